#include "client/replay/pool_block_source.h"

#include "absl/types/span.h"
#include "broker/base/check.h"

namespace kvbroker::replay {

void PoolBlockSource::StepBegin() { pool_.StepBegin(); }

void PoolBlockSource::StepEnd() {
  pool_.StepEnd(++step_);
  WhenDone(step_);
}

bool PoolBlockSource::Alloc(int64_t blocks, Urgency urgency,
                            std::vector<BlockId>* out) {
  const size_t before = out->size();
  out->resize(before + static_cast<size_t>(blocks));
  bool got = pool_.Alloc(absl::MakeSpan(*out).subspan(before),
                         urgency == Urgency::kRunning
                             ? kvbroker::Urgency::kRunning
                             : kvbroker::Urgency::kWaiting);
  if (!got) out->resize(before);
  return got;
}

void PoolBlockSource::Free(std::span<const BlockId> blocks) {
  KVB_CHECK(pool_.Free(absl::MakeConstSpan(blocks.data(), blocks.size())).ok());
}

std::span<const BlockId> PoolBlockSource::BlocksToVacate() {
  const PageCount pages = pool_.pages_to_vacate();
  if (pages == 0) return {};
  const int64_t per_page =
      pool_.options().geometry.page_bytes() / pool_.options().block_bytes;
  to_vacate_.resize(static_cast<size_t>(pages * (per_page + 1)));
  to_vacate_.resize(pool_.BlocksToVacate(absl::MakeSpan(to_vacate_)));
  return to_vacate_;
}

int64_t PoolBlockSource::CapacityBlocks() const {
  return static_cast<int64_t>(pool_.capacity_blocks());
}

BlockUsage PoolBlockSource::Usage() const {
  client::PoolUsage usage = pool_.usage();
  return {.in_use = usage.in_use, .idle = usage.idle, .held = usage.held()};
}

}  // namespace kvbroker::replay
