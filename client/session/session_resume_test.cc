// What an engine sees of a broker that goes away and comes back.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "broker/core/core.h"
#include "broker/device/fake_backend.h"
#include "client/session/lossy_link.h"
#include "client/session/session.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/harness/null_mapper.h"
#include "tests/harness/scripted_link.h"

namespace kvbroker::client {
namespace {

using ::kvbroker::testing::NullMapper;
using ::kvbroker::testing::ScriptedLink;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr Bytes kCapacity = MiB(1);
constexpr Bytes kPage = KiB(64);
constexpr size_t kBlocksPerPage = 16;

class SessionResumeTest : public ::testing::Test {
 protected:
  SessionResumeTest() {
    StartBroker(Remembered{});
    SessionOptions options;
    options.instance = "a";
    PoolOptions pool;
    pool.geometry.handle_bytes = kPage;
    pool.geometry.max_pages = 16;
    pool.block_bytes = KiB(4);
    pool.map_ahead = false;
    pool.min_reserved_pages = 0;
    pool.running_miss_wait = absl::ZeroDuration();
    options.pools.push_back(std::move(pool));
    session_ = *Session::Create(
        std::move(options),
        [&](const PoolGeometry&) {
          auto mapper = std::make_unique<NullMapper>();
          mapper_ = mapper.get();
          return mapper;
        },
        clock_);
    session_->ReconnectWith([this]() -> absl::StatusOr<Session::Connection> {
      wire_ = nullptr;
      ++attempts_;
      if (core_ == nullptr) return absl::UnavailableError("nobody listens");
      auto link = std::make_unique<LossyLink>(*core_, kPeer, *session_);
      wire_ = link.get();
      return Session::Connection{std::move(link), Nonce{}};
    });
    wire_ = &LossyLink::Join(*core_, kPeer, *session_);
    Settle();
  }
  ~SessionResumeTest() override {
    EXPECT_EQ(pool().CheckInvariants(), absl::OkStatus());
    if (core_ != nullptr) {
      EXPECT_EQ(core_->CheckInvariants(), absl::OkStatus());
    }
    session_.reset();
  }

  void StartBroker(Remembered remembered) {
    device_ =
        std::make_unique<FakeBackend>(FakeBackendOptions{.total = kCapacity});
    CoreOptions options;
    options.backend = device_.get();
    options.clock = &clock_;
    options.capacity = kCapacity;
    options.incarnation = ++incarnation_;
    options.remembered = std::move(remembered);
    core_ = *Core::Create(std::move(options));
  }
  Remembered KillBroker() {
    Remembered remembered = core_->Remember();
    if (wire_ != nullptr) wire_->Break(/*broker_gone=*/true);
    core_.reset();
    Settle();
    return remembered;
  }

  void Settle() {
    for (int rounds = 0; rounds < 1000; ++rounds) {
      bool busy = core_ != nullptr && core_->RunDue() <= clock_.Now();
      busy |= session_->RunOnce() <= clock_.Now();
      busy |= wire_ != nullptr && core_ != nullptr && wire_->Deliver();
      if (!busy) return;
    }
    FAIL() << "somebody spins";
  }
  void Advance(absl::Duration by) {
    const absl::Time end = clock_.Now() + by;
    while (clock_.Now() < end) {
      clock_.Advance(absl::Milliseconds(10));
      Settle();
    }
  }

  Pool& pool() { return session_->pool(0); }
  std::optional<std::vector<BlockId>> Alloc(size_t blocks) {
    std::vector<BlockId> out(blocks);
    if (!pool().Alloc(absl::MakeSpan(out), Urgency::kWaiting)) {
      return std::nullopt;
    }
    return out;
  }
  std::vector<BlockId> AskAndAlloc(size_t blocks) {
    if (auto got = Alloc(blocks)) return *got;
    Settle();
    auto got = Alloc(blocks);
    EXPECT_TRUE(got.has_value());
    return got.value_or(std::vector<BlockId>());
  }
  Bytes Held() {
    const CoreSnapshot snapshot = core_->Snapshot();
    return snapshot.instances.empty() ? Bytes(0) : snapshot.instances[0].held;
  }

  const Peer kPeer = {.tenant = "uid:0", .pid = 7};
  FakeClock clock_;
  std::unique_ptr<FakeBackend> device_;
  std::unique_ptr<Core> core_;
  uint64_t incarnation_ = 0;
  int attempts_ = 0;
  NullMapper* mapper_ = nullptr;
  LossyLink* wire_ = nullptr;
  std::unique_ptr<Session> session_;
};

TEST_F(SessionResumeTest, TheEngineRunsOnWithWhatItHasAndGrowsAgainLater) {
  std::vector<BlockId> blocks = AskAndAlloc(4 * kBlocksPerPage);
  Remembered remembered = KillBroker();
  EXPECT_TRUE(absl::IsUnavailable(session_->health())) << session_->health();
  Advance(absl::Milliseconds(50));
  EXPECT_TRUE(absl::IsUnavailable(session_->health())) << session_->health();
  EXPECT_THAT(std::string(session_->health().message()),
              HasSubstr("nobody listens"));
  EXPECT_EQ(pool().Free(blocks), absl::OkStatus());
  EXPECT_TRUE(Alloc(3 * kBlocksPerPage).has_value());
  EXPECT_FALSE(Alloc(2 * kBlocksPerPage).has_value()) << "nothing grows";
  Advance(absl::Seconds(3));

  StartBroker(std::move(remembered));
  Advance(absl::Seconds(1));
  EXPECT_EQ(session_->health(), absl::OkStatus());
  EXPECT_EQ(session_->opened().incarnation, 2u);
  EXPECT_EQ(Held(), kPage * 4);
  AskAndAlloc(5 * kBlocksPerPage);
  EXPECT_EQ(Held(), kPage * 8);
}

TEST_F(SessionResumeTest, WhatWasGivenUpMeanwhileIsNotListed) {
  std::vector<BlockId> blocks = AskAndAlloc(4 * kBlocksPerPage);
  Remembered remembered = KillBroker();
  EXPECT_EQ(pool().Free(blocks), absl::OkStatus());
  Advance(absl::Seconds(31));  // idle pages decay, broker or not
  EXPECT_EQ(mapper_->mapped(), 0u);
  StartBroker(std::move(remembered));
  Advance(absl::Seconds(1));
  EXPECT_EQ(session_->health(), absl::OkStatus());
  EXPECT_EQ(Held(), Bytes(0));
}

TEST_F(SessionResumeTest, OrdersOfTheNewBrokerAreObeyedThoughTheyCountAnew) {
  std::vector<BlockId> blocks = AskAndAlloc(4 * kBlocksPerPage);
  for (int i = 1; i <= 3; ++i) {
    ASSERT_TRUE(core_->SetPolicy({.name = "a"}, {.max = kPage * (4 - i)}).ok());
    Settle();
    ASSERT_TRUE(core_->SetPolicy({.name = "a"}, {.max = kCapacity}).ok());
    Settle();
  }
  StartBroker(KillBroker());
  Advance(absl::Seconds(1));
  EXPECT_EQ(pool().Free(blocks), absl::OkStatus());
  Settle();
  ASSERT_TRUE(core_->SetPolicy({.name = "a"}, {.max = kPage}).ok());
  Advance(absl::Milliseconds(50));
  EXPECT_EQ(Held(), kPage);
}

TEST_F(SessionResumeTest, ABrokenConnectionIsMended) {
  std::vector<BlockId> blocks = AskAndAlloc(2 * kBlocksPerPage);
  wire_->Break(/*broker_gone=*/false);
  Settle();
  EXPECT_FALSE(session_->health().ok());
  Advance(absl::Seconds(1));
  EXPECT_EQ(session_->health(), absl::OkStatus());
  EXPECT_EQ(Held(), kPage * 2);
  EXPECT_EQ(core_->Snapshot().broker.sessions, 1u);
  EXPECT_EQ(device_->live_handles(), 2);
}

TEST_F(SessionResumeTest, TheLongerTheBrokerIsAwayTheRarerItIsLookedFor) {
  KillBroker();
  Advance(absl::Seconds(1));
  const int first = attempts_;
  EXPECT_GT(first, 5);
  Advance(absl::Minutes(1));
  EXPECT_LE(attempts_ - first, 125);
}

TEST_F(SessionResumeTest, WhoNeverHeldAnythingComesBackToo) {
  StartBroker(KillBroker());
  Advance(absl::Seconds(1));
  EXPECT_EQ(session_->health(), absl::OkStatus());
  AskAndAlloc(kBlocksPerPage);
}

// ---- brokers of other versions ----

class OtherVersionTest : public ::testing::Test {
 protected:
  OtherVersionTest() {
    SessionOptions options;
    options.instance = "a";
    options.pools.push_back(
        {.geometry = {.handle_bytes = kPage, .max_pages = 4},
         .block_bytes = KiB(4)});
    session_ = *Session::Create(
        std::move(options),
        [](const PoolGeometry&) { return std::make_unique<NullMapper>(); },
        clock_);
    session_->ReconnectWith([this]() -> absl::StatusOr<Session::Connection> {
      ++attempts_;
      return Session::Connection{NewLink(), Nonce{}};
    });
    session_->Attach(NewLink(), Nonce{});
  }

  std::unique_ptr<ScriptedLink> NewLink() {
    auto link = std::make_unique<ScriptedLink>();
    wire_ = link.get();
    return link;
  }
  void Open(uint64_t incarnation, uint64_t feature_bits,
            std::string instance = "a") {
    Opened opened;
    opened.instance = std::move(instance);
    opened.incarnation = incarnation;
    opened.feature_bits = feature_bits;
    opened.session = SessionId(1);
    opened.pools = {PoolId(1)};
    opened.max = opened.capacity = GiB(1);
    session_->OnMessage(std::move(opened));
    session_->RunOnce();
  }
  void Disconnect() {
    session_->OnDisconnected(absl::UnavailableError("gone"));
    session_->RunOnce();
    clock_.Advance(absl::Seconds(1));
    session_->RunOnce();
  }

  FakeClock clock_;
  std::unique_ptr<Session> session_;
  ScriptedLink* wire_ = nullptr;
  int attempts_ = 0;
};

TEST_F(OtherVersionTest, OneThatCannotTakePagesBackIsLeftAlone) {
  Open(1, kFeatureResume);
  Disconnect();
  ASSERT_EQ(attempts_, 1);
  const std::vector<kvbroker::Open> said = wire_->Take<kvbroker::Open>();
  ASSERT_THAT(said, SizeIs(1));
  ASSERT_TRUE(said[0].resuming.has_value());
  EXPECT_EQ(said[0].resuming->incarnation, 1u);
  Open(2, /*feature_bits=*/0);
  EXPECT_TRUE(absl::IsFailedPrecondition(session_->health()))
      << session_->health();
  EXPECT_THAT(std::string(session_->health().message()),
              HasSubstr("upgrade the broker"));
  clock_.Advance(absl::Minutes(1));
  session_->RunOnce();
  EXPECT_EQ(attempts_, 1) << "it cannot help";
}

TEST_F(OtherVersionTest, OneThatCouldNotIsReplacedByOneThatCan) {
  // Whoever cannot resume says nothing of it at a first open.
  Open(1, /*feature_bits=*/0);
  EXPECT_EQ(session_->health(), absl::OkStatus());
  Disconnect();
  Open(2, kFeatureResume);
  EXPECT_EQ(session_->health(), absl::OkStatus());
  const std::vector<Resume> said = wire_->Take<Resume>();
  ASSERT_THAT(said, SizeIs(1));
  EXPECT_TRUE(said[0].last);
  EXPECT_THAT(said[0].pages, IsEmpty());
}

TEST_F(OtherVersionTest, ASessionThatComesBackAsksForTheNameItHad) {
  ASSERT_EQ(wire_->Take<kvbroker::Open>()[0].instance, "a");
  Open(1, kFeatureResume, "a_1");
  Disconnect();
  EXPECT_EQ(wire_->Take<kvbroker::Open>()[0].instance, "a_1");
}

TEST_F(OtherVersionTest, OneThatDoesNotAnswerIsNone) {
  Open(1, kFeatureResume);
  Disconnect();
  ASSERT_EQ(attempts_, 1);
  clock_.Advance(absl::Seconds(11));
  session_->RunOnce();
  session_->RunOnce();
  clock_.Advance(absl::Seconds(1));
  session_->RunOnce();
  EXPECT_EQ(attempts_, 2);
  EXPECT_TRUE(absl::IsDeadlineExceeded(session_->health()));
}

}  // namespace
}  // namespace kvbroker::client
