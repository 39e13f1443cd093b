#include "broker/transport/event_loop.h"

#include <errno.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>

#include <string>

#include "broker/base/clock.h"

namespace kvbroker {
namespace {

// epoll's own cookies for the two descriptors of the loop; ids count from 1.
constexpr uint64_t kTimerCookie = ~uint64_t{0};
constexpr uint64_t kWakeCookie = ~uint64_t{0} - 1;

absl::Status AddToEpoll(int epoll, int fd, uint32_t events, uint64_t cookie) {
  epoll_event event = {.events = events, .data = {.u64 = cookie}};
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) {
    return ErrnoToStatus(errno, "epoll_ctl");
  }
  return absl::OkStatus();
}

// Empties an eventfd or timerfd, whose count nobody needs.
void Drain(int fd) {
  uint64_t count;
  [[maybe_unused]] ssize_t size = read(fd, &count, sizeof(count));
}

}  // namespace

absl::StatusOr<std::unique_ptr<EventLoop>> EventLoop::Create() {
  UniqueFd epoll(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return ErrnoToStatus(errno, "epoll_create1");
  UniqueFd timer(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!timer) return ErrnoToStatus(errno, "timerfd_create");
  UniqueFd wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake) return ErrnoToStatus(errno, "eventfd");
  if (absl::Status status =
          AddToEpoll(epoll.get(), timer.get(), EPOLLIN, kTimerCookie);
      !status.ok()) {
    return status;
  }
  if (absl::Status status =
          AddToEpoll(epoll.get(), wake.get(), EPOLLIN, kWakeCookie);
      !status.ok()) {
    return status;
  }
  return std::unique_ptr<EventLoop>(
      new EventLoop(std::move(epoll), std::move(timer), std::move(wake)));
}

EventLoop::EventLoop(UniqueFd epoll, UniqueFd timer, UniqueFd wake)
    : epoll_(std::move(epoll)),
      timer_(std::move(timer)),
      wake_(std::move(wake)) {}

EventLoop::~EventLoop() { Stop(); }

void EventLoop::Start() {
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "kvb-loop");
    Run();
  });
}

void EventLoop::Stop() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  Post([] {});
  if (thread_.joinable()) thread_.join();
  // Destroyed without the lock: what they own may call back into the loop.
  decltype(watched_) watched;
  decltype(timers_) timers;
  decltype(posted_) posted;
  MutexLock lock(&mu_);
  watched.swap(watched_);
  timers.swap(timers_);
  timer_times_.clear();
  posted.swap(posted_);
}

absl::StatusOr<EventLoop::WatchId> EventLoop::Watch(int fd, uint32_t events,
                                                    Handler handler) {
  return Add(fd, events, std::move(handler), /*once=*/false);
}

absl::StatusOr<EventLoop::WatchId> EventLoop::WatchOnce(int fd, uint32_t events,
                                                        Handler handler) {
  return Add(fd, events, std::move(handler), /*once=*/true);
}

absl::StatusOr<EventLoop::WatchId> EventLoop::Add(int fd, uint32_t events,
                                                  Handler handler, bool once) {
  MutexLock lock(&mu_);
  const uint64_t id = ++last_id_;
  // Under the lock, so that the loop finds the entry when the event comes.
  if (absl::Status status = AddToEpoll(epoll_.get(), fd, events, id);
      !status.ok()) {
    return status;
  }
  watched_[id] = {fd, once, std::make_shared<Handler>(std::move(handler))};
  return WatchId(id);
}

void EventLoop::Rewatch(WatchId watch, uint32_t events) {
  MutexLock lock(&mu_);
  auto found = watched_.find(watch.value());
  if (found == watched_.end()) return;
  epoll_event event = {.events = events, .data = {.u64 = watch.value()}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, found->second.fd, &event);
}

void EventLoop::Unwatch(WatchId watch) {
  std::shared_ptr<Handler> handler;  // destroyed without the lock
  MutexLock lock(&mu_);
  auto found = watched_.find(watch.value());
  if (found == watched_.end()) return;
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.fd, nullptr);
  handler = std::move(found->second.handler);
  watched_.erase(found);
}

EventLoop::TimerId EventLoop::RunAt(absl::Time when,
                                    std::function<void()> run) {
  MutexLock lock(&mu_);
  const uint64_t id = ++last_id_;
  if (when == absl::InfiniteFuture()) return TimerId(id);
  timer_times_[id] = when;
  auto added = timers_.emplace(std::pair(when, id), std::move(run)).first;
  if (added == timers_.begin()) ArmTimer();
  return TimerId(id);
}

void EventLoop::Cancel(TimerId timer) {
  std::function<void()> run;  // destroyed without the lock
  MutexLock lock(&mu_);
  auto time = timer_times_.find(timer.value());
  if (time == timer_times_.end()) return;
  auto found = timers_.find({time->second, timer.value()});
  run = std::move(found->second);
  const bool was_next = found == timers_.begin();
  timers_.erase(found);
  timer_times_.erase(time);
  if (was_next) ArmTimer();
}

void EventLoop::Post(std::function<void()> run) {
  bool first;
  {
    MutexLock lock(&mu_);
    first = posted_.empty();
    posted_.push_back(std::move(run));
  }
  if (!first) return;
  const uint64_t one = 1;
  [[maybe_unused]] ssize_t size = write(wake_.get(), &one, sizeof(one));
}

void EventLoop::ArmTimer() {
  itimerspec spec = {};
  if (!timers_.empty()) {
    absl::Duration delay = timers_.begin()->first.first - Clock::Steady().Now();
    // A timerfd set to zero is off.
    spec.it_value = absl::ToTimespec(std::max(delay, absl::Nanoseconds(1)));
  }
  timerfd_settime(timer_.get(), 0, &spec, nullptr);
}

void EventLoop::Run() {
  constexpr int kMaxEvents = 64;
  epoll_event events[kMaxEvents];
  for (;;) {
    const int count = epoll_wait(epoll_.get(), events, kMaxEvents, -1);
    for (int i = 0; i < count; ++i) {
      const uint64_t cookie = events[i].data.u64;
      if (cookie == kTimerCookie) {
        Drain(timer_.get());
        RunDueTimers();
        continue;
      }
      if (cookie == kWakeCookie) {
        Drain(wake_.get());
        RunPosted();
        continue;
      }
      std::shared_ptr<Handler> handler = HandlerFor(cookie);
      if (handler != nullptr) (*handler)(events[i].events);
    }
    MutexLock lock(&mu_);
    if (stopping_) return;
  }
}

std::shared_ptr<EventLoop::Handler> EventLoop::HandlerFor(uint64_t id) {
  MutexLock lock(&mu_);
  auto found = watched_.find(id);
  if (found == watched_.end()) return nullptr;
  std::shared_ptr<Handler> handler = found->second.handler;
  if (found->second.once) {
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.fd, nullptr);
    watched_.erase(found);
  }
  return handler;
}

void EventLoop::RunDueTimers() {
  for (;;) {
    std::function<void()> run;
    {
      MutexLock lock(&mu_);
      if (timers_.empty() || stopping_ ||
          timers_.begin()->first.first > Clock::Steady().Now()) {
        ArmTimer();
        return;
      }
      auto first = timers_.begin();
      run = std::move(first->second);
      timer_times_.erase(first->first.second);
      timers_.erase(first);
    }
    run();
  }
}

void EventLoop::RunPosted() {
  std::vector<std::function<void()>> posted;
  {
    MutexLock lock(&mu_);
    posted.swap(posted_);
  }
  for (const std::function<void()>& run : posted) run();
}

}  // namespace kvbroker
