// ReplayClock: what time it is, and sleep that a request to stop ends.
#ifndef KVBROKER_CLIENT_REPLAY_REPLAY_CLOCK_H_
#define KVBROKER_CLIENT_REPLAY_REPLAY_CLOCK_H_

#include <signal.h>

#include "absl/time/time.h"

namespace kvbroker::replay {

// One thread. Two kinds: SignalClock, and a test's that only counts.
class ReplayClock {
 public:
  virtual ~ReplayClock() = default;

  // Steady: it does not jump when the machine's date is set.
  virtual absl::Time Now() = 0;

  // Sleeps until `wake`, which may be past. True as soon as, and ever since,
  // the run shall stop.
  virtual bool SleepUntil(absl::Time wake) = 0;
};

// The machine's steady clock; SIGINT and SIGTERM ask to stop.
//
// Both signals are blocked in the constructing thread and in all threads that
// it starts later, and taken while asleep: none is lost, no handler runs.
class SignalClock : public ReplayClock {
 public:
  SignalClock();
  absl::Time Now() override;
  bool SleepUntil(absl::Time wake) override;

 private:
  sigset_t stop_signals_;
  bool stopped_ = false;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_REPLAY_CLOCK_H_
