// BlockTable::CheckInvariants: what must hold between any two calls.
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "client/block/block_table.h"

namespace kvbroker::client {
namespace {

template <typename... What>
absl::Status Broken(const What&... what) {
  return absl::InternalError(absl::StrCat("Block table: ", what...));
}

}  // namespace

absl::Status BlockTable::CheckInvariants() const {
  RETURN_IF_ERROR(shelves_.CheckInvariants());
  if (!cached_.IsConsistent(blocks_) || !removals_.IsConsistent(blocks_)) {
    return Broken("links of cached blocks or of removals are torn");
  }

  size_t free = 0;
  size_t used = 0;
  size_t cached = 0;
  size_t on_pages = 0;  // blocks that lie wholly on some page
  size_t absent = 0;
  size_t backed = 0;
  std::array<size_t, kPageStates> by_state{};
  for (uint32_t index = 0; index < pages_.size(); ++index) {
    const Page& page = pages_[index];
    const BlockId first = geometry_.FirstBlock(PageIndex(index));
    const BlockId end = geometry_.EndBlock(PageIndex(index));
    on_pages += end - first;
    if (first < end) ++by_state[static_cast<int>(page.state)];
    absent += absent_.Contains(index);
    if (absent_.Contains(index) !=
        (page.state == PageState::kAbsent && first < end)) {
      return Broken("set of absent pages is wrong; page: ", index,
                    ", state: ", Name(page.state));
    }

    std::array<size_t, 5> count{};
    for (BlockId block = first; block < end; ++block) {
      ++count[static_cast<int>(blocks_[block].state)];
      if (blocks_[block].page != index) {
        return Broken("block names another page; block: ", block,
                      ", page: ", index, ", named: ", blocks_[block].page);
      }
    }
    const auto blocks_in = [&](BlockState state) {
      return count[static_cast<int>(state)];
    };
    const size_t reserved = blocks_in(BlockState::kReserved);
    const bool is_null_page = index == 0 && geometry_.reserve_null_block &&
                              page.state == PageState::kBacked;
    if (reserved != (is_null_page ? 1 : 0) ||
        (reserved == 1 && blocks_[kNullBlock].state != BlockState::kReserved)) {
      return Broken("wrong blocks are reserved; page: ", index,
                    ", reserved: ", reserved);
    }
    size_t stacked = 0;
    for (uint32_t i = page.free.top(); i != kNoIndex;
         i = FreeStack::Next(blocks_, i)) {
      if (blocks_[i].page != index || blocks_[i].state != BlockState::kFree) {
        return Broken("foreign block on a free stack; page: ", index,
                      ", block: ", i, ", state: ", Name(blocks_[i].state));
      }
      // More than there are: a block is on it twice, and the walk has no end.
      if (++stacked > blocks_in(BlockState::kFree)) break;
    }
    if (stacked != page.free.size() ||
        stacked != blocks_in(BlockState::kFree)) {
      return Broken("free stack is wrong; page: ", index,
                    ", on the stack: ", page.free.size(),
                    ", free: ", blocks_in(BlockState::kFree));
    }
    if (page.state != PageState::kBacked) {
      if (blocks_in(BlockState::kUnbacked) !=
          static_cast<size_t>(end - first)) {
        return Broken("blocks of a page that is not backed are; page: ", index,
                      ", state: ", Name(page.state));
      }
      continue;
    }
    ++backed;
    const PageShelves::Contents& contents = shelves_.contents(index);
    if (blocks_in(BlockState::kUnbacked) != 0 ||
        contents.free != blocks_in(BlockState::kFree) ||
        contents.used != blocks_in(BlockState::kUsed) + reserved ||
        contents.cached != blocks_in(BlockState::kCached) ||
        contents.pinned != is_null_page) {
      return Broken("page's contents are miscounted; page: ", index,
                    ", free: ", contents.free, ", used: ", contents.used,
                    ", cached: ", contents.cached);
    }
    if (PageShelves::IsOpen(shelves_.tier(index))) free += contents.free;
    used += blocks_in(BlockState::kUsed);
    cached += contents.cached;
  }

  size_t shelved = 0;
  for (int tier = 0; tier < kPageTiers; ++tier) {
    shelved += shelves_.size(static_cast<PageTier>(tier));
  }
  if (by_state != pages_by_state_ || absent != absent_.size() ||
      backed != shelved) {
    return Broken("pages are miscounted; absent: ", absent,
                  ", backed: ", backed, ", on shelves: ", shelved);
  }
  if (free != free_blocks_ || used != used_blocks_ ||
      cached != cached_.size()) {
    return Broken("blocks are miscounted; free: ", free, " for ", free_blocks_,
                  ", used: ", used, " for ", used_blocks_, ", cached: ", cached,
                  " for ", cached_.size());
  }
  for (uint32_t i = cached_.front(); i != kNoIndex;
       i = CachedList::Next(blocks_, i)) {
    if (blocks_[i].state != BlockState::kCached) {
      return Broken("block on the list of cached ones is not; block: ", i,
                    ", state: ", Name(blocks_[i].state));
    }
  }

  size_t backed_blocks = 0;
  for (const Block& block : blocks_) {
    backed_blocks += block.state != BlockState::kUnbacked;
  }
  size_t most = 0;
  for (uint32_t index = 0; index < pages_.size(); ++index) {
    if (pages_[index].state != PageState::kBacked) continue;
    most += geometry_.BlocksOn(PageIndex(index));
  }
  if (backed_blocks != most || on_pages > blocks_.size()) {
    return Broken("straddling blocks are backed; backed: ", backed_blocks,
                  ", on backed pages: ", most);
  }

  size_t pending = 0;
  for (const Block& block : blocks_) pending += block.removal_pending;
  if (pending != removals_.size()) {
    return Broken("removals are miscounted; marked: ", pending,
                  ", queued: ", removals_.size());
  }
  for (uint32_t i = removals_.front(); i != kNoIndex;
       i = removals_.Next(blocks_, i)) {
    // A generation ahead of the block's would name content that still is there.
    if (!blocks_[i].removal_pending ||
        blocks_[i].removed_generation == blocks_[i].generation) {
      return Broken("removal names content that is there; block: ", i);
    }
  }
  return absl::OkStatus();
}

}  // namespace kvbroker::client
