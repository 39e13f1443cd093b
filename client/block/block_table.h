// BlockTable: which blocks of a pool are backed, handed out, cached or free,
// and which pages could go back to the broker. It is the truth that engines'
// own maps are checked against.
//
//   ASSIGN_OR_RETURN(BlockTable table, BlockTable::Create(geometry));
//   size_t n = table.TakeAbsent(absl::MakeSpan(pages));  // put into an Acquire
//   RETURN_IF_ERROR(table.Back(pages[0], generation));   // granted and mapped
//   if (!table.Alloc(absl::MakeSpan(blocks))) ...        // too few; took none
//   RETURN_IF_ERROR(table.Free(blocks, last_scheduled_step));
//   table.CompleteStep(last_scheduled_step);             // its output is back
//   n = table.TakeIdle(absl::MakeSpan(pages));           // unmap these, then
//   RETURN_IF_ERROR(table.Returned(pages[0]));
//
// Where a page stands:
//
//             TakeAbsent               Back
//   ABSENT ---------------> REQUESTED ------> BACKED <-------+
//    ^  ^                       |               |            |
//    |  +------- Abandon -------+               | Take...    | KeepBacked
//    |                                          v            |
//    +----------------- Returned ----------- RETURNING ------+
//
// and, while BACKED, its tier (block_types.h), which follows from its blocks
// and from Close, which forbids new ones:
//
//   IDLE <-----> CACHED <-----> IN USE
//     |             |            |
//     +-- Close ----+            | Close
//            v                   v
//         CLOSED <--empties-- CLOSING --Vacate--> VACATING --empties--> CLOSED
//
// Reopen puts a page from the lower row back where its blocks belong.
//
// Where a block stands: FREE -Alloc-> USED -Free-> FREE, or USED -Cache->
// CACHED -Touch-> USED. A cached block is evicted, least recently cached first,
// when Alloc finds no free one, and when its page is taken or closed. Its
// holder learns of it from DrainRemovals, or from Touch, which fails for a
// generation that is gone.
//
// Fence: Free and Cache stamp the page with a step that may still touch the
// blocks. Such a page is not taken before CompleteStep of that step; it may be
// handed out again at once, since the engine's stream keeps steps in order.
//
// Ownership: holds numbers only, no memory of the pool's.
//
// Threads: none of its own, no lock; the caller holds the pool's lock.
//
// Cost: nothing allocates after Create. Calls on blocks cost by the block;
// those on pages by the page taken, or (Close, Vacate, Reopen, fenced pages to
// skip) by the pages of a tier. Counts take constant time.
//
// Errors: InvalidArgument for blocks that are not what the call needs,
// FailedPrecondition for such pages; the table is then as it was.
#ifndef KVBROKER_CLIENT_BLOCK_BLOCK_TABLE_H_
#define KVBROKER_CLIENT_BLOCK_BLOCK_TABLE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "broker/base/ids.h"
#include "client/block/block_geometry.h"
#include "client/block/block_types.h"
#include "client/block/index_list.h"
#include "client/block/index_set.h"
#include "client/block/index_stack.h"
#include "client/block/page_shelves.h"

namespace kvbroker::client {

class BlockTable {
 public:
  static absl::StatusOr<BlockTable> Create(const BlockGeometry& geometry);
  BlockTable(BlockTable&&) = default;
  BlockTable& operator=(BlockTable&&) = default;

  // All blocks' generations begin after this one, as if their contents had been
  // given up once more. REQUIRES: no block is used or cached.
  void StartGenerationsAfter(BlockGeneration generation);
  BlockGeneration latest_generation() const;

  // ---- Pages come -----------------------------------------------------------
  // Every Take... fills `out` from the front and answers how many it took.

  // The lowest absent indexes that hold a whole block; now REQUESTED.
  size_t TakeAbsent(absl::Span<PageIndex> out);
  // The same of one page, which the broker chose. FailedPrecondition: it is not
  // absent, or holds no whole block.
  absl::Status TakeAbsentAt(PageIndex page);
  // The page is mapped: its blocks are free from now on.
  absl::Status Back(PageIndex page, Generation generation);
  // It was refused, or cancelled.
  absl::Status Abandon(PageIndex page);

  // ---- Blocks ---------------------------------------------------------------

  // Fills `out`, or returns false and changes nothing. Takes free blocks of the
  // fullest pages first, so that others empty out; then evicts cached ones.
  bool Alloc(absl::Span<BlockId> out);
  // Exactly these, which must be free, on open pages, and each named once; or
  // none. Costs by the blocks of their pages.
  absl::Status AllocAt(absl::Span<const BlockId> blocks);
  // All or none of `blocks`, which must be used and each named once.
  // `last_step`: the last step scheduled so far.
  absl::Status Free(absl::Span<const BlockId> blocks, StepId last_step);
  // As Free, but keeps the contents for Touch; later ones count as used later.
  // On a closing page they are given up at once, and removals say so.
  absl::Status Cache(absl::Span<const BlockId> blocks, StepId last_step);
  // Makes all `blocks` used, if each still holds the content of its generation,
  // cached or used already; else returns false and changes nothing.
  bool Touch(absl::Span<const BlockId> blocks,
             absl::Span<const BlockGeneration> generations);
  // The contents of these cached blocks are worth nothing: frees them.
  absl::Status Uncache(absl::Span<const BlockId> blocks);
  // Evicts, least recently used first, until at most `keep` are cached.
  size_t TrimCached(size_t keep);

  // Cached contents that the table evicted since they were last drained: fills
  // `out`, oldest first. A block evicted twice meanwhile is named once, with
  // the later generation.
  size_t DrainRemovals(absl::Span<BlockRemoval> out);

  // ---- Steps and time
  // ---------------------------------------------------------

  // The outputs of all steps up to this one are back.
  void CompleteStep(StepId step);
  // What idle pages are stamped with; never goes back.
  void SetNow(absl::Time now) { shelves_.SetNow(now); }

  // ---- Pages go -------------------------------------------------------------
  // What is taken is RETURNING. Fenced pages stay, and so does the null
  // block's.

  // Closed pages, in the order in which they emptied.
  size_t TakeClosed(absl::Span<PageIndex> out);
  // Closed pages, then idle ones, longest idle first.
  size_t TakeIdle(absl::Span<PageIndex> out);
  // Pages idle since `since` or longer, while more than `keep` are idle.
  size_t TakeIdleSince(absl::Time since, size_t keep,
                       absl::Span<PageIndex> out);
  // Pages with cached blocks only, the one longest without a used block first;
  // evicts those blocks.
  size_t TakeCached(absl::Span<PageIndex> out);

  // Closes up to `pages` more: idle, then cached ones (of both only fenced ones
  // are left after a Take), then those with the fewest used blocks; none dearer
  // than `dearest`. Their cached blocks are evicted. Answers how many.
  size_t Close(size_t pages, PageTier dearest = PageTier::kInUse);
  // Marks up to `pages` more closing pages, those with the fewest used blocks,
  // for preemption. Answers how many.
  size_t Vacate(size_t pages);
  // Opens up to `pages` closing, vacating or closed pages, those with the most
  // used blocks first. Answers how many.
  size_t Reopen(size_t pages);

  // The used blocks of vacating pages, whose requests shall be preempted.
  size_t BlocksToVacate(absl::Span<BlockId> out) const;

  // The page is unmapped.
  absl::Status Returned(PageIndex page);
  // It could not be unmapped: it is idle again.
  absl::Status KeepBacked(PageIndex page);

  // ---- What there is
  // ----------------------------------------------------------

  const BlockGeometry& geometry() const { return geometry_; }

  // Blocks on closing pages are in none of the first three.
  size_t free_blocks() const { return free_blocks_; }
  size_t cached_blocks() const { return cached_.size(); }
  size_t allocatable_blocks() const { return free_blocks_ + cached_.size(); }
  size_t used_blocks() const { return used_blocks_; }  // without the null block
  size_t pending_removals() const { return removals_.size(); }

  // Absent pages that hold no whole block are not counted.
  size_t pages(PageState state) const {
    return pages_by_state_[static_cast<int>(state)];
  }
  size_t pages(PageTier tier) const { return shelves_.size(tier); }
  size_t closing_pages() const {
    return pages(PageTier::kClosing) + pages(PageTier::kVacating) +
           pages(PageTier::kClosed);
  }
  // Since when the longest idle page is idle: when to look for decay next.
  std::optional<absl::Time> oldest_idle_since() const;
  // How many pages are idle since `since` or longer. Costs by the page counted.
  size_t idle_pages_since(absl::Time since) const;
  StepId completed_step() const { return completed_step_; }

  // REQUIRE a block or page of the geometry; tier, generation and fence mean
  // something for a backed page only.
  BlockState block_state(BlockId block) const { return blocks_[block].state; }
  BlockGeneration generation(BlockId block) const {
    return blocks_[block].generation;
  }
  PageIndex page_of(BlockId block) const {
    return PageIndex(blocks_[block].page);
  }
  PageState page_state(PageIndex page) const {
    return pages_[page.value()].state;
  }
  PageTier page_tier(PageIndex page) const {
    return shelves_.tier(page.value());
  }
  Generation page_generation(PageIndex page) const {
    return pages_[page.value()].generation;
  }
  // The null block counts.
  size_t page_used_blocks(PageIndex page) const {
    return shelves_.contents(page.value()).used;
  }
  bool is_fenced(PageIndex page) const {
    return pages_[page.value()].last_step > completed_step_;
  }

  // Recomputes everything from the blocks' states; Internal names what differs.
  absl::Status CheckInvariants() const;

 private:
  struct Block {
    IndexLink link;          // on its page's free stack, or on cached_
    IndexLink removal_link;  // on removals_
    uint32_t page = 0;
    BlockGeneration generation = 0;
    BlockGeneration removed_generation = 0;  // where removal_pending
    BlockState state = BlockState::kUnbacked;
    bool removal_pending = false;
  };
  using CachedList = IndexList<Block, &Block::link>;
  using FreeStack = IndexStack<Block, &Block::link>;

  struct Page {
    FreeStack free;
    PageState state = PageState::kAbsent;
    Generation generation;
    StepId last_step = 0;  // may touch the page until it is complete
  };

  explicit BlockTable(const BlockGeometry& geometry);

  bool HasBlock(BlockId block) const {
    return block >= 0 && static_cast<size_t>(block) < blocks_.size();
  }

  // Fails, and changes nothing, unless the page is in state `from`.
  absl::Status Transition(PageIndex page, PageState from, PageState to);
  void FillWithFreeBlocks(uint32_t page);
  size_t Take(PageTier tier, absl::Time idle_since, absl::Span<PageIndex> out);
  void BeginReturn(uint32_t page);
  void BeginClose(uint32_t page);

  // Moves all `blocks` from state `from` to `to`, or fails and moves none.
  absl::Status Restate(absl::Span<const BlockId> blocks, BlockState from,
                       BlockState to);
  absl::Status WhyNot(absl::Span<const BlockId> blocks, size_t wrong,
                      BlockState needed) const;
  // Calls action(page, run) for each run of blocks of one page.
  template <typename Action>
  void ForRunsOnPage(absl::Span<const BlockId> blocks, Action action);
  size_t AllocOnPage(uint32_t page, absl::Span<BlockId> out);
  void PutFree(uint32_t page, absl::Span<const BlockId> blocks);
  void Evict(BlockId block);
  void EvictAllOn(uint32_t page);

  BlockGeometry geometry_;
  std::vector<Block> blocks_;
  std::vector<Page> pages_;
  IndexSet absent_;  // without those that hold no whole block
  std::array<size_t, kPageStates> pages_by_state_{};
  PageShelves shelves_;  // the backed pages
  CachedList cached_;    // least recently used first
  IndexList<Block, &Block::removal_link> removals_;
  size_t free_blocks_ = 0;  // on open pages
  size_t used_blocks_ = 0;
  StepId completed_step_ = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_BLOCK_TABLE_H_
