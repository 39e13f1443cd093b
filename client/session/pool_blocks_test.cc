// Blocks that are named, set late, taken without a wish, grown for a poller and
// trimmed: what engines do that do not wait in Alloc.
#include <atomic>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "client/session/pool.h"
#include "client/session/scripted_session.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/harness/null_mapper.h"

namespace kvbroker::client {
namespace {

using ::kvbroker::testing::NullMapper;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr PoolId kPool = PoolId(7);
constexpr Bytes kPage = KiB(16);

class PoolBlocksTest : public ::testing::Test {
 protected:
  // 4 blocks a page, 16 pages; a limit of 12.
  PoolBlocksTest() {
    options_.geometry.handle_bytes = kPage;
    options_.geometry.max_pages = 16;
    options_.block_bytes = KiB(4);
    options_.map_ahead = false;
    options_.min_reserved_pages = 0;
    options_.idle_decay = absl::InfiniteDuration();
    options_.running_miss_wait = absl::ZeroDuration();
  }

  void Make() {
    auto mapper = std::make_unique<NullMapper>();
    mapper_ = mapper.get();
    auto pool =
        Pool::Create(options_, std::move(mapper), session_, clock_);
    ASSERT_TRUE(pool.ok()) << pool.status();
    pool_ = *std::move(pool);
    pool_->OnOpened(kPool, kPage * 12, GiB(1));
  }

  void TearDown() override {
    if (thread_.joinable()) thread_.join();
    if (pool_ != nullptr) {
      EXPECT_TRUE(pool_->CheckInvariants().ok()) << pool_->CheckInvariants();
    }
  }

  void Grant(const Acquire& asked) {
    Granted granted;
    granted.sequence = asked.sequence;
    granted.grant = GrantId(++last_grant_);
    granted.pool = kPool;
    for (PageIndex index : asked.indexes) {
      granted.pages.push_back({index, Generation(++last_generation_)});
    }
    std::vector<UniqueFd> descriptors(granted.pages.size());
    pool_->OnGranted(granted, std::move(descriptors));
  }

  void Refuse(const Acquire& asked) {
    Refused refused;
    refused.sequence = asked.sequence;
    refused.code = absl::StatusCode::kUnavailable;
    pool_->OnRefused(refused);
  }

  // In a thread of its own.
  void StartAllocAt(std::vector<BlockId> blocks,
                    absl::Duration timeout = absl::Seconds(5)) {
    thread_ = std::thread([this, blocks = std::move(blocks), timeout] {
      got_ = pool_->AllocAt(blocks, timeout);
    });
  }
  absl::StatusOr<bool> FinishAllocAt() {
    thread_.join();
    return *got_;
  }

  FakeClock clock_;
  ScriptedSession session_;
  PoolOptions options_;
  NullMapper* mapper_ = nullptr;
  std::unique_ptr<Pool> pool_;
  std::thread thread_;
  std::optional<absl::StatusOr<bool>> got_;
  uint64_t last_grant_ = 0;
  uint32_t last_generation_ = 0;
};

TEST_F(PoolBlocksTest, NamedBlocksBringTheirPagesAndOnlyThose) {
  Make();
  StartAllocAt({5, 22, 6});
  Acquire asked = session_.Await<Acquire>();
  EXPECT_THAT(asked.indexes, ElementsAre(PageIndex(1), PageIndex(5)));
  EXPECT_EQ(asked.at_least, 2);
  Grant(asked);
  EXPECT_THAT(FinishAllocAt(), ::testing::Eq(absl::StatusOr<bool>(true)));
  EXPECT_THAT(pool_->UsedBlocks(), ElementsAre(5, 6, 22));
  EXPECT_EQ(pool_->page_used_blocks(PageIndex(1)), 2u);
  EXPECT_EQ(pool_->page_used_blocks(PageIndex(0)), 0u);
  EXPECT_EQ(pool_->page_used_blocks(PageIndex(99)), 0u);
  EXPECT_EQ(pool_->block_state(5), BlockState::kUsed);
  EXPECT_EQ(pool_->block_state(4), BlockState::kFree);
  EXPECT_EQ(pool_->block_state(-1), BlockState::kUnbacked);
  // Of mapped pages at once.
  EXPECT_TRUE(*pool_->AllocAt(std::vector<BlockId>{4, 7}, absl::Seconds(5)));
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
}

TEST_F(PoolBlocksTest, NamedBlocksAreAllTakenOrNone) {
  Make();
  StartAllocAt({0});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  for (const std::vector<BlockId>& wrong :
       {std::vector<BlockId>{1, 0}, {-1}, {64}, {1, 1}}) {
    absl::StatusOr<bool> taken = pool_->AllocAt(wrong, absl::Seconds(5));
    EXPECT_EQ(taken.status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_THAT(pool_->UsedBlocks(), ElementsAre(0));
}

TEST_F(PoolBlocksTest, ARefusalOfNamedBlocksIsAnAnswer) {
  Make();
  StartAllocAt({5});
  Refuse(session_.Await<Acquire>());
  EXPECT_FALSE(*FinishAllocAt());
  EXPECT_THAT(pool_->UsedBlocks(), IsEmpty());
  // The slot is free to ask for again.
  StartAllocAt({5});
  Grant(session_.Await<Acquire>());
  EXPECT_TRUE(*FinishAllocAt());
}

TEST_F(PoolBlocksTest, PagesThatCameAndWentAgainAreAskedForAgain) {
  Make();
  StartAllocAt({5, 9});
  Acquire first = session_.Await<Acquire>();
  // Half of them: the rest is refused; so a page is there, idle, for a moment.
  mapper_->FailNextMap();
  Grant(first);
  EXPECT_FALSE(*FinishAllocAt()) << "one could not be mapped";
  StartAllocAt({9, 5});
  Acquire second = session_.Await<Acquire>();
  ASSERT_THAT(second.indexes, SizeIs(1));
  // The other one goes before this one comes.
  session_.TakeWakes();
  std::thread trim([&] { pool_->Trim(); });
  session_.AwaitWake();
  pool_->Work();
  trim.join();
  Grant(second);
  Grant(session_.Await<Acquire>());
  EXPECT_TRUE(*FinishAllocAt());
}

TEST_F(PoolBlocksTest, NamedBlocksAreNotWaitedForPastTheirTime) {
  Make();
  EXPECT_FALSE(*pool_->AllocAt(std::vector<BlockId>{5}, absl::ZeroDuration()));
  StartAllocAt({5}, absl::Milliseconds(5));
  Acquire asked = session_.Await<Acquire>();
  // The wait is of the real clock, what it looks at the test's.
  while (session_.Take<Cancel>().empty()) {
    clock_.Advance(absl::Milliseconds(5));
    std::this_thread::yield();
  }
  EXPECT_FALSE(*FinishAllocAt());
  // The grant that crossed it is idle.
  Grant(asked);
  EXPECT_EQ(pool_->usage().idle, kPage);
}

TEST_F(PoolBlocksTest, WhereTheBrokerChoosesPagesBlocksCannotBeNamed) {
  Make();
  pool_->OnOpened(kPool, GiB(1), GiB(1), Pool::Slots::kBrokers);
  EXPECT_EQ(pool_->AllocAt(std::vector<BlockId>{5}, absl::Seconds(1))
                .status()
                .code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(PoolBlocksTest, BlocksAreSetWhileNoneIsUsed) {
  Make();
  ASSERT_TRUE(pool_->SetBlocks(KiB(8), 5, /*reserve_null_block=*/true).ok());
  EXPECT_EQ(pool_->block_geometry().block_ids(), 5);
  EXPECT_EQ(pool_->capacity_blocks(), 4u);
  EXPECT_EQ(pool_->generation(5), 0u);
  absl::Status wrong = pool_->SetBlocks(KiB(32), 0, false);
  EXPECT_EQ(wrong.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(pool_->block_geometry().block_ids(), 5);
  StartAllocAt({4});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  absl::Status late = pool_->SetBlocks(KiB(4), 0, false);
  EXPECT_EQ(late.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(late.message()), HasSubstr("in use: 1"));
  // What it is already may be said at any time.
  EXPECT_TRUE(pool_->SetBlocks(KiB(8), 5, true).ok());
}

TEST_F(PoolBlocksTest, PagesStayWhereBlocksAreSetAnew) {
  options_.reserve_null_block = true;
  Make();
  StartAllocAt({1, 4});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  ASSERT_TRUE(pool_->Cache(std::vector<BlockId>{1, 4}).ok());
  EXPECT_EQ(pool_->SetBlocks(KiB(8), 0, true).code(),
            absl::StatusCode::kFailedPrecondition);
  pool_->SetMaxCached(0);
  ASSERT_TRUE(pool_->SetBlocks(KiB(8), 0, true).ok());
  // The null block's page, and an empty one.
  EXPECT_EQ(pool_->available_blocks(), 3u);
  EXPECT_EQ(mapper_->mapped(), 2u);
  ASSERT_TRUE(pool_->SetBlocks(KiB(4), 0, false).ok());
  EXPECT_EQ(pool_->available_blocks(), 8u);
  EXPECT_EQ(pool_->usage().idle, kPage * 2);
  // What has been asked for meanwhile comes.
  StartAllocAt({8});
  Acquire asked = session_.Await<Acquire>();
  ASSERT_TRUE(pool_->SetBlocks(KiB(4), 40, false).ok());
  Grant(asked);
  ASSERT_TRUE(*FinishAllocAt());
  EXPECT_THAT(pool_->UsedBlocks(), ElementsAre(8));
}

TEST_F(PoolBlocksTest, NoMoreIsCachedThanMayBe) {
  Make();
  StartAllocAt({0, 1, 2, 3});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  pool_->SetMaxCached(2);
  ASSERT_TRUE(pool_->Cache(std::vector<BlockId>{0, 1, 2}).ok());
  EXPECT_EQ(pool_->block_state(0), BlockState::kFree);
  EXPECT_EQ(pool_->block_state(1), BlockState::kCached);
  EXPECT_EQ(pool_->block_state(2), BlockState::kCached);
  std::vector<BlockRemoval> removals(4);
  ASSERT_EQ(pool_->DrainRemovals(absl::MakeSpan(removals)), 1u);
  EXPECT_EQ(removals[0].block, 0);
  pool_->SetMaxCached(0);
  EXPECT_EQ(pool_->block_state(2), BlockState::kFree);
  pool_->SetMaxCached(std::nullopt);
  ASSERT_TRUE(pool_->Cache(std::vector<BlockId>{3}).ok());
  EXPECT_EQ(pool_->block_state(3), BlockState::kCached);
}

TEST_F(PoolBlocksTest, TryAllocLeavesNoWish) {
  Make();
  std::vector<BlockId> blocks(3);
  EXPECT_FALSE(pool_->TryAlloc(absl::MakeSpan(blocks)));
  pool_->Work();
  EXPECT_EQ(session_.sends(), 0);
  StartAllocAt({0});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  EXPECT_TRUE(pool_->TryAlloc(absl::MakeSpan(blocks)));
  EXPECT_FALSE(pool_->TryAlloc(absl::MakeSpan(blocks).first(1)));
}

TEST_F(PoolBlocksTest, AFullRangeIsNotWaitedFor) {
  options_.running_miss_wait = absl::Hours(1);
  options_.geometry.max_pages = 2;
  Make();
  StartAllocAt({0, 1, 2, 3, 4, 5, 6, 7});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  std::vector<BlockId> blocks(9);
  // Would wait for hours.
  EXPECT_FALSE(pool_->Alloc(absl::MakeSpan(blocks).first(1),
                            Urgency::kRunning));
  EXPECT_FALSE(pool_->Alloc(absl::MakeSpan(blocks), Urgency::kRunning));
}

TEST_F(PoolBlocksTest, GenerationsGoOnWhereBlocksAreSetAnew) {
  Make();
  StartAllocAt({0});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  const BlockId block = 0;
  const BlockGeneration before = pool_->generation(block);
  ASSERT_TRUE(pool_->Cache({&block, 1}).ok());
  pool_->SetMaxCached(0);  // given up
  session_.TakeWakes();
  thread_ = std::thread([&] { pool_->Trim(); });
  session_.AwaitWake();
  pool_->Work();
  thread_.join();
  ASSERT_TRUE(pool_->SetBlocks(KiB(8), 0, false).ok());
  EXPECT_GT(pool_->generation(block), before);
  EXPECT_FALSE(pool_->Touch({&block, 1}, {&before, 1}));
}

TEST_F(PoolBlocksTest, WhoPollsAndTakesNothingGetsTwiceAsMuchUpToTheLimit) {
  options_.grow_when_polled = true;
  Make();
  std::vector<PageCount> asked_for;
  for (int i = 0; i < 40; ++i) {
    pool_->available_blocks();
    pool_->Work();
    for (const Acquire& asked : session_.Take<Acquire>()) {
      EXPECT_EQ(asked.urgency, Urgency::kSpeculative);
      EXPECT_EQ(asked.at_least, 1);
      asked_for.push_back(asked.want);
      Grant(asked);
    }
  }
  EXPECT_THAT(asked_for, ElementsAre(1, 1, 2, 4, 4));
  EXPECT_EQ(pool_->available_blocks(), 48u);
}

TEST_F(PoolBlocksTest, WhoTakesBlocksNowAndThenIsNoPoller) {
  options_.grow_when_polled = true;
  Make();
  StartAllocAt({0});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  BlockId block;
  for (int i = 0; i < 20; ++i) {
    for (int look = 0; look < 3; ++look) pool_->available_blocks();
    ASSERT_TRUE(pool_->TryAlloc({&block, 1}));
    ASSERT_TRUE(pool_->Free({&block, 1}).ok());
    pool_->Work();
  }
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
}

TEST_F(PoolBlocksTest, APollerThatIsRefusedIsNotPursuedAtOnce) {
  options_.grow_when_polled = true;
  Make();
  const auto look = [&] {
    for (int i = 0; i < 8; ++i) pool_->available_blocks();
    pool_->Work();
  };
  look();
  Refuse(session_.TakeOnly<Acquire>());
  look();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  clock_.Advance(absl::Milliseconds(60));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), SizeIs(1));
}

TEST_F(PoolBlocksTest, TrimReturnsTheReserveToo) {
  options_.min_reserved_pages = 2;
  Make();
  StartAllocAt({0, 4, 8});
  Grant(session_.Await<Acquire>());
  ASSERT_TRUE(*FinishAllocAt());
  ASSERT_TRUE(pool_->Free(std::vector<BlockId>{0, 8}).ok());
  session_.TakeWakes();
  PageCount went = 0;
  thread_ = std::thread([&] { went = pool_->Trim(); });
  session_.AwaitWake();
  pool_->Work();
  thread_.join();
  EXPECT_EQ(went, 2);
  EXPECT_EQ(mapper_->mapped(), 1u);
  EXPECT_THAT(session_.TakeOnly<Return>().pages, SizeIs(2));
  EXPECT_THAT(pool_->UsedBlocks(), ElementsAre(4));
}

// Else the broker refuses the slot, which it takes for full.
TEST_F(PoolBlocksTest, ASlotIsAskedForAfterItsReturnWasSent) {
  Make();
  std::atomic<bool> stop = false;
  std::thread worker([&] {
    while (!stop) {
      session_.AwaitWake();
      pool_->Work();
    }
  });
  for (int round = 0; round < 300; ++round) {
    StartAllocAt({0});
    Acquire asked = session_.Await<Acquire>();
    EXPECT_THAT(session_.Take<Return>(), SizeIs(round == 0 ? 0 : 1));
    Grant(asked);
    ASSERT_TRUE(*FinishAllocAt());
    ASSERT_TRUE(pool_->Free(std::vector<BlockId>{0}).ok());
    EXPECT_EQ(pool_->Trim(), 1);
  }
  stop = true;
  session_.Wake();
  worker.join();
}

TEST_F(PoolBlocksTest, TrimOfNothingAnswers) {
  Make();
  session_.TakeWakes();
  PageCount went = 1;
  thread_ = std::thread([&] { went = pool_->Trim(); });
  session_.AwaitWake();
  pool_->Work();
  thread_.join();
  EXPECT_EQ(went, 0);
}

}  // namespace
}  // namespace kvbroker::client
