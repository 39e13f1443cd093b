// Scheduler: serves a trace's requests from a KV pool the way vLLM does.
//
//   Scheduler scheduler({.speed = speed}, trace.requests, source, nullptr);
//   double now = 0;
//   while (!scheduler.done()) now = scheduler.Step(now);   // virtual time
//
// Requests queue in order of arrival. The first one is admitted as soon as the
// pool gives the blocks of its prompt and one token; nobody overtakes it. It
// computes its prompt at the prefill speed, then generates at the decode speed,
// however many run beside it, takes one block more each time its blocks are
// full, and frees all of them at its end.
//
// A running request that gets no block preempts the youngest running one, which
// may be itself: that one frees everything and goes to the front of the queue;
// admitted again it recomputes prompt and all that it had generated. The same
// happens, youngest first, to those whose blocks the pool wants vacated. A step
// that preempted admits nobody while anything still runs.
//
//   (trace) --arrival--> WAITING --admitted--> RUNNING --last token--> DONE
//                         ^    |                  |
//                         |    +--never fits--> REJECTED
//                         +--------preempted------+
//
// Pure: time comes from the caller, in seconds since the trace's start; there
// is no clock, thread, randomness or I/O inside, so many schedulers can be
// stepped in one process in virtual time, the one that is due first first. Not
// thread-safe.
#ifndef KVBROKER_CLIENT_REPLAY_SCHEDULER_H_
#define KVBROKER_CLIENT_REPLAY_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <optional>
#include <queue>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "client/replay/block_source.h"
#include "client/replay/pattern.h"
#include "client/replay/tokens_in_flight.h"
#include "client/replay/trace.h"

namespace kvbroker::replay {

struct SchedulerOptions {
  EngineSpeed speed;
};

// What became of one request; times in seconds since the trace's start.
struct RequestRecord {
  double arrival_s = 0;
  std::optional<double> admitted_s;  // for the first time
  std::optional<double> first_token_s;
  std::optional<double> end_s;
  int64_t preemptions = 0;
  bool rejected = false;
};

// A request that the pool could never hold.
struct Rejection {
  size_t request = 0;  // index in the trace
  int64_t needed_blocks = 0;
  int64_t capacity_blocks = 0;  // at that moment
};

class Scheduler {
 public:
  // `requests` are sorted by arrival. `source` and `pattern` outlive the
  // scheduler; with a pattern, each block is written when it is taken and
  // checked before it is freed.
  Scheduler(const SchedulerOptions& options, std::vector<TraceRequest> requests,
            BlockSource& source, BlockPattern* pattern);
  // Frees what is still held (without the check that Abandon makes).
  ~Scheduler();

  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Does all that is due at `now_s` and returns when the next step is due:
  // infinity once done(), and one engine step (the time of a token) later while
  // a request waits for blocks, since they may come from elsewhere. Stepping
  // earlier does no harm and lets the pool's wish for blocks be heard; stepping
  // late delays admissions, but not what runs, which keeps to its own due
  // times. REQUIRES: `now_s` never goes back.
  double Step(double now_s);

  // Ends the run: checks and frees the blocks of all that runs. Requests that
  // are not done stay so in their records. Step must not be called again.
  void Abandon();

  // Every request is DONE or REJECTED.
  bool done() const;

  int64_t running() const { return static_cast<int64_t>(running_.size()); }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  // Tokens that the running requests have by now, prompts included.
  int64_t LoadTokens(double now_s) const;
  int64_t preemptions() const { return preemptions_; }

  // One a request, in the trace's order.
  const std::vector<RequestRecord>& records() const { return records_; }
  // In the order in which they happened.
  const std::vector<Rejection>& rejections() const { return rejections_; }

  // Internal: every block has one owner that lists it, and the like.
  absl::Status CheckInvariants() const;

 private:
  enum class State { kAbsent, kWaiting, kRunning, kDone, kRejected };

  // How far a request has come.
  struct Progress {
    State state = State::kAbsent;
    int64_t generated = 0;  // at `segment_start_s`
    // A running request generates `segment_tokens` without asking anything:
    // until its blocks are full or it ends.
    double segment_start_s = 0;
    int64_t segment_tokens = 0;
    uint32_t admissions = 0;  // outdates events of earlier ones
    std::vector<BlockId> blocks;
  };

  // The end of a running request's segment.
  struct Event {
    double due_s;
    uint64_t sequence;  // equal times: first come, first served
    size_t request;
    uint32_t admission;
    friend bool operator>(const Event& a, const Event& b) {
      return a.due_s != b.due_s ? a.due_s > b.due_s : a.sequence > b.sequence;
    }
  };

  void RunDueEvents(double now_s);
  void VacateBlocks(double now_s);
  void QueueArrivals(double now_s);
  void Admit(double now_s);
  double NextDue(double now_s);

  // Generates until its blocks are full or it ends, from `start_s` on.
  void BeginSegment(size_t request, double start_s);
  void EndSegment(size_t request, double due_s, double now_s);
  void Preempt(size_t request, double now_s);
  // Tokens of the present segment that exist by `now_s`.
  int64_t SegmentTokensBy(const Progress& progress, double now_s) const;
  void CountGenerated(size_t request, int64_t tokens);

  bool TakeBlocks(size_t request, int64_t blocks, Urgency urgency);
  void ReleaseBlocks(size_t request);
  bool IsStale(const Event& event) const;

  const SchedulerOptions options_;
  const std::vector<TraceRequest> requests_;
  BlockSource& source_;
  BlockPattern* const pattern_;

  std::vector<Progress> progress_;
  std::vector<RequestRecord> records_;
  std::vector<Rejection> rejections_;
  size_t arrived_ = 0;  // how many of requests_ did
  int64_t finished_ = 0;
  int64_t preemptions_ = 0;

  std::deque<size_t> waiting_;
  std::vector<size_t> running_;  // oldest admission first
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  uint64_t next_sequence_ = 0;
  std::vector<int64_t> owner_of_block_;  // by id; -1: nobody's
  bool preempted_in_step_ = false;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_SCHEDULER_H_
