// Memory of the device that others use: the core with a fake device of 12 MiB, of
// which 10 may be lent at most and 2 stay free. Pages are of 1 MiB.
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "broker/core/core.h"
#include "broker/core/testing/fake_client.h"
#include "broker/core/testing/fake_world.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;
using Use = FakeClient::Use;

constexpr absl::Duration kLong = absl::Seconds(20);

FakeWorld::Options Shared(
    CoreOptions::Charge charge = CoreOptions::Charge::kBroker) {
  return {.capacity = MiB(10),
          .device = MiB(12),
          .headroom = MiB(2),
          .charge = charge};
}

class OthersTest : public testing::Test {
 protected:
  explicit OthersTest(FakeWorld::Options options = Shared())
      : world_(options) {}
  ~OthersTest() override { EXPECT_EQ(world_.Check(), absl::OkStatus()); }

  FakeClient& StartWith(int pages, const FakeEngine& engine) {
    FakeClient& client = world_.Start(engine);
    client.Ask({.at_least = pages});
    world_.Settle();
    EXPECT_EQ(client.mapped(), pages);
    return client;
  }
  // Somebody has so much of the device, for long enough to be believed.
  void SetForeign(Bytes bytes) {
    world_.device().SetForeignBytes(bytes);
    world_.Advance(absl::Milliseconds(500));
  }
  BrokerStatus Broker() { return world_.core().Snapshot().broker; }

  FakeWorld world_;
};

TEST_F(OthersTest, WhatOthersUseIsNotLent) {
  FakeClient& a = StartWith(3, {.name = "a"});
  EXPECT_EQ(Broker().others, Bytes(0));
  SetForeign(MiB(4));
  EXPECT_EQ(Broker().foreign, MiB(4));
  EXPECT_EQ(Broker().others, MiB(4));
  // 12 - 2 - 4 = 6.
  const Sequence refused =
      a.Ask({.at_least = 4, .deadline = absl::Seconds(1)});
  world_.Advance(absl::Seconds(2));
  ASSERT_NE(a.refused(refused), nullptr);
  EXPECT_THAT(a.refused(refused)->reason,
              HasSubstr("others use 4 MiB, engines have declared 0 B and 2 MiB "
                        "stay free: 6 MiB may be lent"));
  a.Ask({.at_least = 3});
  world_.Settle();
  EXPECT_EQ(a.mapped(), 6);
  SetForeign(Bytes(0));
  a.Ask({.at_least = 4});
  world_.Settle();
  EXPECT_EQ(a.mapped(), 10) << "shrinks at once";
}

TEST_F(OthersTest, AnAllocationThatIsGoneAtOnceMovesNothing) {
  StartWith(10, {.name = "a"});
  world_.Advance(absl::Milliseconds(190));
  // One reading sees it, the next does not.
  world_.device().SetForeignBytes(MiB(2));
  world_.Advance(absl::Milliseconds(30));
  world_.device().SetForeignBytes(Bytes(0));
  world_.Advance(absl::Seconds(1));
  EXPECT_EQ(Broker().others, Bytes(0));
  EXPECT_THAT(world_.TakeLog("reclaim "), SizeIs(0));
}

TEST_F(OthersTest, OurOwnPagesAreNobodyElses) {
  FakeClient& a = world_.Start({.name = "a"});
  for (int round = 0; round < 20; ++round) {
    a.Ask({.at_least = 5});
    world_.Advance(absl::Milliseconds(130));
    a.Return(a.pool(), a.pages());
    world_.Advance(absl::Milliseconds(130));
    EXPECT_EQ(Broker().foreign, Bytes(0)) << round;
  }
}

TEST_F(OthersTest, IdleThenCachedPagesGoUntilTheHeadroomIsFreeAgain) {
  FakeClient& a = StartWith(6, {.name = "a"});
  FakeClient& b = StartWith(4, {.name = "b", .min = MiB(4)});
  a.Mark(2, Use::kIdle);
  a.Mark(1, Use::kCached, Use::kInUse);
  b.Mark(1, Use::kIdle);
  a.Report();
  b.Report();
  world_.Advance(absl::Seconds(1));
  SetForeign(MiB(2));
  world_.Advance(absl::Seconds(5));
  EXPECT_EQ(a.mapped() + b.mapped(), 8);
  EXPECT_EQ(a.Count(Use::kCached), 1) << "idle ones were enough";
  SetForeign(MiB(4));
  world_.Advance(absl::Seconds(5));
  EXPECT_EQ(a.Count(Use::kCached), 0);
  EXPECT_EQ(a.mapped(), 3) << "pages in use stay";
  EXPECT_EQ(b.mapped(), 4) << "as does what is guaranteed";
  EXPECT_THAT(world_.TakeLog("tier=preempt"), SizeIs(0));
}

TEST_F(OthersTest, WhatIsDeclaredIsKeptFreeWhetherItIsUsedOrNot) {
  FakeClient& a = world_.Start({.name = "a", .declared_peak = MiB(3)});
  FakeClient& b = world_.Start({.name = "b"});
  b.Ask({.want = 10, .at_least = 1, .deadline = kLong});
  world_.Settle();
  EXPECT_EQ(b.mapped(), 7);
  // It uses what it has declared: that changes nothing.
  SetForeign(MiB(3));
  EXPECT_EQ(Broker().others, MiB(3));
  SetForeign(Bytes(0));
  EXPECT_EQ(Broker().others, MiB(3));
  EXPECT_EQ(Broker().declared, MiB(3));
  a.Die();
  world_.Settle();
  EXPECT_EQ(Broker().others, Bytes(0));
}

TEST_F(OthersTest, ANewEnginesPeakComesFromPagesInUseIfNeedBe) {
  FakeClient& b = StartWith(10, {.name = "b"});
  world_.Start({.name = "a", .declared_peak = MiB(4)});
  world_.Settle();
  EXPECT_EQ(b.mapped(), 10) << "closing is tried first";
  world_.Advance(absl::Seconds(3));
  EXPECT_EQ(b.mapped(), 6);
  const std::vector<std::string> orders = world_.TakeLog("reclaim ");
  ASSERT_THAT(orders, SizeIs(2));
  EXPECT_THAT(orders[0], HasSubstr("tier=closing"));
  EXPECT_THAT(orders[1], HasSubstr("tier=preempt"));
}

TEST_F(OthersTest, ItDoesNotComeFromWhatIsGuaranteed) {
  FakeClient& b = StartWith(10, {.name = "b", .min = MiB(8)});
  world_.Start({.name = "a", .declared_peak = MiB(4)});
  world_.Advance(absl::Seconds(5));
  EXPECT_EQ(b.mapped(), 8);
}

TEST_F(OthersTest, RoomIsMadeByWhoHasItAndThenSaid) {
  FakeClient& a = world_.Start({.name = "a"});
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(3, Use::kIdle);
  b.Report();
  world_.Advance(absl::Milliseconds(200));
  const Sequence room = a.AskRoom(MiB(3), kLong);
  EXPECT_FALSE(a.rooms_made().contains(room));
  world_.Advance(absl::Milliseconds(300));
  EXPECT_TRUE(a.rooms_made().contains(room));
  EXPECT_EQ(b.mapped(), 7);
  EXPECT_EQ(Broker().declared, MiB(3));
  // Less is there at once, and others may have the rest.
  const Sequence less = a.AskRoom(MiB(1), kLong);
  world_.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(a.rooms_made().contains(less));
  b.Ask({.at_least = 2});
  world_.Settle();
  EXPECT_EQ(b.mapped(), 9);
}

TEST_F(OthersTest, RoomThatNobodyGivesIsRefusedWithTheFiguresAndHolders) {
  FakeClient& b = StartWith(10, {.name = "b", .min = MiB(10)});
  FakeClient& a = world_.Start({.name = "a"});
  const Sequence room = a.AskRoom(MiB(4), absl::Seconds(3));
  world_.Advance(absl::Seconds(2));
  EXPECT_EQ(a.refused(room), nullptr);
  world_.Advance(absl::Seconds(2));
  const Refused* refused = a.refused(room);
  ASSERT_NE(refused, nullptr);
  EXPECT_EQ(refused->code, absl::StatusCode::kUnavailable);
  EXPECT_THAT(refused->reason, HasSubstr("4 MiB more are lent than 4 MiB leave"));
  EXPECT_THAT(refused->reason, HasSubstr("6 MiB may be lent"));
  ASSERT_THAT(refused->holders, SizeIs(1));
  EXPECT_EQ(refused->holders[0].instance, "b");
  EXPECT_EQ(b.mapped(), 10);
  // What was declared stays: the room is made once it can be.
  b.Return(b.pool(), b.pages());
  world_.Advance(absl::Seconds(2));
  b.Ask({.want = 10, .at_least = 1, .deadline = kLong});
  world_.Settle();
  EXPECT_EQ(b.mapped(), 6);
}

TEST_F(OthersTest, ANewQuestionForRoomTakesThePlaceOfTheLast) {
  FakeClient& a = world_.Start({.name = "a"});
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().answers_reclaims = false;
  const Sequence first = a.AskRoom(MiB(4), kLong);
  const Sequence second = a.AskRoom(Bytes(0), kLong);
  world_.Advance(absl::Milliseconds(100));
  ASSERT_NE(a.refused(first), nullptr);
  EXPECT_EQ(a.refused(first)->code, absl::StatusCode::kCancelled);
  EXPECT_TRUE(a.rooms_made().contains(second));
}

// Who loops with deadlines of 0 does not keep the device busy.
TEST_F(OthersTest, ReadingsAreNoMoreOftenThanEvery20Ms) {
  FakeClient& a = world_.Start({.name = "a"});
  world_.Advance(absl::Seconds(1));
  const int64_t before = world_.faults().calls(FaultInjectingBackend::Call::kUsedBytes);
  for (int i = 0; i < 100; ++i) {
    a.AskRoom(MiB(i % 2), absl::ZeroDuration());
    world_.Advance(absl::Milliseconds(1));
  }
  EXPECT_LE(world_.faults().calls(FaultInjectingBackend::Call::kUsedBytes) - before, 6);
}

// Its second connection says what it needs; the first does not count beside it.
TEST_F(OthersTest, AMendedConnectionDeclaresOnce) {
  FakeClient& a = StartWith(2, {.name = "a", .pid = 71, .declared_peak = MiB(3)});
  Open again = FakeWorld::OpenOf({.name = "a", .declared_peak = MiB(3)});
  again.resuming = Resuming{a.opened().incarnation, a.id()};
  ASSERT_TRUE(world_.TryStart(a.peer(), again).ok());
  EXPECT_EQ(Broker().declared, MiB(3));
  EXPECT_EQ(Broker().others, MiB(3));
}

TEST_F(OthersTest, CreditIsNoMoreThanWhatMayBeLent) {
  FakeClient& a = world_.Start({.name = "a"});
  a.Ask({.at_least = 8, .credit = true});
  world_.Settle();
  EXPECT_EQ(Broker().held, MiB(8));
  world_.Start({.name = "b", .declared_peak = MiB(5)});
  world_.Settle();
  EXPECT_EQ(Broker().held, Bytes(0));
}

TEST_F(OthersTest, ADeviceThatCannotBeReadChangesNothingAndIsToldOnce) {
  FakeClient& a = StartWith(2, {.name = "a"});
  SetForeign(MiB(3));
  world_.faults().SetPlan(FaultInjectingBackend::Call::kUsedBytes,
                          {.calls = {1, 2, 3, 4, 5}});
  world_.Advance(absl::Seconds(1));
  EXPECT_THAT(world_.TakeLog("measure-failed"), SizeIs(1));
  EXPECT_EQ(Broker().others, MiB(3));
  a.Ask({.at_least = 5});
  world_.Settle();
  EXPECT_EQ(a.mapped(), 7);
}

TEST_F(OthersTest, NothingIsReadWhileNobodyIsThere) {
  FakeClient& a = world_.Start({.name = "a"});
  world_.Advance(absl::Seconds(1));
  EXPECT_LT(world_.core().RunDue(), absl::InfiniteFuture());
  a.Die();
  world_.Advance(absl::Hours(2));
  EXPECT_EQ(world_.core().RunDue(), absl::InfiniteFuture());
}

// A foreign process is first, and the device refuses: never more than a refusal
// to the engine.
TEST_F(OthersTest, WhoTakesTheMemoryFirstHasIt) {
  FakeClient& a = world_.Start({.name = "a"});
  world_.Advance(absl::Milliseconds(100));
  world_.device().SetForeignBytes(MiB(8));
  const Sequence asked = a.Ask({.at_least = 6, .deadline = absl::Seconds(2)});
  world_.Advance(absl::Seconds(3));
  ASSERT_NE(a.refused(asked), nullptr);
  EXPECT_THAT(a.refused(asked)->reason, HasSubstr("others use 8 MiB"));
  EXPECT_EQ(Broker().held, Bytes(0));
}

// Two engines with a context each beside what they have declared, and one who
// has declared nothing.
TEST_F(OthersTest, WhatIsDeclaredComesOnTopOfWhatOtherProcessesUse) {
  FakeClient& a =
      world_.Start({.name = "a", .pid = 71, .declared_peak = MiB(3)});
  world_.Start({.name = "b", .pid = 72});
  auto use = [&](Bytes by_a, Bytes by_b, Bytes by_a_stranger) {
    world_.device().SetProcessBytes(
        std::map<uint32_t, Bytes>{{72, by_b}, {99, by_a_stranger}});
    if (by_a > Bytes(0)) {
      world_.device().SetProcessBytes(std::map<uint32_t, Bytes>{
          {71, by_a}, {72, by_b}, {99, by_a_stranger}});
    }
    SetForeign(by_a + by_b + by_a_stranger);
  };
  use(Bytes(0), MiB(1), MiB(2));
  EXPECT_EQ(Broker().others, MiB(6));
  use(MiB(2), MiB(1), MiB(2));
  EXPECT_EQ(Broker().others, MiB(6)) << "of what it has declared";
  use(MiB(4), MiB(1), MiB(2));
  EXPECT_EQ(Broker().others, MiB(7)) << "more than it has declared";
  use(MiB(3), MiB(1), Bytes(0));
  EXPECT_EQ(Broker().others, MiB(4));
  a.Die();
  use(Bytes(0), MiB(1), Bytes(0));
  EXPECT_EQ(Broker().others, MiB(1));
}

// A driver that takes its time keeps nobody else.
class MeasuredByHandTest : public OthersTest {
 protected:
  MeasuredByHandTest()
      : OthersTest({.capacity = MiB(10),
                    .device = MiB(12),
                    .headroom = MiB(2),
                    .bulk_by_hand = true}) {}
};

TEST_F(MeasuredByHandTest, WhatIsDueIsDoneWhileTheDeviceIsRead) {
  FakeClient& a = world_.Start({.name = "a"});
  world_.core().RunDue();
  EXPECT_EQ(world_.bulk_waiting(), 1) << "the reading waits";
  const Sequence asked = a.Ask({.at_least = 20});
  a.Pump();
  EXPECT_NE(a.refused(asked), nullptr) << "others are served";
  a.Ask({.at_least = 2});
  a.Pump();
  EXPECT_EQ(a.mapped(), 2);
  world_.core().RunDue();
  EXPECT_EQ(world_.bulk_waiting(), 1) << "one at a time";
  world_.device().SetForeignBytes(MiB(4));
  // It is concluded where it is read, without RunDue.
  EXPECT_TRUE(world_.RunBulk());
  EXPECT_EQ(Broker().others, MiB(4));
}

class ChargeEngineTest : public OthersTest {
 protected:
  ChargeEngineTest() : OthersTest(Shared(CoreOptions::Charge::kEngine)) {}
};

TEST_F(ChargeEngineTest, WhatIsMappedIsTheEnginesAlone) {
  FakeClient& a = StartWith(4, {.name = "a"});
  EXPECT_EQ(world_.device().live_handles(), 0);
  EXPECT_EQ(Broker().held, MiB(4));
  for (uint64_t token : a.Tokens()) EXPECT_EQ(world_.device().Imports(token), 1);
  // It goes with the mapping, not into stock, and is made anew.
  a.Return(a.pool(), a.pages());
  world_.Settle();
  EXPECT_EQ(Broker().stock, Bytes(0));
  EXPECT_EQ(Broker().held, Bytes(0));
  a.Ask({.at_least = 10});
  world_.Settle();
  EXPECT_EQ(a.mapped(), 10);
}

TEST_F(ChargeEngineTest, PagesAreNoPartOfAnEnginesPeak) {
  FakeClient& a = world_.Start({.name = "a", .pid = 71, .declared_peak = MiB(2)});
  a.Ask({.at_least = 4});
  world_.Settle();
  // Its pages, and half of what it has declared.
  world_.device().SetProcessBytes(std::map<uint32_t, Bytes>{{71, MiB(5)}});
  SetForeign(MiB(1));
  EXPECT_EQ(Broker().foreign, MiB(1));
  EXPECT_EQ(Broker().others, MiB(2));
}

TEST_F(ChargeEngineTest, ADeathFreesByItself) {
  FakeClient& a = StartWith(10, {.name = "a"});
  a.Die();
  world_.Settle();
  StartWith(10, {.name = "b", .tenant = "uid:2"});
}

}  // namespace
}  // namespace kvbroker
