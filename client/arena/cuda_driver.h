// LoadedCudaDriver: the one CUDA driver of this process.
#ifndef KVBROKER_CLIENT_ARENA_CUDA_DRIVER_H_
#define KVBROKER_CLIENT_ARENA_CUDA_DRIVER_H_

#include "absl/status/statusor.h"
#include "broker/device/cuda/driver.h"

namespace kvbroker::client {

// Loads it when it is asked for first; after a failure the next call tries
// again. It is never unloaded. As CudaDriver::Load. Thread-safe.
absl::StatusOr<const CudaDriver*> LoadedCudaDriver();

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_CUDA_DRIVER_H_
