// StaticBlockSource: a fixed share of memory, taken at the start and kept.
#ifndef KVBROKER_CLIENT_REPLAY_STATIC_BLOCK_SOURCE_H_
#define KVBROKER_CLIENT_REPLAY_STATIC_BLOCK_SOURCE_H_

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "client/replay/block_source.h"

namespace kvbroker::replay {

// A private anonymous mapping cut into blocks, and a list of the free ones.
class StaticBlockSource : public BlockSource {
 public:
  // As many whole blocks as fit into `share`. InvalidArgument: not even one
  // does, or more than 2^31 - 1 do; RESOURCE_EXHAUSTED: no address space for
  // it.
  static absl::StatusOr<std::unique_ptr<StaticBlockSource>> Create(
      Bytes share, Bytes block_bytes);
  ~StaticBlockSource() override;

  StaticBlockSource(const StaticBlockSource&) = delete;
  StaticBlockSource& operator=(const StaticBlockSource&) = delete;

  void StepBegin() override {}
  void StepEnd() override {}
  // `urgency` makes no difference: nobody but this engine frees blocks.
  bool Alloc(int64_t blocks, Urgency urgency,
             std::vector<BlockId>* out) override;
  void Free(std::span<const BlockId> blocks) override;
  std::span<const BlockId> BlocksToVacate() override { return {}; }
  int64_t CapacityBlocks() const override { return blocks_; }
  BlockUsage Usage() const override;
  std::span<std::byte> BeginWrite(BlockId block) override {
    return {BlockData(block), static_cast<size_t>(block_bytes().count())};
  }
  std::span<const std::byte> Read(BlockId block) override {
    return {BlockData(block), static_cast<size_t>(block_bytes().count())};
  }
  std::byte* BlockData(BlockId block) {
    return memory_ + block_bytes().count() * block;
  }

 private:
  StaticBlockSource(std::byte* memory, int64_t blocks, Bytes block_bytes);

  std::byte* const memory_;
  const int64_t blocks_;
  std::vector<BlockId> free_;  // the last one is the next to go
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_STATIC_BLOCK_SOURCE_H_
