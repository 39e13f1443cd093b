#include "client/session/session.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "broker/core/core.h"
#include "broker/device/fake_backend.h"
#include "client/session/lossy_link.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/harness/null_mapper.h"

namespace kvbroker::client {
namespace {

using ::kvbroker::testing::NullMapper;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr Bytes kCapacity = MiB(1);
constexpr Bytes kPage = KiB(64);
constexpr size_t kBlocksPerPage = 16;

PoolOptions QuietPool(uint32_t handles_per_page = 1) {
  PoolOptions pool;
  pool.geometry.handle_bytes = Bytes(kPage.count() / handles_per_page);
  pool.geometry.handles_per_page = handles_per_page;
  pool.geometry.layout =
      handles_per_page == 1 ? Layout::kContiguous : Layout::kPerLayer;
  pool.geometry.max_pages = 16;
  pool.block_bytes = KiB(4);
  pool.map_ahead = false;
  pool.min_reserved_pages = 0;
  pool.running_miss_wait = absl::ZeroDuration();
  return pool;
}

SessionOptions OnePool(std::string instance, uint32_t handles_per_page = 1) {
  SessionOptions options;
  options.instance = std::move(instance);
  options.pools.push_back(QuietPool(handles_per_page));
  return options;
}

class SessionTest : public ::testing::Test {
 protected:
  struct Engine {
    std::unique_ptr<Session> session;
    LossyLink* wire = nullptr;
    std::vector<NullMapper*> mappers;

    Pool& pool(size_t i = 0) { return session->pool(i); }
  };

  SessionTest() : SessionTest(FakeBackendOptions{.total = kCapacity}) {}
  explicit SessionTest(FakeBackendOptions device) : backend_(device) {
    CoreOptions options;
    options.backend = &backend_;
    options.clock = &clock_;
    options.capacity = kCapacity;
    core_ = *Core::Create(std::move(options));
  }

  void TearDown() override {
    for (auto& engine : engines_) {
      for (size_t i = 0; i < engine->session->pool_count(); ++i) {
        EXPECT_TRUE(engine->pool(i).CheckInvariants().ok())
            << engine->pool(i).CheckInvariants();
      }
    }
    EXPECT_TRUE(core_->CheckInvariants().ok()) << core_->CheckInvariants();
  }

  Engine& Start(SessionOptions options) {
    auto engine = std::make_unique<Engine>();
    auto session = Session::Create(
        std::move(options),
        [&](const PoolGeometry&) {
          auto mapper = std::make_unique<NullMapper>();
          engine->mappers.push_back(mapper.get());
          return mapper;
        },
        clock_);
    EXPECT_TRUE(session.ok()) << session.status();
    engine->session = *std::move(session);
    engine->wire = &LossyLink::Join(*core_, Peer{"uid:0", 0, ++last_pid_},
                                    *engine->session);
    engines_.push_back(std::move(engine));
    Settle();
    return *engines_.back();
  }

  // Until nobody has anything more to do now.
  void Settle() {
    for (int rounds = 0; rounds < 1000; ++rounds) {
      bool busy = core_->RunDue() <= clock_.Now();
      for (auto& engine : engines_) {
        if (engine->wire == nullptr) continue;
        busy |= engine->session->RunOnce() <= clock_.Now();
        busy |= engine->wire->Deliver();
      }
      if (!busy) return;
    }
    FAIL() << "somebody spins";
  }
  void Advance(absl::Duration time) {
    clock_.Advance(time);
    Settle();
  }

  std::optional<std::vector<BlockId>> Alloc(Pool& pool, size_t blocks) {
    std::vector<BlockId> out(blocks);
    if (!pool.Alloc(absl::MakeSpan(out), Urgency::kWaiting)) {
      return std::nullopt;
    }
    return out;
  }
  // Leaves a wish, and takes what came of it.
  std::optional<std::vector<BlockId>> AskAndAlloc(Pool& pool, size_t blocks) {
    if (auto got = Alloc(pool, blocks)) return got;
    Settle();
    return Alloc(pool, blocks);
  }

  FakeClock clock_;
  FakeBackend backend_;
  std::unique_ptr<Core> core_;
  std::vector<std::unique_ptr<Engine>> engines_;
  uint32_t last_pid_ = 100;
};

TEST_F(SessionTest, OpensUnderItsNameAndLimits) {
  SessionOptions options = OnePool("llama");
  options.min = kPage;
  options.max = kPage * 4;
  Engine& a = Start(options);
  EXPECT_TRUE(a.session->WaitUntilOpen().ok());
  EXPECT_TRUE(a.session->health().ok());
  EXPECT_TRUE(a.pool().health().ok());
  EXPECT_EQ(a.session->opened().instance, "llama");
  EXPECT_EQ(a.session->opened().min, kPage);
  EXPECT_EQ(a.pool().capacity_blocks(), 4 * kBlocksPerPage);
}

TEST_F(SessionTest, ABrokerThatLendsAnotherKindOfMemoryIsOfNoUse) {
  SessionOptions options = OnePool("a");
  options.backend = "cuda";
  auto session = *Session::Create(
      std::move(options),
      [](const PoolGeometry&) { return std::make_unique<NullMapper>(); },
      clock_);
  LossyLink& wire = LossyLink::Join(*core_, Peer{"uid:0", 0, 1}, *session);
  wire.Deliver();
  session->RunOnce();  // gives up the link
  const absl::Status health = session->health();
  EXPECT_TRUE(absl::IsFailedPrecondition(health)) << health;
  EXPECT_THAT(health.message(), HasSubstr("lends fake memory"));
  EXPECT_THAT(health.message(), HasSubstr("maps cuda memory"));
}

TEST_F(SessionTest, IsUnavailableUntilItIsOpen) {
  auto session = *Session::Create(
      OnePool("a"),
      [](const PoolGeometry&) { return std::make_unique<NullMapper>(); },
      clock_);
  EXPECT_EQ(session->health().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(session->pool(0).health().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(Alloc(session->pool(0), 1));
  session->RunOnce();
  session->Close();
}

TEST_F(SessionTest, SaysWhatTheBrokerHasAgainstIt) {
  Engine& a = Start(OnePool("no such name!"));
  absl::Status refused = a.session->WaitUntilOpen();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("instance"));
  EXPECT_EQ(a.session->health(), refused);
  EXPECT_FALSE(AskAndAlloc(a.pool(), 1));
  Advance(absl::Seconds(1));
  EXPECT_EQ(a.session->RunOnce(), absl::InfiniteFuture());
}

TEST_F(SessionTest, TakesMessageAndDescriptorsInEitherOrder) {
  for (bool descriptors_first : {false, true}) {
    for (uint32_t handles : {1, 4}) {
      Engine& a = Start(OnePool("a", handles));
      a.wire->DescriptorsFirst(descriptors_first);
      EXPECT_TRUE(AskAndAlloc(a.pool(), 3 * kBlocksPerPage));
      EXPECT_EQ(a.mappers[0]->mapped(), 3u);
      EXPECT_THAT(a.wire->Said<Mapped>(), SizeIs(1));
      a.session->Close();
      a.wire = nullptr;
    }
  }
}

TEST_F(SessionTest, TakesAGrantOfSeveralFrames) {
  SessionOptions options = OnePool("a");
  options.pools[0].geometry.handle_bytes = KiB(4);
  options.pools[0].geometry.handles_per_page = 16;
  options.pools[0].geometry.layout = Layout::kPerLayer;
  Engine& a = Start(options);  // 256 handles, of which a frame carries 253
  EXPECT_TRUE(AskAndAlloc(a.pool(), 16 * kBlocksPerPage));
  EXPECT_EQ(a.mappers[0]->mapped(), 16u);
}

TEST_F(SessionTest, AsksAgainForLostDescriptors) {
  Engine& a = Start(OnePool("a"));
  a.wire->LoseNextDescriptors();
  EXPECT_FALSE(AskAndAlloc(a.pool(), kBlocksPerPage));
  Advance(absl::Milliseconds(999));
  EXPECT_THAT(a.wire->Said<Resend>(), IsEmpty());
  Advance(absl::Milliseconds(1));
  EXPECT_THAT(a.wire->Said<Resend>(), SizeIs(1));
  EXPECT_TRUE(Alloc(a.pool(), kBlocksPerPage));
  Advance(absl::Seconds(5));
  EXPECT_THAT(a.wire->Said<Resend>(), SizeIs(1));
}

TEST_F(SessionTest, AsksAgainForALostMessage) {
  Engine& a = Start(OnePool("a"));
  a.wire->LoseNextGrant();
  EXPECT_FALSE(AskAndAlloc(a.pool(), kBlocksPerPage));
  Advance(absl::Seconds(1));
  EXPECT_TRUE(Alloc(a.pool(), kBlocksPerPage));
  EXPECT_EQ(a.mappers[0]->mapped(), 1u);
  a.wire->Forget();
  Advance(absl::Seconds(5));
  EXPECT_THAT(a.wire->Said<Resend>(), IsEmpty());
}

TEST_F(SessionTest, AsksUntilTheMessageComes) {
  Engine& a = Start(OnePool("a"));
  a.wire->LoseNextGrant();
  EXPECT_FALSE(AskAndAlloc(a.pool(), kBlocksPerPage));
  for (int i = 0; i < 4; ++i) {
    a.wire->LoseNextGrant();
    Advance(absl::Seconds(1));
    EXPECT_FALSE(Alloc(a.pool(), kBlocksPerPage));
  }
  a.wire->LoseNothing();
  Advance(absl::Seconds(1));
  EXPECT_TRUE(Alloc(a.pool(), kBlocksPerPage));
}

TEST_F(SessionTest, WhatIsMissingIsRememberedWhileOtherQuestionsAreAnswered) {
  SessionOptions options = OnePool("a");
  options.pools.push_back(QuietPool());
  Engine& a = Start(options);
  a.wire->LoseNextDescriptors();
  EXPECT_FALSE(AskAndAlloc(a.pool(0), kBlocksPerPage));
  for (int i = 0; i < 4; ++i) {  // each says which answers have arrived
    EXPECT_TRUE(AskAndAlloc(a.pool(1), kBlocksPerPage));
  }
  Advance(absl::Seconds(1));
  EXPECT_TRUE(Alloc(a.pool(0), kBlocksPerPage));
}

TEST_F(SessionTest, DescriptorsOfNothingAreDropped) {
  Engine& a = Start(OnePool("a"));
  a.session->OnDescriptors(GrantId(4711), 0, std::vector<UniqueFd>());
  for (int i = 0; i < 3; ++i) Advance(absl::Seconds(1));
  EXPECT_EQ(a.session->RunOnce(), absl::InfiniteFuture());
}

TEST_F(SessionTest, DropsWhatItHasAlready) {
  SessionOptions options = OnePool("a", 2);
  options.pools.push_back(QuietPool());
  Engine& a = Start(options);
  a.wire->RepeatEverything(true);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(AskAndAlloc(a.pool(0), 2 * kBlocksPerPage));
    EXPECT_TRUE(AskAndAlloc(a.pool(1), kBlocksPerPage));
  }
  a.wire->Send(Resend{a.wire->Said<Acquire>().back().sequence});
  Settle();
  EXPECT_EQ(a.mappers[0]->mapped(), 6u);
  EXPECT_EQ(a.mappers[1]->mapped(), 3u);
  for (const Mapped& mapped : a.wire->Said<Mapped>()) {
    EXPECT_THAT(mapped.failed, IsEmpty());
  }
  Advance(absl::Seconds(3));
  EXPECT_TRUE(a.session->health().ok());
}

TEST_F(SessionTest, PoolsOfOneSessionGrowApart) {
  SessionOptions options = OnePool("a");
  options.pools.push_back(QuietPool(4));
  Engine& a = Start(options);
  EXPECT_TRUE(AskAndAlloc(a.pool(0), 2 * kBlocksPerPage));
  EXPECT_TRUE(AskAndAlloc(a.pool(1), 5 * kBlocksPerPage));
  EXPECT_EQ(a.mappers[0]->mapped(), 2u);
  EXPECT_EQ(a.mappers[1]->mapped(), 5u);
  EXPECT_EQ(core_->Snapshot().instances[0].held, kPage * 7);
}

TEST_F(SessionTest, MemoryGoesFromOneToAnother) {
  Engine& a = Start(OnePool("a"));
  Engine& b = Start(OnePool("b"));
  auto blocks = AskAndAlloc(a.pool(), 16 * kBlocksPerPage);  // all there is
  ASSERT_TRUE(blocks);
  EXPECT_FALSE(AskAndAlloc(b.pool(), kBlocksPerPage));
  ASSERT_TRUE(a.pool().Free(*blocks).ok());
  Advance(absl::Milliseconds(200));
  EXPECT_TRUE(Alloc(b.pool(), kBlocksPerPage));
  EXPECT_EQ(a.mappers[0]->mapped(), 15u);
}

TEST_F(SessionTest, ALimitThatChangesIsAcknowledged) {
  Engine& a = Start(OnePool("a"));
  auto changed =
      core_->SetPolicy(InstanceSelector{"a", ""}, {.max = kPage * 2});
  ASSERT_TRUE(changed.ok()) << changed.status();
  Settle();
  EXPECT_THAT(a.wire->Said<LimitAck>(), SizeIs(1));
  EXPECT_EQ(a.pool().capacity_blocks(), 2 * kBlocksPerPage);
  EXPECT_EQ(a.session->opened().max, kPage * 2);
}

TEST_F(SessionTest, FencedTellsWhy) {
  SessionOptions options = OnePool("a");
  std::string why;
  options.on_fenced = [&](const std::string& reason) { why = reason; };
  Start(options);
  ASSERT_TRUE(core_->Delete(InstanceSelector{"a", ""}, /*force=*/true).ok());
  Settle();
  EXPECT_THAT(why, HasSubstr("deleted"));
}

TEST_F(SessionTest, FencedEndsTheProcess) {
  Start(OnePool("a"));
  EXPECT_EXIT(
      {
        (void)core_->Delete(InstanceSelector{"a", ""}, /*force=*/true);
        Settle();
      },
      ::testing::ExitedWithCode(86), "the broker ended this process: deleted");
}

TEST_F(SessionTest, WithoutABrokerTheEngineRunsOn) {
  Engine& a = Start(OnePool("a"));
  auto blocks = AskAndAlloc(a.pool(), 2 * kBlocksPerPage);
  ASSERT_TRUE(blocks);
  EXPECT_FALSE(Alloc(a.pool(), 17 * kBlocksPerPage));
  a.session->OnDisconnected(absl::UnavailableError("the broker is gone"));
  a.session->RunOnce();
  EXPECT_EQ(a.session->health().code(), absl::StatusCode::kUnavailable);
  a.wire->Forget();
  ASSERT_TRUE(a.pool().Free(*blocks).ok());
  EXPECT_TRUE(Alloc(a.pool(), 2 * kBlocksPerPage));
  EXPECT_FALSE(Alloc(a.pool(), 1));
  EXPECT_FALSE(a.pool().Reserve(1, absl::Hours(1)));
  for (int i = 0; i < 100; ++i) {
    const absl::Time due = a.session->RunOnce();
    if (due == absl::InfiniteFuture()) break;
    ASSERT_GT(due, clock_.Now());
    clock_.Advance(due - clock_.Now());
  }
  EXPECT_EQ(a.session->RunOnce(), absl::InfiniteFuture());
  EXPECT_THAT(a.wire->Said<Acquire>(), IsEmpty());
}

TEST_F(SessionTest, LeavingReturnsEverything) {
  SessionOptions options = OnePool("a");
  options.pools.push_back(QuietPool(4));
  Engine& a = Start(options);
  EXPECT_TRUE(AskAndAlloc(a.pool(0), 3 * kBlocksPerPage));
  EXPECT_TRUE(AskAndAlloc(a.pool(1), 3 * kBlocksPerPage));
  EXPECT_FALSE(Alloc(a.pool(0), 12 * kBlocksPerPage));  // a question on its way
  a.session->RunOnce();
  EXPECT_GT(backend_.live_handles(), 0);
  a.session->BeginClose();
  EXPECT_FALSE(a.session->left());
  Settle();
  EXPECT_TRUE(a.session->left());
  EXPECT_EQ(a.mappers[0]->mapped() + a.mappers[1]->mapped(), 0u);
  a.session->Close();
  a.wire = nullptr;
  EXPECT_EQ(backend_.live_handles(), 0);
  EXPECT_EQ(core_->Snapshot().broker.sessions, 0u);
  a.session->Close();
}

TEST_F(SessionTest, LeavingWithAGrantOnItsWayReturnsThatToo) {
  Engine& a = Start(OnePool("a"));
  a.wire->LoseNextDescriptors();
  EXPECT_FALSE(AskAndAlloc(a.pool(), 3 * kBlocksPerPage));
  a.session->BeginClose();
  Settle();
  EXPECT_FALSE(a.session->left());
  Advance(absl::Seconds(1));
  EXPECT_TRUE(a.session->left());
  EXPECT_EQ(core_->Snapshot().broker.held, Bytes(0));
  Advance(absl::Seconds(1));  // the broker's stock decays
  EXPECT_EQ(backend_.live_handles(), 0);
}

TEST_F(SessionTest, DestructionAloneLeavesAsWell) {
  Engine& a = Start(OnePool("a"));
  EXPECT_TRUE(AskAndAlloc(a.pool(), 3 * kBlocksPerPage));
  engines_.clear();
  EXPECT_EQ(backend_.live_handles(), 0);
}

// Keeps what is said.
class SilentLink : public BrokerLink {
 public:
  explicit SilentLink(std::vector<ClientMessage>& said) : said_(said) {}
  void Send(ClientMessage message) override {
    said_.push_back(std::move(message));
  }
  void AcknowledgeDescriptors(GrantId, uint32_t) override {}

 private:
  std::vector<ClientMessage>& said_;
};

TEST_F(SessionTest, WhatDoesNotFitIntoOneMessageGoesAheadAsReturn) {
  std::vector<ClientMessage> said;
  std::unique_ptr<Session> session = *Session::Create(
      OnePool("a"),
      [](const PoolGeometry&) { return std::make_unique<NullMapper>(); },
      clock_);
  session->Attach(std::make_unique<SilentLink>(said), Nonce{});
  PoolSession& pool_session = *session;
  std::vector<PageName> pages;
  for (uint32_t i = 0; i < 70'000; ++i) {
    pages.push_back({PageIndex(i), Generation(i + 1)});
  }
  auto check = [&](const ClientMessage& message) {
    said.clear();
    pool_session.Send(message);
    EXPECT_GT(said.size(), 1);
    EXPECT_EQ(said.back().index(), message.index());
    std::vector<PageName> given;
    for (const ClientMessage& part : said) {
      const auto* back = std::get_if<Return>(&part);
      const auto* answer = std::get_if<ReclaimAnswer>(&part);
      ASSERT_TRUE(back != nullptr || answer != nullptr);
      EXPECT_EQ(back ? back->pool : answer->pool, PoolId(5));
      const std::vector<PageName>& list = back ? back->pages : answer->given;
      EXPECT_LE(list.size(), 65536);
      given.insert(given.end(), list.begin(), list.end());
    }
    std::sort(given.begin(), given.end());
    EXPECT_EQ(given, pages);
  };
  check(Return{PoolId(5), pages});
  check(ReclaimAnswer{.pool = PoolId(5), .given = pages, .final = true});
}

TEST_F(SessionTest, AProcessThatDiesHoldsNothing) {
  Engine& a = Start(OnePool("a"));
  EXPECT_TRUE(AskAndAlloc(a.pool(), 3 * kBlocksPerPage));
  a.wire->Kill();
  Settle();
  EXPECT_EQ(backend_.live_handles(), 0);
}

// ---- one slab for all ----

class SessionInSlabTest : public SessionTest {
 protected:
  SessionInSlabTest()
      : SessionTest(
            FakeBackendOptions{.total = kCapacity, .fixed_addresses = true}) {}
};

TEST_F(SessionInSlabTest, EnginesOfTwoPageSizesShareIt) {
  Engine& a = Start(OnePool("a"));
  SessionOptions other = OnePool("b");
  other.pools[0].geometry.handle_bytes = kPage * 2;
  Engine& b = Start(std::move(other));
  EXPECT_TRUE(AskAndAlloc(a.pool(), 3 * kBlocksPerPage));
  EXPECT_TRUE(AskAndAlloc(b.pool(), 2 * kBlocksPerPage));
  EXPECT_EQ(a.mappers[0]->mapped(), 3u);
  EXPECT_EQ(b.mappers[0]->mapped(), 1u);
  for (const Mapped& mapped : b.wire->Said<Mapped>()) {
    EXPECT_THAT(mapped.failed, IsEmpty());
  }
  a.session->Close();
  a.wire = nullptr;
  Settle();
  EXPECT_TRUE(AskAndAlloc(b.pool(), 6 * kBlocksPerPage));
}

TEST_F(SessionInSlabTest, EndsWithItsBroker) {
  Engine& a = Start(OnePool("a"));
  bool reconnects = false;
  a.session->ReconnectWith([&]() -> absl::StatusOr<Session::Connection> {
    reconnects = true;
    return absl::UnavailableError("nobody listens");
  });
  ASSERT_TRUE(AskAndAlloc(a.pool(), 2));
  a.session->OnDisconnected(absl::UnavailableError("the socket closed"));
  a.session->RunOnce();
  for (const absl::Status& health : {a.session->health(), a.pool().health()}) {
    EXPECT_EQ(health.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(health.message()),
                HasSubstr("restart this process"));
    EXPECT_THAT(std::string(health.message()), HasSubstr("the socket closed"));
  }
  EXPECT_FALSE(Alloc(a.pool(), 1));
  clock_.Advance(absl::Minutes(1));
  a.session->RunOnce();
  EXPECT_FALSE(reconnects) << "no broker can help";
  a.session->Close();
  a.wire = nullptr;
}

class PickyMapper : public NullMapper {
 public:
  absl::Status Begin(const Opened& opened) override {
    return absl::InvalidArgumentError("not this: " + opened.backend);
  }
};

TEST_F(SessionTest, AMapperMayRefuseWhatTheBrokerLends) {
  auto session = *Session::Create(
      OnePool("a"),
      [](const PoolGeometry&) { return std::make_unique<PickyMapper>(); },
      clock_);
  LossyLink& wire = LossyLink::Join(*core_, Peer{"uid:0", 0, 1}, *session);
  wire.Deliver();
  session->RunOnce();  // gives up the link
  EXPECT_EQ(session->health(), absl::InvalidArgumentError("not this: fake"));
  EXPECT_EQ(session->WaitUntilOpen(), session->health());
}

}  // namespace
}  // namespace kvbroker::client
