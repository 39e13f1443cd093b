// MakeBackend: from what an operator writes to a backend.
#ifndef KVBROKER_BROKER_DEVICE_BACKEND_FACTORY_H_
#define KVBROKER_BROKER_DEVICE_BACKEND_FACTORY_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/device/backend.h"

namespace kvbroker {

struct BackendOptions {
  // "host", "cuda", or "auto": `cuda` where a GPU is named, or where there is
  // one that `cuda` can serve, else `host`. "cuda_ipc" is a known name, but not
  // part of this build.
  std::string name = "auto";
  // For `cuda`: index or uuid; empty: the only one.
  std::string gpu;
  // For `host`: the device's size and name instead of the machine's own.
  std::optional<Bytes> total;
  std::string device_uuid;
};

struct ChosenBackend {
  std::unique_ptr<Backend> backend;
  // Why this one and how it behaves here, a line for the log.
  std::string reason;
};

// InvalidArgument: no such name (the message lists them), an option that the
// backend refuses, or several GPUs of which none is named. Unimplemented: a
// backend that this build has not, or that the GPU cannot have. NotFound,
// FailedPrecondition: no such GPU, or no driver for it.
absl::StatusOr<ChosenBackend> MakeBackend(const BackendOptions& options);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_BACKEND_FACTORY_H_
