#include "broker/transport/event_loop.h"

#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <atomic>
#include <future>
#include <string>
#include <vector>

#include "broker/base/clock.h"

namespace kvbroker {
namespace {

class EventLoopTest : public testing::Test {
 protected:
  EventLoopTest() : loop_(*EventLoop::Create()) {
    int ends[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
    ours_ = UniqueFd(ends[0]);
    theirs_ = UniqueFd(ends[1]);
  }

  // Runs everything that is due on the loop.
  void Flush() {
    std::promise<void> done;
    loop_->Post([&] { done.set_value(); });
    done.get_future().wait();
  }

  std::unique_ptr<EventLoop> loop_;
  UniqueFd ours_;
  UniqueFd theirs_;
};

TEST_F(EventLoopTest, HandlersSeeWhatTheyWatchFor) {
  std::promise<uint32_t> seen;
  // A second call would throw.
  auto watch = loop_->WatchOnce(
      ours_.get(), EPOLLIN, [&](uint32_t events) { seen.set_value(events); });
  ASSERT_TRUE(watch.ok()) << watch.status();
  loop_->Start();
  ASSERT_EQ(write(theirs_.get(), "x", 1), 1);
  EXPECT_EQ(seen.get_future().get(), uint32_t{EPOLLIN});
  ASSERT_EQ(write(theirs_.get(), "x", 1), 1);
  Flush();
  EXPECT_TRUE(loop_->Watch(ours_.get(), 0, [](uint32_t) {}).ok());
}

TEST_F(EventLoopTest, AHangUpIsSeenWithoutAskingForIt) {
  std::promise<uint32_t> seen;
  EventLoop::WatchId watch;
  watch = *loop_->Watch(ours_.get(), 0, [&](uint32_t events) {
    loop_->Unwatch(watch);
    seen.set_value(events);
  });
  loop_->Start();
  theirs_.Reset();
  EXPECT_TRUE(seen.get_future().get() & EPOLLHUP);
}

TEST_F(EventLoopTest, UnwatchedHandlersAreDestroyedAndNotCalled) {
  auto owned = std::make_shared<int>(0);
  std::weak_ptr<int> alive = owned;
  std::atomic<int> calls = 0;
  auto watch =
      loop_->Watch(ours_.get(), EPOLLIN,
                   [owned = std::move(owned), &calls](uint32_t) { ++calls; });
  loop_->Unwatch(*watch);
  EXPECT_TRUE(alive.expired());
  loop_->Start();
  ASSERT_EQ(write(theirs_.get(), "x", 1), 1);
  Flush();
  EXPECT_EQ(calls, 0);
  loop_->Unwatch(*watch);
  loop_->Rewatch(*watch, EPOLLIN);
}

TEST_F(EventLoopTest, RewatchChangesTheEvents) {
  std::promise<void> writable;
  EventLoop::WatchId watch;
  watch = *loop_->Watch(ours_.get(), 0, [&](uint32_t events) {
    if (events & EPOLLOUT) {
      loop_->Rewatch(watch, 0);
      writable.set_value();
    }
  });
  loop_->Start();
  Flush();
  loop_->Rewatch(watch, EPOLLOUT);
  writable.get_future().wait();
}

TEST_F(EventLoopTest, TimersRunInOrderAndCancelledOnesNever) {
  std::vector<int> order;
  std::promise<void> done;
  const absl::Time now = Clock::Steady().Now();
  loop_->RunAt(now + absl::Milliseconds(20), [&] {
    order.push_back(3);
    done.set_value();
  });
  loop_->RunAt(now - absl::Seconds(1), [&] { order.push_back(1); });
  EventLoop::TimerId cancelled =
      loop_->RunAt(now + absl::Milliseconds(1), [&] { order.push_back(99); });
  loop_->RunAt(now + absl::Milliseconds(10), [&] { order.push_back(2); });
  loop_->RunAt(absl::InfiniteFuture(), [&] { order.push_back(99); });
  loop_->Cancel(cancelled);
  loop_->Cancel(cancelled);
  loop_->Start();
  done.get_future().wait();
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

TEST_F(EventLoopTest, AnEarlierTimerOvertakesALaterOne) {
  loop_->Start();
  std::promise<void> done;
  loop_->RunAt(Clock::Steady().Now() + absl::Hours(1), [] {});
  loop_->RunAt(Clock::Steady().Now() + absl::Milliseconds(1),
               [&] { done.set_value(); });
  done.get_future().wait();
}

TEST_F(EventLoopTest, StopDropsWhatIsLeft) {
  auto owned = std::make_shared<int>(0);
  std::weak_ptr<int> alive = owned;
  loop_->RunAt(Clock::Steady().Now() + absl::Hours(1),
               [owned = std::move(owned)] {});
  loop_->Start();
  loop_->Stop();
  EXPECT_TRUE(alive.expired());
}

TEST_F(EventLoopTest, ABadDescriptorIsAnError) {
  EXPECT_FALSE(loop_->Watch(-1, EPOLLIN, [](uint32_t) {}).ok());
}

}  // namespace
}  // namespace kvbroker
