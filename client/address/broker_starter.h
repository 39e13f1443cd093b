// BrokerStarter: starts the broker of one device where there is none, and again
// when it has died.
//
//   BrokerStarter starter({.program = ".../kvbrokerd", .directory = ...,
//                          .backend = "host"});
//   while (nobody listens) {
//     absl::Status started = starter.Step();   // never waits for the broker
//     ...
//   }
//
// Many processes may do this at once, for one device: kvbrokerd's own lock lets
// one broker live, and the others' starters say ALREADY_EXISTS: look for the
// socket again. The lock is the old broker's until that is gone for good.
//
//            Step                 kvbrokerd --detach ends
//   RESTING ------> STARTING --+--> OK: it is ready
//      ^                       +--> ALREADY_EXISTS, or why it failed
//      |                       |
//      +-- until it is time <--+    longer each time, unless a broker has lived
//
// What is started leaves this process's group, session and tree, and holds none
// of its descriptors. It gets the environment as it was when the starter was
// made, without what is meant for this process alone.
//
// Threads: one at a time.
#ifndef KVBROKER_CLIENT_ADDRESS_BROKER_STARTER_H_
#define KVBROKER_CLIENT_ADDRESS_BROKER_STARTER_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/clock.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "client/address/broker_address.h"

namespace kvbroker::client {

class BrokerStarter {
 public:
  struct Options {
    std::string program;    // kvbrokerd
    std::string directory;  // of its sockets; made with mode 0700 where missing
    // "host", "cuda", "cuda_ipc", or empty: the best for the GPU.
    std::string backend;
    std::string gpu;  // its uuid; empty: none, the host's memory
  };
  explicit BrokerStarter(Options options, Clock& clock = Clock::Steady());
  // A start that is under way goes on.
  ~BrokerStarter() { Forget(); }
  BrokerStarter(const BrokerStarter&) = delete;
  BrokerStarter& operator=(const BrokerStarter&) = delete;

  // Begins a start, or looks what has become of it. OK once for each start that
  // succeeded. UNAVAILABLE: it is under way. ALREADY_EXISTS: another broker has
  // the device, or had; who, where, and how to be admitted. Others: why it
  // failed. The last one is repeated until it is time for the next start.
  absl::Status Step();

  // Somebody is there: what becomes of a start under way is of no interest.
  void Forget();

  // Where the one that has the device says that it listens; empty: not known.
  std::string holder_socket() const {
    MutexLock lock(&mu_);
    return holder_socket_;
  }

 private:
  absl::Status StepLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Begin() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Of the process that ended with `status`, as of waitpid.
  absl::Status Ended(int status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Clock& clock_;
  std::vector<std::string> environment_;
  // An opening may be at its end when the session's worker looks for the next.
  mutable Mutex mu_;
  // kvbrokerd's first process.
  pid_t starting_ ABSL_GUARDED_BY(mu_) = 0;
  UniqueFd out_ ABSL_GUARDED_BY(mu_), error_ ABSL_GUARDED_BY(mu_);
  absl::Status last_ ABSL_GUARDED_BY(mu_);
  std::string holder_socket_ ABSL_GUARDED_BY(mu_);
  absl::Time began_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time next_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Duration pause_ ABSL_GUARDED_BY(mu_);
};

// Whether KVBROKER_AUTOSTART lets brokers be started; it does where it is unset.
// INVALID_ARGUMENT names the value.
absl::StatusOr<bool> AutostartAllowed(EnvironmentLookup environment);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ADDRESS_BROKER_STARTER_H_
