// PoolBlockSource: the client library's Pool as the scheduler wants it.
//
// The stand-in for a GPU is immediate here: a step's work is done when the step
// ends. Owns neither the pool nor its session.
#ifndef KVBROKER_CLIENT_REPLAY_POOL_BLOCK_SOURCE_H_
#define KVBROKER_CLIENT_REPLAY_POOL_BLOCK_SOURCE_H_

#include <vector>

#include "client/block/block_types.h"
#include "client/replay/block_source.h"
#include "client/session/pool.h"

namespace kvbroker::replay {

class PoolBlockSource : public BlockSource {
 public:
  explicit PoolBlockSource(client::Pool& pool)
      : BlockSource(pool.options().block_bytes), pool_(pool) {}

  void StepBegin() override;
  void StepEnd() override;
  bool Alloc(int64_t blocks, Urgency urgency,
             std::vector<BlockId>* out) override;
  void Free(std::span<const BlockId> blocks) override;
  std::span<const BlockId> BlocksToVacate() override;
  int64_t CapacityBlocks() const override;
  BlockUsage Usage() const override;
  std::byte* BlockData(BlockId block) override {
    return pool_.block_data(block);
  }

 private:
  client::Pool& pool_;
  client::StepId step_ = 0;
  std::vector<BlockId> to_vacate_;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_POOL_BLOCK_SOURCE_H_
