// Backend: where physical memory comes from.
//
// A backend makes handles (one physical allocation each, mapped whole, never in
// part), turns them into descriptors that another process can import, and says
// how much memory the device has. It knows nothing of pools, pages or clients.
//
//   ASSIGN_OR_RETURN(Handle handle, backend.Create(MiB(2)));
//   ASSIGN_OR_RETURN(UniqueFd fd, backend.Export(handle));
//   ... send `fd`; dropping `handle` gives up the broker's own reference ...
//
// A handle's bytes are free again only when every reference is gone: the
// creator's Handle, every descriptor and every import or mapping made of one.
// With fixed addresses (BackendInfo) a handle is a lease of a part of one slab
// that importers have open as a whole: its bytes are free when the creator's
// Handle is gone.
//
// Implementations: `host` (sealed memfds), `cuda`, `cuda_ipc` (fixed
// addresses), a fake for unit tests and a decorator that injects faults. All of
// them pass backend_conformance.h.
#ifndef KVBROKER_BROKER_DEVICE_BACKEND_H_
#define KVBROKER_BROKER_DEVICE_BACKEND_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {

class Backend;

// The creator's reference to one allocation. Move-only; releases when it dies.
// The backend outlives all its handles.
class Handle {
 public:
  Handle() = default;
  Handle(Backend* backend, uint64_t token, Bytes size, Bytes offset = Bytes(0))
      : backend_(backend), token_(token), size_(size), offset_(offset) {}
  Handle(Handle&& other) noexcept { *this = std::move(other); }
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      Reset();
      backend_ = std::exchange(other.backend_, nullptr);
      token_ = other.token_;
      size_ = other.size_;
      offset_ = other.offset_;
    }
    return *this;
  }
  ~Handle() { Reset(); }

  explicit operator bool() const { return backend_ != nullptr; }
  // What the backend knows this allocation by.
  uint64_t token() const { return token_; }
  Bytes size() const { return size_; }
  // Where it lies, with fixed addresses.
  Bytes offset() const { return offset_; }
  // Gives up the reference now.
  void Reset();

 private:
  Backend* backend_ = nullptr;
  uint64_t token_ = 0;
  Bytes size_;
  Bytes offset_;
};

struct BackendInfo {
  std::string name;         // "host", "cuda", "cuda_ipc", "fake"
  std::string device_uuid;  // "HOST-<boot id>" or the GPU's; one broker each
  Bytes total;              // physical memory of the device
  Bytes granularity;        // every handle size is a multiple of this
  // Fixed addresses: all memory is one slab of `total` bytes, which an importer
  // opens once, with this (proto/slab_frame.h). Empty: it maps handle by
  // handle.
  std::string slab;

  bool fixed_addresses() const { return !slab.empty(); }
};

// Thread-safe. No call may block on a client.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendInfo& info() const = 0;

  // Allocates `size` bytes that read as zero. REQUIRES: a positive multiple of
  // the granularity, else InvalidArgument. RESOURCE_EXHAUSTED: the device has
  // no memory, or this process no descriptor, left; nothing is held then.
  // FAILED_PRECONDITION: with fixed addresses it is CreateAt.
  virtual absl::StatusOr<Handle> Create(Bytes size) = 0;

  // The same of `size` bytes from `offset` on, a multiple of `size`. All of
  // them are free, else RESOURCE_EXHAUSTED: who may have which bytes is the
  // caller's to know (range_map.h). With fixed addresses only.
  virtual absl::StatusOr<Handle> CreateAt(Bytes /*offset*/, Bytes /*size*/) {
    return absl::FailedPreconditionError(
        "this backend's memory has no fixed addresses");
  }

  // A descriptor for another process to import; the caller closes it as soon as
  // it is sent. May be asked for again. RESOURCE_EXHAUSTED: out of descriptors.
  virtual absl::StatusOr<UniqueFd> Export(const Handle& handle) = 0;

  // Does now what makes the handle's first Export quick, where that helps.
  virtual void Prepare(const Handle& /*handle*/) {}

  // Bytes of the device's memory in use by anybody, this backend's own
  // allocations included.
  virtual absl::StatusOr<Bytes> UsedBytes() = 0;

  // Of them, what the device charges to which process, by pid; handles that
  // their creator holds are nobody's. UNIMPLEMENTED: the device does not say.
  virtual absl::StatusOr<std::map<uint32_t, Bytes>> UsedByProcess() {
    return absl::UnimplementedError("the device does not say who uses it");
  }

  // Whether anybody is connected. While so, a backend may hold a little for
  // itself that makes its calls quick; UsedBytes leaves that out. One call at a
  // time.
  virtual void SetInUse(bool /*in_use*/) {}

 private:
  friend class Handle;
  // Drops the creator's reference; cannot fail (a driver error is logged).
  virtual void Release(uint64_t token) = 0;
};

inline void Handle::Reset() {
  if (Backend* backend = std::exchange(backend_, nullptr)) {
    backend->Release(token_);
  }
}

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_BACKEND_H_
