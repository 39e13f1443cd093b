#include "broker/server/state_keeper.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvbroker {

StateKeeper::StateKeeper(Options options) : options_(std::move(options)) {
  thread_ = std::thread([this] { Run(); });
}

StateKeeper::~StateKeeper() { Finish(); }

void StateKeeper::Finish() {
  {
    MutexLock lock(&mu_);
    stop_ = true;
    wake_.SignalAll();
  }
  if (thread_.joinable()) thread_.join();
}

void StateKeeper::Changed() {
  MutexLock lock(&mu_);
  ++changes_;
  wake_.SignalAll();
}

bool StateKeeper::Wait(absl::Duration timeout) {
  const absl::Time give_up = absl::Now() + timeout;
  MutexLock lock(&mu_);
  const uint64_t now = changes_;
  while (attempted_ < now && !stop_) {
    if (written_.WaitWithDeadline(&mu_, give_up)) break;
  }
  return attempted_ >= now && !failing_;
}

void StateKeeper::Run() {
  absl::Duration retry = options_.first_retry;
  while (true) {
    uint64_t changes;
    {
      MutexLock lock(&mu_);
      const absl::Time again =
          failing_ ? absl::Now() + retry : absl::InfiniteFuture();
      while (!stop_ && changes_ == attempted_) {
        if (wake_.WaitWithDeadline(&mu_, again)) break;
      }
      // What failed last is worth a last try; what is written is not.
      if (stop_ && changes_ == attempted_ && !failing_) return;
      changes = changes_;
    }
    const absl::Status saved = options_.save(options_.state());
    MutexLock lock(&mu_);
    if (!saved.ok() && !failing_) {
      options_.log(absl::StrCat(
          "state-not-saved error=\"", saved.message(),
          "\" (limits set now would not outlive the broker; trying again)"));
    } else if (saved.ok() && failing_) {
      options_.log("state-saved again");
    }
    retry = failing_ && !saved.ok() ? std::min(retry * 2, options_.last_retry)
                                    : options_.first_retry;
    failing_ = !saved.ok();
    attempted_ = changes;
    written_.SignalAll();
    if (stop_ && changes_ == changes) return;
  }
}

}  // namespace kvbroker
