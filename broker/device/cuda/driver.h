// CudaDriver: libcuda and NVML, opened at run time.
//
//   ASSIGN_OR_RETURN(auto driver, CudaDriver::Load(DriverPaths::Default()));
//   RETURN_IF_ERROR(driver->Require(CudaFunctionGroup::kVmm));
//   RETURN_IF_ERROR(CudaStatus(driver->cuda().cuMemRelease(h),
//   "cuMemRelease"));
//
// A program that never calls Load() needs neither library. A symbol that an old
// driver does not have is a null pointer in the table, and Require() names it.
//
// The libraries stay loaded once they are: the driver's own threads run in
// them. Load() initialises the driver but makes no context. A process that
// forks after that has no working driver in its child.
//
// Threads: safe.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_DRIVER_H_
#define KVBROKER_BROKER_DEVICE_CUDA_DRIVER_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/device/cuda/cuda_abi.h"
#include "broker/device/cuda/cuda_status.h"

namespace kvbroker {

enum class CudaFunctionGroup {
  kBase,     // initialisation and what a device is
  kVmm,      // virtual memory management: CUDA 10.2 and later
  kContext,  // contexts, events and copies: what an engine's process has
  kIpc,      // memory of one process in another, without VMM: CUDA 11.0
};

struct CudaFunctions {
#define KVBROKER_DECLARE(group, name, symbol, ...) \
  cuda::CUresult (*name)(__VA_ARGS__) = nullptr;
  // The signatures name types of the interface.
  using CUdevice = cuda::CUdevice;
  using CUdeviceptr = cuda::CUdeviceptr;
  using CUmemGenericAllocationHandle = cuda::CUmemGenericAllocationHandle;
  using CUcontext = cuda::CUcontext;
  using CUstream = cuda::CUstream;
  using CUevent = cuda::CUevent;
  using CUhostFn = cuda::CUhostFn;
  using CUuuid = cuda::CUuuid;
  using CUmemAllocationProp = cuda::CUmemAllocationProp;
  using CUmemAccessDesc = cuda::CUmemAccessDesc;
  using CUipcMemHandle = cuda::CUipcMemHandle;
  KVBROKER_CUDA_FUNCTIONS(KVBROKER_DECLARE)
#undef KVBROKER_DECLARE
};

struct NvmlFunctions {
#define KVBROKER_DECLARE(need, name, symbol, ...) \
  cuda::nvmlReturn_t (*name)(__VA_ARGS__) = nullptr;
  using nvmlDevice_t = cuda::nvmlDevice_t;
  using nvmlMemory_t = cuda::nvmlMemory_t;
  using nvmlMemory_v2_t = cuda::nvmlMemory_v2_t;
  using nvmlProcessInfo_t = cuda::nvmlProcessInfo_t;
  KVBROKER_NVML_FUNCTIONS(KVBROKER_DECLARE)
#undef KVBROKER_DECLARE
};

struct DriverPaths {
  std::string cuda = "libcuda.so.1";
  std::string nvml = "libnvidia-ml.so.1";

  // KVBROKER_CUDA_DRIVER and KVBROKER_NVML name other libraries, for tests.
  static DriverPaths Default();
};

class CudaDriver {
 public:
  // NOT_FOUND: no such library, or no GPU. FAILED_PRECONDITION: a library that
  // is not a CUDA driver, or one that does not fit the kernel's.
  static absl::StatusOr<std::unique_ptr<CudaDriver>> Load(
      const DriverPaths& paths);
  ~CudaDriver();

  const CudaFunctions& cuda() const { return cuda_; }
  // 13000 is CUDA 13.0.
  int cuda_version() const { return cuda_version_; }
  // FAILED_PRECONDITION, with the first missing symbol and the driver's
  // version: the driver is too old for this group.
  absl::Status Require(CudaFunctionGroup group) const;

  // Whether NVML can be used, else why not.
  const absl::Status& nvml_status() const { return nvml_status_; }
  // REQUIRES: nvml_status() is OK.
  const NvmlFunctions& nvml() const { return nvml_; }
  // "580.65.06"; empty where NVML does not say.
  const std::string& nvidia_version() const { return nvidia_version_; }

 private:
  CudaDriver() = default;
  absl::Status LoadCuda(const std::string& path);
  absl::Status LoadNvml(const std::string& path);

  CudaFunctions cuda_;
  int cuda_version_ = 0;
  NvmlFunctions nvml_;
  absl::Status nvml_status_;
  std::string nvidia_version_;
};

// "13.0"
std::string CudaVersionText(int version);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_DRIVER_H_
