// A session whose broker says what no broker says: the engine keeps what it has
// and goes on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "broker/base/clock.h"
#include "client/session/session.h"
#include "tests/harness/null_mapper.h"
#include "tests/harness/scripted_link.h"

namespace kvbroker::client {
namespace {

using ::kvbroker::testing::NullMapper;
using ::kvbroker::testing::ScriptedLink;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr Bytes kPage = KiB(64);
constexpr size_t kBlocksPerPage = 16;
constexpr uint32_t kMaxPages = 8;
constexpr PoolId kPool(7);

class BrokenBrokerTest : public ::testing::Test {
 protected:
  BrokenBrokerTest() {
    SessionOptions options;
    options.instance = "a";
    PoolOptions pool;
    pool.geometry.handle_bytes = Bytes(kPage.count() / 2);
    pool.geometry.handles_per_page = 2;
    pool.geometry.layout = Layout::kPerLayer;
    pool.geometry.max_pages = kMaxPages;
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
    auto link = std::make_unique<ScriptedLink>();
    wire_ = link.get();
    session_->Attach(std::move(link), Nonce{});
    Say(OpenedWith({kPool}));
  }
  ~BrokenBrokerTest() override {
    absl::Status status = session_->pool(0).CheckInvariants();
    EXPECT_TRUE(status.ok()) << status;
  }

  static Opened OpenedWith(std::vector<PoolId> pools) {
    Opened opened;
    opened.session = SessionId(1);
    opened.instance = "a";
    opened.pools = std::move(pools);
    opened.max = opened.capacity = GiB(1);
    return opened;
  }

  void Say(BrokerMessage message) {
    session_->OnMessage(std::move(message));
    session_->RunOnce();
  }
  void SendDescriptors(GrantId grant, uint32_t first, size_t count) {
    session_->OnDescriptors(grant, first, std::vector<UniqueFd>(count));
    session_->RunOnce();
  }
  bool Alloc(size_t blocks) {
    std::vector<BlockId> out(blocks);
    return session_->pool(0).Alloc(absl::MakeSpan(out), Urgency::kWaiting);
  }
  // What the session asks for when so many pages are missing.
  Acquire AskFor(size_t pages) {
    clock_.Advance(absl::Milliseconds(100));  // past any pause
    EXPECT_FALSE(Alloc(pages * kBlocksPerPage));
    session_->RunOnce();
    std::vector<Acquire> asked = wire_->Take<Acquire>();
    EXPECT_THAT(asked, SizeIs(1));
    return asked.at(0);
  }
  // Grants the pages with all that belongs to them.
  Mapped Grant(Sequence sequence, std::vector<PageName> pages) {
    const GrantId grant(++last_grant_);
    const size_t handles = 2 * pages.size();
    Say(Granted{sequence, grant, kPool, std::move(pages)});
    SendDescriptors(grant, 0, handles);
    std::vector<Mapped> mapped = wire_->Take<Mapped>();
    EXPECT_THAT(mapped, SizeIs(1));
    return mapped.at(0);
  }
  // The engine goes on, and nobody listens to the broker.
  void ExpectBrokenOff(const std::string& why) {
    EXPECT_TRUE(absl::IsInternal(session_->health())) << session_->health();
    EXPECT_THAT(std::string(session_->health().message()), HasSubstr(why));
    EXPECT_EQ(session_->pool(0).health(), session_->health());
    wire_->TakeAll();
    EXPECT_FALSE(Alloc(kMaxPages * kBlocksPerPage));
    Say(OpenedWith({kPool}));
    Say(Reclaim{kPool, Revision(9), 0, Tier::kPreempt});
    SendDescriptors(GrantId(999), 0, 1);
    EXPECT_THAT(wire_->TakeAll(), IsEmpty());
  }

  FakeClock clock_;
  std::unique_ptr<Session> session_;
  NullMapper* mapper_ = nullptr;
  ScriptedLink* wire_ = nullptr;
  uint64_t last_grant_ = 0;
};

TEST_F(BrokenBrokerTest, PagesThatWereNotAskedForAreNotMapped) {
  const Acquire asked = AskFor(2);
  const PageName good{asked.indexes[0], Generation(1)};
  const PageName not_asked{PageIndex(5), Generation(1)};
  const PageName outside{PageIndex(kMaxPages), Generation(1)};
  const PageName far_outside{PageIndex(0xffffffff), Generation(1)};
  const Mapped mapped =
      Grant(asked.sequence, {not_asked, outside, good, far_outside});
  EXPECT_THAT(mapped.failed, ElementsAre(not_asked, outside, far_outside));
  EXPECT_EQ(mapper_->mapped(), 1u);
  EXPECT_TRUE(session_->health().ok());
  // The slot that did not come can be asked for again.
  EXPECT_TRUE(Alloc(kBlocksPerPage));
  EXPECT_THAT(AskFor(1).indexes, ElementsAre(asked.indexes[1]));
}

TEST_F(BrokenBrokerTest, APageGrantedTwiceIsMappedOnce) {
  const Acquire asked = AskFor(1);
  const PageName once{asked.indexes[0], Generation(1)};
  const PageName again{asked.indexes[0], Generation(2)};
  EXPECT_THAT(Grant(asked.sequence, {once, again}).failed, ElementsAre(again));
  EXPECT_EQ(mapper_->mapped(), 1u);
}

TEST_F(BrokenBrokerTest, APageThatIsHeldIsNotMappedOverItself) {
  const Acquire first = AskFor(1);
  Grant(first.sequence, {{first.indexes[0], Generation(1)}});
  EXPECT_TRUE(Alloc(kBlocksPerPage));
  const Acquire second = AskFor(1);
  const PageName held{first.indexes[0], Generation(2)};
  EXPECT_THAT(Grant(second.sequence, {held}).failed, ElementsAre(held));
  EXPECT_EQ(mapper_->mapped(), 1u);
}

TEST_F(BrokenBrokerTest, AnAnswerToNoQuestionIsDeclined) {
  const PageName page{PageIndex(0), Generation(1)};
  EXPECT_THAT(Grant(Sequence(77), {page}).failed, ElementsAre(page));
  EXPECT_EQ(mapper_->mapped(), 0u);
  Say(Refused{Sequence(78)});
  EXPECT_TRUE(session_->health().ok());
}

TEST_F(BrokenBrokerTest, AHandleNumberBeyondTheGrantEndsTheConversation) {
  const Acquire asked = AskFor(1);
  Say(Granted{
      asked.sequence, GrantId(1), kPool, {{asked.indexes[0], Generation(1)}}});
  SendDescriptors(GrantId(1), std::numeric_limits<uint32_t>::max() - 1, 1);
  ExpectBrokenOff("beyond their grant");
}

TEST_F(BrokenBrokerTest, SuchDescriptorsMayComeBeforeTheirGrant) {
  const Acquire asked = AskFor(1);
  SendDescriptors(GrantId(1), 1, 2);
  EXPECT_TRUE(session_->health().ok());
  Say(Granted{
      asked.sequence, GrantId(1), kPool, {{asked.indexes[0], Generation(1)}}});
  ExpectBrokenOff("beyond their grant");
}

TEST_F(BrokenBrokerTest, OpenedTwiceEndsTheConversation) {
  Say(OpenedWith({PoolId(8)}));
  ExpectBrokenOff("twice");
}

TEST_F(BrokenBrokerTest, GrantsThatAreNeverWholeEndTheConversation) {
  AskFor(1);
  for (uint64_t grant = 1; grant <= 5000 && session_->health().ok(); ++grant) {
    SendDescriptors(GrantId(grant), 0, 1);
  }
  ExpectBrokenOff("incomplete");
}

TEST_F(BrokenBrokerTest, WhatIsHeldStaysWhenTheConversationEnds) {
  const Acquire asked = AskFor(1);
  Grant(asked.sequence, {{asked.indexes[0], Generation(1)}});
  Say(OpenedWith({PoolId(8)}));
  ExpectBrokenOff("twice");
  EXPECT_EQ(mapper_->mapped(), 1u);
}

TEST_F(BrokenBrokerTest, WhatIsSaidAfterTheEndIsNotHeard) {
  session_->OnDisconnected(absl::UnavailableError("gone"));
  session_->OnMessage(OpenedWith({kPool}));
  session_->OnDisconnected(absl::InternalError("twice"));
  session_->RunOnce();
  EXPECT_TRUE(absl::IsUnavailable(session_->health())) << session_->health();
  EXPECT_EQ(session_->pool(0).health(), session_->health());
}

TEST_F(BrokenBrokerTest, CreditIsNotMoreThanWasAskedFor) {
  EXPECT_FALSE(session_->pool(0).Reserve(kBlocksPerPage, absl::ZeroDuration()));
  const std::vector<Acquire> asked = wire_->Take<Acquire>();
  ASSERT_THAT(asked, SizeIs(1));
  Granted granted{asked[0].sequence, GrantId(), kPool};
  granted.credit = 0xffffffff;
  granted.credit_for = absl::Seconds(1);
  Say(granted);
  EXPECT_EQ(session_->pool(0).available_blocks(), kBlocksPerPage);
}

TEST(BrokenOpenTest, AnotherNumberOfPoolsOrOneTwiceIsRefused) {
  for (const std::vector<PoolId>& pools :
       {std::vector<PoolId>{}, {PoolId(1)}, {PoolId(1), PoolId(1)}}) {
    SessionOptions options;
    options.pools.resize(2);
    for (PoolOptions& pool : options.pools) {
      pool.geometry = {.handle_bytes = kPage, .max_pages = kMaxPages};
      pool.block_bytes = KiB(4);
    }
    FakeClock clock;
    auto session = *Session::Create(
        std::move(options),
        [](const PoolGeometry&) { return std::make_unique<NullMapper>(); },
        clock);
    session->Attach(std::make_unique<ScriptedLink>(), Nonce{});
    Opened opened;
    opened.pools = pools;
    session->OnMessage(opened);
    session->RunOnce();
    EXPECT_TRUE(absl::IsInternal(session->WaitUntilOpen()));
    EXPECT_FALSE(session->pool(0).health().ok());
  }
}

}  // namespace
}  // namespace kvbroker::client
