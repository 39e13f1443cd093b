// BlockTableModel: what BlockTable promises, kept the slow and plain way in
// maps and lists. Tests run both side by side; see block_table_random_test.cc.
//
// Where the table must make one choice (which page is taken, which block is
// evicted) the model makes it too. Where several would do (which of the fullest
// pages, which of those with the fewest used blocks) it judges the table's.
// Every call that judges answers "" or what was wrong.
#ifndef KVBROKER_CLIENT_BLOCK_BLOCK_TABLE_MODEL_H_
#define KVBROKER_CLIENT_BLOCK_BLOCK_TABLE_MODEL_H_

#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/block/block_geometry.h"
#include "client/block/block_table.h"
#include "client/block/block_types.h"

namespace kvbroker::client {

class BlockTableModel {
 public:
  using Blocks = std::vector<BlockId>;
  using Pages = std::vector<uint32_t>;

  explicit BlockTableModel(const BlockGeometry& geometry);

  // ---- The same calls, with the table's answer where it has a choice.
  Pages TakeAbsent(size_t count);
  bool TakeAbsentAt(uint32_t page);
  bool Back(uint32_t page);
  bool Abandon(uint32_t page);
  std::string Alloc(size_t count, bool ok, const Blocks& chosen);
  bool AllocAt(const Blocks& blocks);
  bool Free(const Blocks& blocks, StepId step);
  bool Cache(const Blocks& blocks, StepId step);
  bool Touch(const Blocks& blocks, const std::vector<BlockGeneration>& wanted);
  bool Uncache(const Blocks& blocks);
  size_t TrimCached(size_t keep);
  std::vector<BlockRemoval> DrainRemovals(size_t count);
  void CompleteStep(StepId step);
  void SetNow(absl::Time now) { now_ = std::max(now_, now); }
  Pages TakeClosed(size_t count) { return Take(PageTier::kClosed, count); }
  Pages TakeIdle(size_t count);
  Pages TakeIdleSince(absl::Time since, size_t keep, size_t count);
  Pages TakeCached(size_t count) { return Take(PageTier::kCached, count); }
  bool Returned(uint32_t page);
  bool KeepBacked(uint32_t page);

  // After the table has closed, vacated or reopened: adopts its choice.
  std::string Close(size_t count, PageTier dearest, size_t answer,
                    const BlockTable& table);
  std::string Vacate(size_t count, size_t answer, const BlockTable& table);
  std::string Reopen(size_t count, size_t answer, const BlockTable& table);

  // Compares every block, page and count.
  std::string Compare(const BlockTable& table) const;

  Blocks BlocksIn(BlockState state) const;
  Pages PagesIn(PageState state) const;

 private:
  enum class Closing { kNo, kYes, kVacating };
  struct Page {
    PageState state = PageState::kAbsent;
    Closing closing = Closing::kNo;
    PageTier tier = PageTier::kIdle;
    uint64_t arrival = 0;  // when it came to this tier
    absl::Time idle_since;
    StepId last_step = 0;
  };
  struct Block {
    BlockState state = BlockState::kUnbacked;
    BlockGeneration generation = 0;
  };

  size_t Count(uint32_t page, BlockState state) const;
  size_t Used(uint32_t page) const;
  bool IsOpenWithFree(uint32_t page) const;
  void Retier(uint32_t page);
  void Fill(uint32_t page);
  void Evict(BlockId block);
  // Pages of a tier in the order of arrival.
  Pages InTier(PageTier tier) const;
  Pages Take(PageTier tier, size_t count);
  bool AllAre(const Blocks& blocks, BlockState state) const;
  bool Move(uint32_t page, PageState from, PageState to);

  BlockGeometry geometry_;
  std::map<uint32_t, Page> pages_;
  std::map<BlockId, Block> blocks_;  // without straddling ones
  std::map<uint32_t, Blocks> blocks_of_;
  std::deque<BlockId> cached_;  // least recently used first
  std::deque<BlockRemoval> removals_;
  StepId completed_ = 0;
  absl::Time now_ = absl::InfinitePast();
  uint64_t arrivals_ = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_BLOCK_TABLE_MODEL_H_
