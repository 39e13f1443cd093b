#include "broker/device/cuda/probe.h"

#include <array>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/nvml_device.h"

namespace kvbroker {
namespace {

absl::StatusOr<bool> Attribute(const CudaDriver& driver, int attribute,
                               cuda::CUdevice device) {
  int value = 0;
  const cuda::CUresult result =
      driver.cuda().cuDeviceGetAttribute(&value, attribute, device);
  // An attribute that is newer than the driver.
  if (result == cuda::CUDA_ERROR_INVALID_VALUE) return false;
  RETURN_IF_ERROR(CudaStatus(result, "cuDeviceGetAttribute"));
  return value != 0;
}

// What every backend needs.
absl::Status Served(const CudaDriver& driver, const CudaDevice& device) {
  ASSIGN_OR_RETURN(NvmlDevice nvml, NvmlDevice::Find(driver, device.uuid));
  ASSIGN_OR_RETURN(bool mig, nvml.MigEnabled());
  if (mig) {
    return absl::UnimplementedError(absl::StrCat(
        device.name, " (", device.uuid,
        ") is in MIG mode, which is not served; turn it off (nvidia-smi -i ",
        device.uuid, " -mig 0) or use the backend host"));
  }
  return absl::OkStatus();
}

absl::Status Usable(const CudaDriver& driver, const CudaDevice& device) {
  if (!device.vmm || !device.posix_descriptors) {
    return absl::UnimplementedError(absl::StrCat(
        device.name, " (", device.uuid, ") has no ",
        device.vmm ? "memory that can be exported as POSIX descriptors"
                   : "virtual memory management"));
  }
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kVmm));
  return Served(driver, device);
}

absl::Status UsableByIpc(const CudaDriver& driver, const CudaDevice& device) {
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kContext));
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kIpc));
  return Served(driver, device);
}

absl::StatusOr<CudaDevice> ProbeDevice(const CudaDriver& driver, int index) {
  const CudaFunctions& cuda = driver.cuda();
  CudaDevice device{.index = index};
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuDeviceGet(&device.device, index), "cuDeviceGet"));
  cuda::CUuuid uuid{};
  RETURN_IF_ERROR(CudaStatus(cuda.cuDeviceGetUuid(&uuid, device.device),
                             "cuDeviceGetUuid"));
  device.uuid = UuidText(uuid);
  std::array<char, 128> name{};
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuDeviceGetName(name.data(), name.size(), device.device),
                 "cuDeviceGetName"));
  device.name = name.data();
  size_t total = 0;
  RETURN_IF_ERROR(CudaStatus(cuda.cuDeviceTotalMem(&total, device.device),
                             "cuDeviceTotalMem"));
  device.total = Bytes(static_cast<int64_t>(total));
  ASSIGN_OR_RETURN(device.vmm,
                   Attribute(driver, cuda::kAttributeVmm, device.device));
  ASSIGN_OR_RETURN(
      device.posix_descriptors,
      Attribute(driver, cuda::kAttributePosixDescriptors, device.device));
  ASSIGN_OR_RETURN(
      device.rdma_with_vmm,
      Attribute(driver, cuda::kAttributeRdmaWithVmm, device.device));
  device.usable = Usable(driver, device);
  device.usable_by_ipc = UsableByIpc(driver, device);
  if (device.usable.ok()) {
    const cuda::CUmemAllocationProp prop = AllocationProp(device);
    size_t granularity = 0;
    RETURN_IF_ERROR(
        CudaStatus(cuda.cuMemGetAllocationGranularity(
                       &granularity, &prop, cuda::kGranularityMinimum),
                   "cuMemGetAllocationGranularity"));
    device.granularity = Bytes(static_cast<int64_t>(granularity));
  }
  return device;
}

std::string List(const std::vector<CudaDevice>& devices) {
  std::string list;
  for (const CudaDevice& device : devices) {
    absl::StrAppend(&list, list.empty() ? "" : ", ", device.index, " = ",
                    device.uuid, " (", device.name, ")");
  }
  return list;
}

}  // namespace

std::string UuidText(const cuda::CUuuid& uuid) {
  std::string text = "GPU";
  for (size_t i = 0; i < sizeof(uuid.bytes); ++i) {
    if (i == 0 || i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    absl::StrAppend(&text, absl::Hex(uuid.bytes[i], absl::kZeroPad2));
  }
  return text;
}

cuda::CUmemAllocationProp AllocationProp(const CudaDevice& device) {
  cuda::CUmemAllocationProp prop{};
  prop.type = cuda::kAllocationPinned;
  prop.requestedHandleTypes = cuda::kHandlePosixDescriptor;
  prop.location = {.type = cuda::kLocationDevice, .id = device.device};
  return prop;
}

absl::StatusOr<std::vector<CudaDevice>> ProbeDevices(const CudaDriver& driver) {
  int count = 0;
  RETURN_IF_ERROR(
      CudaStatus(driver.cuda().cuDeviceGetCount(&count), "cuDeviceGetCount"));
  if (count == 0) {
    return CudaStatus(cuda::CUDA_ERROR_NO_DEVICE, "cuDeviceGetCount");
  }
  std::vector<CudaDevice> devices;
  for (int i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(CudaDevice device, ProbeDevice(driver, i));
    devices.push_back(std::move(device));
  }
  return devices;
}

absl::StatusOr<CudaDevice> ChooseDevice(const std::vector<CudaDevice>& devices,
                                        std::string_view gpu) {
  const absl::string_view wanted(gpu.data(), gpu.size());
  if (wanted.empty()) {
    if (devices.size() == 1) return devices[0];
    return absl::InvalidArgumentError(absl::StrCat(
        "there are several GPUs, and each needs a broker of its own: gpu must "
        "name one of ",
        List(devices)));
  }
  int index = 0;
  const bool is_index = absl::SimpleAtoi(wanted, &index);
  std::vector<CudaDevice> found;
  for (const CudaDevice& device : devices) {
    if (is_index ? device.index == index
                 : absl::string_view(device.uuid).substr(0, wanted.size()) ==
                       wanted) {
      found.push_back(device);
    }
  }
  if (found.size() == 1) return found[0];
  if (found.empty()) {
    return absl::NotFoundError(absl::StrCat("no GPU is called \"", wanted,
                                            "\"; there are ", List(devices)));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("gpu \"", wanted, "\" may be any of ", List(found)));
}

absl::StatusOr<CudaDevice> FindDevice(const CudaDriver& driver,
                                      std::string_view gpu) {
  ASSIGN_OR_RETURN(std::vector<CudaDevice> devices, ProbeDevices(driver));
  return ChooseDevice(devices, gpu);
}

}  // namespace kvbroker
