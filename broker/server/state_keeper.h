// StateKeeper: the thread that writes the state file when there is something
// new to write.
//
//   StateKeeper keeper({.file = std::move(file), .state = [&] { ... }, ...});
//   keeper.Changed();                      // soon
//   keeper.Changed(); keeper.Wait(...);    // now
//
// Changes that come while one is written are written together. What cannot be
// written is said once, tried again after a second and then less and less
// often, and said again when it works: the broker serves on. While nothing
// changes the thread sleeps without a time-out.
//
// Threads: safe.
#ifndef KVBROKER_BROKER_SERVER_STATE_KEEPER_H_
#define KVBROKER_BROKER_SERVER_STATE_KEEPER_H_

#include <cstdint>
#include <functional>
#include <string_view>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/mutex.h"
#include "broker/state/broker_state.h"

namespace kvbroker {

class StateKeeper {
 public:
  struct Options {
    std::function<absl::Status(const BrokerState&)> save;
    // What to write; called on the keeper's thread, without its lock.
    std::function<BrokerState()> state;
    std::function<void(std::string_view line)> log;
    absl::Duration first_retry = absl::Seconds(1);
    absl::Duration last_retry = absl::Minutes(1);
  };

  explicit StateKeeper(Options options);
  ~StateKeeper();

  // Writes what is yet to be written, once, and nothing more after that.
  void Finish();

  // `state` has something new to say.
  void Changed();
  // True once all that had changed by now is written; false after `timeout`, or
  // where it could not be.
  bool Wait(absl::Duration timeout);

 private:
  void Run();

  const Options options_;
  Mutex mu_;
  CondVar wake_;     // the thread's
  CondVar written_;  // those in Wait
  // Changes so far, and those that the last attempt took in.
  uint64_t changes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t attempted_ ABSL_GUARDED_BY(mu_) = 0;
  bool failing_ ABSL_GUARDED_BY(mu_) = false;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_STATE_KEEPER_H_
