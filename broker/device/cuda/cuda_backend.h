// CudaBackend: a GPU's memory, by the driver's virtual memory management.
//
// A handle is a cuMemCreate allocation; an importer gets it as a POSIX
// descriptor. None of that needs a CUDA context, so the broker has none: it
// takes no GPU memory for itself, and NVML lists no process of it.
//
//   ASSIGN_OR_RETURN(auto driver, CudaDriver::Load(DriverPaths::Default()));
//   ASSIGN_OR_RETURN(auto backend, CudaBackend::Create(std::move(driver), {}));
//
// The driver counts references: an allocation is free when the creator's
// handle, all descriptors, imports and mappings of it are gone, those of
// processes that died included. New memory reads as zero.
//
// Descriptors. The kernel's driver sets something up for a process's first one,
// and takes it down with the last (1.2 and 1.1 ms measured); with one there, others
// cost 0.02 and 0.01 ms. So while anybody is connected the backend holds a smallest
// handle with a descriptor, for nothing but that. A handle's descriptor is made
// when it is asked for first, and up to so many are kept until their handle is
// released, for those that change hands. They go when descriptors are short.
//
// Threads: safe. No lock is held over a driver call.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_CUDA_BACKEND_H_
#define KVBROKER_BROKER_DEVICE_CUDA_CUDA_BACKEND_H_

#include <atomic>
#include <cstdint>
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
#include "broker/device/cuda/nvml_device.h"
#include "broker/device/cuda/probe.h"

namespace kvbroker {

struct CudaBackendOptions {
  // Index, uuid or the beginning of one; empty: the only GPU.
  std::string gpu;
  // Memory that network cards can read and write.
  bool rdma = false;
  // Descriptors that are kept for the next Export of the same handle.
  size_t kept_descriptors = 1024;
};

class CudaBackend : public Backend {
 public:
  // Driver calls since the beginning, failed ones included.
  struct Counts {
    int64_t creates = 0;
    int64_t exports = 0;
    int64_t releases = 0;
    int64_t failed_releases = 0;
    int64_t memory_readings = 0;
  };

  // NOT_FOUND, INVALID_ARGUMENT: `gpu` names none. UNIMPLEMENTED: the GPU
  // cannot do what this needs; FAILED_PRECONDITION: the driver cannot.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(
      std::unique_ptr<CudaDriver> driver, const CudaBackendOptions& options);
  ~CudaBackend() override;

  const BackendInfo& info() const override { return info_; }
  absl::StatusOr<Handle> Create(Bytes size) override;
  absl::StatusOr<UniqueFd> Export(const Handle& handle) override;
  // Makes the descriptor, if it will be kept.
  void Prepare(const Handle& handle) override;
  // What NVML says, whoever has it.
  absl::StatusOr<Bytes> UsedBytes() override;
  // UNIMPLEMENTED in a PID namespace of its own, too: NVML has the machine's
  // pids.
  absl::StatusOr<std::map<uint32_t, Bytes>> UsedByProcess() override;
  void SetInUse(bool in_use) override;

  const CudaDevice& device() const { return device_; }
  const CudaDriver& driver() const { return *driver_; }
  Counts counts() const;
  size_t kept_descriptors();

 private:
  struct Allocation {
    cuda::CUmemGenericAllocationHandle made = 0;
    UniqueFd kept;  // a descriptor of it, or none
  };

  CudaBackend(std::unique_ptr<CudaDriver> driver, CudaDevice device,
              NvmlDevice nvml, Bytes total, const CudaBackendOptions& options);

  // RESOURCE_EXHAUSTED: out of descriptors.
  absl::StatusOr<UniqueFd> ExportAnew(
      cuda::CUmemGenericAllocationHandle made);
  absl::StatusOr<UniqueFd> TryExport(uint64_t token);
  // Keeps a copy where there is room and the handle lives.
  void Keep(uint64_t token, const UniqueFd& fd);
  // Closes some of what is kept; false where nothing was.
  bool DropKept();

  void Release(uint64_t token) override;
  absl::StatusOr<NvmlMemory> ReadMemory();
  // Of a driver call. To an error that names no cause NVML may know one: a lost
  // GPU.
  absl::Status Explained(absl::Status status);

  const std::unique_ptr<CudaDriver> driver_;
  const CudaDevice device_;
  const NvmlDevice nvml_;
  const BackendInfo info_;
  const cuda::CUmemAllocationProp prop_;
  const size_t max_kept_;

  std::atomic<int64_t> creates_ = 0;
  std::atomic<int64_t> exports_ = 0;
  std::atomic<int64_t> releases_ = 0;
  std::atomic<int64_t> failed_releases_ = 0;
  std::atomic<int64_t> memory_readings_ = 0;

  // SetInUse's own: what keeps exports quick, with its descriptor.
  Handle opener_;
  UniqueFd opened_;
  std::atomic<int64_t> own_bytes_ = 0;

  Mutex mu_;
  uint64_t next_token_ ABSL_GUARDED_BY(mu_) = 1;
  absl::flat_hash_map<uint64_t, Allocation> live_ ABSL_GUARDED_BY(mu_);
  size_t kept_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_CUDA_BACKEND_H_
