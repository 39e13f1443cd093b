#include "client/block/block_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"

namespace kvbroker::client {

absl::StatusOr<BlockTable> BlockTable::Create(const BlockGeometry& geometry) {
  RETURN_IF_ERROR(geometry.Validate());
  return BlockTable(geometry);
}

BlockTable::BlockTable(const BlockGeometry& geometry)
    : geometry_(geometry),
      blocks_(geometry.block_ids()),
      pages_(geometry.max_pages),
      absent_(geometry.max_pages),
      shelves_(geometry.max_pages, geometry.max_blocks_per_page()) {
  for (uint32_t page = 0; page < geometry_.max_pages; ++page) {
    const BlockId first = geometry_.FirstBlock(PageIndex(page));
    const BlockId end = geometry_.EndBlock(PageIndex(page));
    for (BlockId block = first; block < end; ++block) {
      blocks_[block].page = page;
    }
    // One that straddles lies on the page of its first byte.
    if (static_cast<size_t>(end) < blocks_.size()) blocks_[end].page = page;
    if (first < end) absent_.Insert(page);
  }
  pages_by_state_[static_cast<int>(PageState::kAbsent)] = absent_.size();
}

void BlockTable::StartGenerationsAfter(BlockGeneration generation) {
  for (Block& block : blocks_) block.generation = generation + 1;
}

BlockGeneration BlockTable::latest_generation() const {
  BlockGeneration latest = 0;
  for (const Block& block : blocks_) {
    latest = std::max(latest, block.generation);
  }
  return latest;
}

// ---- Pages come -------------------------------------------------------------

size_t BlockTable::TakeAbsent(absl::Span<PageIndex> out) {
  const size_t count = std::min(out.size(), absent_.size());
  for (size_t i = 0; i < count; ++i) {
    out[i] = PageIndex(absent_.Lowest());
    KVB_CHECK(
        Transition(out[i], PageState::kAbsent, PageState::kRequested).ok());
  }
  return count;
}

absl::Status BlockTable::TakeAbsentAt(PageIndex page) {
  const uint32_t index = page.value();
  if (index < pages_.size() && pages_[index].state == PageState::kAbsent &&
      !absent_.Contains(index)) {
    return absl::FailedPreconditionError(
        absl::StrCat("Page holds no whole block; page: ", index));
  }
  return Transition(page, PageState::kAbsent, PageState::kRequested);
}

absl::Status BlockTable::Back(PageIndex page, Generation generation) {
  RETURN_IF_ERROR(Transition(page, PageState::kRequested, PageState::kBacked));
  pages_[page.value()].generation = generation;
  FillWithFreeBlocks(page.value());
  return absl::OkStatus();
}

absl::Status BlockTable::Abandon(PageIndex page) {
  return Transition(page, PageState::kRequested, PageState::kAbsent);
}

absl::Status BlockTable::Transition(PageIndex page, PageState from,
                                    PageState to) {
  const uint32_t index = page.value();
  if (index >= pages_.size()) {
    return absl::FailedPreconditionError(
        absl::StrCat("Page is outside of the pool; page: ", index,
                     ", pages: ", pages_.size()));
  }
  Page& record = pages_[index];
  if (record.state != from) {
    return absl::FailedPreconditionError(absl::StrCat(
        "Page is not in the state that this needs; page: ", index,
        ", state: ", Name(record.state), ", needed: ", Name(from)));
  }
  if (from == PageState::kAbsent) absent_.Erase(index);
  if (to == PageState::kAbsent) absent_.Insert(index);
  --pages_by_state_[static_cast<int>(from)];
  ++pages_by_state_[static_cast<int>(to)];
  record.state = to;
  return absl::OkStatus();
}

void BlockTable::FillWithFreeBlocks(uint32_t page) {
  Page& record = pages_[page];
  PageShelves::Contents contents;
  BlockId first = geometry_.FirstBlock(PageIndex(page));
  const BlockId end = geometry_.EndBlock(PageIndex(page));
  if (page == 0 && geometry_.reserve_null_block) {
    blocks_[kNullBlock].state = BlockState::kReserved;
    contents.used = 1;
    contents.pinned = true;
    ++first;
  }
  // Backwards, so that the lowest is handed out first.
  for (BlockId block = end - 1; block >= first; --block) {
    blocks_[block].state = BlockState::kFree;
    record.free.Push(blocks_, block);
  }
  contents.free = record.free.size();
  free_blocks_ += contents.free;
  shelves_.Add(page, contents);
}

// ---- Blocks -----------------------------------------------------------------

bool BlockTable::Alloc(absl::Span<BlockId> out) {
  if (out.size() > allocatable_blocks()) return false;
  size_t filled = 0;
  while (filled < out.size() && free_blocks_ > 0) {
    filled += AllocOnPage(shelves_.FullestWithFree(), out.subspan(filled));
  }
  for (; filled < out.size(); ++filled) {
    const BlockId block = static_cast<BlockId>(cached_.front());
    const uint32_t page = blocks_[block].page;
    Evict(block);
    AllocOnPage(page, out.subspan(filled, 1));
  }
  return true;
}

absl::Status BlockTable::AllocAt(absl::Span<const BlockId> blocks) {
  for (BlockId block : blocks) {
    if (!HasBlock(block) || blocks_[block].state != BlockState::kFree ||
        PageShelves::IsOpen(shelves_.tier(blocks_[block].page))) {
      continue;
    }
    return absl::FailedPreconditionError(absl::StrCat(
        "Block is on a page that gets no new ones; block: ", block));
  }
  RETURN_IF_ERROR(Restate(blocks, BlockState::kFree, BlockState::kUsed));
  ForRunsOnPage(blocks, [&](uint32_t page, absl::Span<const BlockId> run) {
    // Those that stay free, in the order in which they were.
    std::vector<uint32_t> kept;
    FreeStack& free = pages_[page].free;
    while (!free.empty()) {
      const uint32_t block = free.Pop(blocks_);
      if (blocks_[block].state == BlockState::kFree) kept.push_back(block);
    }
    for (auto it = kept.rbegin(); it != kept.rend(); ++it) {
      free.Push(blocks_, *it);
    }
    PageShelves::Contents& contents = shelves_.contents(page);
    const size_t taken = contents.free - kept.size();
    contents.free -= taken;
    contents.used += taken;
    free_blocks_ -= taken;
    used_blocks_ += taken;
    shelves_.Refile(page);
  });
  return absl::OkStatus();
}

// Fills the front of `out` with the page's free blocks; answers how many.
size_t BlockTable::AllocOnPage(uint32_t page, absl::Span<BlockId> out) {
  FreeStack free = pages_[page].free;  // a copy stays in registers
  const size_t count = std::min(out.size(), free.size());
  for (size_t i = 0; i < count; ++i) {
    const uint32_t block = free.Pop(blocks_);
    blocks_[block].state = BlockState::kUsed;
    out[i] = static_cast<BlockId>(block);
  }
  pages_[page].free = free;
  PageShelves::Contents& contents = shelves_.contents(page);
  contents.free -= count;
  contents.used += count;
  free_blocks_ -= count;
  used_blocks_ += count;
  shelves_.Refile(page);
  return count;
}

absl::Status BlockTable::Free(absl::Span<const BlockId> blocks,
                              StepId last_step) {
  RETURN_IF_ERROR(Restate(blocks, BlockState::kUsed, BlockState::kFree));
  ForRunsOnPage(blocks, [&](uint32_t page, absl::Span<const BlockId> run) {
    pages_[page].last_step = std::max(pages_[page].last_step, last_step);
    shelves_.contents(page).used -= run.size();
    PutFree(page, run);
  });
  used_blocks_ -= blocks.size();
  return absl::OkStatus();
}

absl::Status BlockTable::Cache(absl::Span<const BlockId> blocks,
                               StepId last_step) {
  RETURN_IF_ERROR(Restate(blocks, BlockState::kUsed, BlockState::kCached));
  ForRunsOnPage(blocks, [&](uint32_t page, absl::Span<const BlockId> run) {
    pages_[page].last_step = std::max(pages_[page].last_step, last_step);
    for (BlockId block : run) cached_.PushBack(blocks_, block);
    PageShelves::Contents& contents = shelves_.contents(page);
    contents.used -= run.size();
    contents.cached += run.size();
    if (!PageShelves::IsOpen(shelves_.tier(page))) {
      for (BlockId block : run) Evict(block);
    }
    shelves_.Refile(page);
  });
  used_blocks_ -= blocks.size();
  return absl::OkStatus();
}

bool BlockTable::Touch(absl::Span<const BlockId> blocks,
                       absl::Span<const BlockGeneration> generations) {
  if (blocks.size() != generations.size()) return false;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (!HasBlock(blocks[i])) return false;
    const Block& block = blocks_[blocks[i]];
    const bool has_content =
        block.state == BlockState::kUsed || block.state == BlockState::kCached;
    if (!has_content || block.generation != generations[i]) return false;
  }
  ForRunsOnPage(blocks, [&](uint32_t page, absl::Span<const BlockId> run) {
    PageShelves::Contents& contents = shelves_.contents(page);
    for (BlockId id : run) {
      Block& block = blocks_[id];
      if (block.state == BlockState::kUsed) continue;
      cached_.Remove(blocks_, id);
      block.state = BlockState::kUsed;
      --contents.cached;
      ++contents.used;
      ++used_blocks_;
    }
    shelves_.Refile(page);
  });
  return true;
}

absl::Status BlockTable::Uncache(absl::Span<const BlockId> blocks) {
  RETURN_IF_ERROR(Restate(blocks, BlockState::kCached, BlockState::kFree));
  ForRunsOnPage(blocks, [&](uint32_t page, absl::Span<const BlockId> run) {
    for (BlockId block : run) cached_.Remove(blocks_, block);
    shelves_.contents(page).cached -= run.size();
    PutFree(page, run);
  });
  return absl::OkStatus();
}

size_t BlockTable::TrimCached(size_t keep) {
  size_t evicted = 0;
  for (; cached_.size() > keep; ++evicted) {
    const BlockId block = static_cast<BlockId>(cached_.front());
    Evict(block);
    shelves_.Refile(blocks_[block].page);
  }
  return evicted;
}

size_t BlockTable::DrainRemovals(absl::Span<BlockRemoval> out) {
  const size_t count = std::min(out.size(), removals_.size());
  for (size_t i = 0; i < count; ++i) {
    const BlockId id = static_cast<BlockId>(removals_.PopFront(blocks_));
    blocks_[id].removal_pending = false;
    out[i] = {.block = id, .generation = blocks_[id].removed_generation};
  }
  return count;
}

absl::Status BlockTable::Restate(absl::Span<const BlockId> blocks,
                                 BlockState from, BlockState to) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    const BlockId id = blocks[i];
    if (HasBlock(id) && blocks_[id].state == from) {
      blocks_[id].state = to;
      continue;
    }
    absl::Status error = WhyNot(blocks, i, from);
    for (BlockId done : blocks.first(i)) blocks_[done].state = from;
    return error;
  }
  return absl::OkStatus();
}

// What is wrong with blocks[wrong], of which the call needs state `needed`.
absl::Status BlockTable::WhyNot(absl::Span<const BlockId> blocks, size_t wrong,
                                BlockState needed) const {
  const BlockId id = blocks[wrong];
  if (!HasBlock(id)) {
    return absl::InvalidArgumentError(
        absl::StrCat("Block is not of this pool; block: ", id,
                     ", blocks: ", blocks_.size()));
  }
  const auto before = blocks.first(wrong);
  if (std::find(before.begin(), before.end(), id) != before.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("Block is named twice in one call; block: ", id));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("Block is not ", Name(needed), "; block: ", id,
                   ", state: ", Name(blocks_[id].state)));
}

template <typename Action>
void BlockTable::ForRunsOnPage(absl::Span<const BlockId> blocks,
                               Action action) {
  while (!blocks.empty()) {
    const uint32_t page = blocks_[blocks.front()].page;
    size_t length = 1;
    while (length < blocks.size() && blocks_[blocks[length]].page == page) {
      ++length;
    }
    action(page, blocks.first(length));
    blocks.remove_prefix(length);
  }
}

// Gives up the content of blocks whose state is FREE already, puts them on
// their page's free stack and the page where it then belongs.
void BlockTable::PutFree(uint32_t page, absl::Span<const BlockId> blocks) {
  FreeStack free = pages_[page].free;
  for (BlockId block : blocks) {
    ++blocks_[block].generation;
    free.Push(blocks_, block);
  }
  pages_[page].free = free;
  shelves_.contents(page).free += blocks.size();
  if (PageShelves::IsOpen(shelves_.tier(page))) free_blocks_ += blocks.size();
  shelves_.Refile(page);
}

// Frees a cached block and queues its removal. The page must be refiled after.
void BlockTable::Evict(BlockId id) {
  Block& block = blocks_[id];
  cached_.Remove(blocks_, id);
  block.removed_generation = block.generation++;
  if (!std::exchange(block.removal_pending, true)) {
    removals_.PushBack(blocks_, id);
  }
  block.state = BlockState::kFree;
  pages_[block.page].free.Push(blocks_, id);
  PageShelves::Contents& contents = shelves_.contents(block.page);
  --contents.cached;
  ++contents.free;
  if (PageShelves::IsOpen(shelves_.tier(block.page))) ++free_blocks_;
}

void BlockTable::EvictAllOn(uint32_t page) {
  const BlockId end = geometry_.EndBlock(PageIndex(page));
  for (BlockId block = geometry_.FirstBlock(PageIndex(page));
       block < end && shelves_.contents(page).cached > 0; ++block) {
    if (blocks_[block].state == BlockState::kCached) Evict(block);
  }
}

// ---- Steps ------------------------------------------------------------------

void BlockTable::CompleteStep(StepId step) {
  completed_step_ = std::max(completed_step_, step);
}

// ---- Pages go ---------------------------------------------------------------

size_t BlockTable::TakeClosed(absl::Span<PageIndex> out) {
  return Take(PageTier::kClosed, absl::InfiniteFuture(), out);
}

size_t BlockTable::TakeIdle(absl::Span<PageIndex> out) {
  const size_t closed = TakeClosed(out);
  return closed +
         Take(PageTier::kIdle, absl::InfiniteFuture(), out.subspan(closed));
}

size_t BlockTable::TakeIdleSince(absl::Time since, size_t keep,
                                 absl::Span<PageIndex> out) {
  const size_t idle = pages(PageTier::kIdle);
  const size_t spare = idle > keep ? idle - keep : 0;
  return Take(PageTier::kIdle, since, out.first(std::min(out.size(), spare)));
}

size_t BlockTable::TakeCached(absl::Span<PageIndex> out) {
  return Take(PageTier::kCached, absl::InfiniteFuture(), out);
}

// `idle_since` says something of idle pages only.
size_t BlockTable::Take(PageTier tier, absl::Time idle_since,
                        absl::Span<PageIndex> out) {
  size_t taken = 0;
  uint32_t next = kNoIndex;
  for (uint32_t page = shelves_.First(tier);
       page != kNoIndex && taken < out.size(); page = next) {
    next = shelves_.Next(page);
    if (tier == PageTier::kIdle && shelves_.idle_since(page) > idle_since) {
      break;
    }
    if (is_fenced(PageIndex(page))) continue;
    BeginReturn(page);
    out[taken++] = PageIndex(page);
  }
  return taken;
}

void BlockTable::BeginReturn(uint32_t page) {
  EvictAllOn(page);
  Page& record = pages_[page];
  KVB_CHECK(shelves_.contents(page).used == 0);
  if (PageShelves::IsOpen(shelves_.tier(page))) {
    free_blocks_ -= record.free.size();
  }
  while (!record.free.empty()) {
    blocks_[record.free.Pop(blocks_)].state = BlockState::kUnbacked;
  }
  shelves_.Remove(page);
  KVB_CHECK(
      Transition(PageIndex(page), PageState::kBacked, PageState::kReturning)
          .ok());
}

size_t BlockTable::Close(size_t pages, PageTier dearest) {
  size_t closed = 0;
  for (PageTier tier : {PageTier::kIdle, PageTier::kCached}) {
    if (tier > dearest) return closed;
    for (; closed < pages && shelves_.size(tier) > 0; ++closed) {
      BeginClose(shelves_.First(tier));
    }
  }
  if (dearest < PageTier::kInUse || closed == pages) return closed;
  const std::vector<uint32_t>& picked = shelves_.Pick(
      {PageTier::kInUse}, PageShelves::Prefer::kFewestUsed, pages - closed);
  for (uint32_t page : picked) BeginClose(page);
  return closed + picked.size();
}

void BlockTable::BeginClose(uint32_t page) {
  EvictAllOn(page);
  free_blocks_ -= pages_[page].free.size();
  shelves_.Close(page);
}

size_t BlockTable::Vacate(size_t pages) {
  const std::vector<uint32_t>& picked = shelves_.Pick(
      {PageTier::kClosing}, PageShelves::Prefer::kFewestUsed, pages);
  for (uint32_t page : picked) shelves_.Vacate(page);
  return picked.size();
}

size_t BlockTable::Reopen(size_t pages) {
  const std::vector<uint32_t>& picked = shelves_.Pick(
      {PageTier::kClosing, PageTier::kVacating, PageTier::kClosed},
      PageShelves::Prefer::kMostUsed, pages);
  for (uint32_t page : picked) {
    free_blocks_ += pages_[page].free.size();
    shelves_.Open(page);
  }
  return picked.size();
}

size_t BlockTable::BlocksToVacate(absl::Span<BlockId> out) const {
  size_t found = 0;
  for (uint32_t page = shelves_.First(PageTier::kVacating);
       page != kNoIndex && found < out.size(); page = shelves_.Next(page)) {
    const BlockId end = geometry_.EndBlock(PageIndex(page));
    for (BlockId block = geometry_.FirstBlock(PageIndex(page));
         block < end && found < out.size(); ++block) {
      if (blocks_[block].state == BlockState::kUsed) out[found++] = block;
    }
  }
  return found;
}

absl::Status BlockTable::Returned(PageIndex page) {
  return Transition(page, PageState::kReturning, PageState::kAbsent);
}

absl::Status BlockTable::KeepBacked(PageIndex page) {
  RETURN_IF_ERROR(Transition(page, PageState::kReturning, PageState::kBacked));
  FillWithFreeBlocks(page.value());
  return absl::OkStatus();
}

size_t BlockTable::idle_pages_since(absl::Time since) const {
  size_t count = 0;
  for (uint32_t page = shelves_.First(PageTier::kIdle);
       page != kNoIndex && shelves_.idle_since(page) <= since;
       page = shelves_.Next(page)) {
    ++count;
  }
  return count;
}

std::optional<absl::Time> BlockTable::oldest_idle_since() const {
  const uint32_t page = shelves_.First(PageTier::kIdle);
  if (page == kNoIndex) return std::nullopt;
  return shelves_.idle_since(page);
}

}  // namespace kvbroker::client
