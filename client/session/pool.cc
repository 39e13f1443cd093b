#include "client/session/pool.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"
#include "broker/device/device_lost.h"

namespace kvbroker::client {
namespace {

// A wish that no try has renewed for so long has nobody behind it.
constexpr absl::Duration kWishLife = absl::Seconds(1);
// How soon a refused wish asks again.
constexpr absl::Duration kAskAgain = absl::Milliseconds(50);
// Mapping ahead: how long others may take to give, and how soon it is tried
// again after a refusal.
constexpr absl::Duration kAheadDeadline = absl::Milliseconds(100);
constexpr absl::Duration kAheadPause = absl::Milliseconds(50);
// The batch grows while one follows the other within this.
constexpr absl::Duration kAheadCalm = absl::Milliseconds(100);
constexpr PageCount kMaxAheadBatch = 32;
// How long pages that came for a wish are kept for its next try.
constexpr absl::Duration kGuard = absl::Milliseconds(100);
constexpr absl::Duration kReportEvery = absl::Milliseconds(5);
// How long memory that the broker has promised is waited for.
constexpr absl::Duration kPromiseKept = absl::Seconds(1);
// Looks at what is available, without taking any, that make a poller.
constexpr int kPollsOfHunger = 4;
// How long Trim waits for steps and running work.
constexpr absl::Duration kTrimPatience = absl::Seconds(1);
// A page that could not be unmapped is tried again after this.
constexpr absl::Duration kUnmapAgain = absl::Milliseconds(1);
// The same, and a mapping, where the device does not work.
constexpr absl::Duration kLostPause = absl::Seconds(1);

}  // namespace

absl::StatusOr<std::unique_ptr<Pool>> Pool::Create(
    PoolOptions options, std::unique_ptr<Mapper> mapper, PoolSession& session,
    Clock& clock) {
  if (options.max_reserved_pages) {
    options.min_reserved_pages =
        std::min(options.min_reserved_pages, *options.max_reserved_pages);
  }
  ASSIGN_OR_RETURN(
      BlockTable table,
      BlockTable::Create({.page_bytes = options.geometry.page_bytes(),
                          .block_bytes = options.block_bytes,
                          .max_pages = options.geometry.max_pages,
                          .max_blocks = options.max_blocks,
                          .reserve_null_block = options.reserve_null_block}));
  return std::unique_ptr<Pool>(new Pool(std::move(options), std::move(table),
                                        std::move(mapper), session, clock));
}

Pool::Pool(PoolOptions options, BlockTable table,
           std::unique_ptr<Mapper> mapper, PoolSession& session, Clock& clock)
    : options_(std::move(options)),
      mapper_(std::move(mapper)),
      session_(session),
      clock_(clock),
      table_(std::move(table)),
      ahead_below_(options_.min_reserved_pages) {
  why_not_ = absl::UnavailableError("not connected to a broker yet");
}

Pool::~Pool() = default;

// ---- the engine's side ----

bool Pool::Alloc(absl::Span<BlockId> out, Urgency urgency) {
  MutexLock lock(&mu_);
  if (closed_ || gone_) return false;
  const bool running = urgency == Urgency::kRunning;
  Wish& wished = wish(urgency);
  std::optional<absl::Time> give_up;
  while (!table_.Alloc(out)) {
    const absl::Time now = clock_.Now();
    const PageCount missing = MissingPages(out.size());
    if (!give_up) {
      absl::Duration patience =
          running ? options_.running_miss_wait : absl::ZeroDuration();
      const PageCount asked_for = missing - promised_pages(now);
      // No memory helps where the range has no slot for it.
      if (asked_for > absent_slots() + slots_asked_for()) {
        patience = absl::ZeroDuration();
      }
      // The broker refuses what it has not decided on within that time; what it
      // has may still be in the making.
      const bool will_be_told =
          patience > absl::ZeroDuration() && !slow_broker_;
      if (asked_for <= 0 || will_be_told) {
        patience = std::max(patience, kPromiseKept);
      }
      give_up = now + patience;
      // Somebody is in the midst of its work: no pause for an earlier refusal.
      if (running) wished.retry_at = absl::InfinitePast();
    } else if (wished.retry_at > now) {
      give_up = now;  // refused meanwhile
    }
    const bool changed = wished.pages != missing;
    wished.pages = missing;
    wished.blocks = out.size();
    wished.renewed_at = now;
    if (changed && running) Pursue(urgency, now);
    if (changed) session_.Wake();
    if (!connected_ || closed_ || now >= *give_up) {
      if (running) {
        slow_broker_ |= now >= *give_up && wished.retry_at <= now &&
                        QuestionOf(urgency) != nullptr;
        wished.pages = 0;
        session_.Wake();  // withdraws the question
      }
      return false;
    }
    ++missing_;
    memory_came_.WaitWithDeadline(&mu_, absl::Now() + (*give_up - now));
    --missing_;
    if (gone_ || closed_) return false;
  }
  // A smaller request than the one that missed says nothing of that one.
  if (wished.pages != 0 && out.size() >= wished.blocks) {
    wished.pages = 0;
    session_.Wake();
  }
  guarded_ = 0;
  took_blocks_ = true;
  polls_ = 0;
  Changed();
  return true;
}

bool Pool::TryAlloc(absl::Span<BlockId> out) {
  MutexLock lock(&mu_);
  if (closed_ || gone_ || !table_.Alloc(out)) return false;
  took_blocks_ = true;
  polls_ = 0;
  Changed();
  return true;
}

void Pool::Withdraw(absl::Span<const Sequence> questions) {
  for (Sequence question : questions) refused_.erase(question);
  for (Question& question : questions_) {
    if (question.cancelled ||
        std::find(questions.begin(), questions.end(), question.sequence) ==
            questions.end()) {
      continue;
    }
    question.cancelled = true;
    session_.Send(Cancel{question.sequence});
  }
}

absl::Status Pool::Free(absl::Span<const BlockId> blocks) {
  MutexLock lock(&mu_);
  table_.SetNow(clock_.Now());
  const PageCount idle = idle_pages();
  absl::Status freed = table_.Free(blocks, scheduled_);
  idle_rose_ |= idle_pages() > idle;
  if (missing_ > 0) memory_came_.SignalAll();
  Changed();
  return freed;
}

absl::Status Pool::Cache(absl::Span<const BlockId> blocks) {
  MutexLock lock(&mu_);
  table_.SetNow(clock_.Now());
  absl::Status cached = table_.Cache(blocks, scheduled_);
  if (max_cached_) table_.TrimCached(*max_cached_);
  if (missing_ > 0) memory_came_.SignalAll();
  Changed();
  return cached;
}

void Pool::SetMaxCached(std::optional<size_t> blocks) {
  MutexLock lock(&mu_);
  max_cached_ = blocks;
  table_.SetNow(clock_.Now());
  if (max_cached_) table_.TrimCached(*max_cached_);
  if (missing_ > 0) memory_came_.SignalAll();
  Changed();
}

bool Pool::Touch(absl::Span<const BlockId> blocks,
                 absl::Span<const BlockGeneration> generations) {
  MutexLock lock(&mu_);
  if (gone_) return false;
  bool touched = table_.Touch(blocks, generations);
  Changed();
  return touched;
}

BlockGeneration Pool::generation(BlockId block) {
  MutexLock lock(&mu_);
  return HasBlock(block) ? table_.generation(block) : 0;
}

BlockState Pool::block_state(BlockId block) {
  MutexLock lock(&mu_);
  return HasBlock(block) ? table_.block_state(block) : BlockState::kUnbacked;
}

std::vector<BlockId> Pool::UsedBlocks() {
  MutexLock lock(&mu_);
  std::vector<BlockId> used;
  used.reserve(table_.used_blocks());
  for (BlockId block = 0; block < table_.geometry().block_ids(); ++block) {
    if (table_.block_state(block) == BlockState::kUsed) used.push_back(block);
  }
  return used;
}

size_t Pool::page_used_blocks(PageIndex page) {
  MutexLock lock(&mu_);
  if (page.value() >= options_.geometry.max_pages ||
      table_.page_state(page) != PageState::kBacked) {
    return 0;
  }
  return table_.page_used_blocks(page);
}

BlockGeometry Pool::block_geometry() {
  MutexLock lock(&mu_);
  return table_.geometry();
}

size_t Pool::DrainRemovals(absl::Span<BlockRemoval> out) {
  MutexLock lock(&mu_);
  return table_.DrainRemovals(out);
}

size_t Pool::available_blocks() {
  MutexLock lock(&mu_);
  if (gone_) return 0;
  if (options_.grow_when_polled && ++polls_ == kPollsOfHunger) {
    hungry_ = true;
    session_.Wake();
  }
  const size_t mapped = table_.allocatable_blocks();
  const PageCount promised =
      arriving_ + credit_ > 0 ? promised_pages(clock_.Now()) : 0;
  if (promised == 0) return mapped;
  // The last page may hold less than the others.
  return std::min(mapped + static_cast<size_t>(promised) * blocks_per_page(),
                  static_cast<size_t>(table_.geometry().block_ids()) -
                      table_.used_blocks() - reserves_null_block());
}

size_t Pool::capacity_blocks() {
  MutexLock lock(&mu_);
  PageCount pages = std::min<PageCount>(
      std::min(max_, capacity_) / options_.geometry.page_bytes(),
      options_.geometry.max_pages);
  const size_t blocks =
      std::min(static_cast<size_t>(pages) * blocks_per_page(),
               static_cast<size_t>(table_.geometry().block_ids()));
  return reserves_null_block() && blocks > 0 ? blocks - 1 : blocks;
}

bool Pool::Reserve(size_t blocks, absl::Duration timeout) {
  MutexLock lock(&mu_);
  const absl::Time give_up = clock_.Now() + timeout;
  bool asked = false;
  Sequence question;
  while (!closed_) {
    const absl::Time now = clock_.Now();
    const PageCount missing = MissingPages(blocks) - promised_pages(now);
    if (missing <= 0) return true;
    if (!connected_) return false;
    // More than the pool has slots for can never be.
    if (missing > options_.geometry.max_pages - held_pages()) return false;
    if (missing > kMaxPagesPerClaim) return false;
    if (!asked) {
      Question credit;
      credit.sequence = question = session_.NextSequence();
      credit.credit = true;
      credit.at_least = missing;
      questions_.push_back(credit);
      asked = true;
      Acquire acquire;
      acquire.sequence = question;
      acquire.pool = id_;
      acquire.want = acquire.at_least = missing;
      acquire.urgency = Urgency::kWaiting;
      acquire.deadline = timeout;
      acquire.credit = true;
      session_.Send(std::move(acquire));
    } else if (std::none_of(
                   questions_.begin(), questions_.end(),
                   [&](const Question& q) { return q.sequence == question; })) {
      return false;  // refused, or granted and lapsed
    }
    if (now >= give_up) break;
    memory_came_.WaitWithDeadline(&mu_, absl::Now() + (give_up - now));
  }
  Withdraw({question});
  return false;
}

PageCount Pool::Trim() {
  MutexLock one_at_a_time(&trim_mu_);
  MutexLock lock(&mu_);
  if (closed_ || gone_) return 0;
  const absl::Time give_up = absl::Now() + kTrimPatience;
  trim_ = true;
  trimmed_ = 0;
  session_.Wake();
  while (trim_ && !closed_ && absl::Now() < give_up) {
    memory_came_.WaitWithDeadline(&mu_, give_up);
  }
  trim_ = false;
  return trimmed_;
}

void Pool::StepBegin() {
  MutexLock lock(&mu_);
  in_step_ = true;
}

void Pool::StepEnd(StepId scheduled) {
  MutexLock lock(&mu_);
  in_step_ = false;
  scheduled_ = std::max(scheduled_, scheduled);
  if (order_ || put_off_) session_.Wake();
  put_off_ = false;
}

void Pool::StepDone(StepId completed) {
  MutexLock lock(&mu_);
  table_.CompleteStep(completed);
  if (order_ || put_off_) session_.Wake();
  put_off_ = false;
}

size_t Pool::BlocksToVacate(absl::Span<BlockId> out) {
  MutexLock lock(&mu_);
  return table_.BlocksToVacate(out);
}

PageCount Pool::pages_to_vacate() {
  MutexLock lock(&mu_);
  return static_cast<PageCount>(table_.pages(PageTier::kVacating));
}

PoolUsage Pool::usage() {
  MutexLock lock(&mu_);
  const Bytes page = options_.geometry.page_bytes();
  PoolUsage usage;
  usage.idle = page * idle_pages();
  usage.cached = page * static_cast<int64_t>(table_.pages(PageTier::kCached));
  usage.in_use = page * static_cast<int64_t>(table_.pages(PageState::kBacked)) -
                 usage.idle - usage.cached;
  usage.arriving = page * arriving_;
  usage.waiting = page * (wishes_[0].pages + wishes_[1].pages);
  return usage;
}

absl::Status Pool::health() {
  MutexLock lock(&mu_);
  if (!device_error_.ok()) return device_error_;
  return connected_ ? absl::OkStatus() : why_not_;
}

// ---- what both sides use ----

PageCount Pool::MissingPages(size_t blocks) {
  if (blocks <= table_.allocatable_blocks()) return 0;
  size_t missing = blocks - table_.allocatable_blocks();
  // Where the broker chooses, the null block's page may be another's.
  if (reserves_null_block() && slots_ == Slots::kOwn &&
      table_.page_state(PageIndex(0)) != PageState::kBacked) {
    ++missing;  // it is on the first page that comes
  }
  // Where blocks straddle pages, some hold one less: the next try asks for what
  // is missing then.
  return static_cast<PageCount>((missing + blocks_per_page() - 1) /
                                blocks_per_page());
}

void Pool::Heed(const absl::Status& of_mapper) {
  if (IsPoisoned(device_error_)) return;
  if (of_mapper.ok()) {
    device_error_ = absl::OkStatus();
  } else if (IsPoisoned(of_mapper)) {
    device_error_ = MarkPoisoned(absl::InternalError(absl::StrCat(
        "the device does not work for this process any more, restart it: ",
        of_mapper.message(),
        "; its pages are free for others when it has ended")));
  } else if (IsDeviceLost(of_mapper)) {
    device_error_ = MarkDeviceLost(absl::UnavailableError(
        absl::StrCat("the device does not work: ", of_mapper.message())));
  }
}

absl::Duration Pool::UnmapPause() {
  return device_error_.ok() ? kUnmapAgain : kLostPause;
}

PageCount Pool::held_pages() {
  return static_cast<PageCount>(table_.pages(PageState::kBacked)) + arriving_;
}

PageCount Pool::guarded_pages(absl::Time now) {
  return now < guarded_until_ ? std::min(guarded_, idle_pages()) : 0;
}

void Pool::Changed() {
  bool wake = false;
  if (order_ && order_->tier >= Tier::kClosing &&
      table_.pages(PageTier::kClosed) > 0) {
    wake = true;
  }
  if (!dirty_) {
    dirty_ = idle_pages() - reported_guarded_ != reported_.idle ||
             static_cast<PageCount>(table_.pages(PageTier::kCached)) !=
                 reported_.cached ||
             // A page can go from its grant straight into use.
             static_cast<PageCount>(table_.pages(PageState::kBacked)) !=
                 reported_.in_use + reported_.idle + reported_.cached;
    wake |= dirty_;
  }
  if (took_blocks_ && !ahead_told_ && options_.map_ahead &&
      idle_pages() + arriving_ < ahead_below_) {
    ahead_told_ = true;
    wake = true;
  }
  if (wake) session_.Wake();
}

Pool::Question* Pool::QuestionOf(Urgency urgency) {
  for (Question& question : questions_) {
    if (question.urgency == urgency && !question.credit &&
        !question.direct && !question.cancelled) {
      return &question;
    }
  }
  return nullptr;
}

// ---- the worker's side: what the broker says ----

void Pool::OnOpened(PoolId id, Bytes max, Bytes capacity, Slots slots) {
  MutexLock lock(&mu_);
  id_ = id;
  slots_ = slots;
  max_ = max;
  capacity_ = capacity;
  connected_ = true;
  why_not_ = absl::OkStatus();
  // Another broker counts its orders anew, and knows no report.
  last_order_ = Revision();
  reported_ = Report{};
  reported_at_ = absl::InfinitePast();
  dirty_ = held_pages() > 0;
  for (Wish& wished : wishes_) wished.retry_at = absl::InfinitePast();
  memory_came_.SignalAll();
}

std::vector<PageName> Pool::HeldPages() {
  MutexLock lock(&mu_);
  std::vector<PageName> held;
  for (uint32_t i = 0; i < options_.geometry.max_pages; ++i) {
    const PageIndex page(i);
    if (table_.page_state(page) == PageState::kBacked) {
      held.push_back({page, table_.page_generation(page)});
    }
  }
  return held;
}

void Pool::OnLimits(Bytes max) {
  MutexLock lock(&mu_);
  max_ = max;
  for (Wish& wished : wishes_) wished.retry_at = absl::InfinitePast();
}

void Pool::OnGranted(const Granted& granted,
                     std::vector<UniqueFd> descriptors) {
  std::optional<Question> question;
  // Of the pages granted, those that were asked for, each once.
  std::vector<bool> wanted;
  const size_t per_page = options_.geometry.handles_per_page;
  {
    MutexLock lock(&mu_);
    for (auto it = questions_.begin(); it != questions_.end(); ++it) {
      if (it->sequence != granted.sequence || it->credit) continue;
      question = std::move(*it);
      questions_.erase(it);
      break;
    }
    slow_broker_ = false;
    if (question) wanted = TakeGranted(granted, *question);
  }
  Mapped mapped;
  mapped.grant = granted.grant;
  if (!question) {
    mapped.failed = granted.pages;  // an answer to no question: unwanted
    session_.Send(std::move(mapped));
    return;
  }
  const bool for_a_wish =
      question->urgency != Urgency::kSpeculative && !question->direct;
  for (size_t i = 0; i < granted.pages.size(); ++i) {
    const PageName name = granted.pages[i];
    if (!wanted[i]) {
      mapped.failed.push_back(name);
      continue;
    }
    auto first = descriptors.begin() + static_cast<ptrdiff_t>(i * per_page);
    std::vector<UniqueFd> handles(
        std::make_move_iterator(first),
        std::make_move_iterator(first + static_cast<ptrdiff_t>(per_page)));
    absl::Status status = mapper_->Map(name.index, std::move(handles));
    MutexLock lock(&mu_);
    Heed(status);
    --arriving_;
    if (!status.ok() || closed_) {
      if (status.ok()) static_cast<void>(mapper_->Unmap(name.index));
      mapped.failed.push_back(name);
      KVB_CHECK(table_.Abandon(name.index).ok());
      continue;
    }
    table_.SetNow(clock_.Now());
    KVB_CHECK(table_.Back(name.index, name.generation).ok());
    // By whoever waits, the wish may have been lowered for those before it.
    const bool wished = for_a_wish && wish(question->urgency).pages > 0;
    if (wished || question->direct) {
      const absl::Time now = clock_.Now();
      if (wished) --wish(question->urgency).pages;
      guarded_ = guarded_pages(now) + 1;
      guarded_until_ = now + kGuard;
    }
    // It may be enough.
    if (missing_ > 0) memory_came_.SignalAll();
  }
  {
    MutexLock lock(&mu_);
    const absl::Time now = clock_.Now();
    PageCount came =
        static_cast<PageCount>(granted.pages.size() - mapped.failed.size());
    if (for_a_wish) {
      Wish& wished = wish(question->urgency);
      if (came > 0) ahead_after_ = absl::InfinitePast();
      if (question->cancelled) wished.retry_at = absl::InfinitePast();
      if (!mapped.failed.empty()) {
        wished.retry_at = now + (device_error_.ok() ? kAskAgain : kLostPause);
      }
    } else if (question->awaited) {
      if (!mapped.failed.empty() && !question->cancelled) {
        refused_.insert(question->sequence);
      }
    } else if (!mapped.failed.empty()) {
      ahead_after_ = now + (device_error_.ok() ? kAheadPause : kLostPause);
    }
    memory_came_.SignalAll();
    Changed();
  }
  session_.Send(std::move(mapped));
  if (for_a_wish && options_.on_memory) options_.on_memory();
}

std::vector<bool> Pool::TakeGranted(const Granted& granted,
                                    const Question& question) {
  std::vector<bool> taken(granted.pages.size());
  std::set<PageIndex> asked(question.pages.begin(), question.pages.end());
  PageCount count = 0;
  for (size_t i = 0; i < granted.pages.size(); ++i) {
    const PageIndex page = granted.pages[i].index;
    taken[i] = slots_ == Slots::kOwn
                   ? asked.erase(page) == 1
                   : count < question.want && table_.TakeAbsentAt(page).ok();
    count += taken[i];
  }
  arriving_ += count;
  // Slots that were asked for and not granted are free to ask for again.
  for (PageIndex page : asked) KVB_CHECK(table_.Abandon(page).ok());
  return taken;
}

void Pool::OnCredit(const Granted& granted) {
  MutexLock lock(&mu_);
  auto it = std::find_if(questions_.begin(), questions_.end(),
                         [&](const Question& q) {
                           return q.sequence == granted.sequence && q.credit;
                         });
  if (it == questions_.end()) return;  // said before
  const PageCount credit = std::min(granted.credit, it->at_least);
  questions_.erase(it);
  const absl::Time now = clock_.Now();
  credit_ = (now < credit_until_ ? credit_ : 0) + credit;
  credit_until_ = now + granted.credit_for;
  memory_came_.SignalAll();
}

void Pool::OnRefused(const Refused& refused) {
  MutexLock lock(&mu_);
  auto it = std::find_if(
      questions_.begin(), questions_.end(),
      [&](const Question& q) { return q.sequence == refused.sequence; });
  if (it == questions_.end()) return;
  Question question = std::move(*it);
  questions_.erase(it);
  slow_broker_ = false;
  for (PageIndex page : question.pages) {
    KVB_CHECK(table_.Abandon(page).ok());
  }
  const absl::Time now = clock_.Now();
  if (question.urgency == Urgency::kSpeculative) {
    ahead_after_ = now + kAheadPause;
    ahead_batch_ = 0;
    ahead_below_ = options_.min_reserved_pages;
    // For its slots.
    if (question.cancelled) {
      for (Wish& wished : wishes_) wished.retry_at = absl::InfinitePast();
    }
  } else if (question.awaited) {
    if (!question.cancelled) refused_.insert(question.sequence);
  } else if (!question.credit && !question.direct) {
    // A cancelled one leaves slots that the next may have been short of.
    wish(question.urgency).retry_at =
        question.cancelled ? absl::InfinitePast() : now + kAskAgain;
  }
  memory_came_.SignalAll();
  session_.Wake();
}

void Pool::OnReclaim(const Reclaim& reclaim) {
  MutexLock lock(&mu_);
  // Orders may overtake each other on their way; the latest counts.
  if (reclaim.revision <= last_order_) return;
  last_order_ = reclaim.revision;
  order_answered_ = false;
  if (reclaim.hold_at_most != kHoldAny) {
    order_ = reclaim;
    return;
  }
  if (order_) {
    // Who has not answered the order for long counts as not answering.
    ReclaimAnswer answer;
    answer.pool = id_;
    answer.revision = reclaim.revision;
    answer.final = true;
    session_.Send(std::move(answer));
  }
  order_.reset();
  reported_.revision = reclaim.revision;
  if (table_.Reopen(table_.closing_pages()) > 0) {
    memory_came_.SignalAll();
    Changed();
  }
}

void Pool::OnDisconnected(const absl::Status& why, Memory memory) {
  MutexLock lock(&mu_);
  connected_ = false;
  if (memory == Memory::kGone) gone_ = true;
  why_not_ = why;
  order_.reset();
  credit_ = 0;
  for (const Question& question : questions_) {
    for (PageIndex page : question.pages) {
      KVB_CHECK(table_.Abandon(page).ok());
    }
  }
  questions_.clear();
  refused_.clear();
  static_cast<void>(table_.Reopen(table_.closing_pages()));
  memory_came_.SignalAll();
}

// ---- the worker's side: what has to be done ----

absl::Time Pool::Work() {
  const absl::Time now = clock_.Now();
  bool closed;
  {
    MutexLock lock(&mu_);
    closed = closed_;
    table_.SetNow(now);
  }
  if (closed) return Leave(now);
  absl::Time due = ObeyOrder(now);
  due = std::min(due, Decay(now));
  due = std::min(due, PursueWishes(now));
  due = std::min(due, MapAhead(now));
  due = std::min(due, GrowForPoller(now));
  return std::min(due, SendReport(now));
}

std::vector<PageName> Pool::Unmap(absl::Span<const PageIndex> pages) {
  std::vector<PageName> gone;
  for (PageIndex page : pages) {
    absl::Status unmapped = mapper_->Unmap(page);
    MutexLock lock(&mu_);
    Heed(unmapped);
    if (unmapped.ok()) {
      gone.push_back({page, table_.page_generation(page)});
    } else {
      KVB_CHECK(table_.KeepBacked(page).ok());
      if (missing_ > 0) memory_came_.SignalAll();
    }
  }
  return gone;
}

void Pool::MarkReturned(absl::Span<const PageName> pages) {
  for (const PageName& page : pages) {
    KVB_CHECK(table_.Returned(page.index).ok());
  }
  // AllocAt wants that very page.
  if (missing_ > 0) memory_came_.SignalAll();
}

absl::Time Pool::ObeyOrder(absl::Time now) {
  std::vector<PageIndex> pages;
  ReclaimAnswer answer;
  size_t closed = 0, vacated = 0;
  Tier tier;
  {
    MutexLock lock(&mu_);
    if (!order_) return absl::InfiniteFuture();
    if (in_step_) {
      put_off_ = true;
      return absl::InfiniteFuture();
    }
    tier = order_->tier;
    answer.pool = id_;
    answer.revision = order_->revision;
    PageCount excess =
        std::max<PageCount>(held_pages() - order_->hold_at_most, 0);
    pages.resize(static_cast<size_t>(excess));
    const PageCount spare =
        static_cast<PageCount>(table_.pages(PageTier::kClosed)) + idle_pages() -
        guarded_pages(now);
    size_t taken = table_.TakeIdle(absl::MakeSpan(pages).subspan(
        0, static_cast<size_t>(std::clamp<PageCount>(spare, 0, excess))));
    if (tier >= Tier::kCached) {
      taken += table_.TakeCached(absl::MakeSpan(pages).subspan(taken));
    }
    pages.resize(taken);
    const size_t left =
        tier >= Tier::kClosing ? static_cast<size_t>(excess) - taken : 0;
    const size_t closing = table_.closing_pages();
    if (closing < left) closed = table_.Close(left - closing);
    if (closing > left && table_.Reopen(closing - left) > 0) {
      memory_came_.SignalAll();
    }
    const size_t vacating = table_.pages(PageTier::kVacating);
    if (tier == Tier::kPreempt && vacating < left) {
      vacated = table_.Vacate(left - vacating);
    }
  }
  answer.given = Unmap(pages);
  const bool unmapped_all = answer.given.size() == pages.size();
  absl::Time again;
  {
    MutexLock lock(&mu_);
    MarkReturned(answer.given);
    again = now + UnmapPause();
    const bool poisoned = IsPoisoned(device_error_);
    answer.kept = std::max<PageCount>(held_pages() - order_->hold_at_most, 0);
    // Empty pages that steps or running work still use go a little later.
    size_t later = table_.pages(PageTier::kClosed) +
                   static_cast<size_t>(idle_pages() - guarded_pages(now));
    if (tier >= Tier::kCached) later += table_.pages(PageTier::kCached);
    // What was asked for may be granted already, above the target.
    const bool more_may_come =
        std::any_of(questions_.begin(), questions_.end(),
                    [](const Question& question) { return !question.credit; });
    answer.final =
        answer.kept == 0 ? !more_may_come
                         : poisoned || (tier <= Tier::kCached && later == 0);
    if (answer.kept > 0) {
      answer.reason = poisoned    ? "the device is lost to this process"
                      : later > 0 ? "step running"
                                  : "in use";
    }
    const bool send =
        !answer.given.empty() || answer.final || !order_answered_;
    order_answered_ = true;
    if (answer.final) {
      reported_.revision = answer.revision;
      order_.reset();
    }
    dirty_ = true;
    if (!order_ || unmapped_all) again = absl::InfiniteFuture();
    // Before anybody can ask for these slots again.
    if (send) session_.Send(std::move(answer));
  }
  if (closed > 0 && options_.on_closing) {
    options_.on_closing(static_cast<PageCount>(closed));
  }
  if (vacated > 0 && options_.on_preempt) options_.on_preempt();
  return again;
}

absl::Time Pool::Decay(absl::Time now) {
  const absl::Time since = now - options_.idle_decay;
  std::vector<PageIndex> pages;
  absl::Time due = absl::InfiniteFuture();
  {
    MutexLock lock(&mu_);
    idle_rose_ = false;
    if (IsPoisoned(device_error_)) return due;
    const PageCount guarded = guarded_pages(now);
    if (guarded > 0) due = guarded_until_;
    // Who waits for more pages will need these as well.
    if (!trim_ && (wishes_[0].pages > 0 || wishes_[1].pages > 0)) return due;
    const PageCount keep =
        trim_ ? 0 : std::max(options_.min_reserved_pages, guarded);
    const PageCount spare = idle_pages() - keep;
    if (spare <= 0) {
      EndTrim(0);
      return due;
    }
    PageCount over = 0;
    if (trim_) {
      over = spare;
    } else if (options_.max_reserved_pages) {
      over = std::clamp<PageCount>(idle_pages() - *options_.max_reserved_pages,
                                   0, spare);
    }
    const absl::Time oldest = *table_.oldest_idle_since();
    if (over == 0 && oldest > since) {
      return std::min(due, oldest + options_.idle_decay);
    }
    if (in_step_) {
      put_off_ = true;
      return due;
    }
    pages.resize(static_cast<size_t>(spare));
    const absl::Span<PageIndex> room = absl::MakeSpan(pages);
    size_t taken = table_.TakeIdle(room.first(static_cast<size_t>(over)));
    taken += table_.TakeIdleSince(since, static_cast<size_t>(keep),
                                  room.subspan(taken));
    pages.resize(taken);
    if (idle_pages() > keep) {
      const absl::Time next = *table_.oldest_idle_since();
      if (next > since) due = std::min(due, next + options_.idle_decay);
      // Those that a step keeps have to go when it is done.
      put_off_ |= next <= since || static_cast<PageCount>(taken) < over;
    }
  }
  Return message;
  message.pages = Unmap(pages);
  MutexLock lock(&mu_);
  if (message.pages.size() < pages.size()) {
    due = std::min(due, now + UnmapPause());
  }
  MarkReturned(message.pages);
  EndTrim(message.pages.size());
  if (message.pages.empty()) return due;
  message.pool = id_;
  dirty_ = true;
  // Before anybody can ask for these slots again. While no broker is there, what
  // is gone is simply not in Resume.
  if (connected_) session_.Send(std::move(message));
  return due;
}

PageCount Pool::absent_slots() {
  PageCount absent = static_cast<PageCount>(table_.pages(PageState::kAbsent));
  if (slots_ == Slots::kOwn) return absent;
  for (const Question& question : questions_) {
    if (!question.credit) absent -= question.want;
  }
  return std::max<PageCount>(absent, 0);
}

PageCount Pool::slots_asked_for() {
  PageCount slots = 0;
  for (const Question& question : questions_) {
    slots += static_cast<PageCount>(question.pages.size());
  }
  return slots;
}

void Pool::Ask(Urgency urgency, PageCount want, PageCount at_least,
               Sequence replaces) {
  // The rest is asked for by the next try, which misses it.
  want = std::min(want, kMaxPagesPerClaim);
  at_least = std::min(at_least, kMaxPagesPerClaim);
  Question question;
  question.want = std::min(want, absent_slots());
  if (slots_ == Slots::kOwn) {
    question.pages.resize(static_cast<size_t>(question.want));
    table_.TakeAbsent(absl::MakeSpan(question.pages));
  }
  if (question.want < at_least) {
    // The address range is full: nothing to ask for.
    for (PageIndex page : question.pages) {
      KVB_CHECK(table_.Abandon(page).ok());
    }
    // Once it is refused, its slots are there for the next try.
    if (replaces != Sequence()) session_.Send(Cancel{replaces});
    // As are those of mapping ahead, which gives way.
    bool slots_come = false;
    for (Question& other : questions_) {
      if (urgency == Urgency::kSpeculative || other.credit ||
          other.urgency != Urgency::kSpeculative) {
        continue;
      }
      slots_come = true;
      if (!std::exchange(other.cancelled, true)) {
        session_.Send(Cancel{other.sequence});
      }
    }
    if (slots_come) return;
    if (urgency != Urgency::kSpeculative) {
      wish(urgency).retry_at = clock_.Now() + kWishLife;
    } else {
      ahead_after_ = clock_.Now() + kWishLife;
    }
    return;
  }
  question.sequence = session_.NextSequence();
  question.urgency = urgency;
  question.at_least = at_least;
  Acquire acquire;
  acquire.sequence = question.sequence;
  acquire.pool = id_;
  acquire.want = question.want;
  acquire.at_least = at_least;
  acquire.indexes = question.pages;
  acquire.urgency = urgency;
  acquire.deadline = options_.claim_deadline;
  if (urgency == Urgency::kSpeculative) acquire.deadline = kAheadDeadline;
  if (urgency == Urgency::kRunning) {
    acquire.deadline = std::clamp(options_.running_miss_wait,
                                  absl::Milliseconds(1), acquire.deadline);
  }
  acquire.replaces = replaces;
  if (urgency != Urgency::kSpeculative) {
    credit_ = std::max<PageCount>(credit_ - acquire.want, 0);
  }
  questions_.push_back(std::move(question));
  session_.Send(std::move(acquire));
}

absl::Time Pool::PursueWishes(absl::Time now) {
  MutexLock lock(&mu_);
  return std::min(Pursue(Urgency::kRunning, now),
                  Pursue(Urgency::kWaiting, now));
}

absl::Time Pool::Pursue(Urgency urgency, absl::Time now) {
  absl::Time due = absl::InfiniteFuture();
  Wish& wished = wish(urgency);
  if (wished.pages > 0 && now - wished.renewed_at >= kWishLife) {
    wished.pages = 0;
  }
  if (wished.pages > 0) due = wished.renewed_at + kWishLife;
  // Pages that cannot be mapped would be taken from others in vain.
  if (!connected_ || closed_ || IsPoisoned(device_error_)) return due;
  const PageCount needed = std::max<PageCount>(wished.pages - arriving_, 0);
  Question* question = QuestionOf(urgency);
  if (question != nullptr && needed != question->at_least) {
    question->cancelled = true;
    Sequence old = question->sequence;
    if (needed == 0) {
      session_.Send(Cancel{old});
    } else {
      Ask(urgency, needed + DrawAhead(now), needed, old);
    }
  } else if (question == nullptr && needed > 0) {
    if (now >= wished.retry_at) {
      Ask(urgency, needed + DrawAhead(now), needed, Sequence());
    }
    if (now < wished.retry_at) due = std::min(due, wished.retry_at);
  }
  return due;
}

PageCount Pool::DrawAhead(absl::Time now) {
  const PageCount idle = idle_pages() + arriving_;
  if (!options_.map_ahead || order_ || idle >= ahead_below_ ||
      QuestionOf(Urgency::kSpeculative) != nullptr ||
      // What is set aside is for what it was counted for.
      (credit_ > 0 && now < credit_until_)) {
    return 0;
  }
  if (now >= ahead_asked_at_ + kAheadCalm) ahead_batch_ = 0;
  PageCount ahead = std::max(options_.min_reserved_pages - idle, ahead_batch_);
  ahead_asked_at_ = now;
  ahead_batch_ = std::min(ahead * 2, kMaxAheadBatch);
  // The next come while these are mapped and used.
  ahead_below_ = std::max(options_.min_reserved_pages, ahead_batch_ / 2);
  if (options_.max_reserved_pages) {
    ahead_below_ = std::min(ahead_below_, *options_.max_reserved_pages);
    ahead = std::min(ahead, *options_.max_reserved_pages - idle);
  }
  return std::max<PageCount>(ahead, 0);
}

absl::Time Pool::MapAhead(absl::Time now) {
  MutexLock lock(&mu_);
  if (!options_.map_ahead || !connected_ || order_ || !took_blocks_ ||
      IsPoisoned(device_error_)) {
    return absl::InfiniteFuture();
  }
  if (now >= ahead_asked_at_ + kAheadCalm) {
    ahead_batch_ = 0;
    ahead_below_ = options_.min_reserved_pages;
  }
  if (idle_pages() + arriving_ >= ahead_below_) {
    ahead_told_ = false;
    took_blocks_ = false;
    return absl::InfiniteFuture();
  }
  // Those on their way to a wish bring their own.
  for (const Question& question : questions_) {
    if (!question.credit && !question.cancelled) return absl::InfiniteFuture();
  }
  if (now < ahead_after_) return ahead_after_;
  took_blocks_ = false;
  ahead_told_ = false;
  const PageCount want = DrawAhead(now);
  if (want > 0) Ask(Urgency::kSpeculative, want, 1, Sequence());
  return absl::InfiniteFuture();
}

absl::Time Pool::GrowForPoller(absl::Time now) {
  MutexLock lock(&mu_);
  if (!hungry_ || !connected_ || closed_ || order_ ||
      IsPoisoned(device_error_)) {
    return absl::InfiniteFuture();
  }
  if (now < ahead_after_) return ahead_after_;
  for (const Question& question : questions_) {
    // Its answer wakes the worker; then there is more, or a pause.
    if (!question.credit && !question.cancelled) return absl::InfiniteFuture();
  }
  hungry_ = false;
  polls_ = 0;
  const PageCount held = held_pages();
  const PageCount most = static_cast<PageCount>(
      std::min(max_, capacity_) / options_.geometry.page_bytes());
  const PageCount want = std::min(
      std::max({held, options_.min_reserved_pages, PageCount{1}}), most - held);
  if (want <= 0) {
    ahead_after_ = now + kAheadPause;  // at the limit
    return absl::InfiniteFuture();
  }
  const size_t before = questions_.size();
  Ask(Urgency::kSpeculative, want, 1, Sequence());
  if (questions_.size() > before) questions_.back().direct = true;
  return absl::InfiniteFuture();
}

void Pool::EndTrim(size_t went) {
  if (!trim_) return;
  trimmed_ += static_cast<PageCount>(went);
  // What a step or running work keeps goes when that is done.
  if (idle_pages() > 0 && put_off_) return;
  trim_ = false;
  took_blocks_ = false;  // the reserve comes back with the next block taken
  memory_came_.SignalAll();
}

absl::Time Pool::SendReport(absl::Time now) {
  MutexLock lock(&mu_);
  // Pages that wait for their wish's next try are as good as in use.
  const PageCount guarded = guarded_pages(now);
  const absl::Time due = guarded > 0 ? guarded_until_ : absl::InfiniteFuture();
  if (guarded != reported_guarded_) dirty_ = true;
  if (!dirty_ || !connected_) return due;
  if (now < reported_at_ + kReportEvery) {
    return std::min(due, reported_at_ + kReportEvery);
  }
  Report report;
  report.pool = id_;
  report.cached = static_cast<PageCount>(table_.pages(PageTier::kCached));
  report.idle = idle_pages() - guarded;
  report.in_use = static_cast<PageCount>(table_.pages(PageState::kBacked)) -
                  report.idle - report.cached;
  if (auto oldest = table_.oldest_idle_since()) {
    report.oldest_idle = std::max(now - *oldest, absl::ZeroDuration());
  }
  report.settled = static_cast<PageCount>(
      table_.idle_pages_since(now - absl::Milliseconds(100)));
  report.settled = std::min(report.settled, report.idle);
  report.revision = reported_.revision;
  reported_ = report;
  reported_guarded_ = guarded;
  reported_at_ = now;
  dirty_ = false;
  session_.Send(report);
  // Freed since Decay looked, while a report was due anyway: that woke nobody.
  return idle_rose_ ? now : due;
}

// ---- the end ----

void Pool::Close() {
  {
    MutexLock lock(&mu_);
    if (closed_) return;
    closed_ = true;
    order_.reset();
    for (uint32_t i = 0; i < options_.geometry.max_pages; ++i) {
      if (table_.page_state(PageIndex(i)) == PageState::kBacked) {
        leaving_.push_back(PageIndex(i));
      }
    }
    for (Question& question : questions_) {
      if (std::exchange(question.cancelled, true)) continue;
      session_.Send(Cancel{question.sequence});
    }
    memory_came_.SignalAll();
  }
  Leave(clock_.Now());
}

absl::Time Pool::Leave(absl::Time now) {
  Return message;
  MutexLock lock(&mu_);
  message.pool = id_;
  std::erase_if(leaving_, [&](PageIndex page) {
    mu_.AssertHeld();
    const absl::Status unmapped = mapper_->Unmap(page);
    Heed(unmapped);
    // It goes with the process, and is lent until then.
    if (IsDeviceLost(unmapped)) return true;
    if (!unmapped.ok()) return false;
    message.pages.push_back({page, table_.page_generation(page)});
    return true;
  });
  if (!message.pages.empty()) session_.Send(std::move(message));
  return leaving_.empty() ? absl::InfiniteFuture() : now + kUnmapAgain;
}

bool Pool::left() {
  MutexLock lock(&mu_);
  return closed_ && leaving_.empty();
}

absl::Status Pool::CheckInvariants() {
  MutexLock lock(&mu_);
  RETURN_IF_ERROR(table_.CheckInvariants());
  size_t requested = 0;
  for (const Question& question : questions_)
    requested += question.pages.size();
  if (requested + static_cast<size_t>(arriving_) !=
      table_.pages(PageState::kRequested)) {
    return absl::InternalError(absl::StrCat(
        "pool: requested pages ", table_.pages(PageState::kRequested),
        " are not those in questions, ", requested, ", and arriving, ",
        arriving_));
  }
  return absl::OkStatus();
}

}  // namespace kvbroker::client
