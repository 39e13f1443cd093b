// Which GPUs there are and what they can do. Makes no context.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_PROBE_H_
#define KVBROKER_BROKER_DEVICE_CUDA_PROBE_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/device/cuda/driver.h"

namespace kvbroker {

struct CudaDevice {
  int index = 0;  // among those that CUDA_VISIBLE_DEVICES leaves
  cuda::CUdevice device = 0;
  std::string uuid;  // "GPU-8a9f1c3e-...", as nvidia-smi -L prints it
  std::string name;
  Bytes total;
  bool vmm = false;                // virtual memory management
  bool posix_descriptors = false;  // allocations can be exported as such
  bool rdma_with_vmm = false;
  Bytes granularity;  // of allocations; zero without VMM
  // Why `cuda` cannot serve it, or OK; the same for `cuda_ipc`.
  absl::Status usable;
  absl::Status usable_by_ipc;
};

// NOT_FOUND: no GPU at all.
absl::StatusOr<std::vector<CudaDevice>> ProbeDevices(const CudaDriver& driver);

// `gpu` is an index, a uuid, or the beginning of one that only one GPU has;
// empty: the only GPU. NOT_FOUND and INVALID_ARGUMENT list what there is.
absl::StatusOr<CudaDevice> ChooseDevice(const std::vector<CudaDevice>& devices,
                                        std::string_view gpu);

// Both in one.
absl::StatusOr<CudaDevice> FindDevice(const CudaDriver& driver,
                                      std::string_view gpu);

// What a handle of the device is made with: pinned memory, exportable.
cuda::CUmemAllocationProp AllocationProp(const CudaDevice& device);

// "GPU-" and the bytes in groups of 8, 4, 4, 4 and 12 digits.
std::string UuidText(const cuda::CUuuid& uuid);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_PROBE_H_
