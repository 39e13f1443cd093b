// CurrentCudaContext: a context that is current in this thread for a while.
//
//   CurrentCudaContext current(cuda, context);
//   RETURN_IF_ERROR(current.status());
//
// On its thread, in the order of a stack: what was current before is so again.
// Meanwhile the thread may make calls that a graph's capture in another thread
// would forbid it.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_CURRENT_CONTEXT_H_
#define KVBROKER_BROKER_DEVICE_CUDA_CURRENT_CONTEXT_H_

#include "absl/status/status.h"
#include "broker/device/cuda/cuda_status.h"
#include "broker/device/cuda/driver.h"

namespace kvbroker {

class CurrentCudaContext {
 public:
  CurrentCudaContext(const CudaFunctions& cuda, cuda::CUcontext context)
      : cuda_(cuda),
        status_(
            CudaStatus(cuda.cuCtxPushCurrent(context), "cuCtxPushCurrent")) {
    if (status_.ok()) cuda_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
  }
  CurrentCudaContext(const CurrentCudaContext&) = delete;
  CurrentCudaContext& operator=(const CurrentCudaContext&) = delete;
  ~CurrentCudaContext() {
    if (!status_.ok()) return;
    cuda_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
    cuda::CUcontext popped;
    cuda_.cuCtxPopCurrent(&popped);
  }

  // Why it is not current.
  const absl::Status& status() const { return status_; }

 private:
  const CudaFunctions& cuda_;
  const absl::Status status_;
  int capture_mode_ = cuda::kStreamCaptureModeRelaxed;  // then the one before
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_CURRENT_CONTEXT_H_
