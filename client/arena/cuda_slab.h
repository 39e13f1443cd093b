// CudaSlab: a broker's slab of GPU memory, open in this process.
//
//   ASSIGN_OR_RETURN(auto slab, CudaSlab::Open(driver, device, frame));
//   ... slab->base() ...
//
// The driver opens the memory of another process once: all who want the same
// slab here share that, and it is closed when the last of them is gone. It is
// open in the device's primary context, which is retained as long.
//
// Threads: safe.
#ifndef KVBROKER_CLIENT_ARENA_CUDA_SLAB_H_
#define KVBROKER_CLIENT_ARENA_CUDA_SLAB_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "broker/device/cuda/driver.h"
#include "broker/device/cuda/probe.h"
#include "proto/slab_frame.h"

namespace kvbroker::client {

class CudaSlab {
 public:
  // The driver outlives it.
  static absl::StatusOr<std::unique_ptr<CudaSlab>> Open(
      const CudaDriver& driver, const CudaDevice& device,
      const SlabFrame& slab);
  ~CudaSlab();
  CudaSlab(const CudaSlab&) = delete;
  CudaSlab& operator=(const CudaSlab&) = delete;

  cuda::CUdeviceptr base() const { return base_; }
  cuda::CUcontext context() const { return context_; }

 private:
  CudaSlab(const CudaFunctions& cuda, cuda::CUdevice device,
           cuda::CUcontext context);

  const CudaFunctions& cuda_;
  const cuda::CUdevice device_;
  const cuda::CUcontext context_;
  // Which of those that are open; empty where none could be opened.
  std::string key_;
  cuda::CUdeviceptr base_ = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_CUDA_SLAB_H_
