#include "client/replay/replay_clock.h"

#include <time.h>

#include <algorithm>

#include "broker/base/check.h"
#include "broker/base/clock.h"

namespace kvbroker::replay {

SignalClock::SignalClock() {
  sigemptyset(&stop_signals_);
  sigaddset(&stop_signals_, SIGINT);
  sigaddset(&stop_signals_, SIGTERM);
  KVB_CHECK(pthread_sigmask(SIG_BLOCK, &stop_signals_, nullptr) == 0);
}

absl::Time SignalClock::Now() { return Clock::Steady().Now(); }

bool SignalClock::SleepUntil(absl::Time wake) {
  // An hour at a time: what never comes is due in infinity.
  constexpr absl::Duration kLongest = absl::Hours(1);
  while (!stopped_) {
    const absl::Duration left =
        std::clamp(wake - Now(), absl::ZeroDuration(), kLongest);
    const timespec timeout = absl::ToTimespec(left);
    // Only an expired sleep and the signals of others return -1.
    if (sigtimedwait(&stop_signals_, nullptr, &timeout) > 0) stopped_ = true;
    if (Now() >= wake) break;
  }
  return stopped_;
}

}  // namespace kvbroker::replay
