// StateFile: where a broker's state is kept from one start to the next.
//
//   ASSIGN_OR_RETURN(StateFile file, StateFile::Create(path));
//   absl::StatusOr<BrokerState> last = file.Load();
//   RETURN_IF_ERROR(file.Save(state));
//
// At any moment PATH is either the old or the new state, whole: a new one is
// written to PATH.tmp, synced, and renamed. A file that cannot be understood is
// not lost either, but set aside: PATH.bad is the latest, PATH.bad.3 the
// oldest.
//
// Nothing is followed or believed that others can have put there: the directory
// must be this user's or root's and nobody else's to write to; files must be
// this user's own, and no links.
//
// Threads: compatible. One process at a time uses a path: that the device's
// lock is held is the caller's to see to.
#ifndef KVBROKER_BROKER_STATE_STATE_FILE_H_
#define KVBROKER_BROKER_STATE_STATE_FILE_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"
#include "broker/state/broker_state.h"
#include "broker/state/file_system.h"

namespace kvbroker {

// Every failure names the file, and ends with the system's own words where it
// was the system that failed.
class StateFile {
 public:
  // Makes the directory where there is none (its parent must be there), mode
  // 0700, and removes what a predecessor's death left half written. `system`
  // outlives the object.
  static absl::StatusOr<StateFile> Create(
      const std::string& path, FileSystem& system = FileSystem::Real());

  // NOT_FOUND: none was saved. As ParseState: what is there cannot be used, has
  // been set aside, and the text says where. FAILED_PRECONDITION also: it is
  // not a file of this user's own, and was left alone. Others: it cannot be
  // read now.
  absl::StatusOr<BrokerState> Load();

  // On success the state outlives a power failure. On failure the old one is
  // still there; where only the directory could not be synced, the new one.
  // INVALID_ARGUMENT: Load would not take it.
  absl::Status Save(const BrokerState& state);

  const std::string& path() const { return path_; }

 private:
  StateFile(std::string path, FileSystem& system);

  absl::StatusOr<UniqueFd> OpenDirectory();
  // As the system call, again while interrupted.
  UniqueFd Open(int directory, const std::string& name, int flags,
                mode_t mode = 0);
  absl::StatusOr<std::string> ReadAll(int fd);
  absl::Status WriteAndSync(int fd, std::string_view text);
  absl::Status Sync(int fd, std::string_view what);
  absl::Status Replace(int directory, std::string_view text);
  // Takes the file out of the way; `why` with where it is now.
  absl::Status SetAside(int directory, const absl::Status& why);
  absl::Status RemoveIfThere(int directory, const std::string& name);
  // errno's status: "CALL of PATH<suffix> failed: ...".
  absl::Status Failed(std::string_view call, std::string_view suffix = "");

  std::string path_;
  std::string directory_;
  std::string name_;  // in the directory
  FileSystem* system_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_STATE_STATE_FILE_H_
