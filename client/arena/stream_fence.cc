#include "client/arena/stream_fence.h"

#include "broker/base/status_macros.h"

namespace kvbroker::client {

void StreamFence::Add(cuda::CUstream stream) {
  MutexLock lock(&mu_);
  streams_.push_back(stream);
}

void StreamFence::Remove(cuda::CUstream stream) {
  MutexLock lock(&mu_);
  std::erase(streams_, stream);
}

absl::Status StreamFence::Wait() {
  size_t recorded = 0;
  bool all = false;
  {
    MutexLock lock(&mu_);
    for (cuda::CUstream stream : streams_) {
      if (stream == kAllStreams) {
        all = true;
        continue;
      }
      if (recorded == events_.size()) {
        cuda::CUevent event = nullptr;
        RETURN_IF_ERROR(CudaStatus(
            cuda_.cuEventCreate(
                &event, cuda::kEventBlockingSync | cuda::kEventDisableTiming),
            "cuEventCreate"));
        events_.push_back(event);
      }
      RETURN_IF_ERROR(CudaStatus(cuda_.cuEventRecord(events_[recorded], stream),
                                 "cuEventRecord"));
      ++recorded;
    }
  }
  for (size_t i = 0; i < recorded; ++i) {
    RETURN_IF_ERROR(
        CudaStatus(cuda_.cuEventSynchronize(events_[i]), "cuEventSynchronize"));
  }
  if (all) {
    RETURN_IF_ERROR(CudaStatus(cuda_.cuCtxSynchronize(), "cuCtxSynchronize"));
  }
  return absl::OkStatus();
}

void StreamFence::Clear() {
  for (cuda::CUevent event : events_) cuda_.cuEventDestroy(event);
  events_.clear();
}

}  // namespace kvbroker::client
