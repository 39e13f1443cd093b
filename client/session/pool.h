// Pool: an engine's KV blocks, backed by pages borrowed from the broker.
//
//   pool.StepBegin();
//   if (pool.Alloc(absl::MakeSpan(blocks), Urgency::kRunning)) ...
//   pool.StepEnd(step);                       // `step` has been scheduled
//   pool.StepDone(step);                      // its output is back
//   RETURN_IF_ERROR(pool.Free(blocks));
//
// The engine's calls do not wait for the broker while mapped pages last: Alloc and
// Free do no RPC then and allocate nothing. A miss leaves a *wish*, which becomes
// an Acquire: at once where the engine waits for it, else by the session's worker.
// That maps what is granted, answers reclaims without the engine's help, maps
// ahead while demand rises, returns what has been idle for long, and reports.
//
// A wish, one an urgency:
//
//   NONE --Alloc misses--> WANTED --Acquire--> ASKED --Granted, mapped--> NONE
//     ^                       ^                 |  |
//     |                       +---- Refused ----+  | not renewed for a second:
//     +-------------------------------------Cancel-+ nobody waits any more
//
// Between StepBegin and StepEnd no block that was free at the begin is taken
// away. A page is unmapped only when the steps that may use it are done.
//
// Threads: the engine's calls from any thread; those marked so from the worker
// only. Callbacks run on the worker or a thread of the link, without the pool's
// lock, must not close the session, and may call the
// engine's side.
#ifndef KVBROKER_CLIENT_SESSION_POOL_H_
#define KVBROKER_CLIENT_SESSION_POOL_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "broker/base/clock.h"
#include "broker/base/mutex.h"
#include "client/arena/mapper.h"
#include "client/block/block_table.h"
#include "proto/messages.h"

namespace kvbroker::client {

struct PoolOptions {
  PoolGeometry geometry;
  // The blocks at first; SetBlocks changes them.
  Bytes block_bytes;        // all layers together
  uint32_t max_blocks = 0;  // ids are below it; 0: as many as fit
  bool reserve_null_block = false;
  // Slots without a page do not fault; see Mapper::Guard for what it costs.
  bool guard = false;
  // Pages kept mapped ahead of need, while there is free memory for it.
  bool map_ahead = true;
  PageCount min_reserved_pages = 5;
  // Who asks what is available again and again, and takes nothing, wants more
  // than that: maps twice as many pages each time, up to the limits. For engines
  // that look before they ask and so never miss.
  bool grow_when_polled = false;
  // Idle pages kept mapped at most; absent: until somebody needs them.
  std::optional<PageCount> max_reserved_pages;
  // Idle pages above the reserve go back after this long; infinite: never.
  absl::Duration idle_decay = absl::Seconds(30);
  // How long a running request's miss may wait inside Alloc for others to give;
  // what the broker has granted within that time is waited for, up to a second.
  absl::Duration running_miss_wait = absl::Milliseconds(2);
  // How long the broker may take to answer a wish with a refusal.
  absl::Duration claim_deadline = absl::Seconds(10);

  // The broker wants requests preempted: see BlocksToVacate.
  std::function<void()> on_preempt;
  // Pages were closed: their blocks are handed out no more.
  std::function<void(PageCount pages)> on_closing;
  // Pages came for a wish: an engine that waits may try again.
  std::function<void()> on_memory;
};

// What a pool has, in bytes. held = in_use + cached + idle + arriving.
struct PoolUsage {
  Bytes in_use;    // pages with a used block
  Bytes cached;    // pages with cached blocks only
  Bytes idle;      // pages without either
  Bytes arriving;  // granted, not mapped yet
  Bytes waiting;   // wished for
  Bytes held() const { return in_use + cached + idle + arriving; }
};

// What the pool needs of its session. Thread-safe.
class PoolSession {
 public:
  virtual ~PoolSession() = default;
  virtual Sequence NextSequence() = 0;
  virtual void Send(ClientMessage message) = 0;
  // Calls the worker to Work() soon.
  virtual void Wake() = 0;
};

class Pool {
 public:
  // `session` and `clock` outlive the pool.
  static absl::StatusOr<std::unique_ptr<Pool>> Create(
      PoolOptions options, std::unique_ptr<Mapper> mapper, PoolSession& session,
      Clock& clock);
  ~Pool();

  // ---- the engine's side ----

  // Fills `out`, or returns false and takes none. A running request's miss may
  // wait for running_miss_wait, which is the broker's deadline; a waiting one's
  // leaves its wish and returns. Both wait up to a second for memory that the
  // broker has promised, the first also for its answer, unless it kept the last
  // one waiting for that long.
  bool Alloc(absl::Span<BlockId> out, Urgency urgency);
  // As Alloc, of what is mapped only: waits for nothing and leaves no wish.
  bool TryAlloc(absl::Span<BlockId> out);
  // Exactly these blocks, whose pages are asked for where they are not mapped;
  // all or none. False: not within `timeout`, or refused meanwhile.
  // INVALID_ARGUMENT: one of them is used, cached, reserved or none of the pool.
  // FAILED_PRECONDITION: the broker chooses the pages, or has gone, or the pool
  // is closed.
  absl::StatusOr<bool> AllocAt(absl::Span<const BlockId> blocks,
                               absl::Duration timeout);
  // Other blocks on the same pages, which stay. FAILED_PRECONDITION: a block is in
  // use or cached, or a page is about to leave. INVALID_ARGUMENT: no such geometry.
  // Then it is as it was.
  absl::Status SetBlocks(Bytes block_bytes, uint32_t max_blocks,
                         bool reserve_null_block);
  // See BlockTable for these; the step is the last one scheduled.
  absl::Status Free(absl::Span<const BlockId> blocks);
  absl::Status Cache(absl::Span<const BlockId> blocks);
  bool Touch(absl::Span<const BlockId> blocks,
             absl::Span<const BlockGeneration> generations);
  // At most so many blocks are cached: the least recently used go first. Absent,
  // the default: as many as there is memory for.
  void SetMaxCached(std::optional<size_t> blocks);
  // 0 for no block of the pool.
  BlockGeneration generation(BlockId block);
  // kUnbacked for no block of the pool.
  BlockState block_state(BlockId block);
  std::vector<BlockId> UsedBlocks();
  // Used blocks on the page; 0 where it is not mapped.
  size_t page_used_blocks(PageIndex page);
  size_t DrainRemovals(absl::Span<BlockRemoval> out);

  // Blocks that Alloc would get now: free and evictable ones in mapped pages,
  // and those of pages the broker has granted or set aside.
  size_t available_blocks();
  // The most blocks the pool may come to hold as its limits stand.
  size_t capacity_blocks();
  // Has the broker set aside what `blocks` need and mapped pages do not have,
  // for a second. False where it cannot within `timeout`. Waits.
  bool Reserve(size_t blocks, absl::Duration timeout);
  // Has the worker unmap and return all idle pages, the reserve too, but for
  // those that a step keeps; waits up to a second. How many went.
  PageCount Trim();

  void StepBegin();
  void StepEnd(StepId scheduled);
  void StepDone(StepId completed);

  // Used blocks whose requests shall be preempted. Costs nothing when none.
  size_t BlocksToVacate(absl::Span<BlockId> out);
  PageCount pages_to_vacate();

  PoolUsage usage();
  // OK while the broker is there; growth waits otherwise. Where the device does
  // not work for this process, it says so and what to do: blocks that are taken
  // stay taken, no page comes or goes, and Close ends all the same.
  absl::Status health();
  // REQUIRES: the contiguous layout, and no SetBlocks.
  std::byte* block_data(BlockId block) const {
    return mapper_->region(0) + block * options_.block_bytes.count();
  }
  BlockGeometry block_geometry();
  Mapper& mapper() { return *mapper_; }
  const PoolOptions& options() const { return options_; }

  // ---- the worker's side ----

  // The broker knows the pool by this from now on.
  // With `slots` kBrokers the broker chooses the indexes of pages.
  enum class Slots { kOwn, kBrokers };
  void OnOpened(PoolId id, Bytes max, Bytes capacity,
                Slots slots = Slots::kOwn);
  // All descriptors of the grant, in order. Maps, backs, acknowledges.
  void OnGranted(const Granted& granted, std::vector<UniqueFd> descriptors);
  void OnCredit(const Granted& granted);
  void OnRefused(const Refused& refused);
  void OnReclaim(const Reclaim& reclaim);
  void OnLimits(Bytes max);
  // With `memory` kGone the pages' contents went with the broker: no block is
  // handed out any more.
  enum class Memory { kStays, kGone };
  void OnDisconnected(const absl::Status& why, Memory memory = Memory::kStays);
  // All pages that are mapped, by the names they were granted under.
  std::vector<PageName> HeldPages();
  // Does what is due; says when to call again at the latest.
  absl::Time Work();
  // Withdraws all questions and unmaps and returns all pages, in use or not.
  // The pool is dead; Work goes on with pages that running work keeps.
  void Close();
  // Closed, and nothing is mapped any more.
  bool left();

  absl::Status CheckInvariants();

 private:
  // What the broker takes in one Acquire.
  static constexpr PageCount kMaxPagesPerClaim = 65536;

  struct Wish {
    PageCount pages = 0;  // still missing; 0: none
    size_t blocks = 0;    // what the last try asked for
    absl::Time renewed_at = absl::InfinitePast();
    absl::Time retry_at = absl::InfinitePast();
  };
  // An Acquire under way.
  struct Question {
    Sequence sequence;
    Urgency urgency = Urgency::kWaiting;
    bool credit = false;
    // Of AllocAt, or for who polls: no wish stands behind it.
    bool direct = false;
    bool awaited = false;  // by AllocAt, which looks into refused_
    PageCount at_least = 0;
    PageCount want = 0;
    // The slots for them; none where the broker chooses.
    std::vector<PageIndex> pages;
    bool cancelled = false;
  };

  Pool(PoolOptions options, BlockTable table, std::unique_ptr<Mapper> mapper,
       PoolSession& session, Clock& clock);

  Wish& wish(Urgency urgency) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return wishes_[urgency == Urgency::kRunning];
  }
  Question* QuestionOf(Urgency urgency) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // After any change of the table: wakes the worker where it has to act.
  void Changed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  PageCount held_pages() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  PageCount idle_pages() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return static_cast<PageCount>(table_.pages(PageTier::kIdle));
  }
  // Idle pages that came for a wish and must not be taken before its next try.
  PageCount guarded_pages(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  PageCount MissingPages(size_t blocks) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  size_t blocks_per_page() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return static_cast<size_t>(table_.geometry().max_blocks_per_page());
  }
  bool HasBlock(BlockId block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return block >= 0 && block < table_.geometry().block_ids();
  }
  bool reserves_null_block() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return table_.geometry().reserve_null_block;
  }
  // Of blocks for AllocAt: the pages that are still to be asked for; whether all
  // can be taken at once.
  struct Placement {
    std::vector<PageIndex> absent;
    bool ready = true;
  };
  absl::StatusOr<Placement> Place(absl::Span<const BlockId> blocks)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Withdraw(absl::Span<const Sequence> questions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Asks for exactly these pages.
  Sequence AskFor(std::vector<PageIndex> pages, absl::Duration deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Pages on their way, or set aside by the broker.
  PageCount promised_pages(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return arriving_ + (now < credit_until_ ? credit_ : 0);
  }
  // Slots that a question can still be asked for.
  PageCount absent_slots() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Those that questions under way hold.
  PageCount slots_asked_for() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Puts the granted pages that answer the question into the table, as
  // REQUESTED; which of them those are.
  std::vector<bool> TakeGranted(const Granted& granted,
                                const Question& question)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Ask(Urgency urgency, PageCount want, PageCount at_least,
           Sequence replaces) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Sends and withdraws questions for a wish; says when to call again.
  absl::Time Pursue(Urgency urgency, absl::Time now)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // How many pages to ask for beside those that are needed; each time more.
  PageCount DrawAhead(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Each does one of Work's duties and says when it is due next.
  absl::Time ObeyOrder(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Time Decay(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Time PursueWishes(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Time MapAhead(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Time GrowForPoller(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  // Decay has returned `went` pages; Trim may be done.
  void EndTrim(size_t went) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Time SendReport(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Time Leave(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  // Unmaps RETURNING pages; which could be unmapped. They are MarkReturned, which
  // frees their slots, under the lock under which the broker is told.
  std::vector<PageName> Unmap(absl::Span<const PageIndex> pages)
      ABSL_LOCKS_EXCLUDED(mu_);
  void MarkReturned(absl::Span<const PageName> pages)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What Map or Unmap answered, for health.
  void Heed(const absl::Status& of_mapper) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // How soon a page that could not be unmapped is tried again.
  absl::Duration UnmapPause() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const PoolOptions options_;
  const std::unique_ptr<Mapper> mapper_;
  PoolSession& session_;
  Clock& clock_;

  Mutex trim_mu_;  // of whoever is in Trim; before mu_
  Mutex mu_;
  CondVar memory_came_;
  PoolId id_ ABSL_GUARDED_BY(mu_);
  BlockTable table_ ABSL_GUARDED_BY(mu_);
  Slots slots_ ABSL_GUARDED_BY(mu_) = Slots::kOwn;
  bool connected_ ABSL_GUARDED_BY(mu_) = false;
  bool gone_ ABSL_GUARDED_BY(mu_) = false;  // the memory, with its broker
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status why_not_ ABSL_GUARDED_BY(mu_);
  // Of the mapper, while the device is lost to this process.
  absl::Status device_error_ ABSL_GUARDED_BY(mu_);
  Bytes max_ ABSL_GUARDED_BY(mu_), capacity_ ABSL_GUARDED_BY(mu_);
  StepId scheduled_ ABSL_GUARDED_BY(mu_) = 0;
  bool in_step_ ABSL_GUARDED_BY(mu_) = false;
  // The worker has work to do when the step ends, or one is done.
  bool put_off_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<PageIndex> leaving_ ABSL_GUARDED_BY(mu_);  // once closed

  Wish wishes_[2] ABSL_GUARDED_BY(mu_);
  int missing_ ABSL_GUARDED_BY(mu_) = 0;  // threads that wait in Alloc
  bool slow_broker_ ABSL_GUARDED_BY(mu_) = false;  // owes a running miss an answer
  std::vector<Question> questions_ ABSL_GUARDED_BY(mu_);
  std::set<Sequence> refused_ ABSL_GUARDED_BY(mu_);  // or not mapped; awaited ones
  PageCount arriving_ ABSL_GUARDED_BY(mu_) = 0;  // granted, being mapped
  PageCount credit_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time credit_until_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  PageCount guarded_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time guarded_until_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();

  // Map ahead: whether the engine took blocks since the last time, whether the
  // worker has been told, the next batch, when it is asked for, when the last
  // was, and the pause after a refusal.
  bool took_blocks_ ABSL_GUARDED_BY(mu_) = false;
  bool ahead_told_ ABSL_GUARDED_BY(mu_) = false;
  PageCount ahead_batch_ ABSL_GUARDED_BY(mu_) = 0;
  PageCount ahead_below_ ABSL_GUARDED_BY(mu_);  // with fewer idle ones
  absl::Time ahead_asked_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time ahead_after_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();

  std::optional<size_t> max_cached_ ABSL_GUARDED_BY(mu_);
  // Grow when polled: looks since the last block was taken, and whether that was
  // often enough to grow.
  int polls_ ABSL_GUARDED_BY(mu_) = 0;
  bool hungry_ ABSL_GUARDED_BY(mu_) = false;
  // Trim waits for Decay to do it.
  bool trim_ ABSL_GUARDED_BY(mu_) = false;
  PageCount trimmed_ ABSL_GUARDED_BY(mu_) = 0;

  std::optional<Reclaim> order_ ABSL_GUARDED_BY(mu_);  // in force
  Revision last_order_ ABSL_GUARDED_BY(mu_);
  bool order_answered_ ABSL_GUARDED_BY(mu_) = false;   // once at least

  Report reported_ ABSL_GUARDED_BY(mu_);
  PageCount reported_guarded_ ABSL_GUARDED_BY(mu_) = 0;  // as in use
  absl::Time reported_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  bool dirty_ ABSL_GUARDED_BY(mu_) = false;
  bool idle_rose_ ABSL_GUARDED_BY(mu_) = false;  // since Decay looked
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_POOL_H_
