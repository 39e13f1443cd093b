// CudaBlockMemory: writes and reads blocks on a GPU, as an engine's kernels would.
//
//   std::span<std::byte> staged = memory->BeginWrite();
//   ... fill `staged` ...
//   memory->EndWrite(address);              // queued on the stream
//   memory->WhenDone([&] { pool.StepDone(step); });
//   memory->Read(address);                  // waits for what was queued
//
// Everything goes through one stream of its own; who owns the pool tells the
// pool's mapper about it. Not thread-safe.
#ifndef KVBROKER_CLIENT_REPLAY_CUDA_BLOCK_MEMORY_H_
#define KVBROKER_CLIENT_REPLAY_CUDA_BLOCK_MEMORY_H_

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/device/cuda/driver.h"
#include "broker/device/cuda/probe.h"

namespace kvbroker::replay {

class CudaBlockMemory {
 public:
  // `gpu` as in FindDevice(). The driver outlives it.
  static absl::StatusOr<std::unique_ptr<CudaBlockMemory>> Create(
      const CudaDriver& driver, std::string_view gpu, size_t block_bytes);
  // Waits for what is queued.
  ~CudaBlockMemory();

  // Host memory of a block's size.
  std::span<std::byte> BeginWrite();
  // Queues the copy of what BeginWrite gave to the GPU.
  void EndWrite(const std::byte* address);
  // A copy of the block, after all that is queued.
  std::span<const std::byte> Read(const std::byte* address);
  // Calls `done`, on a thread of the driver's, when all that is queued by now is
  // done. It must not call the driver.
  void WhenDone(std::function<void()> done);
  // Until all that is queued is done.
  void Wait();

  cuda::CUstream stream() const { return stream_; }
  // The first error of the driver; nothing can be said about contents then.
  const absl::Status& status() const { return status_; }

 private:
  // Copies under way at once.
  static constexpr size_t kStages = 16;
  struct Stage {
    std::byte* memory = nullptr;
    cuda::CUevent copied = nullptr;
  };

  CudaBlockMemory(const CudaDriver& driver, CudaDevice device,
                  size_t block_bytes)
      : cuda_(driver.cuda()),
        device_(std::move(device)),
        block_bytes_(block_bytes) {}
  absl::Status Start();
  void Note(cuda::CUresult result, std::string_view call);

  const CudaFunctions& cuda_;
  const CudaDevice device_;
  const size_t block_bytes_;
  absl::Status status_;
  cuda::CUcontext context_ = nullptr;
  cuda::CUstream stream_ = nullptr;
  std::array<Stage, kStages> stages_;
  size_t next_ = 0;  // of `stages_`
  std::byte* read_ = nullptr;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_CUDA_BLOCK_MEMORY_H_
