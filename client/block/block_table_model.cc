#include "client/block/block_table_model.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace kvbroker::client {
namespace {

size_t CountIf(const auto& range, auto matches) {
  return std::count_if(range.begin(), range.end(), matches);
}

}  // namespace

BlockTableModel::BlockTableModel(const BlockGeometry& geometry)
    : geometry_(geometry) {
  const int64_t page_bytes = geometry.page_bytes.count();
  const int64_t block_bytes = geometry.block_bytes.count();
  for (uint32_t page = 0; page < geometry.max_pages; ++page) {
    pages_[page];
    blocks_of_[page];
  }
  for (int64_t block = 0;
       (block + 1) * block_bytes <= page_bytes * geometry.max_pages; ++block) {
    const int64_t first_page = block * block_bytes / page_bytes;
    const int64_t last_page = ((block + 1) * block_bytes - 1) / page_bytes;
    if (first_page != last_page) continue;
    if (geometry.max_blocks > 0 && block >= geometry.max_blocks) break;
    blocks_[block];
    blocks_of_[first_page].push_back(block);
  }
}

size_t BlockTableModel::Count(uint32_t page, BlockState state) const {
  return CountIf(blocks_of_.at(page), [&](BlockId block) {
    return blocks_.at(block).state == state;
  });
}

size_t BlockTableModel::Used(uint32_t page) const {
  return Count(page, BlockState::kUsed) + Count(page, BlockState::kReserved);
}

bool BlockTableModel::IsOpenWithFree(uint32_t page) const {
  return pages_.at(page).state == PageState::kBacked &&
         pages_.at(page).closing == Closing::kNo &&
         Count(page, BlockState::kFree) > 0;
}

void BlockTableModel::Retier(uint32_t index) {
  Page& page = pages_[index];
  PageTier tier = PageTier::kInUse;
  if (page.closing != Closing::kNo) {
    tier = Used(index) == 0                     ? PageTier::kClosed
           : page.closing == Closing::kVacating ? PageTier::kVacating
                                                : PageTier::kClosing;
  } else if (Used(index) == 0) {
    tier = Count(index, BlockState::kCached) > 0 ? PageTier::kCached
                                                 : PageTier::kIdle;
  }
  if (page.arrival != 0 && tier == page.tier) return;
  page.tier = tier;
  page.arrival = ++arrivals_;
  page.idle_since = now_;
}

void BlockTableModel::Fill(uint32_t page) {
  for (BlockId block : blocks_of_.at(page)) {
    blocks_[block].state = block == kNullBlock && geometry_.reserve_null_block
                               ? BlockState::kReserved
                               : BlockState::kFree;
  }
  pages_[page].closing = Closing::kNo;
  pages_[page].arrival = 0;
  Retier(page);
}

bool BlockTableModel::Move(uint32_t page, PageState from, PageState to) {
  if (!pages_.contains(page) || pages_[page].state != from) return false;
  pages_[page].state = to;
  return true;
}

BlockTableModel::Pages BlockTableModel::TakeAbsent(size_t count) {
  Pages taken;
  for (auto& [index, page] : pages_) {
    if (taken.size() == count) break;
    if (page.state != PageState::kAbsent || blocks_of_.at(index).empty())
      continue;
    page.state = PageState::kRequested;
    taken.push_back(index);
  }
  return taken;
}

bool BlockTableModel::TakeAbsentAt(uint32_t page) {
  if (!pages_.contains(page) || blocks_of_.at(page).empty()) return false;
  return Move(page, PageState::kAbsent, PageState::kRequested);
}

bool BlockTableModel::Back(uint32_t page) {
  if (!Move(page, PageState::kRequested, PageState::kBacked)) return false;
  pages_[page].last_step = 0;
  Fill(page);
  return true;
}

bool BlockTableModel::Abandon(uint32_t page) {
  return Move(page, PageState::kRequested, PageState::kAbsent);
}

bool BlockTableModel::Returned(uint32_t page) {
  return Move(page, PageState::kReturning, PageState::kAbsent);
}

bool BlockTableModel::KeepBacked(uint32_t page) {
  if (!Move(page, PageState::kReturning, PageState::kBacked)) return false;
  Fill(page);
  return true;
}

std::string BlockTableModel::Alloc(size_t count, bool ok,
                                   const Blocks& chosen) {
  size_t free = 0;
  for (const auto& [index, page] : pages_) {
    if (IsOpenWithFree(index)) free += Count(index, BlockState::kFree);
  }
  if (ok != (count <= free + cached_.size())) {
    return absl::StrCat("Alloc answered ", ok, " with free: ", free,
                        ", cached: ", cached_.size());
  }
  if (!ok) return "";
  for (BlockId block : chosen) {
    if (!blocks_.contains(block)) return absl::StrCat("no block: ", block);
    const uint32_t chosen_page = geometry_.PageOf(block).value();
    if (blocks_[block].state == BlockState::kFree) {
      // Fullest first; nothing cached comes after that, and idle last.
      const auto rank = [this](uint32_t page) {
        return std::pair(Used(page), pages_[page].tier != PageTier::kIdle);
      };
      if (!IsOpenWithFree(chosen_page)) return "block of a closing page";
      for (const auto& [index, page] : pages_) {
        if (!IsOpenWithFree(index)) continue;
        const bool younger_idle = page.tier == PageTier::kIdle &&
                                  rank(index) == rank(chosen_page) &&
                                  page.arrival > pages_[chosen_page].arrival;
        if (rank(index) > rank(chosen_page) || younger_idle) {
          return absl::StrCat("page ", index, " comes before page of ", block);
        }
      }
    } else {
      for (const auto& [index, page] : pages_) {
        if (IsOpenWithFree(index)) return "evicted with free blocks left";
      }
      if (cached_.empty() || cached_.front() != block) {
        return absl::StrCat("not the least recently used: ", block);
      }
      Evict(block);
    }
    blocks_[block].state = BlockState::kUsed;
    Retier(chosen_page);
  }
  return "";
}

bool BlockTableModel::AllAre(const Blocks& blocks, BlockState state) const {
  return std::set(blocks.begin(), blocks.end()).size() == blocks.size() &&
         std::all_of(blocks.begin(), blocks.end(), [&](BlockId block) {
           return blocks_.contains(block) && blocks_.at(block).state == state;
         });
}

bool BlockTableModel::AllocAt(const Blocks& blocks) {
  if (!AllAre(blocks, BlockState::kFree)) return false;
  for (BlockId block : blocks) {
    if (!IsOpenWithFree(geometry_.PageOf(block).value())) return false;
  }
  // As one step: a page that is in use before is in use all along.
  for (BlockId block : blocks) {
    blocks_[block].state = BlockState::kUsed;
    Retier(geometry_.PageOf(block).value());
  }
  return true;
}

bool BlockTableModel::Free(const Blocks& blocks, StepId step) {
  if (!AllAre(blocks, BlockState::kUsed)) return false;
  for (BlockId block : blocks) {
    blocks_[block].state = BlockState::kFree;
    ++blocks_[block].generation;
    const uint32_t page = geometry_.PageOf(block).value();
    pages_[page].last_step = std::max(pages_[page].last_step, step);
    Retier(page);
  }
  return true;
}

bool BlockTableModel::Cache(const Blocks& blocks, StepId step) {
  if (!AllAre(blocks, BlockState::kUsed)) return false;
  for (BlockId block : blocks) {
    const uint32_t page = geometry_.PageOf(block).value();
    blocks_[block].state = BlockState::kCached;
    cached_.push_back(block);
    if (pages_[page].closing != Closing::kNo) Evict(block);
    pages_[page].last_step = std::max(pages_[page].last_step, step);
    Retier(page);
  }
  return true;
}

bool BlockTableModel::Touch(const Blocks& blocks,
                            const std::vector<BlockGeneration>& wanted) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (!blocks_.contains(blocks[i])) return false;
    const Block& block = blocks_[blocks[i]];
    if (block.state != BlockState::kUsed && block.state != BlockState::kCached)
      return false;
    if (block.generation != wanted[i]) return false;
  }
  for (BlockId block : blocks) {
    blocks_[block].state = BlockState::kUsed;
    std::erase(cached_, block);
    Retier(geometry_.PageOf(block).value());
  }
  return true;
}

bool BlockTableModel::Uncache(const Blocks& blocks) {
  if (!AllAre(blocks, BlockState::kCached)) return false;
  for (BlockId block : blocks) {
    blocks_[block].state = BlockState::kFree;
    ++blocks_[block].generation;
    std::erase(cached_, block);
    Retier(geometry_.PageOf(block).value());
  }
  return true;
}

size_t BlockTableModel::TrimCached(size_t keep) {
  size_t evicted = 0;
  for (; cached_.size() > keep; ++evicted) {
    const BlockId block = cached_.front();
    Evict(block);
    Retier(geometry_.PageOf(block).value());
  }
  return evicted;
}

void BlockTableModel::Evict(BlockId block) {
  const BlockGeneration gone = blocks_[block].generation++;
  blocks_[block].state = BlockState::kFree;
  std::erase(cached_, block);
  for (BlockRemoval& removal : removals_) {
    if (removal.block != block) continue;
    removal.generation = gone;
    return;
  }
  removals_.push_back({.block = block, .generation = gone});
}

std::vector<BlockRemoval> BlockTableModel::DrainRemovals(size_t count) {
  std::vector<BlockRemoval> drained;
  while (drained.size() < count && !removals_.empty()) {
    drained.push_back(removals_.front());
    removals_.pop_front();
  }
  return drained;
}

void BlockTableModel::CompleteStep(StepId step) {
  completed_ = std::max(completed_, step);
}

BlockTableModel::Pages BlockTableModel::InTier(PageTier tier) const {
  Pages found;
  for (const auto& [index, page] : pages_) {
    if (page.state == PageState::kBacked && page.tier == tier) {
      found.push_back(index);
    }
  }
  std::sort(found.begin(), found.end(), [this](uint32_t a, uint32_t b) {
    return pages_.at(a).arrival < pages_.at(b).arrival;
  });
  return found;
}

BlockTableModel::Pages BlockTableModel::Take(PageTier tier, size_t count) {
  Pages taken;
  for (uint32_t page : InTier(tier)) {
    if (taken.size() == count) break;
    if (pages_[page].last_step > completed_) continue;
    for (BlockId block : blocks_of_.at(page)) {
      if (blocks_[block].state == BlockState::kCached) Evict(block);
      blocks_[block].state = BlockState::kUnbacked;
    }
    pages_[page].state = PageState::kReturning;
    taken.push_back(page);
  }
  return taken;
}

BlockTableModel::Pages BlockTableModel::TakeIdle(size_t count) {
  Pages taken = Take(PageTier::kClosed, count);
  const Pages idle = Take(PageTier::kIdle, count - taken.size());
  taken.insert(taken.end(), idle.begin(), idle.end());
  return taken;
}

BlockTableModel::Pages BlockTableModel::TakeIdleSince(absl::Time since,
                                                      size_t keep,
                                                      size_t count) {
  const Pages idle = InTier(PageTier::kIdle);
  const size_t old = CountIf(idle, [&](uint32_t page) {
    return pages_[page].idle_since <= since &&
           pages_[page].last_step <= completed_;
  });
  const size_t spare = idle.size() > keep ? idle.size() - keep : 0;
  return Take(PageTier::kIdle, std::min({count, spare, old}));
}

std::string BlockTableModel::Close(size_t count, PageTier dearest,
                                   size_t answer, const BlockTable& table) {
  // Idle and cached ones go in order, of those in use the fewest used ones.
  Pages expected;
  for (PageTier tier : {PageTier::kIdle, PageTier::kCached}) {
    if (tier > dearest) continue;
    for (uint32_t page : InTier(tier)) expected.push_back(page);
  }
  expected.resize(std::min(expected.size(), count));
  size_t most_closed = 0;
  size_t fewest_open = SIZE_MAX;
  size_t could = expected.size();
  if (dearest == PageTier::kInUse) {
    for (uint32_t page : InTier(PageTier::kInUse)) {
      if (page == 0 && geometry_.reserve_null_block) continue;
      ++could;
      if (table.page_tier(PageIndex(page)) == PageTier::kInUse) {
        fewest_open = std::min(fewest_open, Used(page));
      } else {
        most_closed = std::max(most_closed, Used(page));
        expected.push_back(page);
      }
    }
  }
  if (answer != std::min(could, count) || answer != expected.size()) {
    return absl::StrCat("Close answered ", answer, " of ", could,
                        ", and closed ", expected.size());
  }
  if (most_closed > fewest_open) {
    return absl::StrCat("closed a page with used: ", most_closed,
                        ", left one with: ", fewest_open);
  }
  for (uint32_t page : expected) {
    for (BlockId block : blocks_of_.at(page)) {
      if (blocks_[block].state == BlockState::kCached) Evict(block);
    }
    pages_[page].closing = Closing::kYes;
    Retier(page);
  }
  return "";
}

std::string BlockTableModel::Vacate(size_t count, size_t answer,
                                    const BlockTable& table) {
  const Pages closing = InTier(PageTier::kClosing);
  size_t most = 0;
  size_t fewest_left = SIZE_MAX;
  size_t chosen = 0;
  for (uint32_t page : closing) {
    if (table.page_tier(PageIndex(page)) == PageTier::kClosing) {
      fewest_left = std::min(fewest_left, Used(page));
      continue;
    }
    ++chosen;
    most = std::max(most, Used(page));
    pages_[page].closing = Closing::kVacating;
    Retier(page);
  }
  if (answer != chosen || answer != std::min(count, closing.size())) {
    return absl::StrCat("Vacate answered ", answer, " of ", closing.size());
  }
  return most > fewest_left ? "vacated a page that is fuller" : "";
}

std::string BlockTableModel::Reopen(size_t count, size_t answer,
                                    const BlockTable& table) {
  Pages closing;
  for (PageTier tier :
       {PageTier::kClosing, PageTier::kVacating, PageTier::kClosed}) {
    for (uint32_t page : InTier(tier)) closing.push_back(page);
  }
  size_t fewest = SIZE_MAX;
  size_t most_left = 0;
  size_t chosen = 0;
  for (uint32_t page : closing) {
    if (table.page_tier(PageIndex(page)) > PageTier::kInUse) {
      most_left = std::max(most_left, Used(page));
      continue;
    }
    ++chosen;
    fewest = std::min(fewest, Used(page));
    pages_[page].closing = Closing::kNo;
    Retier(page);
  }
  if (answer != chosen || answer != std::min(count, closing.size())) {
    return absl::StrCat("Reopen answered ", answer, " of ", closing.size());
  }
  return fewest < most_left ? "reopened a page that is emptier" : "";
}

std::string BlockTableModel::Compare(const BlockTable& table) const {
  std::map<BlockState, size_t> blocks_in;
  size_t free_on_open = 0;
  for (const auto& [id, block] : blocks_) {
    ++blocks_in[block.state];
    const uint32_t page = geometry_.PageOf(id).value();
    free_on_open +=
        block.state == BlockState::kFree && IsOpenWithFree(page) ? 1 : 0;
    if (table.block_state(id) != block.state ||
        table.generation(id) != block.generation) {
      return absl::StrCat("block ", id, " is ", Name(table.block_state(id)),
                          " of ", table.generation(id), ", not ",
                          Name(block.state), " of ", block.generation);
    }
  }
  std::map<PageState, size_t> pages_in;
  std::map<PageTier, size_t> tiers;
  Blocks to_vacate;
  for (const auto& [index, page] : pages_) {
    const PageIndex id(index);
    if (!blocks_of_.at(index).empty()) ++pages_in[page.state];
    if (table.page_state(id) != page.state) {
      return absl::StrCat("page ", index, " is ", Name(table.page_state(id)),
                          ", not ", Name(page.state));
    }
    if (page.state != PageState::kBacked) continue;
    ++tiers[page.tier];
    if (table.page_tier(id) != page.tier) {
      return absl::StrCat("page ", index, " is ", Name(table.page_tier(id)),
                          ", not ", Name(page.tier));
    }
    if (table.is_fenced(id) != (page.last_step > completed_) ||
        table.page_used_blocks(id) != Used(index)) {
      return absl::StrCat("page ", index, " has another fence or used count");
    }
    if (page.tier != PageTier::kVacating) continue;
    for (BlockId block : blocks_of_.at(index)) {
      if (blocks_.at(block).state == BlockState::kUsed) {
        to_vacate.push_back(block);
      }
    }
  }
  for (int i = 0; i < kPageStates; ++i) {
    const PageState state = static_cast<PageState>(i);
    if (table.pages(state) != pages_in[state]) {
      return absl::StrCat("pages ", Name(state), ": ", table.pages(state),
                          ", not ", pages_in[state]);
    }
  }
  for (int i = 0; i < kPageTiers; ++i) {
    const PageTier tier = static_cast<PageTier>(i);
    if (table.pages(tier) != tiers[tier]) {
      return absl::StrCat("pages ", Name(tier), ": ", table.pages(tier),
                          ", not ", tiers[tier]);
    }
  }
  if (table.free_blocks() != free_on_open ||
      table.used_blocks() != blocks_in[BlockState::kUsed] ||
      table.cached_blocks() != cached_.size() ||
      table.pending_removals() != removals_.size()) {
    return absl::StrCat("counts differ; free: ", table.free_blocks(), " for ",
                        free_on_open, ", used: ", table.used_blocks(), " for ",
                        blocks_in[BlockState::kUsed]);
  }
  Blocks vacate(blocks_.size());
  vacate.resize(table.BlocksToVacate(absl::MakeSpan(vacate)));
  std::sort(vacate.begin(), vacate.end());
  if (vacate != to_vacate) return "blocks to vacate differ";
  const Pages idle = InTier(PageTier::kIdle);
  if (table.oldest_idle_since().has_value() == idle.empty() ||
      (!idle.empty() &&
       *table.oldest_idle_since() != pages_.at(idle.front()).idle_since)) {
    return "oldest idle page differs";
  }
  return "";
}

BlockTableModel::Blocks BlockTableModel::BlocksIn(BlockState state) const {
  Blocks found;
  for (const auto& [id, block] : blocks_) {
    if (block.state == state) found.push_back(id);
  }
  return found;
}

BlockTableModel::Pages BlockTableModel::PagesIn(PageState state) const {
  Pages found;
  for (const auto& [index, page] : pages_) {
    if (page.state == state) found.push_back(index);
  }
  return found;
}

}  // namespace kvbroker::client
