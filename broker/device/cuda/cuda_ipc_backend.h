// CudaIpcBackend: GPU memory by cuMemAlloc and the driver's older inter-process
// handles, for GPUs without virtual memory management (Tesla K80).
//
//   ASSIGN_OR_RETURN(auto driver, CudaDriver::Load(DriverPaths::Default()));
//   ASSIGN_OR_RETURN(auto backend, CudaIpcBackend::Create(
//       std::move(driver), {.bytes = [](Bytes total, Bytes used) { ... }}));
//   ASSIGN_OR_RETURN(Handle handle, backend->CreateAt(MiB(256), MiB(128)));
//
// One slab of fixed size is allocated at the start and freed at the end. An
// importer opens all of it, so a handle is no more than the word that a part is
// lent: importers are one trust domain, and what keeps them apart is the
// broker's books. A part is set to zero before it is lent.
//
// It has the device's primary context, and so takes some of the device's memory
// besides the slab. What others use does not matter once the slab is there.
//
// Threads: safe. No lock is held over a driver call.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_CUDA_IPC_BACKEND_H_
#define KVBROKER_BROKER_DEVICE_CUDA_CUDA_IPC_BACKEND_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/device/backend.h"
#include "broker/device/cuda/driver.h"
#include "broker/device/cuda/probe.h"
#include "broker/device/range_map.h"
#include "proto/slab_frame.h"

namespace kvbroker {

// How large the slab shall be, of a device with `total` bytes of which `used`
// are in use, those of this process's context among them.
using SlabSize = std::function<absl::StatusOr<Bytes>(Bytes total, Bytes used)>;

struct CudaIpcBackendOptions {
  // Index, uuid or the beginning of one; empty: the only GPU.
  std::string gpu;
  // Rounded down to whole granules. Null: all that is free.
  SlabSize bytes;
  // Called before anything of the device is taken; a failure is Create's. Null:
  // nobody need know.
  std::function<absl::Status(const std::string& device_uuid)> claim;
};

class CudaIpcBackend : public Backend {
 public:
  // NOT_FOUND, INVALID_ARGUMENT: `gpu` names none, or no such slab.
  // UNIMPLEMENTED, FAILED_PRECONDITION: GPU or driver cannot.
  // RESOURCE_EXHAUSTED: less is free.
  static absl::StatusOr<std::unique_ptr<CudaIpcBackend>> Create(
      std::unique_ptr<CudaDriver> driver, const CudaIpcBackendOptions& options);
  ~CudaIpcBackend() override;

  // `total` is the slab's size.
  const BackendInfo& info() const override { return info_; }
  absl::StatusOr<Handle> Create(Bytes size) override;
  absl::StatusOr<Handle> CreateAt(Bytes offset, Bytes size) override;
  absl::StatusOr<UniqueFd> Export(const Handle& handle) override;
  // Of the slab, what there are handles of.
  absl::StatusOr<Bytes> UsedBytes() override;

  const CudaDevice& device() const { return device_; }
  const CudaDriver& driver() const { return *driver_; }

 private:
  CudaIpcBackend(std::unique_ptr<CudaDriver> driver, CudaDevice device);
  // Context, slab and stream; what was made is undone by the destructor.
  absl::Status Start(const SlabSize& bytes);
  absl::Status Scrub(Bytes offset, Bytes size);
  void Release(uint64_t token) override;

  struct Range {
    Bytes offset, size;
  };

  const std::unique_ptr<CudaDriver> driver_;
  const CudaDevice device_;
  // Set by Start only.
  BackendInfo info_;
  SlabFrame slab_;
  cuda::CUcontext context_ = nullptr;
  cuda::CUdeviceptr base_ = 0;
  cuda::CUstream stream_ = nullptr;

  Mutex mu_;
  uint64_t next_token_ ABSL_GUARDED_BY(mu_) = 1;
  RangeMap ranges_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, Range> live_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_CUDA_IPC_BACKEND_H_
