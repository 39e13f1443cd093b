#include "client/replay/cuda_block_memory.h"

#include <cstring>
#include <utility>

#include "broker/base/status_macros.h"
#include "broker/device/cuda/cuda_status.h"
#include "broker/device/cuda/current_context.h"

namespace kvbroker::replay {
namespace {

cuda::CUdeviceptr OnDevice(const std::byte* address) {
  return reinterpret_cast<uintptr_t>(address);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaBlockMemory>> CudaBlockMemory::Create(
    const CudaDriver& driver, std::string_view gpu, size_t block_bytes) {
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kContext));
  ASSIGN_OR_RETURN(CudaDevice device, FindDevice(driver, gpu));
  std::unique_ptr<CudaBlockMemory> memory(
      new CudaBlockMemory(driver, std::move(device), block_bytes));
  RETURN_IF_ERROR(memory->Start());
  return memory;
}

absl::Status CudaBlockMemory::Start() {
  RETURN_IF_ERROR(
      CudaStatus(cuda_.cuDevicePrimaryCtxRetain(&context_, device_.device),
                 "cuDevicePrimaryCtxRetain"));
  CurrentCudaContext current(cuda_, context_);
  RETURN_IF_ERROR(current.status());
  RETURN_IF_ERROR(
      CudaStatus(cuda_.cuStreamCreate(&stream_, cuda::kStreamNonBlocking),
                 "cuStreamCreate"));
  auto allocate = [this](std::byte** memory) {
    return CudaStatus(cuda_.cuMemHostAlloc(reinterpret_cast<void**>(memory),
                                           block_bytes_, 0),
                      "cuMemHostAlloc");
  };
  for (Stage& stage : stages_) {
    RETURN_IF_ERROR(allocate(&stage.memory));
    RETURN_IF_ERROR(CudaStatus(
        cuda_.cuEventCreate(&stage.copied, cuda::kEventBlockingSync |
                                               cuda::kEventDisableTiming),
        "cuEventCreate"));
  }
  return allocate(&read_);
}

CudaBlockMemory::~CudaBlockMemory() {
  if (context_ == nullptr) return;
  {
    CurrentCudaContext current(cuda_, context_);
    if (stream_ != nullptr) {
      cuda_.cuStreamSynchronize(stream_);
      cuda_.cuStreamDestroy(stream_);
    }
    for (Stage& stage : stages_) {
      if (stage.copied != nullptr) cuda_.cuEventDestroy(stage.copied);
      if (stage.memory != nullptr) cuda_.cuMemFreeHost(stage.memory);
    }
    if (read_ != nullptr) cuda_.cuMemFreeHost(read_);
  }
  cuda_.cuDevicePrimaryCtxRelease(device_.device);
}

void CudaBlockMemory::Note(cuda::CUresult result, std::string_view call) {
  if (result != cuda::CUDA_SUCCESS) status_.Update(CudaStatus(result, call));
}

std::span<std::byte> CudaBlockMemory::BeginWrite() {
  CurrentCudaContext current(cuda_, context_);
  status_.Update(current.status());
  Stage& stage = stages_[next_];
  // Before its first copy the event counts as done.
  Note(cuda_.cuEventSynchronize(stage.copied), "cuEventSynchronize");
  return {stage.memory, block_bytes_};
}

void CudaBlockMemory::EndWrite(const std::byte* address) {
  CurrentCudaContext current(cuda_, context_);
  status_.Update(current.status());
  Stage& stage = stages_[next_];
  next_ = (next_ + 1) % kStages;
  Note(cuda_.cuMemcpyHtoDAsync(OnDevice(address), stage.memory, block_bytes_,
                               stream_),
       "cuMemcpyHtoDAsync");
  Note(cuda_.cuEventRecord(stage.copied, stream_), "cuEventRecord");
}

std::span<const std::byte> CudaBlockMemory::Read(const std::byte* address) {
  CurrentCudaContext current(cuda_, context_);
  status_.Update(current.status());
  // What is there if the copy fails is not what was read before.
  std::memset(read_, 0, block_bytes_);
  Note(cuda_.cuMemcpyDtoHAsync(read_, OnDevice(address), block_bytes_, stream_),
       "cuMemcpyDtoHAsync");
  Note(cuda_.cuStreamSynchronize(stream_), "cuStreamSynchronize");
  return {read_, block_bytes_};
}

void CudaBlockMemory::WhenDone(std::function<void()> done) {
  CurrentCudaContext current(cuda_, context_);
  status_.Update(current.status());
  auto* call = new std::function<void()>(std::move(done));
  const cuda::CUresult result = cuda_.cuLaunchHostFunc(
      stream_,
      [](void* data) {
        std::unique_ptr<std::function<void()>> call(
            static_cast<std::function<void()>*>(data));
        (*call)();
      },
      call);
  Note(result, "cuLaunchHostFunc");
  if (result != cuda::CUDA_SUCCESS) delete call;
}

void CudaBlockMemory::Wait() {
  CurrentCudaContext current(cuda_, context_);
  status_.Update(current.status());
  Note(cuda_.cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

}  // namespace kvbroker::replay
