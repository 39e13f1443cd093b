#include "client/replay/activations.h"

#include <utility>

#include "absl/time/clock.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/cuda_status.h"
#include "broker/device/cuda/current_context.h"

namespace kvbroker::replay {

absl::StatusOr<std::unique_ptr<Activations>> Activations::Start(
    const CudaDriver& driver, std::string_view gpu, Bytes bytes,
    absl::Duration period) {
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kContext));
  ASSIGN_OR_RETURN(CudaDevice device, FindDevice(driver, gpu));
  std::unique_ptr<Activations> activations(
      new Activations(driver, std::move(device), bytes, period));
  RETURN_IF_ERROR(
      CudaStatus(activations->cuda_.cuDevicePrimaryCtxRetain(
                     &activations->context_, activations->device_.device),
                 "cuDevicePrimaryCtxRetain"));
  activations->thread_ = std::thread([raw = activations.get()] { raw->Loop(); });
  return activations;
}

Activations::Activations(const CudaDriver& driver, CudaDevice device,
                         Bytes bytes, absl::Duration period)
    : cuda_(driver.cuda()),
      device_(std::move(device)),
      bytes_(bytes),
      period_(period) {}

Activations::~Activations() {
  stop_ = true;
  if (thread_.joinable()) thread_.join();
  if (context_ != nullptr) cuda_.cuDevicePrimaryCtxRelease(device_.device);
}

void Activations::Loop() {
  CurrentCudaContext current(cuda_, context_);
  if (!current.status().ok()) {
    ++failed_;
    return;
  }
  while (!stop_) {
    cuda::CUdeviceptr address = 0;
    const bool got =
        cuda_.cuMemAlloc(&address, static_cast<size_t>(bytes_.count())) ==
        cuda::CUDA_SUCCESS;
    ++(got ? taken_ : failed_);
    absl::SleepFor(period_);
    if (got) cuda_.cuMemFree(address);
    absl::SleepFor(period_);
  }
}

}  // namespace kvbroker::replay
