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
  // "host", or "auto" for the best that this machine has. "cuda" and "cuda_ipc"
  // are known names, but not part of this build.
  std::string name = "auto";
  // For `host`: the device's size and name instead of the machine's own.
  std::optional<Bytes> total;
  std::string device_uuid;
};

struct ChosenBackend {
  std::unique_ptr<Backend> backend;
  // Why this one and how it behaves here, a line for the log.
  std::string reason;
};

// InvalidArgument: no such name (the message lists them), or an option that the
// backend refuses. Unimplemented: a backend that this build has not.
absl::StatusOr<ChosenBackend> MakeBackend(const BackendOptions& options);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_BACKEND_FACTORY_H_
