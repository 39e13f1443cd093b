// The whole broker, real core and real sockets, with engines in this process
// and in others.
#include "broker/server/composition.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/escaping.h"
#include "broker/base/temp_folder.h"
#include "broker/server/test_peer.h"
#include "broker/server/test_session.h"

namespace kvbroker {
namespace {

class CompositionTest : public testing::Test {
 protected:
  CompositionTest() {
    config_.backend = "host";
    config_.device_uuid = "HOST-test";
    config_.capacity.bytes = MiB(64);
    config_.socket_dir = folder_ / "sockets";
    config_.lock_dir = folder_ / "locks";
    config_.state_dir = folder_ / "state";
    config_.log_file = folder_ / "log";
    config_.log_level = "debug";
  }

  ~CompositionTest() override { broker_.reset(); }

  void Start() { Start(BrokerOptions()); }
  void Start(BrokerOptions options) {
    options.log_to_stderr = false;
    absl::StatusOr<std::unique_ptr<RunningBroker>> broker =
        RunningBroker::Start(config_, std::move(options));
    ASSERT_TRUE(broker.ok()) << broker.status();
    broker_ = *std::move(broker);
  }

  const client::BrokerAddress& address() { return broker_->address(); }

  Bytes Held() { return broker_->core().Snapshot().broker.held; }
  uint32_t Sessions() { return broker_->core().Snapshot().broker.sessions; }

  // Waits for what comes in its own time; the test's time-out is the limit.
  template <typename Condition>
  void WaitUntil(Condition condition) {
    while (!condition()) std::this_thread::yield();
  }

  std::string Log() {
    broker_.reset();  // writes all of it
    std::string text;
    UniqueFd fd(open(config_.log_file.c_str(), O_RDONLY));
    char bytes[4096];
    for (ssize_t size; (size = read(fd.get(), bytes, sizeof(bytes))) > 0;) {
      text.append(bytes, size);
    }
    return text;
  }

  TempFolder folder_;
  BrokerConfig config_;
  std::unique_ptr<RunningBroker> broker_;
};

bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_F(CompositionTest, AnEngineBorrowsMemoryThatItCanMap) {
  Start();
  TestSession engine(address());
  absl::Status begun = engine.Begin("llama");
  ASSERT_TRUE(begun.ok()) << begun;
  absl::StatusOr<std::vector<UniqueFd>> handles = engine.Acquire(3);
  ASSERT_TRUE(handles.ok()) << handles.status();
  ASSERT_EQ(handles->size(), 6);
  for (const UniqueFd& handle : *handles) {
    void* memory = mmap(nullptr, 64 << 10, PROT_READ | PROT_WRITE, MAP_SHARED,
                        handle.get(), 0);
    ASSERT_NE(memory, MAP_FAILED);
    EXPECT_EQ(static_cast<char*>(memory)[100], 0);
    static_cast<char*>(memory)[100] = 1;
    munmap(memory, 64 << 10);
  }
  EXPECT_EQ(Held(), engine.page_bytes() * 3);
  handles->clear();
  engine.Send(Return{engine.pool(), {{PageIndex(0), Generation(1)}}});
  EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
}

TEST_F(CompositionTest, ManyDescriptorsFlowWithinTheWindow) {
  Start();
  TestSession engine(address());
  ASSERT_TRUE(engine.Begin("llama").ok());
  // 2 x 500 handles in frames of at most 253, more than the window of 512.
  absl::StatusOr<std::vector<UniqueFd>> handles = engine.Acquire(500);
  ASSERT_TRUE(handles.ok()) << handles.status();
  EXPECT_EQ(handles->size(), 1000);
}

TEST_F(CompositionTest, ANonceIsGoodOnce) {
  Start();
  TestSession engine(address());
  Nonce nonce = *engine.descriptors().GetNonce();
  ASSERT_TRUE(engine.OpenWith(nonce, "llama").ok());
  TestSession replay(address());
  EXPECT_TRUE(absl::IsAborted(replay.OpenWith(nonce, "other")));
  EXPECT_TRUE(engine.Acquire(1).ok()) << "the session goes on";
}

TEST_F(CompositionTest, AStolenNonceOpensNothing) {
  Start();
  TestSession engine(address());
  Nonce nonce = *engine.descriptors().GetNonce();
  TestPeer thief(
      address(), "steal",
      absl::BytesToHexString(absl::string_view(
          reinterpret_cast<const char*>(nonce.data()), nonce.size())));
  EXPECT_TRUE(Has(thief.Line(), "PERMISSION_DENIED"));
  EXPECT_TRUE(engine.OpenWith(nonce, "llama").ok()) << "still the owner's";
}

TEST_F(CompositionTest, AKilledEnginesPagesComeBack) {
  for (auto [peer_pidfd, pidfd_open] :
       {std::pair(true, true), std::pair(false, true)}) {
    BrokerOptions options;
    options.use_peer_pidfd = peer_pidfd;
    options.use_pidfd_open = pidfd_open;
    Start(std::move(options));
    TestPeer engine(address(), "hold", "10");
    EXPECT_EQ(engine.Line(), "held");
    EXPECT_EQ(Held(), KiB(128) * 10);
    engine.Kill();
    WaitUntil([&] { return Held() == Bytes(0) && Sessions() == 0; });
    EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
    broker_.reset();
  }
}

TEST_F(CompositionTest, APidfdFromHelloServesWhereTheKernelHasNone) {
  BrokerOptions options;
  options.use_peer_pidfd = false;
  options.use_pidfd_open = false;
  Start(std::move(options));
  TestSession without(address());
  EXPECT_FALSE(without.Begin("llama").ok());
  TestSession with(address());
  absl::Status begun = with.Begin("llama", /*with_pidfd=*/true);
  EXPECT_TRUE(begun.ok()) << begun;
  EXPECT_TRUE(with.Acquire(1).ok());
}

TEST_F(CompositionTest, AHangUpOfEitherConnectionKeepsThePages) {
  Start();
  TestSession one(address()), two(address());
  ASSERT_TRUE(one.Begin("one").ok() && two.Begin("two").ok());
  ASSERT_TRUE(one.Acquire(2).ok() && two.Acquire(3).ok());
  one.descriptors().HangUp();
  EXPECT_TRUE(absl::IsUnavailable(one.ReadToTheEnd()));
  two.HangUpStream();
  EXPECT_TRUE(two.descriptors().WaitForEnd());
  // This process, which may still map them, lives.
  EXPECT_EQ(Held(), KiB(128) * 5);
  EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
}

TEST_F(CompositionTest, GarbageEndsItsOwnSessionOnly) {
  Start();
  TestSession good(address());
  ASSERT_TRUE(good.Begin("good").ok());
  {
    TestSession early(address());
    // Something before Open: OpenWith would send Open first.
    Nonce nonce{};
    EXPECT_TRUE(absl::IsAborted(early.OpenWith(nonce, "x")));
  }
  {
    TestSession empty(address());
    ASSERT_TRUE(empty.Begin("empty").ok());
    empty.SendBytes("");
    EXPECT_TRUE(absl::IsInvalidArgument(empty.ReadToTheEnd()));
    EXPECT_TRUE(empty.descriptors().WaitForEnd());
  }
  {
    TestSession twice(address());
    ASSERT_TRUE(twice.Begin("twice").ok());
    twice.Send(Open{.instance = "again",
                    .pools = {{.handle_bytes = KiB(64), .max_pages = 1}}});
    EXPECT_TRUE(absl::IsInvalidArgument(twice.ReadToTheEnd()));
  }
  {
    TestSession huge(address());
    ASSERT_TRUE(huge.Begin("huge").ok());
    Return much{.pool = huge.pool()};
    much.pages.resize(60000, {PageIndex(0xffffffff), Generation(0xffffffff)});
    for (int i = 0; i < 3; ++i) {
      much.pages.insert(much.pages.end(), much.pages.begin(),
                        much.pages.begin() + 60000);
    }
    huge.Send(much);
    EXPECT_FALSE(huge.ReadToTheEnd().ok());
  }
  {
    TestSession garbled(address());
    ASSERT_TRUE(garbled.Begin("garbled").ok());
    garbled.descriptors().SendPacket("nonsense");
    EXPECT_TRUE(absl::IsUnavailable(garbled.ReadToTheEnd()));
  }
  EXPECT_TRUE(good.Acquire(1).ok());
  EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
}

TEST_F(CompositionTest, ASlowReaderIsDroppedAndNobodyElseNotices) {
  BrokerOptions options;
  options.max_waiting = 64;
  Start(std::move(options));
  TestSession good(address());
  ASSERT_TRUE(good.Begin("good").ok());
  TestPeer slow(address(), "slow");
  EXPECT_EQ(slow.Line(), "dropped");
  EXPECT_TRUE(good.Acquire(1).ok());
  EXPECT_TRUE(Has(Log(), "the peer does not read"));
}

TEST_F(CompositionTest, OtherUsersAreKeptOut) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to change users";
  config_.allow_uids = {4001};
  Start();
  TestSession engine(address());
  ASSERT_TRUE(engine.Begin("llama").ok());
  TestPeer stranger(address(), "list", "", 4002);
  EXPECT_TRUE(Has(stranger.Line(), "UNAVAILABLE"));
  // Who is allowed sees and changes its own tenant's only.
  TestPeer guest(address(), "list", "", 4001);
  EXPECT_EQ(guest.Line(), "OK ");
  TestPeer meddler(address(), "limit", "llama", 4001);
  std::string line = meddler.Line();
  EXPECT_TRUE(Has(line, "PERMISSION_DENIED") && Has(line, "another tenant"))
      << line;
  TestPeer lost(address(), "limit", "nobody", 4001);
  line = lost.Line();
  EXPECT_TRUE(Has(line, "NOT_FOUND") && Has(line, "none")) << line;
  TestPeer borrower(address(), "hold", "2", 4001);
  EXPECT_EQ(borrower.Line(), "held");
  absl::StatusOr<std::vector<std::string>> all = TestAdmin(address()).List();
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->size(), 2);
  EXPECT_TRUE(Has(Log(), "peer-refused uid=4002"));
}

TEST_F(CompositionTest, TheAdminServiceShowsAndSets) {
  Start();
  TestSession engine(address());
  ASSERT_TRUE(engine.Begin("llama").ok());
  TestAdmin admin(address());
  EXPECT_TRUE(admin.Healthy());
  std::string services = admin.Reflect();
  EXPECT_TRUE(Has(services, "kvbroker.v1.Broker") &&
              Has(services, "kvbroker.v1.Admin"));
  ASSERT_EQ(admin.List()->size(), 1);
  EXPECT_TRUE(Has(admin.List()->at(0), " llama"));
  EXPECT_TRUE(admin.List({"llama"}).ok());
  absl::Status missing = admin.List({"llama", "gpt"}).status();
  EXPECT_TRUE(absl::IsNotFound(missing));
  EXPECT_TRUE(Has(std::string(missing.message()), "llama")) << missing;
  EXPECT_TRUE(admin.SetMax("llama", Bytes(1234567)).ok());
  EXPECT_TRUE(absl::IsNotFound(admin.SetMax("gpt", MiB(1))));
  EXPECT_TRUE(absl::IsInvalidArgument(admin.SetMax("", MiB(1))));
  EXPECT_TRUE(
      absl::IsInvalidArgument(admin.SetMax("llama", Bytes(int64_t{1} << 60))));
  EXPECT_FALSE(admin.Explain("llama")->empty());
  EXPECT_TRUE(absl::IsFailedPrecondition(admin.Delete("llama", false)));
  // The limit was changed: the engine hears of it, then is fenced.
  EXPECT_TRUE(admin.Delete("llama", true).ok());
  bool limited = false, fenced = false;
  for (;;) {
    absl::StatusOr<BrokerMessage> message = engine.Read();
    if (!message.ok()) break;
    limited |= std::holds_alternative<LimitChanged>(*message);
    fenced |= std::holds_alternative<Fenced>(*message);
    if (fenced) break;
  }
  EXPECT_TRUE(limited && fenced);
}

// Each connection takes another number, and each call is its own caller's.
TEST_F(CompositionTest, ConnectionsComeAndGo) {
  BrokerOptions options;
  options.rest_after = absl::ZeroDuration();
  Start(std::move(options));
  for (int i = 0; i < 60; ++i) {
    TestAdmin admin(address());
    EXPECT_TRUE(admin.List().ok()) << i;
  }
}

TEST_F(CompositionTest, ASecondBrokerForADeviceIsToldWhoHasIt) {
  Start();
  BrokerOptions options;
  options.log_to_stderr = false;
  absl::Status status =
      RunningBroker::Start(config_, std::move(options)).status();
  EXPECT_TRUE(absl::IsAlreadyExists(status)) << status;
  EXPECT_TRUE(Has(std::string(status.message()), address().rpc_path));
  TestSession engine(address());
  EXPECT_TRUE(engine.Begin("llama").ok()) << "the first one goes on";
}

TEST_F(CompositionTest, AStoppedBrokerLeavesNoSocketsAndEnginesRunOn) {
  Start();
  TestSession engine(address());
  ASSERT_TRUE(engine.Begin("llama").ok());
  absl::StatusOr<std::vector<UniqueFd>> handles = engine.Acquire(1);
  ASSERT_TRUE(handles.ok());
  void* memory = mmap(nullptr, 64 << 10, PROT_READ | PROT_WRITE, MAP_SHARED,
                      handles->at(0).get(), 0);
  ASSERT_NE(memory, MAP_FAILED);
  broker_->Stop();
  EXPECT_TRUE(std::filesystem::is_empty(config_.socket_dir));
  EXPECT_FALSE(engine.ReadToTheEnd().ok());
  broker_.reset();
  static_cast<char*>(memory)[0] = 1;
  munmap(memory, 64 << 10);
  // And another one can follow at once.
  Start();
  TestSession next(address());
  EXPECT_TRUE(next.Begin("llama").ok());
}

TEST_F(CompositionTest, AStoppedEngineDoesNotKeepTheBrokerFromStopping) {
  Start();
  TestPeer engine(address(), "hold", "1");
  ASSERT_EQ(engine.Line(), "held");
  kill(engine.pid(), SIGSTOP);
  // More than its socket holds.
  for (int i = 0; i < 3000; ++i) {
    ASSERT_TRUE(broker_->core()
                    .SetPolicy({.name = "peer"}, {.max = MiB(1) + Bytes(i)})
                    .ok());
  }
  std::future<void> stopped =
      std::async(std::launch::async, [this] { broker_->Stop(); });
  const bool in_time =
      stopped.wait_for(std::chrono::seconds(20)) == std::future_status::ready;
  engine.Kill();
  EXPECT_TRUE(in_time);
}

TEST_F(CompositionTest, ABrokerIsIdleWhileNoEngineLives) {
  config_.idle_exit = absl::Milliseconds(1);
  std::atomic<int> times = 0;
  BrokerOptions options;
  options.idle = [&] { ++times; };
  Start(std::move(options));
  WaitUntil([&] { return times > 0; });
  TestPeer engine(address(), "hold", "1");
  EXPECT_EQ(engine.Line(), "held");
  const int before = times;
  TestAdmin admin(address());
  for (int i = 0; i < 50; ++i) EXPECT_TRUE(admin.List().ok());
  EXPECT_EQ(times, before);
  engine.Kill();
  WaitUntil([&] { return times > before; });
}

TEST_F(CompositionTest, ABrokerDoesNotLeaveWhileSomebodyOpensASession) {
  Start();
  {
    // Between hello and Open.
    TestSession session(address());
    ASSERT_TRUE(session.descriptors().GetNonce());
    EXPECT_FALSE(broker_->LeaveIfIdle());
  }
  WaitUntil([&] { return TestSession(address()).Begin("a").ok(); });
  TestSession open(address());
  ASSERT_TRUE(open.Begin("a").ok());
  EXPECT_FALSE(broker_->LeaveIfIdle());
  EXPECT_TRUE(open.Acquire(1).ok());
}

TEST_F(CompositionTest, WhoComesAfterABrokerHasLeftFindsNobody) {
  Start();
  const client::BrokerAddress left = address();
  TestAdmin admin(left);  // an operator's connection keeps no broker
  EXPECT_TRUE(admin.List().ok());
  ASSERT_TRUE(broker_->LeaveIfIdle());
  EXPECT_FALSE(client::SomebodyListens(left));
  EXPECT_FALSE(std::filesystem::exists(left.rpc_path));
  broker_->Stop();
}

TEST_F(CompositionTest, WhatIsSetWrongIsNamed) {
  auto error = [&](auto set) {
    BrokerConfig config = config_;
    set(config);
    BrokerOptions options;
    options.log_to_stderr = false;
    return std::string(
        RunningBroker::Start(config, std::move(options)).status().message());
  };
  EXPECT_TRUE(Has(error([](auto& c) { c.socket_group = "no-such-group"; }),
                  "socket_group"));
  EXPECT_TRUE(Has(error([](auto& c) { c.socket_dir = "/no/such/dir"; }),
                  "/no/such/dir"));
  EXPECT_TRUE(
      Has(error([](auto& c) { c.log_file = "/no/such/log"; }), "/no/such/log"));
  EXPECT_TRUE(Has(
      error([](auto& c) { c.socket_dir = "/tmp/" + std::string(100, 'x'); }),
      "too long"));
  EXPECT_NE(error([](auto& c) { c.backend = "cuda_ipc"; }), "");
  EXPECT_TRUE(Has(error([](auto& c) { c.gpu = "0"; }), "gpu must be empty"));
}

}  // namespace
}  // namespace kvbroker
