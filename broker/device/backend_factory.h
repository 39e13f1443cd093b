// MakeBackend: from what an operator writes to a backend.
#ifndef KVBROKER_BROKER_DEVICE_BACKEND_FACTORY_H_
#define KVBROKER_BROKER_DEVICE_BACKEND_FACTORY_H_

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/device/backend.h"
#include "broker/device/cuda/cuda_ipc_backend.h"

namespace kvbroker {

struct BackendOptions {
  // "host", "cuda", "cuda_ipc", or "auto": for the GPU that is named, or the
  // only one, `cuda` where that can serve it, else `cuda_ipc`; else `host`.
  std::string name = "auto";
  // For a GPU: index or uuid; empty: the only one.
  std::string gpu;
  // For `cuda_ipc`: how large the slab shall be; null: as large as it can.
  SlabSize slab;
  // Called before a slab is taken of a device; a failure is MakeBackend's.
  std::function<absl::Status(const std::string& device_uuid)> claim;
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
