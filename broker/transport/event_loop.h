// EventLoop: one thread that waits for descriptors and times, and for nothing
// else: while nothing happens it sleeps in the kernel without a time-out.
//
//   ASSIGN_OR_RETURN(auto loop, EventLoop::Create());
//   auto watch = loop->Watch(fd, EPOLLIN, [](uint32_t events) { ... });
//   loop->RunAt(Clock::Steady().Now() + absl::Seconds(10), [] { ... });
//   loop->Start();
//   ...
//   loop->Stop();
//
// Threads: every call is safe from any thread, also from within a handler.
// Handlers, timers and posted functions run on the loop's thread alone, one at
// a time, without a lock of the loop. Watch and Unwatch borrow the descriptor:
// it stays open from Watch to Unwatch.
//
// Unwatch from the loop's thread: the handler is not called any more, and is
// destroyed at the latest when the running one returns. From another thread: a
// call that has begun still ends.
#ifndef KVBROKER_BROKER_TRANSPORT_EVENT_LOOP_H_
#define KVBROKER_BROKER_TRANSPORT_EVENT_LOOP_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/ids.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {

class EventLoop {
 public:
  using WatchId = Id<struct WatchIdTag, uint64_t>;
  using TimerId = Id<struct TimerIdTag, uint64_t>;
  // `events` as epoll_wait gives them.
  using Handler = std::function<void(uint32_t events)>;

  static absl::StatusOr<std::unique_ptr<EventLoop>> Create();
  // Stops first.
  ~EventLoop();

  void Start();
  // Returns when the thread has ended. Watches, timers and posted functions
  // that are left are dropped uncalled. Not from the loop's own thread.
  void Stop();

  // `events` of epoll (EPOLLIN, EPOLLONESHOT, ...); 0 waits for a hang-up only.
  absl::StatusOr<WatchId> Watch(int fd, uint32_t events, Handler handler);
  // As Watch, for one event: unwatched before the handler is called.
  absl::StatusOr<WatchId> WatchOnce(int fd, uint32_t events, Handler handler);
  // Waits for other events from now on. A watch that is gone is fine.
  void Rewatch(WatchId watch, uint32_t events);
  void Unwatch(WatchId watch);

  // Once, at `when` of Clock::Steady() or soon after; InfiniteFuture: never.
  TimerId RunAt(absl::Time when, std::function<void()> run);
  // A timer that has run is fine.
  void Cancel(TimerId timer);
  // Soon.
  void Post(std::function<void()> run);

 private:
  struct Watched {
    int fd;
    bool once;
    std::shared_ptr<Handler> handler;
  };

  EventLoop(UniqueFd epoll, UniqueFd timer, UniqueFd wake);

  absl::StatusOr<WatchId> Add(int fd, uint32_t events, Handler handler,
                              bool once);
  void Run();
  // Null where an earlier handler of the same round unwatched it.
  std::shared_ptr<Handler> HandlerFor(uint64_t id);
  void RunDueTimers();
  void RunPosted();
  // Sets the timer descriptor to the earliest timer.
  void ArmTimer() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const UniqueFd epoll_;
  const UniqueFd timer_;
  const UniqueFd wake_;
  std::thread thread_;

  Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t last_id_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<uint64_t, Watched> watched_ ABSL_GUARDED_BY(mu_);
  // By time, then age; and back from the id to the time.
  std::map<std::pair<absl::Time, uint64_t>, std::function<void()>> timers_
      ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, absl::Time> timer_times_ ABSL_GUARDED_BY(mu_);
  std::vector<std::function<void()>> posted_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_EVENT_LOOP_H_
