// Of Pool: blocks that the engine names, and blocks that are set late.
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"
#include "client/session/pool.h"

namespace kvbroker::client {

absl::StatusOr<bool> Pool::AllocAt(absl::Span<const BlockId> blocks,
                                   absl::Duration timeout) {
  MutexLock lock(&mu_);
  if (slots_ != Slots::kOwn) {
    return absl::FailedPreconditionError(
        "the broker chooses the pages of this pool, so blocks cannot be chosen");
  }
  const absl::Time give_up = clock_.Now() + timeout;
  std::vector<Sequence> questions;
  while (true) {
    if (closed_ || gone_) {
      return absl::FailedPreconditionError("the pool is closed");
    }
    ASSIGN_OR_RETURN(Placement placement, Place(blocks));
    if (placement.ready) break;
    const absl::Time now = clock_.Now();
    bool refused = false;
    for (Sequence question : questions) refused |= refused_.erase(question) > 0;
    if (refused || !connected_ || now >= give_up) {
      Withdraw(questions);
      return false;
    }
    if (static_cast<PageCount>(placement.absent.size()) > kMaxPagesPerClaim) {
      Withdraw(questions);
      return absl::InvalidArgumentError(
          absl::StrCat("Blocks are on more pages than can be asked for at once; "
                       "pages: ",
                       placement.absent.size(), ", most: ", kMaxPagesPerClaim));
    }
    // Some may have come and gone again, as idle ones.
    if (!placement.absent.empty()) {
      questions.push_back(AskFor(std::move(placement.absent), give_up - now));
    }
    ++missing_;
    memory_came_.WaitWithDeadline(&mu_, absl::Now() + (give_up - now));
    --missing_;
  }
  RETURN_IF_ERROR(table_.AllocAt(blocks));
  guarded_ = 0;
  for (Sequence question : questions) refused_.erase(question);
  Changed();
  return true;
}

absl::StatusOr<Pool::Placement> Pool::Place(
    absl::Span<const BlockId> blocks) {
  Placement placement;
  std::set<PageIndex> absent;
  for (BlockId block : blocks) {
    if (block < 0 || block >= table_.geometry().block_ids()) {
      return absl::InvalidArgumentError(
          absl::StrCat("Block is not of this pool; block: ", block,
                       ", blocks: ", table_.geometry().block_ids()));
    }
    const PageIndex page = table_.page_of(block);
    const BlockState state = table_.block_state(block);
    if (block < table_.geometry().FirstBlock(page) ||
        block >= table_.geometry().EndBlock(page)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Block straddles two pages and is never backed; block: ", block));
    }
    if (state != BlockState::kFree && state != BlockState::kUnbacked) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Block is not free; block: ", block, ", state: ", Name(state)));
    }
    if (block == kNullBlock && reserves_null_block()) {
      return absl::InvalidArgumentError("Block 0 is the null block");
    }
    const PageState stands = table_.page_state(page);
    if (stands == PageState::kAbsent) absent.insert(page);
    placement.ready &=
        stands == PageState::kBacked &&
        table_.page_tier(page) <= PageTier::kInUse;
  }
  placement.absent.assign(absent.begin(), absent.end());
  return placement;
}

Sequence Pool::AskFor(std::vector<PageIndex> pages, absl::Duration deadline) {
  Question question;
  question.sequence = session_.NextSequence();
  question.urgency = Urgency::kRunning;
  question.direct = question.awaited = true;
  question.at_least = question.want = static_cast<PageCount>(pages.size());
  for (PageIndex page : pages) KVB_CHECK(table_.TakeAbsentAt(page).ok());
  question.pages = std::move(pages);
  Acquire acquire;
  acquire.sequence = question.sequence;
  acquire.pool = id_;
  acquire.want = acquire.at_least = question.want;
  acquire.indexes = question.pages;
  acquire.urgency = question.urgency;
  acquire.deadline = deadline;
  const Sequence sequence = question.sequence;
  questions_.push_back(std::move(question));
  session_.Send(std::move(acquire));
  return sequence;
}

absl::Status Pool::SetBlocks(Bytes block_bytes, uint32_t max_blocks,
                             bool reserve_null_block) {
  MutexLock lock(&mu_);
  BlockGeometry geometry = table_.geometry();
  geometry.block_bytes = block_bytes;
  geometry.max_blocks = max_blocks;
  geometry.reserve_null_block = reserve_null_block;
  if (geometry == table_.geometry()) return absl::OkStatus();
  if (table_.used_blocks() > 0 || table_.cached_blocks() > 0 || closed_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "a pool's blocks can be changed while none is in use or cached; in use: ",
        table_.used_blocks(), ", cached: ", table_.cached_blocks()));
  }
  ASSIGN_OR_RETURN(BlockTable table, BlockTable::Create(geometry));
  if (slots_ == Slots::kBrokers &&
      table.pages(PageState::kAbsent) < geometry.max_pages) {
    return absl::InvalidArgumentError(
        "in a slab each page has to hold a whole block");
  }
  table.SetNow(clock_.Now());
  table.CompleteStep(table_.completed_step());
  // Its pages stay, and are empty; those that are on their way come.
  for (uint32_t i = 0; i < geometry.max_pages; ++i) {
    const PageIndex page(i);
    const PageState state = table_.page_state(page);
    if (state == PageState::kAbsent) continue;
    const bool leaves =
        state == PageState::kReturning ||
        (state == PageState::kBacked &&
         (table_.page_tier(page) > PageTier::kInUse || table_.is_fenced(page)));
    if (leaves || !table.TakeAbsentAt(page).ok()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "a page is on its way out, or would hold no block: try again; page: ",
          i));
    }
    if (state == PageState::kBacked) {
      KVB_CHECK(table.Back(page, table_.page_generation(page)).ok());
    }
  }
  // Whoever remembers a block of before does not find it again.
  table.StartGenerationsAfter(table_.latest_generation());
  table_ = std::move(table);
  Changed();
  return absl::OkStatus();
}

}  // namespace kvbroker::client
