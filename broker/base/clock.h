// Clock: what time it is, so that tests can say.
#ifndef KVBROKER_BROKER_BASE_CLOCK_H_
#define KVBROKER_BROKER_BASE_CLOCK_H_

#include <atomic>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace kvbroker {

// Thread-safe. Times only ever compare with times of the same clock; they do
// not jump when the machine's date is set.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;

  // The process's steady clock; never destroyed.
  static Clock& Steady();
};

// Stands still until told.
class FakeClock : public Clock {
 public:
  absl::Time Now() const override {
    return absl::UnixEpoch() + absl::Nanoseconds(nanos_.load());
  }
  void Advance(absl::Duration d) { nanos_ += absl::ToInt64Nanoseconds(d); }

 private:
  std::atomic<int64_t> nanos_{int64_t{1} << 40};
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_BASE_CLOCK_H_
