// Memory of engines that cannot answer, or whose children outlive them: a whole
// broker, real sockets, other processes.
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <variant>

#include "broker/base/temp_folder.h"
#include "broker/config/broker_config.h"
#include "broker/device/host_backend.h"
#include "broker/server/composition.h"
#include "broker/server/test_peer.h"
#include "broker/server/test_session.h"

namespace kvbroker {
namespace {

constexpr uint32_t kAllPages = 64;
constexpr Bytes kPage = KiB(128);

class HeldMemoryTest : public testing::Test {
 protected:
  HeldMemoryTest() {
    BrokerConfig config;
    config.backend = "host";
    config.device_uuid = "HOST-held";
    config.capacity.bytes = kPage * kAllPages;
    config.socket_dir = folder_ / "sockets";
    config.lock_dir = folder_ / "locks";
    config.state_dir = folder_ / "state";
    auto backend = *HostBackend::Create(
        {.total = kPage * kAllPages, .device_uuid = "HOST-held"});
    backend_ = backend.get();
    broker_ = *RunningBroker::Start(
        config, {.backend = std::move(backend), .log_to_stderr = false});
    // Orphans are ours to wait for.
    prctl(PR_SET_CHILD_SUBREAPER, 1);
  }

  const client::BrokerAddress& address() { return broker_->address(); }
  Bytes Held() { return broker_->core().Snapshot().broker.held; }
  uint32_t Sessions() { return broker_->core().Snapshot().broker.sessions; }

  // Waits for what comes in its own time; the test's time-out is the limit.
  template <typename Condition>
  void WaitUntil(Condition condition) {
    while (!condition()) std::this_thread::yield();
  }

  TempFolder folder_;
  HostBackend* backend_;
  std::unique_ptr<RunningBroker> broker_;
};

TEST_F(HeldMemoryTest, AChildThatInheritsEverythingKeepsTheDeviceBusyOnly) {
  TestPeer engine(address(), "fork", "10");
  const std::string line = engine.Line();
  const pid_t child = atoi(line.c_str());
  ASSERT_GT(child, 0) << line;
  EXPECT_EQ(Held(), kPage * 10);

  engine.Kill();
  // The child has the sockets still, and so nobody has hung up.
  WaitUntil([&] { return Held() == Bytes(0) && Sessions() == 0; });
  ASSERT_EQ(kill(child, 0), 0);
  EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
  // The child maps it; what the broker has in stock goes within a second.
  WaitUntil([&] { return *backend_->UsedBytes() == kPage * 10; });

  // What the child maps is nobody else's; the rest is.
  TestSession next(address());
  ASSERT_TRUE(next.Begin("next").ok());
  absl::StatusOr<std::vector<UniqueFd>> rest = next.Acquire(kAllPages - 10);
  EXPECT_TRUE(rest.ok()) << rest.status();
  EXPECT_EQ(*backend_->UsedBytes(), kPage * kAllPages);

  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  WaitUntil([&] { return *backend_->UsedBytes() == kPage * (kAllPages - 10); });
  EXPECT_TRUE(next.Acquire(10).ok());
  EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
}

TEST_F(HeldMemoryTest, AStoppedEngineKeepsItsPagesAndIsNamed) {
  TestPeer engine(address(), "hold", std::to_string(kAllPages));
  ASSERT_EQ(engine.Line(), "held");
  kill(engine.pid(), SIGSTOP);
  int status;
  ASSERT_EQ(waitpid(engine.pid(), &status, WUNTRACED), engine.pid());

  TestSession other(address());
  ASSERT_TRUE(other.Begin("other").ok());
  ASSERT_TRUE(other.SendAcquire(1, absl::Milliseconds(300)));
  Refused refused;
  for (bool answered = false; !answered;) {
    absl::StatusOr<BrokerMessage> message = other.Read();
    ASSERT_TRUE(message.ok()) << message.status();
    if (const auto* answer = std::get_if<Refused>(&*message)) {
      refused = *answer;
      answered = true;
    }
  }
  ASSERT_FALSE(refused.holders.empty());
  EXPECT_EQ(refused.holders.front().instance, "peer");
  EXPECT_EQ(Held(), kPage * kAllPages);

  kill(engine.pid(), SIGCONT);
  EXPECT_EQ(Held(), kPage * kAllPages) << "stopped is not gone";
  EXPECT_EQ(Sessions(), 2);
  engine.CloseInput();  // ends on its own
  WaitUntil([&] { return Held() == Bytes(0); });
  EXPECT_TRUE(other.Acquire(1).ok());
  EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
}

}  // namespace
}  // namespace kvbroker
