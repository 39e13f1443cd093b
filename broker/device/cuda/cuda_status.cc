#include "broker/device/cuda/cuda_status.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {
namespace {

using absl::StatusCode;

// Of the device, for whoever works with it already.
enum class Loss { kNone, kLost, kSticky };

struct Meaning {
  int result;
  StatusCode code;
  const char* name;
  const char* advice = "";
  Loss loss = Loss::kNone;
};

constexpr char kPoisoned[] =
    "; the context is poisoned: every call fails until this process ends";

constexpr Meaning kCudaErrors[] = {
    {cuda::CUDA_ERROR_INVALID_VALUE, StatusCode::kInvalidArgument,
     "INVALID_VALUE"},
    {cuda::CUDA_ERROR_OUT_OF_MEMORY, StatusCode::kResourceExhausted,
     "OUT_OF_MEMORY"},
    {cuda::CUDA_ERROR_NOT_INITIALIZED, StatusCode::kInternal,
     "NOT_INITIALIZED"},
    {cuda::CUDA_ERROR_DEINITIALIZED, StatusCode::kUnavailable, "DEINITIALIZED",
     "; the driver is shutting down"},
    {cuda::CUDA_ERROR_STUB_LIBRARY, StatusCode::kFailedPrecondition,
     "STUB_LIBRARY",
     "; this libcuda is the toolkit's stub: take its folder out of "
     "LD_LIBRARY_PATH"},
    {cuda::CUDA_ERROR_INSUFFICIENT_DRIVER, StatusCode::kFailedPrecondition,
     "INSUFFICIENT_DRIVER", "; the NVIDIA driver is too old: update it"},
    {cuda::CUDA_ERROR_DEVICE_UNAVAILABLE, StatusCode::kUnavailable,
     "DEVICE_UNAVAILABLE",
     "; another process has the GPU for itself (compute mode, nvidia-smi -q)",
     Loss::kLost},
    {cuda::CUDA_ERROR_NO_DEVICE, StatusCode::kNotFound, "NO_DEVICE",
     "; there is no GPU, or CUDA_VISIBLE_DEVICES hides it", Loss::kLost},
    {cuda::CUDA_ERROR_INVALID_DEVICE, StatusCode::kNotFound, "INVALID_DEVICE",
     "", Loss::kLost},
    {cuda::CUDA_ERROR_INVALID_CONTEXT, StatusCode::kInternal,
     "INVALID_CONTEXT"},
    {cuda::CUDA_ERROR_ALREADY_MAPPED, StatusCode::kAlreadyExists,
     "ALREADY_MAPPED"},
    {cuda::CUDA_ERROR_ECC_UNCORRECTABLE, StatusCode::kInternal,
     "ECC_UNCORRECTABLE", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_NVLINK_UNCORRECTABLE, StatusCode::kInternal,
     "NVLINK_UNCORRECTABLE", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_OPERATING_SYSTEM, StatusCode::kInternal,
     "OPERATING_SYSTEM", "; may this user open /dev/nvidia* ?"},
    {cuda::CUDA_ERROR_INVALID_HANDLE, StatusCode::kInvalidArgument,
     "INVALID_HANDLE"},
    {cuda::CUDA_ERROR_NOT_READY, StatusCode::kUnavailable, "NOT_READY"},
    {cuda::CUDA_ERROR_ILLEGAL_ADDRESS, StatusCode::kInternal, "ILLEGAL_ADDRESS",
     kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_LAUNCH_TIMEOUT, StatusCode::kInternal, "LAUNCH_TIMEOUT",
     kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_CONTEXT_IS_DESTROYED, StatusCode::kInternal,
     "CONTEXT_IS_DESTROYED", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_ASSERT, StatusCode::kInternal, "ASSERT", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_HARDWARE_STACK_ERROR, StatusCode::kInternal,
     "HARDWARE_STACK_ERROR", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_ILLEGAL_INSTRUCTION, StatusCode::kInternal,
     "ILLEGAL_INSTRUCTION", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_MISALIGNED_ADDRESS, StatusCode::kInternal,
     "MISALIGNED_ADDRESS", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_INVALID_ADDRESS_SPACE, StatusCode::kInternal,
     "INVALID_ADDRESS_SPACE", kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_INVALID_PC, StatusCode::kInternal, "INVALID_PC",
     kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
     StatusCode::kFailedPrecondition, "STREAM_CAPTURE_UNSUPPORTED",
     "; a graph is being captured"},
    {cuda::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, StatusCode::kFailedPrecondition,
     "STREAM_CAPTURE_IMPLICIT", "; a graph is being captured"},
    {cuda::CUDA_ERROR_LAUNCH_FAILED, StatusCode::kInternal, "LAUNCH_FAILED",
     kPoisoned, Loss::kSticky},
    {cuda::CUDA_ERROR_NOT_PERMITTED, StatusCode::kPermissionDenied,
     "NOT_PERMITTED"},
    {cuda::CUDA_ERROR_NOT_SUPPORTED, StatusCode::kUnimplemented,
     "NOT_SUPPORTED"},
    {cuda::CUDA_ERROR_SYSTEM_NOT_READY, StatusCode::kUnavailable,
     "SYSTEM_NOT_READY", "; is nvidia-fabricmanager running?", Loss::kLost},
    {cuda::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, StatusCode::kFailedPrecondition,
     "SYSTEM_DRIVER_MISMATCH",
     "; libcuda and the kernel's driver are of different versions: reboot, or "
     "mount the host's libcuda into the container"},
    {cuda::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,
     StatusCode::kFailedPrecondition, "COMPAT_NOT_SUPPORTED_ON_DEVICE",
     "; the driver is too old for this libcuda: update it"},
    {cuda::CUDA_ERROR_MPS_CONNECTION_FAILED, StatusCode::kUnavailable,
     "MPS_CONNECTION_FAILED", "; the MPS daemon does not answer"},
    {cuda::CUDA_ERROR_MPS_RPC_FAILURE, StatusCode::kUnavailable,
     "MPS_RPC_FAILURE", "; the MPS server has failed", Loss::kLost},
    {cuda::CUDA_ERROR_MPS_SERVER_NOT_READY, StatusCode::kUnavailable,
     "MPS_SERVER_NOT_READY", "; the MPS server recovers from a fault",
     Loss::kLost},
    {cuda::CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED, StatusCode::kUnavailable,
     "MPS_MAX_CONNECTIONS_REACHED"},
    {cuda::CUDA_ERROR_MPS_CLIENT_TERMINATED, StatusCode::kInternal,
     "MPS_CLIENT_TERMINATED",
     "; another client's fault ended this one at the MPS server: every call "
     "fails until this process ends",
     Loss::kSticky},
    {cuda::CUDA_ERROR_UNKNOWN, StatusCode::kInternal, "UNKNOWN"},
};

constexpr Meaning kNvmlErrors[] = {
    {cuda::NVML_ERROR_NOT_SUPPORTED, StatusCode::kUnimplemented,
     "NOT_SUPPORTED"},
    {cuda::NVML_ERROR_NO_PERMISSION, StatusCode::kPermissionDenied,
     "NO_PERMISSION"},
    {cuda::NVML_ERROR_NOT_FOUND, StatusCode::kNotFound, "NOT_FOUND"},
    {cuda::NVML_ERROR_DRIVER_NOT_LOADED, StatusCode::kFailedPrecondition,
     "DRIVER_NOT_LOADED", "; the kernel has no NVIDIA driver loaded"},
    {cuda::NVML_ERROR_FUNCTION_NOT_FOUND, StatusCode::kUnimplemented,
     "FUNCTION_NOT_FOUND"},
    {cuda::NVML_ERROR_GPU_IS_LOST, StatusCode::kUnavailable, "GPU_IS_LOST",
     "; the GPU fell off the bus: see dmesg for its Xid", Loss::kLost},
    {cuda::NVML_ERROR_RESET_REQUIRED, StatusCode::kUnavailable,
     "RESET_REQUIRED", "; reset the GPU (nvidia-smi --gpu-reset)", Loss::kLost},
    {cuda::NVML_ERROR_LIB_RM_VERSION_MISMATCH, StatusCode::kFailedPrecondition,
     "LIB_RM_VERSION_MISMATCH",
     "; NVML and the kernel's driver are of different versions: reboot"},
};

template <size_t N>
Meaning MeaningOf(int result, const Meaning (&known)[N]) {
  for (const Meaning& meaning : known) {
    if (meaning.result == result) return meaning;
  }
  return {result, StatusCode::kInternal, "unknown error"};
}

absl::Status ToStatus(const Meaning& meaning, std::string_view library,
                      std::string_view call) {
  absl::Status status(
      meaning.code,
      absl::StrCat(absl::string_view(call.data(), call.size()), " failed: ",
                   absl::string_view(library.data(), library.size()), " ",
                   meaning.name, " (", meaning.result, ")", meaning.advice));
  if (meaning.loss == Loss::kSticky) return MarkPoisoned(std::move(status));
  if (meaning.loss == Loss::kLost) return MarkDeviceLost(std::move(status));
  return status;
}

}  // namespace

absl::Status CudaStatus(cuda::CUresult result, std::string_view call) {
  if (result == cuda::CUDA_SUCCESS) return absl::OkStatus();
  return ToStatus(MeaningOf(result, kCudaErrors), "CUDA error", call);
}

absl::Status NvmlStatus(cuda::nvmlReturn_t result, std::string_view call) {
  if (result == cuda::NVML_SUCCESS) return absl::OkStatus();
  return ToStatus(MeaningOf(result, kNvmlErrors), "NVML error", call);
}

absl::Status CudaStatusOfDescriptorCall(cuda::CUresult result,
                                        std::string_view call) {
  absl::Status status = CudaStatus(result, call);
  if (status.ok() || IsDeviceLost(status)) return status;
  UniqueFd next(open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (next) return status;
  const int error = errno;
  if (error != EMFILE && error != ENFILE) return status;
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  return absl::ResourceExhaustedError(absl::StrCat(
      absl::string_view(call.data(), call.size()),
      error == EMFILE
          ? " failed: this process has as many files open as it may, "
          : " failed: the machine has too many files open; this process may "
            "have ",
      limit.rlim_cur,
      error == EMFILE ? "; raise its limit (ulimit -n, LimitNOFILE= of its "
                        "service)"
                      : " (fs.file-max)"));
}

}  // namespace kvbroker
