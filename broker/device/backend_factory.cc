#include "broker/device/backend_factory.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/device/host_backend.h"

namespace kvbroker {

absl::StatusOr<ChosenBackend> MakeBackend(const BackendOptions& options) {
  if (options.name == "cuda" || options.name == "cuda_ipc") {
    return absl::UnimplementedError(absl::StrCat(
        "this build has no CUDA backend; use \"host\" instead of \"",
        options.name, "\""));
  }
  if (options.name != "host" && options.name != "auto") {
    return absl::InvalidArgumentError(
        absl::StrCat("a backend is one of auto, host, cuda, cuda_ipc; it is \"",
                     options.name, "\""));
  }
  ASSIGN_OR_RETURN(
      std::unique_ptr<HostBackend> host,
      HostBackend::Create(HostBackendOptions{
          .total = options.total, .device_uuid = options.device_uuid}));
  std::string reason = options.name == "host"
                           ? "host: asked for"
                           : "host: no CUDA backend in this build";
  if (!host->sees_importers()) {
    reason +=
        "; this kernel has no leases on memfds, so bytes count as free as soon "
        "as the broker lets go of them";
  }
  return ChosenBackend{std::move(host), std::move(reason)};
}

}  // namespace kvbroker
