#include "broker/device/backend_factory.h"

#include <sys/resource.h>

#include <string_view>
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

// "Tesla K80, driver 470.82.01, CUDA 11.4"
std::string InWords(const CudaDevice& device, const CudaDriver& driver) {
  return absl::StrCat(device.name, ", driver ", driver.nvidia_version(),
                      ", CUDA ", CudaVersionText(driver.cuda_version()));
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
      InWords(backend->device(), backend->driver()));
  return ChosenBackend{std::move(backend), std::move(reason)};
}

// `why` it is this one.
absl::StatusOr<ChosenBackend> MakeCudaIpc(const BackendOptions& options,
                                          std::string_view why) {
  ASSIGN_OR_RETURN(std::unique_ptr<CudaDriver> driver,
                   CudaDriver::Load(DriverPaths::Default()));
  ASSIGN_OR_RETURN(
      std::unique_ptr<CudaIpcBackend> backend,
      CudaIpcBackend::Create(
          std::move(driver),
          {.gpu = options.gpu, .bytes = options.slab, .claim = options.claim}));
  std::string reason =
      absl::StrCat("cuda_ipc: ", absl::string_view(why.data(), why.size()),
                   "; ", InWords(backend->device(), backend->driver()),
                   "; one slab, for one tenant");
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
  if (options.name == "cuda") {
    absl::StatusOr<ChosenBackend> cuda = MakeCuda(options);
    if (!absl::IsUnimplemented(cuda.status())) return cuda;
    return absl::UnimplementedError(absl::StrCat(
        cuda.status().message(), "; the backend may be auto or cuda_ipc"));
  }
  if (options.name == "cuda_ipc") return MakeCudaIpc(options, "asked for");
  if (options.name == "auto") {
    // What is for `host` alone says what is wanted.
    if (options.total || !options.device_uuid.empty()) {
      return MakeHost(options, "host: its size or its name is given");
    }
    absl::StatusOr<ChosenBackend> cuda = MakeCuda(options);
    // Who has several must say which.
    if (cuda.ok() || absl::IsInvalidArgument(cuda.status())) return cuda;
    const std::string why_not(cuda.status().message());
    const bool no_gpu = absl::IsNotFound(cuda.status());
    if (!no_gpu) {
      absl::StatusOr<ChosenBackend> ipc = MakeCudaIpc(options, why_not);
      const bool cannot = absl::IsUnimplemented(ipc.status()) ||
                          absl::IsFailedPrecondition(ipc.status());
      // Who names a GPU wants it, and one that could serve is not passed over.
      if (!cannot || !options.gpu.empty()) return ipc;
      return MakeHost(options, absl::StrCat("host: ", why_not, "; ",
                                            ipc.status().message()));
    }
    if (!options.gpu.empty()) return cuda;
    return MakeHost(options, absl::StrCat("host: ", why_not));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("a backend is one of auto, host, cuda, cuda_ipc; it is \"",
                   options.name, "\""));
}

}  // namespace kvbroker
