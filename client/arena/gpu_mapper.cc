#include "client/arena/gpu_mapper.h"

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/probe.h"
#include "client/arena/cuda_ipc_mapper.h"
#include "client/arena/cuda_mapper.h"

namespace kvbroker::client {

absl::StatusOr<std::unique_ptr<GpuMapper>> GpuMapper::Create(
    const PoolGeometry& geometry, const CudaDriver& driver,
    std::string_view gpu) {
  RETURN_IF_ERROR(FindDevice(driver, gpu).status());
  return std::unique_ptr<GpuMapper>(new GpuMapper(geometry, driver, gpu));
}

absl::Status GpuMapper::Guard() {
  RETURN_IF_ERROR(CheckGuardLayout(geometry_));
  guard_ = true;
  return absl::OkStatus();
}

absl::Status GpuMapper::Begin(const Opened& opened) {
  if (opened.backend == "cuda") {
    ASSIGN_OR_RETURN(mapper_, CudaMapper::Create(geometry_, driver_, gpu_));
  } else if (opened.backend == "cuda_ipc") {
    ASSIGN_OR_RETURN(
        mapper_, CudaIpcMapper::Create(geometry_, driver_, gpu_, opened.slab));
  } else {
    return absl::FailedPreconditionError(
        absl::StrCat("the broker lends ", opened.backend,
                     " memory, and this process maps a GPU's"));
  }
  return guard_ ? mapper_->Guard() : absl::OkStatus();
}

}  // namespace kvbroker::client
