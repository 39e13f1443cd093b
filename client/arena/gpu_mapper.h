// GpuMapper: a pool's pages on a GPU, whichever way the broker lends them.
//
// That is known when the broker has opened the session (Begin): until then
// there is no region and nothing can be mapped.
#ifndef KVBROKER_CLIENT_ARENA_GPU_MAPPER_H_
#define KVBROKER_CLIENT_ARENA_GPU_MAPPER_H_

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/device/cuda/driver.h"
#include "client/arena/mapper.h"
#include "proto/messages.h"

namespace kvbroker::client {

class GpuMapper : public Mapper {
 public:
  // `gpu` as in FindDevice(). The driver outlives it. NOT_FOUND and
  // INVALID_ARGUMENT: it names no GPU that this process sees.
  static absl::StatusOr<std::unique_ptr<GpuMapper>> Create(
      const PoolGeometry& geometry, const CudaDriver& driver,
      std::string_view gpu);

  // What the mapper of that kind fails with; FAILED_PRECONDITION: the broker
  // lends no GPU's memory.
  absl::Status Begin(const Opened& opened) override;

  // Of the mapper that Begin chooses, and with it: what that one fails with.
  absl::Status Guard() override;

  // REQUIRE: begun.
  absl::Status Map(PageIndex page, std::vector<UniqueFd> descriptors) override {
    return mapper_->Map(page, std::move(descriptors));
  }
  absl::Status Unmap(PageIndex page) override { return mapper_->Unmap(page); }
  std::byte* region(size_t handle_of_page) const override {
    return mapper_->region(handle_of_page);
  }
  std::shared_ptr<void> range() const override { return mapper_->range(); }
  void AddStream(void* stream) override { mapper_->AddStream(stream); }
  void RemoveStream(void* stream) override { mapper_->RemoveStream(stream); }

 private:
  GpuMapper(const PoolGeometry& geometry, const CudaDriver& driver,
            std::string_view gpu)
      : geometry_(geometry), driver_(driver), gpu_(gpu) {}

  const PoolGeometry geometry_;
  const CudaDriver& driver_;
  const std::string gpu_;
  bool guard_ = false;
  std::unique_ptr<Mapper> mapper_;  // since Begin
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_GPU_MAPPER_H_
