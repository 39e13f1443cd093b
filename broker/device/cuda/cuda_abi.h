// What we use of the binary interfaces of libcuda and NVML: types, constants,
// and one list of functions a library.
//
// The libraries are opened at run time (driver.h), so that one program runs
// with and without a GPU and nothing of CUDA is needed to build it. Names and
// values are those of the driver's own interface. Pointers to what only the
// driver looks into are `void*`: whoever includes the real headers passes its
// streams as they are.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_CUDA_ABI_H_
#define KVBROKER_BROKER_DEVICE_CUDA_CUDA_ABI_H_

#include <cstddef>
#include <cstdint>

namespace kvbroker::cuda {

// --- libcuda -----------------------------------------------------------------

// An enum of the driver's that grows with each version: an int here.
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUmemGenericAllocationHandle = unsigned long long;
using CUcontext = void*;
using CUstream = void*;
using CUevent = void*;
using CUhostFn = void (*)(void* data);

struct CUuuid {
  unsigned char bytes[16];
};

inline constexpr CUresult CUDA_SUCCESS = 0;
inline constexpr CUresult CUDA_ERROR_INVALID_VALUE = 1;
inline constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
inline constexpr CUresult CUDA_ERROR_NOT_INITIALIZED = 3;
inline constexpr CUresult CUDA_ERROR_DEINITIALIZED = 4;
inline constexpr CUresult CUDA_ERROR_STUB_LIBRARY = 34;
inline constexpr CUresult CUDA_ERROR_INSUFFICIENT_DRIVER = 35;
inline constexpr CUresult CUDA_ERROR_DEVICE_UNAVAILABLE = 46;
inline constexpr CUresult CUDA_ERROR_NO_DEVICE = 100;
inline constexpr CUresult CUDA_ERROR_INVALID_DEVICE = 101;
inline constexpr CUresult CUDA_ERROR_INVALID_CONTEXT = 201;
inline constexpr CUresult CUDA_ERROR_ALREADY_MAPPED = 208;
inline constexpr CUresult CUDA_ERROR_ECC_UNCORRECTABLE = 214;
inline constexpr CUresult CUDA_ERROR_NVLINK_UNCORRECTABLE = 220;
inline constexpr CUresult CUDA_ERROR_OPERATING_SYSTEM = 304;
inline constexpr CUresult CUDA_ERROR_INVALID_HANDLE = 400;
inline constexpr CUresult CUDA_ERROR_NOT_READY = 600;
inline constexpr CUresult CUDA_ERROR_ILLEGAL_ADDRESS = 700;
inline constexpr CUresult CUDA_ERROR_LAUNCH_TIMEOUT = 702;
inline constexpr CUresult CUDA_ERROR_CONTEXT_IS_DESTROYED = 709;
inline constexpr CUresult CUDA_ERROR_ASSERT = 710;
inline constexpr CUresult CUDA_ERROR_HARDWARE_STACK_ERROR = 714;
inline constexpr CUresult CUDA_ERROR_ILLEGAL_INSTRUCTION = 715;
inline constexpr CUresult CUDA_ERROR_MISALIGNED_ADDRESS = 716;
inline constexpr CUresult CUDA_ERROR_INVALID_ADDRESS_SPACE = 717;
inline constexpr CUresult CUDA_ERROR_INVALID_PC = 718;
inline constexpr CUresult CUDA_ERROR_LAUNCH_FAILED = 719;
inline constexpr CUresult CUDA_ERROR_NOT_PERMITTED = 800;
inline constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900;
inline constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906;
// Of cuThreadExchangeStreamCaptureMode: this thread may call whatever it wants
// while another one captures a graph.
inline constexpr int kStreamCaptureModeRelaxed = 2;
inline constexpr CUresult CUDA_ERROR_NOT_SUPPORTED = 801;
inline constexpr CUresult CUDA_ERROR_SYSTEM_NOT_READY = 802;
inline constexpr CUresult CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803;
inline constexpr CUresult CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE = 804;
inline constexpr CUresult CUDA_ERROR_MPS_CONNECTION_FAILED = 805;
inline constexpr CUresult CUDA_ERROR_MPS_RPC_FAILURE = 806;
inline constexpr CUresult CUDA_ERROR_MPS_SERVER_NOT_READY = 807;
inline constexpr CUresult CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED = 809;
inline constexpr CUresult CUDA_ERROR_MPS_CLIENT_TERMINATED = 810;
inline constexpr CUresult CUDA_ERROR_UNKNOWN = 999;

// CUdevice_attribute
inline constexpr int kAttributeVmm = 102;
inline constexpr int kAttributePosixDescriptors = 103;
inline constexpr int kAttributeRdmaWithVmm = 110;

inline constexpr int kAllocationPinned = 1;       // CUmemAllocationType
inline constexpr int kHandlePosixDescriptor = 1;  // CUmemAllocationHandleType
inline constexpr int kLocationDevice = 1;         // CUmemLocationType
inline constexpr int kAccessReadWrite = 3;        // CUmemAccess_flags
inline constexpr int kGranularityMinimum = 0;
inline constexpr unsigned int kIpcLazyPeerAccess = 1;  // CUipcMem_flags
inline constexpr unsigned int kStreamNonBlocking = 1;
inline constexpr unsigned int kEventBlockingSync = 1;
inline constexpr unsigned int kEventDisableTiming = 2;

struct CUmemLocation {
  int type;
  int id;
};

struct CUmemAllocationProp {
  int type;
  int requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};
static_assert(sizeof(CUmemAllocationProp) == 32);
static_assert(offsetof(CUmemAllocationProp, allocFlags) == 24);

struct CUmemAccessDesc {
  CUmemLocation location;
  int flags;
};
static_assert(sizeof(CUmemAccessDesc) == 12);

// What one process tells another of an allocation; only the driver looks into
// it.
struct CUipcMemHandle {
  unsigned char reserved[64];
};
static_assert(sizeof(CUipcMemHandle) == 64);

// X(group, name, symbol, arguments...): what each group is for says driver.h.
#define KVBROKER_CUDA_FUNCTIONS(X)                                             \
  X(kBase, cuInit, "cuInit", unsigned int flags)                               \
  X(kBase, cuDriverGetVersion, "cuDriverGetVersion", int* version)             \
  X(kBase, cuDeviceGetCount, "cuDeviceGetCount", int* count)                   \
  X(kBase, cuDeviceGet, "cuDeviceGet", CUdevice* device, int index)            \
  X(kBase, cuDeviceGetName, "cuDeviceGetName", char* name, int size,           \
    CUdevice device)                                                           \
  X(kBase, cuDeviceGetUuid, "cuDeviceGetUuid", CUuuid* uuid, CUdevice device)  \
  X(kBase, cuDeviceTotalMem, "cuDeviceTotalMem_v2", size_t* bytes,             \
    CUdevice device)                                                           \
  X(kBase, cuDeviceGetAttribute, "cuDeviceGetAttribute", int* value,           \
    int attribute, CUdevice device)                                            \
  X(kVmm, cuMemGetAllocationGranularity, "cuMemGetAllocationGranularity",      \
    size_t* granularity, const CUmemAllocationProp* prop, int option)          \
  X(kVmm, cuMemCreate, "cuMemCreate", CUmemGenericAllocationHandle* handle,    \
    size_t size, const CUmemAllocationProp* prop, unsigned long long flags)    \
  X(kVmm, cuMemRelease, "cuMemRelease", CUmemGenericAllocationHandle handle)   \
  X(kVmm, cuMemExportToShareableHandle, "cuMemExportToShareableHandle",        \
    void* shareable, CUmemGenericAllocationHandle handle, int type,            \
    unsigned long long flags)                                                  \
  X(kVmm, cuMemImportFromShareableHandle, "cuMemImportFromShareableHandle",    \
    CUmemGenericAllocationHandle* handle, void* shareable, int type)           \
  X(kVmm, cuMemAddressReserve, "cuMemAddressReserve", CUdeviceptr* address,    \
    size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags) \
  X(kVmm, cuMemAddressFree, "cuMemAddressFree", CUdeviceptr address,           \
    size_t size)                                                               \
  X(kVmm, cuMemMap, "cuMemMap", CUdeviceptr address, size_t size,              \
    size_t offset, CUmemGenericAllocationHandle handle,                        \
    unsigned long long flags)                                                  \
  X(kVmm, cuMemUnmap, "cuMemUnmap", CUdeviceptr address, size_t size)          \
  X(kVmm, cuMemSetAccess, "cuMemSetAccess", CUdeviceptr address, size_t size,  \
    const CUmemAccessDesc* access, size_t count)                               \
  X(kContext, cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain",            \
    CUcontext* context, CUdevice device)                                       \
  X(kContext, cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2",       \
    CUdevice device)                                                           \
  X(kContext, cuCtxPushCurrent, "cuCtxPushCurrent_v2", CUcontext context)      \
  X(kContext, cuCtxPopCurrent, "cuCtxPopCurrent_v2", CUcontext* context)       \
  X(kContext, cuCtxSynchronize, "cuCtxSynchronize")                            \
  X(kContext, cuThreadExchangeStreamCaptureMode,                               \
    "cuThreadExchangeStreamCaptureMode", int* mode)                            \
  X(kContext, cuEventCreate, "cuEventCreate", CUevent* event,                  \
    unsigned int flags)                                                        \
  X(kContext, cuEventRecord, "cuEventRecord", CUevent event, CUstream stream)  \
  X(kContext, cuEventSynchronize, "cuEventSynchronize", CUevent event)         \
  X(kContext, cuEventDestroy, "cuEventDestroy_v2", CUevent event)              \
  X(kContext, cuStreamCreate, "cuStreamCreate", CUstream* stream,              \
    unsigned int flags)                                                        \
  X(kContext, cuStreamSynchronize, "cuStreamSynchronize", CUstream stream)     \
  X(kContext, cuStreamDestroy, "cuStreamDestroy_v2", CUstream stream)          \
  X(kContext, cuLaunchHostFunc, "cuLaunchHostFunc", CUstream stream,           \
    CUhostFn function, void* data)                                             \
  X(kContext, cuMemAlloc, "cuMemAlloc_v2", CUdeviceptr* address, size_t size)  \
  X(kContext, cuMemFree, "cuMemFree_v2", CUdeviceptr address)                  \
  X(kContext, cuMemHostAlloc, "cuMemHostAlloc", void** memory, size_t size,    \
    unsigned int flags)                                                        \
  X(kContext, cuMemFreeHost, "cuMemFreeHost", void* memory)                    \
  X(kContext, cuMemcpyHtoD, "cuMemcpyHtoD_v2", CUdeviceptr to,                 \
    const void* from, size_t size)                                             \
  X(kContext, cuMemcpyDtoH, "cuMemcpyDtoH_v2", void* to, CUdeviceptr from,     \
    size_t size)                                                               \
  X(kContext, cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", CUdeviceptr to,       \
    const void* from, size_t size, CUstream stream)                            \
  X(kContext, cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", void* to,             \
    CUdeviceptr from, size_t size, CUstream stream)                            \
  X(kContext, cuMemsetD8Async, "cuMemsetD8Async", CUdeviceptr to,              \
    unsigned char value, size_t count, CUstream stream)                        \
  X(kIpc, cuIpcGetMemHandle, "cuIpcGetMemHandle", CUipcMemHandle* handle,      \
    CUdeviceptr address)                                                       \
  X(kIpc, cuIpcOpenMemHandle, "cuIpcOpenMemHandle_v2", CUdeviceptr* address,   \
    CUipcMemHandle handle, unsigned int flags)                                 \
  X(kIpc, cuIpcCloseMemHandle, "cuIpcCloseMemHandle", CUdeviceptr address)

// --- NVML --------------------------------------------------------------------

using nvmlReturn_t = int;
using nvmlDevice_t = void*;

inline constexpr nvmlReturn_t NVML_SUCCESS = 0;
inline constexpr nvmlReturn_t NVML_ERROR_NOT_SUPPORTED = 3;
inline constexpr nvmlReturn_t NVML_ERROR_NO_PERMISSION = 4;
inline constexpr nvmlReturn_t NVML_ERROR_NOT_FOUND = 6;
inline constexpr nvmlReturn_t NVML_ERROR_INSUFFICIENT_SIZE = 7;
inline constexpr nvmlReturn_t NVML_ERROR_DRIVER_NOT_LOADED = 9;
inline constexpr nvmlReturn_t NVML_ERROR_FUNCTION_NOT_FOUND = 13;
inline constexpr nvmlReturn_t NVML_ERROR_GPU_IS_LOST = 15;
inline constexpr nvmlReturn_t NVML_ERROR_RESET_REQUIRED = 16;
inline constexpr nvmlReturn_t NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18;
inline constexpr nvmlReturn_t NVML_ERROR_UNKNOWN = 999;

struct nvmlMemory_t {
  unsigned long long total, free, used;
};
static_assert(sizeof(nvmlMemory_t) == 24);

struct nvmlMemory_v2_t {
  unsigned int version;
  unsigned long long total, reserved, free, used;
};
static_assert(sizeof(nvmlMemory_v2_t) == 40);
inline constexpr unsigned int kNvmlMemoryV2 =
    sizeof(nvmlMemory_v2_t) | (2u << 24);

struct nvmlProcessInfo_t {
  unsigned int pid;
  unsigned long long usedGpuMemory;
  unsigned int gpuInstanceId, computeInstanceId;
};
static_assert(sizeof(nvmlProcessInfo_t) == 24);
inline constexpr unsigned long long kNvmlNotAvailable = ~0ull;

// Required ones first; a driver before 510 has no nvmlDeviceGetMemoryInfo_v2 and
// no nvmlDeviceGetComputeRunningProcesses_v3, one before 450 no
// nvmlDeviceGetMigMode.
#define KVBROKER_NVML_FUNCTIONS(X)                                       \
  X(kRequired, nvmlInit, "nvmlInit_v2", void)                            \
  X(kRequired, nvmlShutdown, "nvmlShutdown", void)                       \
  X(kRequired, nvmlSystemGetDriverVersion, "nvmlSystemGetDriverVersion", \
    char* version, unsigned int size)                                    \
  X(kRequired, nvmlDeviceGetHandleByUUID, "nvmlDeviceGetHandleByUUID",   \
    const char* uuid, nvmlDevice_t* device)                              \
  X(kRequired, nvmlDeviceGetMemoryInfo, "nvmlDeviceGetMemoryInfo",       \
    nvmlDevice_t device, nvmlMemory_t* memory)                           \
  X(kOptional, nvmlDeviceGetMemoryInfo_v2, "nvmlDeviceGetMemoryInfo_v2", \
    nvmlDevice_t device, nvmlMemory_v2_t* memory)                        \
  X(kOptional, nvmlDeviceGetComputeRunningProcesses,                     \
    "nvmlDeviceGetComputeRunningProcesses_v3", nvmlDevice_t device,      \
    unsigned int* count, nvmlProcessInfo_t* processes)                   \
  X(kOptional, nvmlDeviceGetMigMode, "nvmlDeviceGetMigMode",             \
    nvmlDevice_t device, unsigned int* current, unsigned int* pending)

}  // namespace kvbroker::cuda

#endif  // KVBROKER_BROKER_DEVICE_CUDA_CUDA_ABI_H_
