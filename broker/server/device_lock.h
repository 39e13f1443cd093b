// DeviceLock: one broker a device, whoever starts it.
//
//   ASSIGN_OR_RETURN(DeviceLock lock,
//                    DeviceLock::Acquire(DefaultLockDirectories(), uuid));
//
// A lock is a flock on DIRECTORY/UUID.lock, which the kernel drops with the
// process. Brokers of different users must look in the same place, so the
// directories are open to all (mode 1777), and not every user can make each of
// them: the lock is taken in every one that can be used, and one is enough.
//
// Since anybody can put files there, no link is followed, only a regular file
// with one name is locked, and nothing that is read from it is believed unless
// the kernel's own list of locks agrees.
#ifndef KVBROKER_BROKER_SERVER_DEVICE_LOCK_H_
#define KVBROKER_BROKER_SERVER_DEVICE_LOCK_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {

// In the payload of ALREADY_EXISTS: where the holder says that it listens.
inline constexpr char kHolderSocket[] = "kvbroker/holder-socket";

// /run/lock/kvbroker and /tmp/kvbroker-locks.
std::vector<std::string> DefaultLockDirectories();

// Move-only; held until destruction.
class DeviceLock {
 public:
  // `socket_path` is what somebody locked out is told. ALREADY_EXISTS: another
  // broker has the device; says its uid and pid, where it listens and how to be
  // admitted. Other codes: no directory can be used; says why for each.
  static absl::StatusOr<DeviceLock> Acquire(
      const std::vector<std::string>& directories, const std::string& uuid,
      const std::string& socket_path);

 private:
  explicit DeviceLock(std::vector<UniqueFd> files) : files_(std::move(files)) {}
  std::vector<UniqueFd> files_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_DEVICE_LOCK_H_
