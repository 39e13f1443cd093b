#include "broker/base/clock.h"

#include <time.h>

namespace kvbroker {
namespace {

class SteadyClock : public Clock {
 public:
  absl::Time Now() const override {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return absl::TimeFromTimespec(now);
  }
};

}  // namespace

Clock& Clock::Steady() {
  static SteadyClock* const clock = new SteadyClock;
  return *clock;
}

}  // namespace kvbroker
