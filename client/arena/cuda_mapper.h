// CudaMapper: GPU pages mapped into this process.
//
//   ASSIGN_OR_RETURN(std::unique_ptr<CudaDriver> driver,
//                    CudaDriver::Load(DriverPaths::Default()));
//   ASSIGN_OR_RETURN(auto mapper, CudaMapper::Create(geometry, *driver, uuid));
//   mapper->AddStream(stream);  // each one whose kernels touch the pool
//
// It works in the primary context of the device, the one that frameworks use,
// which it retains; it makes it current for its own calls only, on whatever
// thread they come.
//
// Unmap first waits for what was queued, when it was called, on the streams
// that were added. Other streams neither wait nor are waited for. Who adds no
// stream sees to it himself that nothing queued touches a page he unmaps.
//
// Errors. Map and Unmap are all or nothing: whatever was done is undone, and an
// Unmap that fails leaves the page mapped. Exceptions are drivers that refuse
// to undo, too: a poisoned context (IsPoisoned() of the status), where every
// call fails; and memory that was unmapped but is not released, which is
// INTERNAL. Its bytes stay charged until Unmap is called again or the process
// ends.
#ifndef KVBROKER_CLIENT_ARENA_CUDA_MAPPER_H_
#define KVBROKER_CLIENT_ARENA_CUDA_MAPPER_H_

#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/device/cuda/driver.h"
#include "broker/device/cuda/probe.h"
#include "client/arena/mapper.h"
#include "client/arena/stream_fence.h"
#include "proto/messages.h"

namespace kvbroker::client {

class CudaMapper : public Mapper {
 public:
  // `gpu` as in FindDevice(); the broker's device uuid finds its GPU whatever
  // CUDA_VISIBLE_DEVICES leaves of them. The driver outlives the mapper.
  // INVALID_ARGUMENT: handles are no multiple of the device's granularity.
  static absl::StatusOr<std::unique_ptr<CudaMapper>> Create(
      const PoolGeometry& geometry, const CudaDriver& driver,
      std::string_view gpu);
  // Unmaps what is mapped. REQUIRES: nothing queued touches it.
  ~CudaMapper() override;

  absl::Status Map(PageIndex page, std::vector<UniqueFd> descriptors) override;
  absl::Status Unmap(PageIndex page) override;
  // An address of the GPU.
  std::byte* region(size_t handle_of_page) const override;
  std::shared_ptr<void> range() const override { return range_; }
  // On an H200 about 30 us a slot now, and 30 to 50 us more with each Map and
  // each Unmap: cuMemSetAccess and cuMemUnmap are the dear ones. The memory
  // counts as used by others: what the engine declares includes it.
  absl::Status Guard() override;

  // Null is the context's default stream.
  void AddStream(cuda::CUstream stream) override { fence_.Add(stream); }
  void RemoveStream(cuda::CUstream stream) override { fence_.Remove(stream); }

 private:
  // One handle of a page as this process has it.
  struct MappedHandle {
    cuda::CUmemGenericAllocationHandle import = 0;
    bool imported = false;
    bool mapped = false;
  };

  CudaMapper(const PoolGeometry& geometry, const CudaDriver& driver,
             CudaDevice device);

  // Context and addresses; what was made is undone by the destructor.
  absl::Status Start();

  absl::Status MapHandle(PageIndex page, size_t handle, int descriptor);
  // Maps what is imported, with access.
  absl::Status MapImport(PageIndex page, size_t handle);
  // Read and write access for this device.
  absl::Status OpenToAccess(cuda::CUdeviceptr address);
  absl::Status UnmapHandle(PageIndex page, size_t handle);
  // Guard mode's handle behind the slot, or not; nothing to do where it is so.
  absl::Status MapGuard(PageIndex page);
  absl::Status UnmapGuard(PageIndex page);
  // Takes it from behind all slots and gives it back, as far as the driver lets
  // it.
  void DropGuard();
  absl::Status ReleaseHandle(PageIndex page, size_t handle);
  // Undoes what was done of a page, as far as the driver lets it.
  void RollBack(PageIndex page, size_t count);

  cuda::CUdeviceptr AddressOf(PageIndex page, size_t handle) const;
  MappedHandle& at(PageIndex page, size_t handle) {
    return handles_[page.value() * geometry_.handles_per_page + handle];
  }
  size_t handle_bytes() const {
    return static_cast<size_t>(geometry_.handle_bytes.count());
  }
  size_t range_bytes() const {
    return handle_bytes() * geometry_.handles_per_page * geometry_.max_pages;
  }

  const PoolGeometry geometry_;
  const CudaFunctions& cuda_;
  const CudaDevice device_;
  cuda::CUcontext context_ = nullptr;
  // Ends the reservation and, from then on, the hold on the context.
  std::shared_ptr<void> range_;
  cuda::CUdeviceptr base_ = 0;
  std::vector<MappedHandle> handles_;
  // Of guard mode, and the slots that it lies behind.
  std::optional<cuda::CUmemGenericAllocationHandle> guard_;
  std::vector<bool> guarded_;
  StreamFence fence_;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_CUDA_MAPPER_H_
