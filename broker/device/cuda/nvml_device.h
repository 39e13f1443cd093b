// NvmlDevice: what NVML says of one GPU.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_NVML_DEVICE_H_
#define KVBROKER_BROKER_DEVICE_CUDA_NVML_DEVICE_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/device/cuda/driver.h"

namespace kvbroker {

struct NvmlMemory {
  // What processes can have. With the driver's newer figures its own reserve is
  // in neither number; with the older ones (before 510) it is in both.
  Bytes total, used;
};

// Threads: safe. The driver outlives it.
class NvmlDevice {
 public:
  // `uuid` as in "GPU-8a9f...". NOT_FOUND: no such GPU.
  static absl::StatusOr<NvmlDevice> Find(const CudaDriver& driver,
                                         const std::string& uuid);

  absl::StatusOr<NvmlMemory> ReadMemory() const;
  // What is charged to which process, by its pid in the namespace of this one.
  // UNIMPLEMENTED: the driver is too old to say.
  absl::StatusOr<std::map<uint32_t, Bytes>> ReadProcesses() const;
  // False where the GPU or the driver knows no MIG.
  absl::StatusOr<bool> MigEnabled() const;

 private:
  NvmlDevice(const CudaDriver& driver, cuda::nvmlDevice_t device)
      : driver_(&driver), device_(device) {}

  const CudaDriver* driver_;
  cuda::nvmlDevice_t device_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_NVML_DEVICE_H_
