#include "client/replay/replay_clock.h"

#include <signal.h>

#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

TEST(SignalClockTest, SleepsUntilThen) {
  SignalClock clock;
  const absl::Time wake = clock.Now() + absl::Milliseconds(2);
  EXPECT_FALSE(clock.SleepUntil(wake));
  EXPECT_GE(clock.Now(), wake);
}

TEST(SignalClockTest, ThePastIsNoSleep) {
  SignalClock clock;
  EXPECT_FALSE(clock.SleepUntil(clock.Now() - absl::Hours(1)));
  EXPECT_FALSE(clock.SleepUntil(absl::InfinitePast()));
}

TEST(SignalClockTest, SignalsEndAnySleepForGood) {
  for (int signal : {SIGINT, SIGTERM}) {
    SignalClock clock;
    raise(signal);  // Blocked: it waits for the sleep.
    EXPECT_TRUE(clock.SleepUntil(absl::InfiniteFuture()));
    EXPECT_TRUE(clock.SleepUntil(absl::InfiniteFuture()));
  }
}

TEST(SignalClockTest, ASignalIsSeenWithoutSleep) {
  SignalClock clock;
  raise(SIGTERM);
  EXPECT_TRUE(clock.SleepUntil(absl::InfinitePast()));
}

}  // namespace
}  // namespace kvbroker::replay
