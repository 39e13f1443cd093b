#include "broker/device/cuda/cuda_backend.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

// The inode that the kernel gives to the first PID namespace of a machine.
constexpr ino_t kTopPidNamespace = 0xEFFFFFFC;

bool IsTopPidNamespace() {
  struct stat info;
  return stat("/proc/self/ns/pid", &info) == 0 &&
         info.st_ino == kTopPidNamespace;
}

// Enough for a frame's worth of others, and no long wait.
constexpr size_t kDroppedAtOnce = 64;

cuda::CUmemAllocationProp PropOf(const CudaDevice& device, bool rdma) {
  cuda::CUmemAllocationProp prop = AllocationProp(device);
  prop.allocFlags.gpuDirectRDMACapable = rdma ? 1 : 0;
  return prop;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(
    std::unique_ptr<CudaDriver> driver, const CudaBackendOptions& options) {
  ASSIGN_OR_RETURN(CudaDevice device, FindDevice(*driver, options.gpu));
  RETURN_IF_ERROR(device.usable);
  if (options.rdma && !device.rdma_with_vmm) {
    return absl::UnimplementedError(
        absl::StrCat(device.name, " (", device.uuid,
                     ") cannot give network cards access to exportable "
                     "memory; turn the option off"));
  }
  ASSIGN_OR_RETURN(NvmlDevice nvml, NvmlDevice::Find(*driver, device.uuid));
  ASSIGN_OR_RETURN(NvmlMemory memory, nvml.ReadMemory());
  return std::unique_ptr<CudaBackend>(new CudaBackend(
      std::move(driver), std::move(device), nvml, memory.total, options));
}

CudaBackend::CudaBackend(std::unique_ptr<CudaDriver> driver, CudaDevice device,
                         NvmlDevice nvml, Bytes total,
                         const CudaBackendOptions& options)
    : driver_(std::move(driver)),
      device_(std::move(device)),
      nvml_(nvml),
      info_{.name = "cuda",
            .device_uuid = device_.uuid,
            .total = total,
            .granularity = device_.granularity},
      prop_(PropOf(device_, options.rdma)),
      max_kept_(options.kept_descriptors) {}

CudaBackend::~CudaBackend() {
  SetInUse(false);
  MutexLock lock(&mu_);
  KVB_CHECK(live_.empty());  // A handle outlives its backend.
}

absl::StatusOr<Handle> CudaBackend::Create(Bytes size) {
  if (size <= Bytes(0) || size.count() % info_.granularity.count() != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a handle's size must be a positive multiple of the granularity, ",
        info_.granularity.count(), " bytes; asked for ", size.count()));
  }
  // The driver has other words for sizes that no device has.
  if (size > info_.total) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no such memory on this GPU: bytes asked for ",
                     size.count(), ", total ", info_.total.count()));
  }
  creates_.fetch_add(1, std::memory_order_relaxed);
  cuda::CUmemGenericAllocationHandle made = 0;
  const cuda::CUresult result = driver_->cuda().cuMemCreate(
      &made, static_cast<size_t>(size.count()), &prop_, 0);
  if (result == cuda::CUDA_ERROR_OUT_OF_MEMORY) {
    absl::StatusOr<NvmlMemory> memory = ReadMemory();
    return absl::ResourceExhaustedError(absl::StrCat(
        "the GPU has too little memory left: bytes asked for ", size.count(),
        memory.ok()
            ? absl::StrCat(", free ", (memory->total - memory->used).count(),
                           ", total ", memory->total.count())
            : ""));
  }
  RETURN_IF_ERROR(Explained(CudaStatusOfDescriptorCall(result, "cuMemCreate")));
  MutexLock lock(&mu_);
  const uint64_t token = next_token_++;
  live_[token].made = made;
  return Handle(this, token, size);
}

absl::StatusOr<UniqueFd> CudaBackend::Export(const Handle& handle) {
  if (!handle) {
    return absl::InvalidArgumentError(
        "only a live handle of this backend can be exported");
  }
  absl::StatusOr<UniqueFd> fd = TryExport(handle.token());
  // Descriptors that are only kept are the first to go.
  if (absl::IsResourceExhausted(fd.status()) && DropKept()) {
    fd = TryExport(handle.token());
  }
  return fd;
}

void CudaBackend::Prepare(const Handle& handle) {
  {
    MutexLock lock(&mu_);
    if (kept_ >= max_kept_) return;
  }
  // A failure is Export's to tell.
  TryExport(handle.token()).IgnoreError();
}

absl::StatusOr<UniqueFd> CudaBackend::TryExport(uint64_t token) {
  cuda::CUmemGenericAllocationHandle made = 0;
  {
    MutexLock lock(&mu_);
    auto it = live_.find(token);
    if (it == live_.end()) {
      return absl::InvalidArgumentError(
          "only a live handle of this backend can be exported");
    }
    if (it->second.kept) return it->second.kept.Duplicate();
    made = it->second.made;
  }
  ASSIGN_OR_RETURN(UniqueFd fd, ExportAnew(made));
  Keep(token, fd);
  return fd;
}

absl::StatusOr<UniqueFd> CudaBackend::ExportAnew(
    cuda::CUmemGenericAllocationHandle made) {
  exports_.fetch_add(1, std::memory_order_relaxed);
  int number = -1;
  RETURN_IF_ERROR(Explained(CudaStatusOfDescriptorCall(
      driver_->cuda().cuMemExportToShareableHandle(
          &number, made, cuda::kHandlePosixDescriptor, 0),
      "cuMemExportToShareableHandle")));
  UniqueFd fd(number);
  if (fcntl(number, F_SETFD, FD_CLOEXEC) != 0) {
    return ErrnoToStatus(errno, "F_SETFD of an export");
  }
  return fd;
}

void CudaBackend::SetInUse(bool in_use) {
  if (!in_use) {
    opened_.Reset();
    opener_.Reset();
    own_bytes_ = 0;
    return;
  }
  if (opened_) return;
  absl::StatusOr<Handle> opener = Create(info_.granularity);
  // Without it all works, slower.
  if (!opener.ok()) return;
  cuda::CUmemGenericAllocationHandle made = 0;
  {
    MutexLock lock(&mu_);
    made = live_.at(opener->token()).made;
  }
  absl::StatusOr<UniqueFd> opened = ExportAnew(made);
  if (!opened.ok()) return;
  opener_ = *std::move(opener);
  opened_ = *std::move(opened);
  own_bytes_ = opener_.size().count();
}

void CudaBackend::Keep(uint64_t token, const UniqueFd& fd) {
  MutexLock lock(&mu_);
  auto it = live_.find(token);
  if (kept_ >= max_kept_ || it == live_.end() || it->second.kept) return;
  absl::StatusOr<UniqueFd> copy = fd.Duplicate();
  if (!copy.ok()) return;
  it->second.kept = *std::move(copy);
  ++kept_;
}

bool CudaBackend::DropKept() {
  std::vector<UniqueFd> dropped;
  {
    MutexLock lock(&mu_);
    for (auto& [token, allocation] : live_) {
      if (dropped.size() == kDroppedAtOnce) break;
      if (allocation.kept) dropped.push_back(std::move(allocation.kept));
    }
    kept_ -= dropped.size();
  }
  return !dropped.empty();
}

size_t CudaBackend::kept_descriptors() {
  MutexLock lock(&mu_);
  return kept_;
}

absl::Status CudaBackend::Explained(absl::Status status) {
  if (!absl::IsInternal(status) || IsDeviceLost(status)) return status;
  const absl::Status reading = ReadMemory().status();
  if (!IsDeviceLost(reading)) return status;
  return MarkDeviceLost(absl::Status(
      reading.code(), absl::StrCat(status.message(), "; ", reading.message())));
}

absl::StatusOr<NvmlMemory> CudaBackend::ReadMemory() {
  memory_readings_.fetch_add(1, std::memory_order_relaxed);
  return nvml_.ReadMemory();
}

absl::StatusOr<Bytes> CudaBackend::UsedBytes() {
  // Whichever is less, should it come or go meanwhile.
  const Bytes own(own_bytes_);
  ASSIGN_OR_RETURN(NvmlMemory memory, ReadMemory());
  return std::max(memory.used - std::max(own, Bytes(own_bytes_)), Bytes(0));
}

absl::StatusOr<std::map<uint32_t, Bytes>> CudaBackend::UsedByProcess() {
  static const bool at_the_top = IsTopPidNamespace();
  if (!at_the_top) {
    return absl::UnimplementedError(
        "NVML's pids are not those of this PID namespace");
  }
  return nvml_.ReadProcesses();
}

void CudaBackend::Release(uint64_t token) {
  Allocation gone;
  {
    MutexLock lock(&mu_);
    auto it = live_.find(token);
    KVB_CHECK(it != live_.end());
    gone = std::move(it->second);
    live_.erase(it);
    if (gone.kept) --kept_;
  }
  // A reference as any other.
  gone.kept.Reset();
  releases_.fetch_add(1, std::memory_order_relaxed);
  absl::Status released =
      CudaStatus(driver_->cuda().cuMemRelease(gone.made), "cuMemRelease");
  if (released.ok()) return;
  failed_releases_.fetch_add(1, std::memory_order_relaxed);
  std::fprintf(stderr, "a handle's memory was not given back: %s\n",
               std::string(released.message()).c_str());
}

CudaBackend::Counts CudaBackend::counts() const {
  return {.creates = creates_.load(std::memory_order_relaxed),
          .exports = exports_.load(std::memory_order_relaxed),
          .releases = releases_.load(std::memory_order_relaxed),
          .failed_releases = failed_releases_.load(std::memory_order_relaxed),
          .memory_readings = memory_readings_.load(std::memory_order_relaxed)};
}

}  // namespace kvbroker
