// RunReplay: drives a scheduler by the clock, and tells how it goes.
//
// No step is done before its time. One that comes late, because the machine was
// busy, is done as of the time it was due, and those after it likewise until
// the run has caught up. So a static pool's figures depend on the trace alone,
// and an elastic one's on the broker, not on who else uses the processor; how
// late steps came is told apart.
#ifndef KVBROKER_CLIENT_REPLAY_REPLAY_LOOP_H_
#define KVBROKER_CLIENT_REPLAY_REPLAY_LOOP_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "client/replay/block_source.h"
#include "client/replay/replay_clock.h"
#include "client/replay/scheduler.h"

namespace kvbroker::replay {

// One moment of a run.
struct ReplayStatus {
  double t_ms = 0;          // trace time
  int64_t load_tokens = 0;  // of the running requests, so far
  int64_t waiting = 0;
  int64_t running = 0;
  BlockUsage usage;
};

std::string StatusToJson(const ReplayStatus& status);  // one line

struct ReplayPace {
  absl::Time start;    // of trace time, by the replay's clock
  double speedup = 1;  // trace seconds a second
  std::optional<double> until_s;
  // Events that are due within this span are done together.
  absl::Duration min_sleep = absl::Microseconds(200);
  // While requests run or wait, the pool is asked at least this often whether
  // it has blocks, or wants some. A pool of the engine's own never changes by
  // itself: infinite.
  absl::Duration poll = absl::InfiniteDuration();
};

struct ReplayListener {
  // Every 100 ms, and once at the end. May be empty.
  std::function<void(const ReplayStatus&)> on_status;
  // Once each. May be empty.
  std::function<void(const Rejection&)> on_rejection;
};

struct ReplayRun {
  bool interrupted = false;
  absl::Duration elapsed;   // since the start of trace time
  absl::Duration late_max;  // of a step
};

// Steps the scheduler from `pace.start` on until it is done, trace time reaches
// `until_s` or the clock says stop. All blocks are free then.
ReplayRun RunReplay(Scheduler& scheduler, const BlockSource& source,
                    const ReplayPace& pace, const ReplayListener& listener,
                    ReplayClock& clock);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_REPLAY_LOOP_H_
