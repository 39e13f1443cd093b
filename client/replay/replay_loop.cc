#include "client/replay/replay_loop.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_format.h"

namespace kvbroker::replay {
namespace {

constexpr absl::Duration kStatusPeriod = absl::Milliseconds(100);

// One call of RunReplay.
class Run {
 public:
  Run(Scheduler& scheduler, const BlockSource& source, const ReplayPace& pace,
      const ReplayListener& listener, ReplayClock& clock)
      : scheduler_(scheduler),
        source_(source),
        pace_(pace),
        listener_(listener),
        clock_(clock),
        until_s_(
            pace.until_s.value_or(std::numeric_limits<double>::infinity())) {}

  ReplayRun ToTheEnd() {
    ReplayRun run;
    run.interrupted = clock_.SleepUntil(pace_.start);
    next_status_ = pace_.start;
    double due_s = 0;
    while (!run.interrupted) {
      const absl::Time now = clock_.Now();
      const double trace_s = std::min(TraceSeconds(now), until_s_);
      if (due_s <= trace_s) {
        run.late_max = std::max(run.late_max, now - RealTime(due_s));
      } else if (Polls()) {
        due_s = trace_s;
      }
      while (due_s <= trace_s && !scheduler_.done()) {
        due_s = scheduler_.Step(due_s);
      }
      TellRejections();
      if (now >= next_status_) TellStatus(now);
      if (scheduler_.done() || trace_s >= until_s_) break;
      if (!source_.Health().ok()) break;
      run.interrupted = clock_.SleepUntil(WakeAfter(now, due_s));
    }
    scheduler_.Abandon();
    const absl::Time end = std::max(clock_.Now(), pace_.start);
    TellStatus(end);
    run.elapsed = end - pace_.start;
    return run;
  }

 private:
  double TraceSeconds(absl::Time now) const {
    return absl::ToDoubleSeconds(now - pace_.start) * pace_.speedup;
  }

  absl::Time RealTime(double trace_s) const {
    // Rounded up to the clock's tick: waking before the event is of no use.
    return pace_.start +
           absl::Nanoseconds(std::ceil(trace_s / pace_.speedup * 1e9));
  }

  bool Polls() const {
    return pace_.poll < absl::InfiniteDuration() &&
           scheduler_.running() + scheduler_.waiting() > 0;
  }

  absl::Time WakeAfter(absl::Time now, double due_s) const {
    due_s = std::min(due_s, until_s_);
    absl::Time wake = absl::InfiniteFuture();
    if (std::isfinite(due_s)) wake = RealTime(due_s);
    if (Polls()) wake = std::min(wake, now + pace_.poll);
    if (listener_.on_status) wake = std::min(wake, next_status_);
    return std::max(wake, now + pace_.min_sleep);
  }

  void TellRejections() {
    for (; told_rejections_ < scheduler_.rejections().size();
         ++told_rejections_) {
      if (!listener_.on_rejection) continue;
      listener_.on_rejection(scheduler_.rejections()[told_rejections_]);
    }
  }

  void TellStatus(absl::Time now) {
    next_status_ = now + kStatusPeriod;
    if (!listener_.on_status) return;
    const double trace_s = TraceSeconds(now);
    listener_.on_status({.t_ms = trace_s * 1000,
                         .load_tokens = scheduler_.LoadTokens(trace_s),
                         .waiting = scheduler_.waiting(),
                         .running = scheduler_.running(),
                         .usage = source_.Usage()});
  }

  Scheduler& scheduler_;
  const BlockSource& source_;
  const ReplayPace& pace_;
  const ReplayListener& listener_;
  ReplayClock& clock_;
  const double until_s_;
  absl::Time next_status_;
  size_t told_rejections_ = 0;
};

}  // namespace

std::string StatusToJson(const ReplayStatus& status) {
  return absl::StrFormat(
      R"({"t_ms":%.0f,"load_tokens":%d,"waiting":%d,"running":%d,)"
      R"("in_use_bytes":%d,"idle_bytes":%d,"held_bytes":%d})"
      "\n",
      status.t_ms, status.load_tokens, status.waiting, status.running,
      status.usage.in_use.count(), status.usage.idle.count(),
      status.usage.held.count());
}

ReplayRun RunReplay(Scheduler& scheduler, const BlockSource& source,
                    const ReplayPace& pace, const ReplayListener& listener,
                    ReplayClock& clock) {
  return Run(scheduler, source, pace, listener, clock).ToTheEnd();
}

}  // namespace kvbroker::replay
