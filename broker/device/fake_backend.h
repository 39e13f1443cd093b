// FakeBackend: a device without memory, for unit tests of what uses a Backend.
//
// It keeps the books of a device: which handles live, what is imported, and
// when the last reference to a handle is gone. Tests play the importers by
// hand:
//
//   FakeBackend device({.total = MiB(64)});
//   ... the code under test creates a handle and exports `fd` ...
//   ASSERT_OK_AND_ASSIGN(uint64_t token, device.Import(fd.get()));
//   ... the code under test drops the handle: the bytes stay in use ...
//   ASSERT_OK(device.Unimport(token));  // Free now.
//
// Descriptors come in two kinds:
//   kNumbers  Export() makes no system call. The UniqueFd holds a number that
//   no
//             open file has (2^30 and up), which Import() knows; to close it is
//             harmless, to send it fails. It is no reference: importing after
//             the creator let go and nobody else holds the handle is NotFound.
//   kReal     The write end of a pipe. It can be duplicated and sent, and
//   counts
//             as a reference until its last copy is closed. Two descriptors of
//             this process each.
//
// Threads: safe.
#ifndef KVBROKER_BROKER_DEVICE_FAKE_BACKEND_H_
#define KVBROKER_BROKER_DEVICE_FAKE_BACKEND_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/device/backend.h"
#include "broker/device/range_map.h"

namespace kvbroker {

struct FakeBackendOptions {
  enum class Descriptors { kNumbers, kReal };

  Bytes total = GiB(1);
  Bytes granularity = KiB(4);
  std::string device_uuid = "FAKE-0";
  Descriptors descriptors = Descriptors::kNumbers;
  // All memory is one slab; handles are leases of parts of it, and free when
  // the creator lets go of them, whatever importers do.
  bool fixed_addresses = false;
};

class FakeBackend : public Backend {
 public:
  // Calls that succeeded since the beginning.
  struct Counts {
    int64_t creates = 0;
    int64_t exports = 0;
    int64_t releases = 0;
    int64_t imports = 0;
    int64_t unimports = 0;
  };

  explicit FakeBackend(FakeBackendOptions options = FakeBackendOptions());
  ~FakeBackend() override;

  // --- Backend ---------------------------------------------------------------
  const BackendInfo& info() const override { return info_; }
  absl::StatusOr<Handle> Create(Bytes size) override;
  absl::StatusOr<Handle> CreateAt(Bytes offset, Bytes size) override;
  absl::StatusOr<UniqueFd> Export(const Handle& handle) override;
  // Foreign bytes included.
  absl::StatusOr<Bytes> UsedBytes() override;
  absl::StatusOr<std::map<uint32_t, Bytes>> UsedByProcess() override;

  // --- The importers' side ---------------------------------------------------
  // Takes a reference to the handle that `fd` was exported from and returns its
  // token; `fd` stays the caller's. NotFound: the handle is gone, or `fd` never
  // was an export of this backend.
  absl::StatusOr<uint64_t> Import(int fd);
  // Gives one such reference up. FailedPrecondition: there is none.
  absl::Status Unimport(uint64_t token);

  // --- What a test programs --------------------------------------------------
  // The next Create() of a valid size returns `status`; asked for twice, the
  // next two do. REQUIRES: !status.ok().
  void FailNextCreate(absl::Status status);
  // Called at the start of each Create(), on its thread, with no lock held: to
  // let something else happen meanwhile. Null ends it.
  void OnCreate(std::function<void(Bytes size)> hook);
  // Memory that somebody else takes from the device.
  void SetForeignBytes(Bytes foreign);
  // Of them, what belongs to known processes; unset: the device does not say.
  void SetProcessBytes(std::optional<std::map<uint32_t, Bytes>> by_process);
  Bytes foreign_bytes();

  // --- What a test asks ------------------------------------------------------
  Counts counts();
  // Handles that the creator holds.
  int64_t live_handles();
  bool IsLive(uint64_t token);
  // Where a handle that anybody references lies in the slab.
  std::optional<Bytes> OffsetOf(uint64_t token);
  // How many references importers hold; 0 for an unknown token.
  int64_t Imports(uint64_t token);
  // The handle's size while anybody references it, else 0.
  Bytes SizeOf(uint64_t token);
  // OK, or what in the books does not add up.
  absl::Status CheckInvariants();

 private:
  struct Allocation {
    Bytes size;
    bool live = true;  // the creator holds it
    int64_t imports = 0;
    std::vector<uint64_t> exports;  // keys in exports_
    Bytes offset;
    bool in_use = true;  // its bytes count
  };
  struct ExportRecord {
    uint64_t token = 0;
    UniqueFd
        read_end;  // kReal only: sees a hang-up when `fd` is closed for good
  };

  void Release(uint64_t token) override;
  absl::StatusOr<Handle> Make(Bytes size, std::optional<Bytes> offset);

  // What Import() knows an exported descriptor by: the number itself, or the
  // inode of the pipe. 0: none.
  uint64_t KeyOf(int fd) const;
  // Forgets descriptors that were closed, and handles that nobody references.
  void DropUnreferenced(uint64_t token) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropAllUnreferenced() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const BackendInfo info_;
  const FakeBackendOptions::Descriptors descriptors_;

  Mutex mu_;
  RangeMap ranges_ ABSL_GUARDED_BY(mu_);  // with fixed addresses
  absl::flat_hash_map<uint64_t, Allocation> allocations_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, ExportRecord> exports_ ABSL_GUARDED_BY(mu_);
  uint64_t next_token_ ABSL_GUARDED_BY(mu_) = 1;
  int next_number_ ABSL_GUARDED_BY(mu_);
  int64_t live_handles_ ABSL_GUARDED_BY(mu_) = 0;
  Bytes used_ ABSL_GUARDED_BY(mu_);
  Bytes foreign_ ABSL_GUARDED_BY(mu_);
  std::optional<std::map<uint32_t, Bytes>> by_process_ ABSL_GUARDED_BY(mu_);
  Counts counts_ ABSL_GUARDED_BY(mu_);
  std::deque<absl::Status> create_failures_ ABSL_GUARDED_BY(mu_);
  std::function<void(Bytes)> create_hook_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_FAKE_BACKEND_H_
