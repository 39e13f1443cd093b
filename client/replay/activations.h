// Activations: GPU memory that an engine takes for each step and gives back, which
// no broker lends: what it declares as its peak.
#ifndef KVBROKER_CLIENT_REPLAY_ACTIVATIONS_H_
#define KVBROKER_CLIENT_REPLAY_ACTIVATIONS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string_view>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/device/cuda/driver.h"
#include "broker/device/cuda/probe.h"

namespace kvbroker::replay {

class Activations {
 public:
  // Takes `bytes` of the GPU for as long as `period`, then gives them back for as
  // long, on a thread of its own, until it is destroyed. `gpu` as in
  // FindDevice(); the driver outlives it.
  static absl::StatusOr<std::unique_ptr<Activations>> Start(
      const CudaDriver& driver, std::string_view gpu, Bytes bytes,
      absl::Duration period);
  ~Activations();

  int64_t taken() const { return taken_; }
  // Times at which the memory was not there.
  int64_t failed() const { return failed_; }

 private:
  Activations(const CudaDriver& driver, CudaDevice device, Bytes bytes,
              absl::Duration period);
  void Loop();

  const CudaFunctions& cuda_;
  const CudaDevice device_;
  const Bytes bytes_;
  const absl::Duration period_;
  std::atomic<bool> stop_ = false;
  std::atomic<int64_t> taken_ = 0, failed_ = 0;
  cuda::CUcontext context_ = nullptr;
  std::thread thread_;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_ACTIVATIONS_H_
