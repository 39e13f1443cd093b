// HostBackend: pages of ordinary memory, for machines without a GPU.
//
// Each handle is a memfd whose pages are allocated at once and whose size is
// sealed. It stands in for a GPU in the demo, the tests and on laptops, so it
// is as strict as the CUDA driver about when memory is free again.
//
//   ASSIGN_OR_RETURN(std::unique_ptr<HostBackend> backend,
//                    HostBackend::Create(HostBackendOptions{.total = GiB(4)}));
//
// When is an allocation free? When the creator's Handle is gone *and* no
// descriptor, in whatever process or unread message, and no mapping is left. A
// memfd has no count of its users to read, so the backend asks for a lease:
//   - Export() does not duplicate the memfd's descriptor, it opens the file
//     anew. The kernel counts that open as a writer of the file until its last
//     duplicate, message and mapping is gone, exited processes included.
//   - F_SETLEASE(F_RDLCK) on the creator's own descriptor, which never counts
//     as a writer, succeeds exactly when there is no such open.
// A dropped Handle whose file still has users becomes *lingering*: the backend
// keeps its descriptor and charges its bytes. Lingering allocations are looked
// at again by UsedBytes() and by a Create() that lacks room; what nobody uses
// any more is given back then, in O(lingering). Nothing runs in the background.
//
// An importer that goes out of its way (reopens the file read-only or as O_PATH
// through /proc) is not seen. It gains nothing: before the bytes are called
// free, the pages are punched out of the file.
//
// On a kernel without such leases the backend still works, but bytes are free
// as soon as the Handle is dropped: `sees_importers()` is false then.
//
// One descriptor of this process per handle, live or lingering. The last
// numbers below the limit of open files are left to others (new connections,
// files): a handle that would need one of them is refused with the limit and
// how to raise it.
//
// Threads: safe. No lock is held over a system call, but for the one that lets
// only one thread look through the lingering allocations.
#ifndef KVBROKER_BROKER_DEVICE_HOST_BACKEND_H_
#define KVBROKER_BROKER_DEVICE_HOST_BACKEND_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/device/backend.h"

namespace kvbroker {

struct HostBackendOptions {
  // The device's size; default half of the machine's memory. Nothing is set
  // aside: two backends share the machine unless their totals keep them apart.
  std::optional<Bytes> total;

  // Default "HOST-" and the first eight digits of the kernel's boot id. Several
  // brokers on one machine each need their own.
  std::string device_uuid;

  // Create() fails rather than leave the machine less than this, because an
  // allocation that finds no memory at all does not fail: it wakes the kernel's
  // OOM killer. Default 1/32 of the machine's memory.
  std::optional<Bytes> keep_available;

  // False: behave as on a kernel without leases.
  bool watch_importers = true;
};

class HostBackend : public Backend {
 public:
  // Fails with InvalidArgument for a total below one granule or above
  // `kMaxBytes`, or where /proc cannot be read.
  static absl::StatusOr<std::unique_ptr<HostBackend>> Create(
      HostBackendOptions options);
  ~HostBackend() override;

  const BackendInfo& info() const override { return info_; }

  // Also RESOURCE_EXHAUSTED: the machine itself is short of memory.
  absl::StatusOr<Handle> Create(Bytes size) override;
  // Also UNAVAILABLE: an importer of an earlier export has leased the file.
  absl::StatusOr<UniqueFd> Export(const Handle& handle) override;

  // Bytes of this backend's allocations that anybody still references. Memory
  // of other programs is no part of the device.
  absl::StatusOr<Bytes> UsedBytes() override;

  // Whether an importer's reference keeps the bytes charged.
  bool sees_importers() const { return sees_importers_; }

 private:
  struct Allocation {
    UniqueFd fd;
    Bytes size;
    bool exported = false;
  };

  HostBackend(BackendInfo info, Bytes keep_available, UniqueFd own_descriptors,
              bool sees_importers);

  void Release(uint64_t token) override;

  // Charges `size` to the device, or says why it cannot.
  absl::Status Charge(Bytes size);
  bool TryCharge(Bytes size);
  // Whether the machine has `size` to spare. REQUIRES: `size` is charged.
  absl::Status CheckMachine(Bytes size);

  // Frees `allocation` unless somebody else still references it.
  bool TryGiveBack(Allocation& allocation);
  void GiveBackLingering();

  const BackendInfo info_;
  const Bytes keep_available_;
  const UniqueFd own_descriptors_;  // the folder /proc/self/fd
  const bool sees_importers_;

  // Held while lingering allocations are looked through, so that a Create()
  // that lacks room waits for what another thread is about to give back.
  Mutex sweep_mu_ ABSL_ACQUIRED_BEFORE(mu_);

  Mutex mu_;
  uint64_t next_token_ ABSL_GUARDED_BY(mu_) = 1;
  absl::flat_hash_map<uint64_t, Allocation> live_ ABSL_GUARDED_BY(mu_);
  std::vector<Allocation> lingering_ ABSL_GUARDED_BY(mu_);
  // Live, lingering and being filled; never above info_.total.
  Bytes used_ ABSL_GUARDED_BY(mu_);
  // Charged, but maybe not yet visible in the machine's figures.
  Bytes being_filled_ ABSL_GUARDED_BY(mu_);
  // What the machine had available at `read_at_`, less what was charged since.
  Bytes available_ ABSL_GUARDED_BY(mu_);
  absl::Time read_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_HOST_BACKEND_H_
