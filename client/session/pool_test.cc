#include "client/session/pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "client/arena/host_mapper.h"
#include "client/session/scripted_session.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/harness/null_mapper.h"

namespace kvbroker::client {
namespace {

using ::kvbroker::testing::NullMapper;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr PoolId kPool = PoolId(7);
constexpr Bytes kPage = KiB(16);
constexpr Bytes kBlock = KiB(4);
constexpr size_t kBlocksPerPage = 4;

// Quiet: neither maps ahead nor lets pages decay unless a test says so.
PoolOptions QuietOptions() {
  PoolOptions options;
  options.geometry.handle_bytes = kPage;
  options.geometry.max_pages = 16;
  options.block_bytes = kBlock;
  options.map_ahead = false;
  options.min_reserved_pages = 0;
  options.idle_decay = absl::InfiniteDuration();
  options.running_miss_wait = absl::ZeroDuration();
  return options;
}

class PoolTest : public ::testing::Test {
 protected:
  void Make(PoolOptions options, std::unique_ptr<Mapper> mapper = nullptr) {
    if (mapper == nullptr) {
      auto null = std::make_unique<NullMapper>();
      mapper_ = null.get();
      mapper = std::move(null);
    }
    auto pool =
        Pool::Create(std::move(options), std::move(mapper), session_, clock_);
    ASSERT_TRUE(pool.ok()) << pool.status();
    pool_ = *std::move(pool);
    pool_->OnOpened(kPool, GiB(1), GiB(1));
  }

  void TearDown() override {
    if (pool_ != nullptr) {
      EXPECT_TRUE(pool_->CheckInvariants().ok()) << pool_->CheckInvariants();
    }
  }

  std::optional<std::vector<BlockId>> Alloc(
      size_t blocks, Urgency urgency = Urgency::kWaiting) {
    std::vector<BlockId> out(blocks);
    if (!pool_->Alloc(absl::MakeSpan(out), urgency)) return std::nullopt;
    return out;
  }

  // The broker's answer with all that was asked for, or its first `pages`.
  void Grant(const Acquire& asked, size_t pages = SIZE_MAX) {
    Granted granted;
    granted.sequence = asked.sequence;
    granted.grant = GrantId(++last_grant_);
    granted.pool = kPool;
    for (PageIndex index : asked.indexes) {
      if (granted.pages.size() == pages) break;
      granted.pages.push_back({index, Generation(++last_generation_)});
    }
    std::vector<UniqueFd> descriptors(
        granted.pages.size() * pool_->options().geometry.handles_per_page);
    for (UniqueFd& descriptor : descriptors) {
      descriptor = UniqueFd(memfd_create("page", MFD_CLOEXEC));
      ASSERT_EQ(ftruncate(descriptor.get(),
                          pool_->options().geometry.handle_bytes.count()),
                0);
    }
    pool_->OnGranted(granted, std::move(descriptors));
  }

  void Refuse(const Acquire& asked,
              absl::StatusCode code = absl::StatusCode::kUnavailable) {
    Refused refused;
    refused.sequence = asked.sequence;
    refused.code = code;
    pool_->OnRefused(refused);
  }

  // Asks for so many pages, gets them and no more, and takes all their blocks.
  std::vector<BlockId> Fill(size_t pages) {
    EXPECT_FALSE(Alloc(pages * kBlocksPerPage));
    pool_->Work();
    Grant(session_.TakeOnly<Acquire>(), pages);
    auto blocks = Alloc(pages * kBlocksPerPage);
    EXPECT_TRUE(blocks);
    Settle();
    return blocks.value_or(std::vector<BlockId>());
  }

  // Past the coalescing of reports and the guard of what came; forgets what was
  // sent meanwhile.
  void Settle() {
    for (int i = 0; i < 3; ++i) {
      clock_.Advance(absl::Milliseconds(101));
      pool_->Work();
    }
    session_.Take<Report>();
    session_.Take<Mapped>();
    session_.TakeWakes();
  }

  // Alloc in a thread of its own, which has missed when this returns.
  void StartAlloc(size_t blocks, Urgency urgency = Urgency::kRunning) {
    session_.TakeWakes();
    thread_ = std::thread([this, blocks, urgency] {
      got_ = Alloc(blocks, urgency).has_value();
    });
    session_.AwaitWake();
  }
  bool FinishAlloc() {
    thread_.join();
    return got_;
  }

  void Order(PageCount hold_at_most, Tier tier) {
    Reclaim order;
    order.pool = kPool;
    order.revision = Revision(++last_revision_);
    order.hold_at_most = hold_at_most;
    order.tier = tier;
    pool_->OnReclaim(order);
  }

  absl::Duration WorkDueIn() {
    const absl::Time due = pool_->Work();
    return due - clock_.Now();
  }

  FakeClock clock_;
  ScriptedSession session_;
  NullMapper* mapper_ = nullptr;
  std::unique_ptr<Pool> pool_;
  std::thread thread_;
  bool got_ = false;  // REQUIRES: the thread is joined
  uint64_t last_grant_ = 0, last_revision_ = 0;
  uint32_t last_generation_ = 0;
};

// ---- wishes ----

TEST_F(PoolTest, AMissLeavesAWishAndAsksOnce) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(5));
  EXPECT_GT(session_.TakeWakes(), 0);
  EXPECT_EQ(session_.sends(), 0);  // the engine's call talks to nobody
  EXPECT_EQ(pool_->usage().waiting, kPage * 2);
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.pool, kPool);
  EXPECT_EQ(asked.want, 2);
  EXPECT_EQ(asked.at_least, 2);
  EXPECT_EQ(asked.urgency, Urgency::kWaiting);
  EXPECT_EQ(asked.deadline, pool_->options().claim_deadline);
  EXPECT_THAT(asked.indexes, ElementsAre(PageIndex(0), PageIndex(1)));
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(Alloc(5));  // tries again
    pool_->Work();
  }
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
}

TEST_F(PoolTest, AGrantIsMappedAcknowledgedAndTaken) {
  PoolOptions options = QuietOptions();
  int told = 0;
  options.on_memory = [&] { ++told; };
  Make(options);
  EXPECT_FALSE(Alloc(5));
  pool_->Work();
  Grant(session_.TakeOnly<Acquire>());
  EXPECT_EQ(mapper_->mapped(), 2u);
  EXPECT_EQ(told, 1);
  Mapped mapped = session_.TakeOnly<Mapped>();
  EXPECT_EQ(mapped.grant, GrantId(1));
  EXPECT_THAT(mapped.failed, IsEmpty());
  EXPECT_EQ(pool_->available_blocks(), 8u);
  EXPECT_TRUE(Alloc(5));
  EXPECT_EQ(pool_->usage().waiting, Bytes(0));
  EXPECT_EQ(pool_->usage().in_use, kPage * 2);
}

TEST_F(PoolTest, AWishThatIsRenewedKeepsItsQuestion) {
  Make(QuietOptions());
  for (int i = 0; i < 10; ++i) {
    EXPECT_FALSE(Alloc(4));
    pool_->Work();
    clock_.Advance(absl::Milliseconds(900));
  }
  EXPECT_THAT(session_.Take<Acquire>(), SizeIs(1));
  EXPECT_THAT(session_.Take<Cancel>(), IsEmpty());
}

TEST_F(PoolTest, AWishThatIsNotRenewedForASecondIsCancelled) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(4));
  EXPECT_EQ(WorkDueIn(), absl::Seconds(1));
  Acquire asked = session_.TakeOnly<Acquire>();
  clock_.Advance(absl::Seconds(1));
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Cancel>().sequence, asked.sequence);
  EXPECT_EQ(pool_->usage().waiting, Bytes(0));
  Refuse(asked, absl::StatusCode::kCancelled);
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
}

TEST_F(PoolTest, AGrantThatCrossesTheCancelIsMappedAndIdle) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  clock_.Advance(absl::Seconds(1));
  pool_->Work();
  session_.TakeOnly<Cancel>();
  Grant(asked);
  EXPECT_EQ(mapper_->mapped(), 1u);
  EXPECT_EQ(pool_->usage().idle, kPage);
}

TEST_F(PoolTest, AGrownWishReplacesTheQuestionAndItsRefusalFreesTheSlots) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Acquire first = session_.TakeOnly<Acquire>();
  EXPECT_FALSE(Alloc(12));
  pool_->Work();
  Acquire second = session_.TakeOnly<Acquire>();
  EXPECT_EQ(second.replaces, first.sequence);
  EXPECT_EQ(second.at_least, 3);
  EXPECT_THAT(second.indexes,
              ElementsAre(PageIndex(1), PageIndex(2), PageIndex(3)));
  EXPECT_THAT(session_.Take<Cancel>(), IsEmpty());
  Refuse(first, absl::StatusCode::kCancelled);
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Acquire third = session_.TakeOnly<Acquire>();
  EXPECT_EQ(third.replaces, second.sequence);
  EXPECT_THAT(third.indexes, ElementsAre(PageIndex(0)));  // free again
}

TEST_F(PoolTest, AGrowthPastTheFreeSlotsWaitsForThoseOfTheOldQuestion) {
  Make(QuietOptions());  // 16 slots
  EXPECT_FALSE(Alloc(9 * kBlocksPerPage));
  pool_->Work();
  Acquire first = session_.TakeOnly<Acquire>();
  EXPECT_FALSE(Alloc(10 * kBlocksPerPage));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  EXPECT_EQ(session_.TakeOnly<Cancel>().sequence, first.sequence);
  session_.TakeWakes();
  Refuse(first, absl::StatusCode::kCancelled);
  EXPECT_GT(session_.TakeWakes(), 0);
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Acquire>().at_least, 10);
}

TEST_F(PoolTest, MoreThanTheAddressRangeIsNotAskedFor) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(17 * kBlocksPerPage));
  EXPECT_GE(WorkDueIn(), absl::Seconds(1));
  EXPECT_EQ(session_.sends(), 0);
}

TEST_F(PoolTest, ARefusedWishAsksAgainAfterThePause) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Refuse(session_.TakeOnly<Acquire>());
  EXPECT_FALSE(Alloc(4));
  const absl::Duration pause = WorkDueIn();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  EXPECT_GT(pause, absl::ZeroDuration());
  clock_.Advance(pause);
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), SizeIs(1));
}

TEST_F(PoolTest, ARaisedLimitEndsThePause) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Refuse(session_.TakeOnly<Acquire>(), absl::StatusCode::kResourceExhausted);
  pool_->OnLimits(GiB(2));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), SizeIs(1));
}

TEST_F(PoolTest, ASmallerRequestThatIsServedLeavesTheWishOfALargerOne) {
  Make(QuietOptions());
  auto blocks = Fill(1);
  ASSERT_TRUE(pool_->Free(absl::MakeConstSpan(blocks).first(2)).ok());
  EXPECT_FALSE(Alloc(12));
  pool_->Work();
  session_.TakeOnly<Acquire>();
  EXPECT_TRUE(Alloc(1));
  EXPECT_FALSE(Alloc(11));
  pool_->Work();
  EXPECT_THAT(session_.Take<Cancel>(), IsEmpty());
}

TEST_F(PoolTest, AllocIsAllOrNothing) {
  Make(QuietOptions());
  auto blocks = Fill(2);
  ASSERT_TRUE(pool_->Free(absl::MakeConstSpan(blocks).first(3)).ok());
  EXPECT_FALSE(Alloc(4));
  EXPECT_EQ(pool_->available_blocks(), 3u);
  EXPECT_TRUE(Alloc(3));
}

TEST_F(PoolTest, TheNullBlocksPageIsAskedForWithRoomForOneMore) {
  PoolOptions options = QuietOptions();
  options.reserve_null_block = true;
  Make(options);
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.at_least, 2);
  Grant(asked);
  auto blocks = Alloc(4);
  ASSERT_TRUE(blocks);
  EXPECT_EQ(std::count(blocks->begin(), blocks->end(), kNullBlock), 0);
}

TEST_F(PoolTest, AMappingThatFailsIsRolledBackReportedAndTriedLater) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(8));
  pool_->Work();
  mapper_->FailNextMap();
  Acquire asked = session_.TakeOnly<Acquire>();
  Grant(asked);
  Mapped mapped = session_.TakeOnly<Mapped>();
  EXPECT_THAT(mapped.failed,
              ElementsAre(PageName{asked.indexes[0], Generation(1)}));
  EXPECT_EQ(mapper_->mapped(), 1u);
  EXPECT_EQ(pool_->available_blocks(), 4u);
  EXPECT_TRUE(pool_->CheckInvariants().ok());
  EXPECT_FALSE(Alloc(8));
  const absl::Duration pause = WorkDueIn();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());  // not in a tight loop
  clock_.Advance(pause);
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Acquire>().at_least, 1);
}

TEST_F(PoolTest, AnAnswerToNoQuestionIsGivenBack) {
  Make(QuietOptions());
  Acquire never_sent;
  never_sent.sequence = Sequence(99);
  never_sent.indexes = {PageIndex(3)};
  Grant(never_sent);
  EXPECT_THAT(session_.TakeOnly<Mapped>().failed, SizeIs(1));
  EXPECT_EQ(mapper_->mapped(), 0u);
}

// ---- running requests ----

TEST_F(PoolTest, ARunningMissIsWokenByMemory) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  StartAlloc(4);
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.urgency, Urgency::kRunning);
  Grant(asked);
  EXPECT_TRUE(FinishAlloc());
}

TEST_F(PoolTest, ARunningMissWaitsForTheAnswerThatIsDueByThen) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Milliseconds(2);
  Make(options);
  StartAlloc(4);
  Acquire asked = session_.Await<Acquire>();
  EXPECT_EQ(asked.deadline, absl::Milliseconds(2));
  // The broker has granted it in time; the pages take a while.
  clock_.Advance(absl::Milliseconds(500));
  Grant(asked);
  EXPECT_TRUE(FinishAlloc());
}

TEST_F(PoolTest, ABrokerThatOwesAnAnswerIsNotWaitedForAgain) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Milliseconds(2);
  Make(options);
  StartAlloc(4);
  Acquire asked = session_.Await<Acquire>();
  clock_.Advance(absl::Seconds(1));
  EXPECT_FALSE(FinishAlloc());
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Cancel>().sequence, asked.sequence);
  StartAlloc(4);
  session_.Await<Acquire>();
  clock_.Advance(absl::Milliseconds(2));
  EXPECT_FALSE(FinishAlloc());
  // Until it says something.
  Refuse(asked, absl::StatusCode::kCancelled);
  pool_->Work();
  session_.Take<Acquire>();
  session_.Take<Cancel>();
  StartAlloc(4);
  asked = session_.Await<Acquire>();
  clock_.Advance(absl::Milliseconds(500));
  Grant(asked);
  EXPECT_TRUE(FinishAlloc());
}

TEST_F(PoolTest, ARefusalEndsARunningMiss) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  StartAlloc(4);
  pool_->Work();
  Refuse(session_.TakeOnly<Acquire>());
  EXPECT_FALSE(FinishAlloc());
}

TEST_F(PoolTest, ARunningMissIsServedByWhatAnotherFrees) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  auto blocks = Fill(1);
  StartAlloc(4);
  pool_->Work();
  session_.TakeOnly<Acquire>();
  ASSERT_TRUE(pool_->Free(blocks).ok());
  EXPECT_TRUE(FinishAlloc());
}

TEST_F(PoolTest, ADisconnectEndsARunningMiss) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  StartAlloc(4);
  pool_->OnDisconnected(absl::UnavailableError("gone"));
  EXPECT_FALSE(FinishAlloc());
}

TEST_F(PoolTest, AWaitingMissReturnsAtOnce) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  EXPECT_FALSE(Alloc(4, Urgency::kWaiting));
}

// ---- credit ----

class CreditTest : public PoolTest {
 protected:
  // As Reserve, with `pages` for an answer; 0 refuses.
  bool Reserve(size_t blocks, PageCount pages) {
    bool reserved = false;
    std::thread engine(
        [&] { reserved = pool_->Reserve(blocks, absl::Hours(1)); });
    const Acquire asked = session_.Await<Acquire>();
    EXPECT_TRUE(asked.credit);
    EXPECT_THAT(asked.indexes, IsEmpty());
    if (pages == 0) {
      Refuse(asked);
    } else {
      answer_.sequence = asked.sequence;
      answer_.credit = pages;
      answer_.credit_for = absl::Seconds(1);
      pool_->OnCredit(answer_);
    }
    engine.join();
    return reserved;
  }

  Granted answer_;
};

TEST_F(CreditTest, CountsAsAvailableUntilItLapses) {
  Make(QuietOptions());
  EXPECT_TRUE(Reserve(6, 2));
  EXPECT_EQ(pool_->available_blocks(), 8u);
  EXPECT_TRUE(pool_->Reserve(8, absl::ZeroDuration()));  // has it already
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(pool_->available_blocks(), 0u);
}

TEST_F(CreditTest, IsDrawnOnAndWorthWaitingForWhoeverAsks) {
  for (Urgency urgency : {Urgency::kRunning, Urgency::kWaiting}) {
    Make(QuietOptions());
    EXPECT_TRUE(Reserve(12, 3));
    EXPECT_FALSE(Reserve(20, 0));
    EXPECT_EQ(pool_->available_blocks(), 12u);
    StartAlloc(4, urgency);
    pool_->Work();
    Acquire asked = session_.TakeOnly<Acquire>();
    EXPECT_EQ(asked.want, 1);
    EXPECT_FALSE(asked.credit);
    EXPECT_EQ(pool_->available_blocks(), 8u);
    Grant(asked);
    EXPECT_TRUE(FinishAlloc());
    EXPECT_EQ(pool_->available_blocks(), 8u);
  }
}

TEST_F(CreditTest, TheSameAnswerTwiceCountsOnce) {
  Make(QuietOptions());
  EXPECT_TRUE(Reserve(4, 1));
  pool_->OnCredit(answer_);
  EXPECT_EQ(pool_->available_blocks(), 4u);
}

TEST_F(CreditTest, NobodyAnswersWithinTheTimeout) {
  Make(QuietOptions());
  EXPECT_FALSE(pool_->Reserve(4, absl::ZeroDuration()));
  Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(session_.TakeOnly<Cancel>().sequence, asked.sequence);
}

TEST_F(CreditTest, MappedBlocksNeedNone) {
  Make(QuietOptions());
  ASSERT_TRUE(pool_->Free(Fill(1)).ok());
  const int sends = session_.sends();
  EXPECT_TRUE(pool_->Reserve(4, absl::ZeroDuration()));
  pool_->OnDisconnected(absl::UnavailableError("gone"));
  EXPECT_TRUE(pool_->Reserve(4, absl::ZeroDuration()));
  EXPECT_FALSE(pool_->Reserve(5, absl::ZeroDuration()));
  EXPECT_EQ(session_.sends(), sends);
}

// ---- ahead of need, and back ----

PoolOptions AheadOptions() {
  PoolOptions options = QuietOptions();
  options.map_ahead = true;
  options.min_reserved_pages = 2;
  return options;
}

TEST_F(PoolTest, MapsAheadOnlyOnceTheEngineTakesBlocks) {
  Make(AheadOptions());
  pool_->Work();
  EXPECT_EQ(session_.sends(), 0);
}

TEST_F(PoolTest, MapAheadKeepsTheReserve) {
  Make(AheadOptions());
  Fill(1);
  Acquire ahead = session_.TakeOnly<Acquire>();
  EXPECT_EQ(ahead.urgency, Urgency::kSpeculative);
  EXPECT_EQ(ahead.want, 2);
  EXPECT_EQ(ahead.at_least, 1);
  EXPECT_EQ(ahead.deadline, absl::Milliseconds(100));
  Grant(ahead);
  Settle();
  EXPECT_EQ(pool_->usage().idle, kPage * 2);
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  // Takes from the reserve, which is filled up again in growing batches.
  EXPECT_TRUE(Alloc(4));
  EXPECT_GT(session_.TakeWakes(), 0);
  pool_->Work();
  EXPECT_GE(session_.TakeOnly<Acquire>().want, 1);
}

TEST_F(PoolTest, AWishBringsTheReserveAlong) {
  Make(AheadOptions());
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.urgency, Urgency::kWaiting);
  EXPECT_EQ(asked.at_least, 1);
  EXPECT_EQ(asked.want, 3);
  Grant(asked);
  EXPECT_TRUE(Alloc(4));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  EXPECT_EQ(pool_->usage().idle, kPage * 2);
}

TEST_F(PoolTest, WhileDemandGoesOnEachTimeMoreIsMappedAhead) {
  Make(AheadOptions());
  // Pages asked for as the engine takes one.
  auto take = [&] {
    std::vector<PageCount> asked_for;
    Alloc(4);
    pool_->Work();
    for (const Acquire& asked : session_.Take<Acquire>()) {
      asked_for.push_back(asked.want);
      Grant(asked);
    }
    return asked_for;
  };
  EXPECT_THAT(take(), ElementsAre(3)) << "the miss, and the reserve";
  EXPECT_THAT(take(), IsEmpty());
  EXPECT_THAT(take(), ElementsAre(4));
  EXPECT_THAT(take(), IsEmpty());
  EXPECT_THAT(take(), ElementsAre(8)) << "while others are still there";
  // Once it was calm it begins anew.
  clock_.Advance(absl::Milliseconds(100));
  for (int i = 0; i < 9; ++i) EXPECT_THAT(take(), IsEmpty());
  EXPECT_THAT(take(), ElementsAre(1));
}

TEST_F(PoolTest, ARunningMissAsksAtOnce) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  StartAlloc(4);
  EXPECT_EQ(session_.Await<Acquire>().urgency, Urgency::kRunning)
      << "without the worker";
  pool_->OnDisconnected(absl::UnavailableError("gone"));
  EXPECT_FALSE(FinishAlloc());
}

TEST_F(PoolTest, WhatIsNeededIsTakenBeforeTheRestIsMapped) {
  PoolOptions options = AheadOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  StartAlloc(4);
  Acquire asked = session_.Await<Acquire>();
  ASSERT_EQ(asked.want, 3);
  bool in_time = false;
  int mapped = 0;
  mapper_->on_map = [&] {
    // The engine has the first while the second is mapped.
    if (++mapped == 2) in_time = FinishAlloc();
  };
  Grant(asked);
  mapper_->on_map = nullptr;
  EXPECT_TRUE(in_time);
  EXPECT_EQ(mapper_->mapped(), 3u);
}

TEST_F(PoolTest, MappingAheadGivesItsSlotsToWhoNeedsThem) {
  PoolOptions options = AheadOptions();
  options.geometry.max_pages = 3;
  Make(options);
  Fill(1);
  Acquire ahead = session_.TakeOnly<Acquire>();
  ASSERT_EQ(ahead.urgency, Urgency::kSpeculative);
  ASSERT_EQ(ahead.want, 2) << "all slots that are left";
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Cancel>().sequence, ahead.sequence);
  Refuse(ahead, absl::StatusCode::kCancelled);
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Acquire>().urgency, Urgency::kWaiting)
      << "without a pause";
}

TEST_F(PoolTest, WhoWaitsWhenThePoolIsClosedGetsNothing) {
  PoolOptions options = QuietOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  StartAlloc(4);
  Acquire asked = session_.Await<Acquire>();
  pool_->Close();
  Grant(asked);
  EXPECT_FALSE(FinishAlloc());
  EXPECT_EQ(mapper_->mapped(), 0u);
}

// What is set aside is for what it was counted for.
TEST_F(CreditTest, NothingIsMappedAheadOfIt) {
  PoolOptions options = AheadOptions();
  options.running_miss_wait = absl::Hours(1);
  Make(options);
  EXPECT_TRUE(Reserve(8, 2));
  StartAlloc(4);
  Acquire asked = session_.Await<Acquire>();
  EXPECT_EQ(asked.want, 1);
  EXPECT_EQ(pool_->available_blocks(), 4u);
  Grant(asked);
  EXPECT_TRUE(FinishAlloc());
}

TEST_F(PoolTest, MapAheadPausesAfterARefusal) {
  Make(AheadOptions());
  Fill(2);
  Refuse(session_.TakeOnly<Acquire>());
  ASSERT_TRUE(pool_->Free(std::vector<BlockId>{0, 1, 2, 3}).ok());
  EXPECT_TRUE(Alloc(4));
  const absl::Duration pause = WorkDueIn();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  EXPECT_GT(pause, absl::ZeroDuration());
  clock_.Advance(absl::Seconds(1));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), SizeIs(1));
}

TEST_F(PoolTest, MapAheadIsOffUnderAnOrder) {
  Make(AheadOptions());
  Fill(3);
  Refuse(session_.TakeOnly<Acquire>());
  clock_.Advance(absl::Seconds(1));
  Order(1, Tier::kClosing);
  pool_->Work();
  EXPECT_FALSE(Alloc(1));
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.want, 1) << "a wish brings nothing along, either";
  Grant(asked);
  EXPECT_TRUE(Alloc(1));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  Order(kHoldAny, Tier::kIdle);
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Acquire>().urgency, Urgency::kSpeculative);
}

TEST_F(PoolTest, MapAheadStaysWithinTheMostThatMayBeReserved) {
  PoolOptions options = AheadOptions();
  options.min_reserved_pages = 5;  // more than may be: means 3
  options.max_reserved_pages = 3;
  Make(options);
  Fill(1);
  for (int i = 0; i < 8; ++i) {
    for (const Acquire& asked : session_.Take<Acquire>()) Grant(asked);
    EXPECT_LE(pool_->usage().idle, kPage * 3);
    EXPECT_TRUE(Alloc(1));
    Settle();
  }
  EXPECT_THAT(session_.Take<Return>(), IsEmpty());
}

TEST_F(PoolTest, IdlePagesDecayAndTheReserveStays) {
  PoolOptions options = QuietOptions();
  options.min_reserved_pages = 2;
  options.idle_decay = absl::Seconds(30);
  Make(options);
  ASSERT_TRUE(pool_->Free(Fill(5)).ok());
  pool_->Work();
  clock_.Advance(absl::Seconds(29));
  pool_->Work();
  EXPECT_THAT(session_.Take<Return>(), IsEmpty());
  EXPECT_LE(WorkDueIn(), absl::Seconds(1));
  clock_.Advance(absl::Seconds(1));
  pool_->Work();
  EXPECT_THAT(session_.TakeOnly<Return>().pages, SizeIs(3));
  EXPECT_EQ(mapper_->mapped(), 2u);
  // Nothing more to do, ever.
  clock_.Advance(absl::Seconds(100));
  pool_->Work();
  EXPECT_EQ(WorkDueIn(), absl::InfiniteDuration());
}

TEST_F(PoolTest, WhatDecaysDuringAStepGoesAtItsEnd) {
  PoolOptions options = QuietOptions();
  options.idle_decay = absl::Seconds(30);
  Make(options);
  ASSERT_TRUE(pool_->Free(Fill(2)).ok());
  Settle();
  pool_->StepBegin();
  clock_.Advance(absl::Seconds(30));
  EXPECT_EQ(WorkDueIn(), absl::InfiniteDuration());
  EXPECT_EQ(mapper_->mapped(), 2u);
  session_.TakeWakes();
  pool_->StepEnd(1);
  EXPECT_GT(session_.TakeWakes(), 0);
  pool_->Work();
  EXPECT_EQ(mapper_->mapped(), 0u);
}

TEST_F(PoolTest, AnIdlePageWhoseStepRunsDecaysWhenItIsDone) {
  PoolOptions options = QuietOptions();
  options.idle_decay = absl::ZeroDuration();
  Make(options);
  auto blocks = Fill(1);
  pool_->StepBegin();
  pool_->StepEnd(1);
  ASSERT_TRUE(pool_->Free(blocks).ok());
  Settle();
  EXPECT_EQ(mapper_->mapped(), 1u);
  EXPECT_EQ(WorkDueIn(), absl::InfiniteDuration());  // and does not poll for it
  session_.TakeWakes();
  pool_->StepDone(1);
  EXPECT_GT(session_.TakeWakes(), 0);
  pool_->Work();
  EXPECT_EQ(mapper_->mapped(), 0u);
}

TEST_F(PoolTest, IdlePagesAboveTheMostThatMayBeReservedGoAtOnce) {
  PoolOptions options = QuietOptions();
  options.max_reserved_pages = 2;
  Make(options);
  ASSERT_TRUE(pool_->Free(Fill(5)).ok());
  EXPECT_GT(session_.TakeWakes(), 0);
  pool_->Work();
  EXPECT_THAT(session_.TakeOnly<Return>().pages, SizeIs(3));
}

// Calls `once` in the midst of the next Unmap.
class InterruptedMapper : public NullMapper {
 public:
  absl::Status Unmap(PageIndex page) override {
    if (once) std::exchange(once, nullptr)();
    return NullMapper::Unmap(page);
  }
  std::function<void()> once;
};

TEST_F(PoolTest, APageFreedWhileOthersAreGivenBackIsNotForgotten) {
  PoolOptions options = QuietOptions();
  options.max_reserved_pages = 0;
  auto owned = std::make_unique<InterruptedMapper>();
  InterruptedMapper& mapper = *owned;
  Make(options, std::move(owned));
  const std::vector<BlockId> blocks = Fill(2);
  const auto page = [&](size_t i) {
    return absl::MakeConstSpan(blocks).subspan(i * kBlocksPerPage,
                                               kBlocksPerPage);
  };
  clock_.Advance(absl::Milliseconds(10));
  mapper.once = [&] { EXPECT_TRUE(pool_->Free(page(1)).ok()); };
  ASSERT_TRUE(pool_->Free(page(0)).ok());
  session_.TakeWakes();
  const absl::Time due = pool_->Work();
  EXPECT_EQ(mapper.mapped(), 1u);
  EXPECT_TRUE(session_.TakeWakes() > 0 || due <= clock_.Now()) << due;
  pool_->Work();
  EXPECT_EQ(mapper.mapped(), 0u);
}

TEST_F(PoolTest, PagesThatCameForAWishAreNoneOfTheReserve) {
  // Else a prompt of more than max_reserved_pages never starts.
  for (bool decay_at_once : {false, true}) {
    PoolOptions options = QuietOptions();
    if (decay_at_once) {
      options.idle_decay = absl::ZeroDuration();
    } else {
      options.max_reserved_pages = 1;
    }
    Make(options);
    EXPECT_FALSE(Alloc(5 * kBlocksPerPage));
    pool_->Work();
    Grant(session_.TakeOnly<Acquire>());
    pool_->Work();
    EXPECT_EQ(mapper_->mapped(), 5u);
    EXPECT_TRUE(Alloc(5 * kBlocksPerPage));
  }
}

TEST_F(PoolTest, NothingGoesBackWhileSomebodyWaitsForMore) {
  PoolOptions options = QuietOptions();
  options.max_reserved_pages = 1;
  Make(options);
  EXPECT_FALSE(Alloc(3 * kBlocksPerPage));
  pool_->Work();
  Grant(session_.TakeOnly<Acquire>(), 2);  // the third takes its time
  EXPECT_FALSE(Alloc(3 * kBlocksPerPage));
  Settle();
  EXPECT_EQ(mapper_->mapped(), 2u);
  clock_.Advance(absl::Seconds(1));  // nobody waits any more
  pool_->Work();
  pool_->Work();
  EXPECT_EQ(mapper_->mapped(), 1u);
}

// ---- reports ----

TEST_F(PoolTest, ReportsCarryTheTiersAndAreCoalesced) {
  Make(QuietOptions());
  auto blocks = Fill(4);
  auto page = [&](size_t i) {
    return absl::MakeConstSpan(blocks).subspan(i * kBlocksPerPage,
                                               kBlocksPerPage);
  };
  ASSERT_TRUE(pool_->Free(page(0)).ok());
  EXPECT_EQ(session_.TakeWakes(), 1);
  pool_->Work();
  Report report = session_.TakeOnly<Report>();
  EXPECT_EQ(report.pool, kPool);
  EXPECT_EQ(report.idle, 1);
  EXPECT_EQ(report.cached, 0);
  EXPECT_EQ(report.in_use, 3);

  ASSERT_TRUE(pool_->Cache(page(1)).ok());
  ASSERT_TRUE(pool_->Free(page(2)).ok());
  EXPECT_EQ(session_.TakeWakes(), 1);  // once for both
  const absl::Duration later = WorkDueIn();
  EXPECT_THAT(session_.Take<Report>(), IsEmpty());
  EXPECT_GT(later, absl::ZeroDuration());
  EXPECT_LE(later, absl::Milliseconds(5));
  clock_.Advance(later);
  pool_->Work();
  report = session_.TakeOnly<Report>();
  EXPECT_EQ(report.idle, 2);
  EXPECT_EQ(report.cached, 1);
  EXPECT_EQ(report.in_use, 1);
  EXPECT_EQ(report.settled, 0);
  EXPECT_EQ(report.oldest_idle, later);

  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(WorkDueIn(), absl::InfiniteDuration());
  EXPECT_THAT(session_.Take<Report>(), IsEmpty());  // nothing changed
}

TEST_F(PoolTest, APageThatIsInUseAsItComesIsReported) {
  PoolOptions options = QuietOptions();
  options.reserve_null_block = true;
  Make(options);
  EXPECT_FALSE(Alloc(1));
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  Grant(asked);  // of which the null block takes one at once
  session_.TakeWakes();
  ASSERT_TRUE(Alloc(1));
  pool_->Work();
  Report report = session_.TakeOnly<Report>();
  EXPECT_EQ(report.in_use, 1);
  EXPECT_EQ(report.idle, 0);
}

// ---- reclaims ----

TEST_F(PoolTest, IdleIsAnsweredFinally) {
  Make(QuietOptions());
  auto blocks = Fill(4);
  ASSERT_TRUE(pool_->Free(absl::MakeConstSpan(blocks).first(8)).ok());
  Order(1, Tier::kIdle);
  pool_->Work();
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_EQ(answer.pool, kPool);
  EXPECT_EQ(answer.revision, Revision(1));
  EXPECT_THAT(answer.given, SizeIs(2));
  EXPECT_EQ(answer.kept, 1);
  EXPECT_EQ(answer.reason, "in use");
  EXPECT_TRUE(answer.final);
  EXPECT_EQ(mapper_->mapped(), 2u);
  EXPECT_EQ(pool_->usage().held(), kPage * 2);
  // Once answered, what empties later is not given.
  ASSERT_TRUE(pool_->Free(absl::MakeConstSpan(blocks).subspan(8)).ok());
  Settle();
  EXPECT_THAT(session_.Take<ReclaimAnswer>(), IsEmpty());
}

TEST_F(PoolTest, TheTargetIsAbsolute) {
  Make(QuietOptions());
  ASSERT_TRUE(pool_->Free(Fill(4)).ok());
  Order(6, Tier::kPreempt);  // holds less already
  pool_->Work();
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_THAT(answer.given, IsEmpty());
  EXPECT_EQ(answer.kept, 0);
  EXPECT_TRUE(answer.final);
  Order(3, Tier::kIdle);
  pool_->Work();
  EXPECT_THAT(session_.TakeOnly<ReclaimAnswer>().given, SizeIs(1));
}

TEST_F(PoolTest, AnOrderStaysInForceWhileAGrantMayBeOnItsWay) {
  Make(QuietOptions());
  Fill(1);
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  Order(1, Tier::kIdle);
  pool_->Work();
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_EQ(answer.kept, 0);
  EXPECT_FALSE(answer.final);
  Grant(asked);
  pool_->Work();
  answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_EQ(answer.kept, 1);  // for its wish's next try
  EXPECT_TRUE(answer.final);
}

TEST_F(PoolTest, AnOlderOrderThanTheOneInForceIsIgnored) {
  Make(QuietOptions());
  Fill(4);
  Order(2, Tier::kClosing);
  Order(3, Tier::kClosing);
  last_revision_ = 0;
  Order(0, Tier::kClosing);  // revision 1 again
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<ReclaimAnswer>().kept, 1);
}

TEST_F(PoolTest, CachedEvictsAndSaysSo) {
  Make(QuietOptions());
  auto blocks = Fill(3);
  const BlockGeneration generation = pool_->generation(blocks[0]);
  ASSERT_TRUE(pool_->Cache(absl::MakeConstSpan(blocks).first(8)).ok());
  Order(2, Tier::kIdle);
  pool_->Work();
  EXPECT_THAT(session_.TakeOnly<ReclaimAnswer>().given, IsEmpty());
  Order(2, Tier::kCached);
  pool_->Work();
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_THAT(answer.given, SizeIs(1));
  EXPECT_TRUE(answer.final);
  std::vector<BlockRemoval> removals(16);
  removals.resize(pool_->DrainRemovals(absl::MakeSpan(removals)));
  EXPECT_THAT(removals, SizeIs(4));
  EXPECT_FALSE(pool_->Touch({removals[0].block}, {removals[0].generation}));
  EXPECT_TRUE(pool_->Touch({blocks[4]}, {generation}));
}

TEST_F(PoolTest, ClosingEmptiesOutByFrees) {
  PoolOptions options = QuietOptions();
  PageCount told = 0;
  options.on_closing = [&](PageCount pages) { told += pages; };
  Make(options);
  auto blocks = Fill(3);
  Order(1, Tier::kClosing);
  pool_->Work();
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_THAT(answer.given, IsEmpty());
  EXPECT_EQ(answer.kept, 2);
  EXPECT_FALSE(answer.final);
  EXPECT_EQ(told, 2);
  EXPECT_EQ(pool_->pages_to_vacate(), 0);
  // A closing page's free blocks are handed out no more.
  ASSERT_TRUE(pool_->Free(blocks).ok());
  EXPECT_EQ(pool_->available_blocks(), kBlocksPerPage);
  EXPECT_GT(session_.TakeWakes(), 0);
  pool_->Work();
  answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_THAT(answer.given, SizeIs(2));
  EXPECT_TRUE(answer.final);
  EXPECT_EQ(mapper_->mapped(), 1u);
}

TEST_F(PoolTest, PreemptNamesTheBlocksToVacate) {
  PoolOptions options = QuietOptions();
  int preempts = 0;
  options.on_preempt = [&] { ++preempts; };
  Make(options);
  auto blocks = Fill(3);
  ASSERT_TRUE(pool_->Free(absl::MakeConstSpan(blocks).first(3)).ok());
  Order(2, Tier::kPreempt);
  pool_->Work();
  EXPECT_EQ(preempts, 1);
  EXPECT_EQ(pool_->pages_to_vacate(), 1);
  std::vector<BlockId> vacate(16);
  vacate.resize(pool_->BlocksToVacate(absl::MakeSpan(vacate)));
  EXPECT_THAT(vacate, ElementsAre(blocks[3]));  // of the page with the fewest
  ASSERT_TRUE(pool_->Free(vacate).ok());
  session_.Take<ReclaimAnswer>();
  pool_->Work();
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_THAT(answer.given, SizeIs(1));
  EXPECT_TRUE(answer.final);
}

TEST_F(PoolTest, ALiftedOrderReopens) {
  Make(QuietOptions());
  auto blocks = Fill(2);
  ASSERT_TRUE(pool_->Free(absl::MakeConstSpan(blocks).first(2)).ok());
  Order(0, Tier::kPreempt);
  pool_->Work();
  EXPECT_EQ(pool_->available_blocks(), 0u);
  session_.Take<ReclaimAnswer>();
  Order(kHoldAny, Tier::kIdle);
  EXPECT_EQ(pool_->available_blocks(), 2u);
  EXPECT_EQ(pool_->pages_to_vacate(), 0);
  // Says that it is alive: the order may have been lifted for its silence.
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_EQ(answer.revision, Revision(2));
  EXPECT_TRUE(answer.final);
  Order(kHoldAny, Tier::kIdle);
  EXPECT_THAT(session_.Take<ReclaimAnswer>(), IsEmpty());
}

TEST_F(PoolTest, ACheaperOrderReopensWhatADearerOneClosed) {
  Make(QuietOptions());
  auto blocks = Fill(2);
  ASSERT_TRUE(pool_->Free(absl::MakeConstSpan(blocks).first(2)).ok());
  Order(0, Tier::kClosing);
  pool_->Work();
  EXPECT_EQ(pool_->available_blocks(), 0u);
  Order(0, Tier::kCached);
  pool_->Work();
  EXPECT_EQ(pool_->available_blocks(), 2u);
}

TEST_F(PoolTest, ASmallerOrderReopensTheRest) {
  Make(QuietOptions());
  auto blocks = Fill(3);
  Order(0, Tier::kClosing);
  pool_->Work();
  Order(2, Tier::kClosing);
  pool_->Work();
  ASSERT_TRUE(pool_->Free(blocks).ok());
  EXPECT_EQ(pool_->available_blocks(), 2 * kBlocksPerPage);
}

TEST_F(PoolTest, AReclaimIsPutOffDuringAStepAndDoneAtItsEnd) {
  Make(QuietOptions());
  ASSERT_TRUE(pool_->Free(Fill(2)).ok());
  Settle();
  pool_->StepBegin();
  const size_t available = pool_->available_blocks();
  Order(0, Tier::kPreempt);
  EXPECT_EQ(WorkDueIn(), absl::InfiniteDuration());
  EXPECT_EQ(pool_->available_blocks(), available);
  EXPECT_TRUE(Alloc(4));
  session_.TakeWakes();
  pool_->StepEnd(1);
  EXPECT_GT(session_.TakeWakes(), 0);
  pool_->Work();
  EXPECT_THAT(session_.TakeOnly<ReclaimAnswer>().given, SizeIs(1));
}

TEST_F(PoolTest, APageWhoseStepRunsGoesWhenItIsDone) {
  for (Tier tier : {Tier::kIdle, Tier::kClosing}) {
    Make(QuietOptions());
    auto blocks = Fill(1);
    pool_->StepBegin();
    pool_->StepEnd(5);
    ASSERT_TRUE(pool_->Free(blocks).ok());  // step 5 may still write them
    Settle();
    Order(0, tier);
    EXPECT_EQ(WorkDueIn(), absl::InfiniteDuration());
    ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
    EXPECT_THAT(answer.given, IsEmpty());
    EXPECT_FALSE(answer.final);
    EXPECT_EQ(answer.reason, "step running");
    EXPECT_EQ(mapper_->mapped(), 1u);
    session_.TakeWakes();
    pool_->StepDone(5);
    EXPECT_GT(session_.TakeWakes(), 0);
    pool_->Work();
    answer = session_.TakeOnly<ReclaimAnswer>();
    EXPECT_THAT(answer.given, SizeIs(1));
    EXPECT_TRUE(answer.final);
  }
}

TEST_F(PoolTest, APageWithRunningWorkIsTriedAgain) {
  for (Tier tier : {Tier::kIdle, Tier::kPreempt}) {
    PoolOptions options = QuietOptions();
    auto mapper = *HostMapper::Create(options.geometry);
    HostMapper& stream = *mapper;
    Make(options, std::move(mapper));
    auto blocks = Fill(1);
    pool_->block_data(blocks[0])[0] = std::byte{1};
    stream.BeginWork(PageIndex(0));
    ASSERT_TRUE(pool_->Free(blocks).ok());
    Order(0, tier);
    for (int i = 0; i < 3; ++i) {
      const absl::Duration again = WorkDueIn();
      EXPECT_GT(again, absl::ZeroDuration());
      EXPECT_LE(again, absl::Milliseconds(5));
      EXPECT_EQ(pool_->usage().held(), kPage);
      clock_.Advance(again);
    }
    stream.EndWork(PageIndex(0));
    clock_.Advance(absl::Milliseconds(1));
    pool_->Work();
    auto answers = session_.Take<ReclaimAnswer>();
    ASSERT_FALSE(answers.empty());
    EXPECT_FALSE(answers.front().final);
    EXPECT_THAT(answers.back().given, SizeIs(1));
    EXPECT_TRUE(answers.back().final);
    EXPECT_EQ(pool_->usage().held(), Bytes(0));
  }
}

TEST_F(PoolTest, FreshlyGrantedPagesAreGuardedForTheNextTry) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(8));
  pool_->Work();
  Grant(session_.TakeOnly<Acquire>());
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Report>().in_use, 2);
  Order(0, Tier::kCached);
  pool_->Work();
  ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_THAT(answer.given, IsEmpty());
  EXPECT_TRUE(answer.final);
  EXPECT_TRUE(Alloc(8));
}

TEST_F(PoolTest, TheGuardEndsByItselfAndIsReported) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(8));
  pool_->Work();
  Grant(session_.TakeOnly<Acquire>());
  absl::Duration due = WorkDueIn();
  session_.Take<Report>();
  EXPECT_LE(due, absl::Milliseconds(100));
  clock_.Advance(absl::Milliseconds(99));
  EXPECT_EQ(WorkDueIn(), absl::Milliseconds(1));
  EXPECT_THAT(session_.Take<Report>(), IsEmpty());
  clock_.Advance(absl::Milliseconds(1));
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Report>().idle, 2);
  Order(0, Tier::kIdle);
  pool_->Work();
  EXPECT_THAT(session_.TakeOnly<ReclaimAnswer>().given, SizeIs(2));
}

TEST_F(PoolTest, AGuardThatIsTakenIsReportedSoon) {
  Make(QuietOptions());
  EXPECT_FALSE(Alloc(8));
  pool_->Work();
  Grant(session_.TakeOnly<Acquire>());
  pool_->Work();
  session_.Take<Report>();
  session_.TakeWakes();
  EXPECT_TRUE(Alloc(2));  // leaves an idle page, guarded no more
  EXPECT_GT(session_.TakeWakes(), 0);
  clock_.Advance(absl::Milliseconds(5));
  pool_->Work();
  EXPECT_EQ(session_.TakeOnly<Report>().idle, 1);
}

// ---- limits, loss, the end ----

TEST_F(PoolTest, CapacityFollowsTheLimits) {
  PoolOptions options = QuietOptions();
  options.reserve_null_block = true;
  Make(options);
  EXPECT_EQ(pool_->capacity_blocks(), 16 * kBlocksPerPage - 1);
  pool_->OnLimits(kPage * 3 + Bytes(1));
  EXPECT_EQ(pool_->capacity_blocks(), 3 * kBlocksPerPage - 1);
  pool_->OnLimits(Bytes(0));
  EXPECT_EQ(pool_->capacity_blocks(), 0u);
}

TEST_F(PoolTest, WithoutABrokerTheEngineRunsOn) {
  PoolOptions options = AheadOptions();
  options.idle_decay = absl::Seconds(30);
  Make(options);
  auto blocks = Fill(6);
  session_.Take<Acquire>();
  Order(1, Tier::kClosing);
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  const int sends = session_.sends();
  pool_->OnDisconnected(absl::UnavailableError("the broker is gone"));
  EXPECT_EQ(pool_->health().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(pool_->CheckInvariants().ok());
  ASSERT_TRUE(pool_->Free(blocks).ok());
  EXPECT_TRUE(Alloc(6 * kBlocksPerPage));
  EXPECT_FALSE(Alloc(1));
  EXPECT_FALSE(Alloc(1, Urgency::kRunning));
  // The worker has no reason to spin, nor to talk.
  for (int i = 0; i < 100; ++i) {
    const absl::Time due = pool_->Work();
    ASSERT_GT(due, clock_.Now());
    if (due == absl::InfiniteFuture()) break;
    clock_.Advance(due - clock_.Now());
  }
  EXPECT_EQ(pool_->Work(), absl::InfiniteFuture());
  EXPECT_EQ(session_.sends(), sends);
  EXPECT_EQ(pool_->usage().waiting, Bytes(0));
}

TEST_F(PoolTest, WithoutABrokerIdlePagesGoBackToTheDevice) {
  PoolOptions options = QuietOptions();
  options.idle_decay = absl::Seconds(30);
  Make(options);
  ASSERT_TRUE(pool_->Free(Fill(2)).ok());
  pool_->OnDisconnected(absl::UnavailableError("the broker is gone"));
  clock_.Advance(absl::Seconds(31));
  pool_->Work();
  EXPECT_EQ(mapper_->mapped(), 0u);
}

TEST_F(PoolTest, CloseReturnsEverythingAndCancels) {
  Make(QuietOptions());
  Fill(2);
  EXPECT_FALSE(Alloc(4));
  pool_->Work();
  Acquire asked = session_.TakeOnly<Acquire>();
  pool_->Close();
  EXPECT_TRUE(pool_->left());
  EXPECT_EQ(mapper_->mapped(), 0u);
  EXPECT_THAT(session_.TakeOnly<Return>().pages, SizeIs(2));
  EXPECT_EQ(session_.TakeOnly<Cancel>().sequence, asked.sequence);
  EXPECT_FALSE(Alloc(1));
  // What crosses the cancel goes back as well.
  Grant(asked);
  EXPECT_EQ(mapper_->mapped(), 0u);
  EXPECT_THAT(session_.TakeOnly<Mapped>().failed, SizeIs(1));
  EXPECT_EQ(pool_->Work(), absl::InfiniteFuture());
  pool_->Close();
  EXPECT_THAT(session_.Take<Return>(), IsEmpty());
}

TEST_F(PoolTest, CloseWaitsForRunningWork) {
  PoolOptions options = QuietOptions();
  auto mapper = *HostMapper::Create(options.geometry);
  HostMapper& stream = *mapper;
  Make(options, std::move(mapper));
  Fill(2);
  stream.BeginWork(PageIndex(0));
  pool_->Close();
  EXPECT_FALSE(pool_->left());
  EXPECT_THAT(session_.TakeOnly<Return>().pages, SizeIs(1));
  EXPECT_LE(WorkDueIn(), absl::Milliseconds(5));
  stream.EndWork(PageIndex(0));
  pool_->Work();
  EXPECT_TRUE(pool_->left());
  EXPECT_THAT(session_.TakeOnly<Return>().pages, SizeIs(1));
}

// ---- pages where the broker puts them ----

class PoolInSlabTest : public PoolTest {
 protected:
  void MakeInSlab(PoolOptions options = QuietOptions()) {
    Make(std::move(options));
    pool_->OnOpened(kPool, GiB(1), GiB(1), Pool::Slots::kBrokers);
  }

  // The broker's answer with these pages.
  void GrantAt(const Acquire& asked, const std::vector<uint32_t>& indexes) {
    EXPECT_THAT(asked.indexes, IsEmpty());
    Acquire chosen = asked;
    for (uint32_t index : indexes) chosen.indexes.push_back(PageIndex(index));
    Grant(chosen);
  }
};

TEST_F(PoolInSlabTest, TakesThePagesThatTheBrokerChose) {
  MakeInSlab();
  EXPECT_FALSE(Alloc(2 * kBlocksPerPage));
  pool_->Work();
  const Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.want, 2);
  GrantAt(asked, {11, 5});
  EXPECT_THAT(session_.TakeOnly<Mapped>().failed, IsEmpty());
  EXPECT_EQ(mapper_->mapped(), 2u);
  // Blocks are called by where they lie.
  auto blocks = Alloc(2 * kBlocksPerPage);
  ASSERT_TRUE(blocks);
  for (BlockId block : *blocks) {
    const size_t page = static_cast<size_t>(block) / kBlocksPerPage;
    EXPECT_TRUE(page == 5 || page == 11) << block;
  }
}

TEST_F(PoolInSlabTest, TheFirstPageNeedNotBeTheNullBlocks) {
  PoolOptions options = QuietOptions();
  options.reserve_null_block = true;
  MakeInSlab(options);
  EXPECT_FALSE(Alloc(kBlocksPerPage));
  pool_->Work();
  const Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.want, 1) << "page 0 may be another's";
  GrantAt(asked, {3});
  EXPECT_TRUE(Alloc(kBlocksPerPage));
}

TEST_F(PoolInSlabTest, PagesThatItCannotHaveAreGivenBack) {
  MakeInSlab();
  EXPECT_FALSE(Alloc(3 * kBlocksPerPage));
  pool_->Work();
  // One twice, one beyond its addresses, and then more than it asked for.
  GrantAt(session_.TakeOnly<Acquire>(), {4, 4, 16, 5, 6, 7});
  EXPECT_THAT(session_.TakeOnly<Mapped>().failed, SizeIs(3));
  EXPECT_EQ(mapper_->mapped(), 3u);
  EXPECT_EQ(pool_->CheckInvariants(), absl::OkStatus());
}

TEST_F(PoolInSlabTest, AsksForNoMoreThanItHasSlotsFor) {
  MakeInSlab();
  EXPECT_FALSE(Alloc(16 * kBlocksPerPage));
  pool_->Work();
  const Acquire asked = session_.TakeOnly<Acquire>();
  EXPECT_EQ(asked.want, 16);
  EXPECT_FALSE(Alloc(1, Urgency::kRunning));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty()) << "all are asked for";
  Refuse(asked);
  EXPECT_FALSE(Alloc(17 * kBlocksPerPage));
  clock_.Advance(absl::Milliseconds(51));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty()) << "never enough";
}

TEST_F(PoolInSlabTest, GivesPagesBackByTheirNames) {
  MakeInSlab();
  EXPECT_FALSE(Alloc(kBlocksPerPage));
  pool_->Work();
  GrantAt(session_.TakeOnly<Acquire>(), {9});
  auto blocks = Alloc(kBlocksPerPage);
  ASSERT_TRUE(blocks);
  ASSERT_TRUE(pool_->Free(*blocks).ok());
  pool_->Close();
  const Return back = session_.TakeOnly<Return>();
  ASSERT_THAT(back.pages, SizeIs(1));
  EXPECT_EQ(back.pages[0].index, PageIndex(9));
}

TEST_F(PoolInSlabTest, MemoryThatIsGoneIsNotHandedOut) {
  MakeInSlab();
  EXPECT_FALSE(Alloc(kBlocksPerPage));
  pool_->Work();
  GrantAt(session_.TakeOnly<Acquire>(), {9});
  auto blocks = Alloc(2);
  ASSERT_TRUE(blocks);
  std::vector<BlockGeneration> generations;
  for (BlockId block : *blocks) {
    generations.push_back(pool_->generation(block));
  }
  ASSERT_TRUE(pool_->Cache(*blocks).ok());
  pool_->OnDisconnected(absl::FailedPreconditionError("restart"),
                        Pool::Memory::kGone);
  EXPECT_FALSE(Alloc(1));
  EXPECT_FALSE(pool_->Touch(*blocks, generations));
  EXPECT_EQ(pool_->available_blocks(), 0u);
  EXPECT_EQ(pool_->health(), absl::FailedPreconditionError("restart"));
}

}  // namespace
}  // namespace kvbroker::client
