// PoolBlockSource: the client library's Pool as the scheduler wants it.
//
// In host memory the stand-in for a GPU is immediate: a step's work is done when
// the step ends. Owns neither the pool nor its session.
#ifndef KVBROKER_CLIENT_REPLAY_POOL_BLOCK_SOURCE_H_
#define KVBROKER_CLIENT_REPLAY_POOL_BLOCK_SOURCE_H_

#include <cstddef>
#include <span>
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
  // In host memory the block itself.
  std::span<std::byte> BeginWrite(BlockId block) override {
    return {pool_.block_data(block),
            static_cast<size_t>(block_bytes().count())};
  }
  std::span<const std::byte> Read(BlockId block) override {
    return BeginWrite(block);
  }

 protected:
  client::Pool& pool() const { return pool_; }
  // Called at the end of a step, once it is scheduled: has StepDone called when
  // its work is done.
  virtual void WhenDone(client::StepId step) { pool_.StepDone(step); }

 private:
  client::Pool& pool_;
  client::StepId step_ = 0;
  std::vector<BlockId> to_vacate_;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_POOL_BLOCK_SOURCE_H_
