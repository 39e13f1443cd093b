#include "client/arena/cuda_driver.h"

#include <memory>

#include "absl/base/thread_annotations.h"
#include "broker/base/mutex.h"
#include "broker/base/status_macros.h"

namespace kvbroker::client {

absl::StatusOr<const CudaDriver*> LoadedCudaDriver() {
  struct Loaded {
    Mutex mu;
    const CudaDriver* driver ABSL_GUARDED_BY(mu) = nullptr;
  };
  static Loaded& loaded = *new Loaded;
  MutexLock lock(&loaded.mu);
  if (loaded.driver == nullptr) {
    ASSIGN_OR_RETURN(std::unique_ptr<CudaDriver> driver,
                     CudaDriver::Load(DriverPaths::Default()));
    loaded.driver = driver.release();
  }
  return loaded.driver;
}

}  // namespace kvbroker::client
