#include "broker/device/backend_factory.h"

#include <sys/resource.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/cuda_backend.h"
#include "broker/device/host_backend.h"

namespace kvbroker {

namespace {

size_t DescriptorLimit() {
  rlimit limit{};
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : 1024;
}

absl::StatusOr<ChosenBackend> MakeCuda(const BackendOptions& options) {
  ASSIGN_OR_RETURN(std::unique_ptr<CudaDriver> driver,
                   CudaDriver::Load(DriverPaths::Default()));
  ASSIGN_OR_RETURN(
      std::unique_ptr<CudaBackend> backend,
      CudaBackend::Create(std::move(driver),
                          {.gpu = options.gpu,
                           .kept_descriptors = DescriptorLimit() / 8}));
  std::string reason = absl::StrCat(
      "cuda: ", options.name == "cuda" ? "asked for" : "the best here", "; ",
      backend->device().name, ", driver ", backend->driver().nvidia_version(),
      ", CUDA ", CudaVersionText(backend->driver().cuda_version()));
  return ChosenBackend{std::move(backend), std::move(reason)};
}

absl::StatusOr<ChosenBackend> MakeHost(const BackendOptions& options,
                                       std::string reason) {
  ASSIGN_OR_RETURN(
      std::unique_ptr<HostBackend> host,
      HostBackend::Create(HostBackendOptions{
          .total = options.total, .device_uuid = options.device_uuid}));
  if (!host->sees_importers()) {
    reason +=
        "; this kernel has no leases on memfds, so bytes count as free as soon "
        "as the broker lets go of them";
  }
  return ChosenBackend{std::move(host), std::move(reason)};
}

}  // namespace

absl::StatusOr<ChosenBackend> MakeBackend(const BackendOptions& options) {
  if (options.name == "host") return MakeHost(options, "host: asked for");
  if (options.name == "cuda") return MakeCuda(options);
  if (options.name == "auto") {
    // What is for `host` alone says what is wanted.
    if (options.total || !options.device_uuid.empty()) {
      return MakeHost(options, "host: its size or its name is given");
    }
    absl::StatusOr<ChosenBackend> cuda = MakeCuda(options);
    // Who names a GPU wants it, and who has several must say which.
    if (cuda.ok() || !options.gpu.empty() ||
        absl::IsInvalidArgument(cuda.status())) {
      return cuda;
    }
    return MakeHost(options, absl::StrCat("host: ", cuda.status().message()));
  }
  if (options.name == "cuda_ipc") {
    return absl::UnimplementedError(
        "this build has no backend \"cuda_ipc\"; use \"host\" instead");
  }
  return absl::InvalidArgumentError(
      absl::StrCat("a backend is one of auto, host, cuda, cuda_ipc; it is \"",
                   options.name, "\""));
}

}  // namespace kvbroker
