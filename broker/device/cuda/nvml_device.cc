#include "broker/device/cuda/nvml_device.h"

#include <algorithm>
#include <vector>

#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

constexpr size_t kMostProcesses = 65536;

}  // namespace

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

absl::StatusOr<std::map<uint32_t, Bytes>> NvmlDevice::ReadProcesses() const {
  const auto read = driver_->nvml().nvmlDeviceGetComputeRunningProcesses;
  if (read == nullptr) {
    return absl::UnimplementedError(
        "this driver's NVML does not say which process uses how much");
  }
  std::vector<cuda::nvmlProcessInfo_t> processes(16);
  unsigned int count = 0;
  cuda::nvmlReturn_t result;
  // Some may start meanwhile.
  do {
    count = static_cast<unsigned int>(processes.size());
    result = read(device_, &count, processes.data());
    processes.resize(std::max<size_t>(count, processes.size()) * 2);
  } while (result == cuda::NVML_ERROR_INSUFFICIENT_SIZE &&
           processes.size() <= kMostProcesses);
  RETURN_IF_ERROR(NvmlStatus(result, "nvmlDeviceGetComputeRunningProcesses"));
  std::map<uint32_t, Bytes> used;
  for (unsigned int i = 0; i < count; ++i) {
    const cuda::nvmlProcessInfo_t& process = processes[i];
    if (process.usedGpuMemory == cuda::kNvmlNotAvailable) continue;
    used[process.pid] += Bytes(static_cast<int64_t>(process.usedGpuMemory));
  }
  return used;
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
