#include "client/arena/make_mapper.h"

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "client/address/broker_address.h"
#include "client/arena/cuda_driver.h"
#include "client/arena/cuda_mapper.h"
#include "client/arena/gpu_mapper.h"
#include "client/arena/host_mapper.h"

namespace kvbroker::client {

absl::StatusOr<std::unique_ptr<Mapper>> MakeMapper(
    std::string_view backend, std::string_view device_uuid,
    const PoolGeometry& geometry) {
  if (backend == "host" || (backend.empty() && !IsGpu(device_uuid))) {
    return HostMapper::Create(geometry);
  }
  if (backend == "cuda") {
    ASSIGN_OR_RETURN(const CudaDriver* driver, LoadedCudaDriver());
    return CudaMapper::Create(geometry, *driver, device_uuid);
  }
  if (backend == "cuda_ipc" || backend.empty()) {
    ASSIGN_OR_RETURN(const CudaDriver* driver, LoadedCudaDriver());
    return GpuMapper::Create(geometry, *driver, device_uuid);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("a backend is one of host, cuda, cuda_ipc; it is \"",
                   absl::string_view(backend.data(), backend.size()), "\""));
}

}  // namespace kvbroker::client
