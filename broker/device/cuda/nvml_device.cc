#include "broker/device/cuda/nvml_device.h"

#include "broker/base/status_macros.h"

namespace kvbroker {

absl::StatusOr<NvmlDevice> NvmlDevice::Find(const CudaDriver& driver,
                                            const std::string& uuid) {
  RETURN_IF_ERROR(driver.nvml_status());
  cuda::nvmlDevice_t device = nullptr;
  RETURN_IF_ERROR(
      NvmlStatus(driver.nvml().nvmlDeviceGetHandleByUUID(uuid.c_str(), &device),
                 "nvmlDeviceGetHandleByUUID"));
  return NvmlDevice(driver, device);
}

absl::StatusOr<NvmlMemory> NvmlDevice::ReadMemory() const {
  const NvmlFunctions& nvml = driver_->nvml();
  if (nvml.nvmlDeviceGetMemoryInfo_v2 != nullptr) {
    cuda::nvmlMemory_v2_t memory{.version = cuda::kNvmlMemoryV2};
    const cuda::nvmlReturn_t result =
        nvml.nvmlDeviceGetMemoryInfo_v2(device_, &memory);
    if (result == cuda::NVML_SUCCESS) {
      return NvmlMemory{
          .total = Bytes(static_cast<int64_t>(memory.total - memory.reserved)),
          .used = Bytes(static_cast<int64_t>(memory.used))};
    }
    // The library can be newer than the kernel's driver.
    if (result != cuda::NVML_ERROR_FUNCTION_NOT_FOUND &&
        result != cuda::NVML_ERROR_NOT_SUPPORTED) {
      return NvmlStatus(result, "nvmlDeviceGetMemoryInfo_v2");
    }
  }
  cuda::nvmlMemory_t memory{};
  RETURN_IF_ERROR(NvmlStatus(nvml.nvmlDeviceGetMemoryInfo(device_, &memory),
                             "nvmlDeviceGetMemoryInfo"));
  return NvmlMemory{.total = Bytes(static_cast<int64_t>(memory.total)),
                    .used = Bytes(static_cast<int64_t>(memory.used))};
}

absl::StatusOr<bool> NvmlDevice::MigEnabled() const {
  const NvmlFunctions& nvml = driver_->nvml();
  if (nvml.nvmlDeviceGetMigMode == nullptr) return false;
  unsigned int current = 0, pending = 0;
  const cuda::nvmlReturn_t result =
      nvml.nvmlDeviceGetMigMode(device_, &current, &pending);
  if (result == cuda::NVML_ERROR_NOT_SUPPORTED) return false;
  RETURN_IF_ERROR(NvmlStatus(result, "nvmlDeviceGetMigMode"));
  return current == 1;
}

}  // namespace kvbroker
