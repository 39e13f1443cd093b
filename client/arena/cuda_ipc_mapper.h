// CudaIpcMapper: a pool's pages in a slab of GPU memory that the broker keeps.
//
// The whole slab is open in this process, once for all pools, so the region is
// all of it: page i lies at i times the page's bytes, whoever has it. Nothing
// is mapped or unmapped with a page; to map one is to see that its descriptor
// leases just that part. An address of a page that is not leased does not
// fault: it is another's.
//
// Unmap waits for streams as CudaMapper does.
#ifndef KVBROKER_CLIENT_ARENA_CUDA_IPC_MAPPER_H_
#define KVBROKER_CLIENT_ARENA_CUDA_IPC_MAPPER_H_

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/device/cuda/driver.h"
#include "client/arena/cuda_slab.h"
#include "client/arena/mapper.h"
#include "client/arena/stream_fence.h"
#include "proto/messages.h"
#include "proto/slab_frame.h"

namespace kvbroker::client {

class CudaIpcMapper : public Mapper {
 public:
  // `gpu` as in FindDevice(), `slab` as in Opened. The driver outlives the
  // mapper. INVALID_ARGUMENT: the pool's layout is not contiguous, or `slab` is
  // none.
  static absl::StatusOr<std::unique_ptr<CudaIpcMapper>> Create(
      const PoolGeometry& geometry, const CudaDriver& driver,
      std::string_view gpu, std::string_view slab);
  ~CudaIpcMapper() override;

  // INVALID_ARGUMENT: the descriptor is no lease of this page.
  absl::Status Map(PageIndex page, std::vector<UniqueFd> descriptors) override;
  absl::Status Unmap(PageIndex page) override;
  // An address of the GPU.
  std::byte* region(size_t handle_of_page) const override;
  // The slab stays open.
  std::shared_ptr<void> range() const override { return slab_; }

  // Null is the context's default stream.
  void AddStream(void* stream) override { fence_.Add(stream); }
  void RemoveStream(void* stream) override { fence_.Remove(stream); }

 private:
  CudaIpcMapper(const PoolGeometry& geometry, const CudaDriver& driver,
                const SlabFrame& frame, std::unique_ptr<CudaSlab> slab);

  const PoolGeometry geometry_;
  const CudaFunctions& cuda_;
  const SlabFrame frame_;
  const std::shared_ptr<CudaSlab> slab_;
  std::vector<bool> leased_;  // by page
  StreamFence fence_;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_CUDA_IPC_MAPPER_H_
