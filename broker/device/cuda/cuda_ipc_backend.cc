#include "broker/device/cuda/cuda_ipc_backend.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/current_context.h"
#include "broker/device/cuda/nvml_device.h"

namespace kvbroker {
namespace {

// As with VMM, so that a page's size that is good for one is for the other.
constexpr Bytes kGranularity = MiB(2);

}  // namespace

absl::StatusOr<std::unique_ptr<CudaIpcBackend>> CudaIpcBackend::Create(
    std::unique_ptr<CudaDriver> driver, const CudaIpcBackendOptions& options) {
  ASSIGN_OR_RETURN(CudaDevice device, FindDevice(*driver, options.gpu));
  RETURN_IF_ERROR(device.usable_by_ipc);
  if (options.claim) RETURN_IF_ERROR(options.claim(device.uuid));
  std::unique_ptr<CudaIpcBackend> backend(
      new CudaIpcBackend(std::move(driver), std::move(device)));
  RETURN_IF_ERROR(backend->Start(options.bytes));
  return backend;
}

CudaIpcBackend::CudaIpcBackend(std::unique_ptr<CudaDriver> driver,
                               CudaDevice device)
    : driver_(std::move(driver)),
      device_(std::move(device)),
      ranges_(Bytes(0)) {}

absl::Status CudaIpcBackend::Start(const SlabSize& bytes) {
  const CudaFunctions& cuda = driver_->cuda();
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuDevicePrimaryCtxRetain(&context_, device_.device),
                 "cuDevicePrimaryCtxRetain"));
  CurrentCudaContext current(cuda, context_);
  RETURN_IF_ERROR(current.status());
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuStreamCreate(&stream_, cuda::kStreamNonBlocking),
                 "cuStreamCreate"));
  ASSIGN_OR_RETURN(NvmlDevice nvml, NvmlDevice::Find(*driver_, device_.uuid));
  ASSIGN_OR_RETURN(NvmlMemory memory, nvml.ReadMemory());
  Bytes wish = memory.total - memory.used;
  if (bytes) {
    ASSIGN_OR_RETURN(wish, bytes(memory.total, memory.used));
  }
  const Bytes size = kGranularity * (wish / kGranularity);
  if (size <= Bytes(0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a slab has ", FormatBytes(kGranularity),
                     " at least; asked for ", FormatBytes(wish)));
  }
  const cuda::CUresult result =
      cuda.cuMemAlloc(&base_, static_cast<size_t>(size.count()));
  if (result == cuda::CUDA_ERROR_OUT_OF_MEMORY) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the GPU has no ", FormatBytes(size),
        " in one piece for the slab; lower capacity, or raise headroom: used ",
        FormatBytes(memory.used), " of ", FormatBytes(memory.total)));
  }
  RETURN_IF_ERROR(CudaStatus(result, "cuMemAlloc"));
  cuda::CUipcMemHandle handle;
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuIpcGetMemHandle(&handle, base_), "cuIpcGetMemHandle"));
  std::memcpy(slab_.ipc_handle, handle.reserved, sizeof(slab_.ipc_handle));
  slab_.slab_bytes = slab_.size = static_cast<uint64_t>(size.count());
  info_ = {.name = "cuda_ipc",
           .device_uuid = device_.uuid,
           .total = size,
           .granularity = kGranularity,
           .slab = SlabFrameText(slab_)};
  MutexLock lock(&mu_);
  ranges_ = RangeMap(size);
  return absl::OkStatus();
}

CudaIpcBackend::~CudaIpcBackend() {
  {
    MutexLock lock(&mu_);
    KVB_CHECK(live_.empty());  // A handle outlives its backend.
  }
  if (context_ == nullptr) return;
  const CudaFunctions& cuda = driver_->cuda();
  {
    CurrentCudaContext current(cuda, context_);
    if (base_ != 0) cuda.cuMemFree(base_);
    if (stream_ != nullptr) cuda.cuStreamDestroy(stream_);
  }
  cuda.cuDevicePrimaryCtxRelease(device_.device);
}

absl::StatusOr<Handle> CudaIpcBackend::Create(Bytes /*size*/) {
  return absl::FailedPreconditionError(
      "memory of cuda_ipc has fixed addresses: CreateAt");
}

absl::StatusOr<Handle> CudaIpcBackend::CreateAt(Bytes offset, Bytes size) {
  if (size <= Bytes(0) || size.count() % kGranularity.count() != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a handle's size must be a positive multiple of the granularity, ",
        kGranularity.count(), " bytes; asked for ", size.count()));
  }
  if (offset.count() % size.count() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a handle's offset must be a multiple of its size, ",
                     size.count(), " bytes; got ", offset.count()));
  }
  {
    MutexLock lock(&mu_);
    if (!ranges_.Take(offset, size)) {
      return absl::ResourceExhaustedError(
          absl::StrCat("this part of the slab is in use, or beyond its end, ",
                       info_.total.count(), ": bytes asked for ", size.count(),
                       " from ", offset.count(), " on"));
    }
  }
  absl::Status scrubbed = Scrub(offset, size);
  MutexLock lock(&mu_);
  if (!scrubbed.ok()) {
    ranges_.GiveBack(offset, size);
    return scrubbed;
  }
  const uint64_t token = next_token_++;
  live_[token] = {offset, size};
  return Handle(this, token, size, offset);
}

absl::Status CudaIpcBackend::Scrub(Bytes offset, Bytes size) {
  const CudaFunctions& cuda = driver_->cuda();
  CurrentCudaContext current(cuda, context_);
  RETURN_IF_ERROR(current.status());
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuMemsetD8Async(
                     base_ + static_cast<cuda::CUdeviceptr>(offset.count()), 0,
                     static_cast<size_t>(size.count()), stream_),
                 "cuMemsetD8Async"));
  return CudaStatus(cuda.cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

absl::StatusOr<UniqueFd> CudaIpcBackend::Export(const Handle& handle) {
  SlabFrame lease = slab_;
  {
    MutexLock lock(&mu_);
    auto it = handle ? live_.find(handle.token()) : live_.end();
    if (it == live_.end()) {
      return absl::InvalidArgumentError(
          "only a live handle of this backend can be exported");
    }
    lease.offset = static_cast<uint64_t>(it->second.offset.count());
    lease.size = static_cast<uint64_t>(it->second.size.count());
  }
  return SealSlabFrame(lease);
}

absl::StatusOr<Bytes> CudaIpcBackend::UsedBytes() {
  MutexLock lock(&mu_);
  return ranges_.taken();
}

void CudaIpcBackend::Release(uint64_t token) {
  MutexLock lock(&mu_);
  auto it = live_.find(token);
  KVB_CHECK(it != live_.end());
  ranges_.GiveBack(it->second.offset, it->second.size);
  live_.erase(it);
}

}  // namespace kvbroker
