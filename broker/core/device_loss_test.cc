// A device that does not work any more: the core with a fake device of 10 pages
// of 1 MiB.
#include <string>
#include <vector>

#include "broker/core/core.h"
#include "broker/core/testing/fake_client.h"
#include "broker/core/testing/fake_world.h"
#include "broker/device/device_lost.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using Call = FaultInjectingBackend::Call;

class DeviceLossTest : public testing::Test {
 protected:
  explicit DeviceLossTest(FakeWorld::Options options = {}) : world_(options) {}
  ~DeviceLossTest() override { EXPECT_EQ(world_.Check(), absl::OkStatus()); }

  void Break(Call call) {
    world_.faults().SetPlan(
        call, {.probability = 1,
               .status = MarkDeviceLost(
                   absl::UnavailableError("GPU_IS_LOST; see dmesg"))});
  }
  void Mend() {
    for (Call call : {Call::kCreate, Call::kExport, Call::kUsedBytes}) {
      world_.faults().SetPlan(call, {});
    }
  }
  std::string Error() { return world_.core().Snapshot().broker.device_error; }

  FakeWorld world_;
};

TEST_F(DeviceLossTest, RefusesAtOnceAndSaysWhatToDo) {
  FakeClient& a = world_.Start({.name = "a"});
  EXPECT_EQ(world_.core().device_status(), absl::OkStatus());
  EXPECT_EQ(Error(), "");
  Break(Call::kCreate);
  const Sequence first = a.Ask({.at_least = 2});
  world_.Settle();
  ASSERT_NE(a.refused(first), nullptr) << "no time has passed";
  EXPECT_EQ(a.refused(first)->code, absl::StatusCode::kUnavailable);
  EXPECT_THAT(a.refused(first)->reason,
              AllOf(HasSubstr("FAKE-0"), HasSubstr("GPU_IS_LOST; see dmesg"),
                    HasSubstr("tried every 1s"), HasSubstr("reset")));
  EXPECT_THAT(a.refused(first)->holders, IsEmpty());
  EXPECT_EQ(Error(), a.refused(first)->reason);
  EXPECT_THAT(world_.core().Explain({.name = "a"})->lines,
              testing::Contains(Error()));
  EXPECT_EQ(world_.Status("a").held, Bytes(0));
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));

  // Whoever asks next is told the same, and the device is left alone.
  const int64_t creates = world_.faults().calls(Call::kCreate);
  const Sequence next = a.Ask({.at_least = 1});
  const Sequence credit = a.Ask({.at_least = 1, .credit = true});
  world_.Settle();
  ASSERT_NE(a.refused(next), nullptr);
  ASSERT_NE(a.refused(credit), nullptr);
  EXPECT_EQ(a.refused(next)->reason, Error());
  EXPECT_EQ(a.refused(credit)->reason, Error());
  EXPECT_EQ(world_.faults().calls(Call::kCreate), creates);
  EXPECT_THAT(world_.TakeLog("device-lost"), SizeIs(1));
  EXPECT_THAT(world_.TakeLog("-failed"), IsEmpty());
}

TEST_F(DeviceLossTest, ThoseWhoWaitAreRefusedAndNobodyIsAskedForThem) {
  FakeClient& a = world_.Start({.name = "a"});
  FakeClient& b = world_.Start({.name = "b", .tenant = "uid:2"});
  a.Ask({.at_least = 8});
  world_.Settle();
  const Sequence waits = b.Ask({.at_least = 5, .deadline = absl::Minutes(1)});
  world_.Settle();
  EXPECT_EQ(b.refused(waits), nullptr);
  FakeClient& c = world_.Start({.name = "c", .tenant = "uid:2"});
  const Sequence more = c.Ask({.at_least = 9, .deadline = absl::Minutes(1)});
  world_.Settle();
  Break(Call::kCreate);
  // What `b` waits for can be made; or could.
  std::vector<PageName> three = a.pages();
  three.resize(3);
  a.Return(a.pool(), three);
  world_.Settle();
  ASSERT_NE(b.refused(waits), nullptr);
  EXPECT_EQ(b.refused(waits)->reason, Error());
  ASSERT_NE(c.refused(more), nullptr);
  EXPECT_EQ(c.refused(more)->reason, Error());
  EXPECT_EQ(a.order(), nullptr) << "lifted";
  world_.Advance(absl::Seconds(10));
  EXPECT_EQ(a.mapped(), 5) << "what is lent stays lent";
  EXPECT_EQ(world_.core().Snapshot().broker.sessions, 3);
}

TEST_F(DeviceLossTest, IsTriedEverySecondAndComesBackByItself) {
  FakeClient& a = world_.Start({.name = "a"});
  Break(Call::kCreate);
  a.Ask({.at_least = 1});
  world_.Settle();
  const int64_t before = world_.faults().calls(Call::kCreate);
  world_.Advance(absl::Seconds(60));
  EXPECT_EQ(world_.faults().calls(Call::kCreate) - before, 60);
  EXPECT_THAT(world_.TakeLog("device"), SizeIs(1));
  Mend();
  world_.Advance(absl::Seconds(1));
  EXPECT_EQ(Error(), "");
  EXPECT_THAT(world_.TakeLog("device-back"), SizeIs(1));
  a.Ask({.at_least = 10});
  world_.Settle();
  EXPECT_EQ(a.mapped(), 10);
  a.Return(a.pool(), a.pages());
  world_.Advance(absl::Seconds(3));
  EXPECT_EQ(world_.core().RunDue(), absl::InfiniteFuture()) << "no probes";
}

class SlabDeviceLossTest : public DeviceLossTest {
 protected:
  SlabDeviceLossTest()
      : DeviceLossTest({.capacity = MiB(8), .fixed_addresses = true}) {}
};

TEST_F(SlabDeviceLossTest, ComesBackByItself) {
  FakeClient& a = world_.Start({.name = "a"});
  Break(Call::kCreate);
  const Sequence first = a.Ask({.at_least = 1});
  world_.Settle();
  ASSERT_NE(a.refused(first), nullptr);
  Mend();
  world_.Advance(absl::Seconds(1));
  EXPECT_EQ(Error(), "");
  a.Ask({.at_least = 2});
  world_.Settle();
  EXPECT_EQ(a.mapped(), 2);
}

TEST_F(DeviceLossTest, AFullDeviceWorks) {
  FakeClient& a = world_.Start({.name = "a"});
  Break(Call::kCreate);
  a.Ask({.at_least = 1});
  world_.Settle();
  world_.faults().SetPlan(Call::kCreate, {.probability = 1});  // exhausted
  world_.Advance(absl::Seconds(1));
  EXPECT_EQ(Error(), "");
}

TEST_F(DeviceLossTest, AnotherErrorDoesNotBringItBack) {
  FakeClient& a = world_.Start({.name = "a"});
  Break(Call::kCreate);
  a.Ask({.at_least = 1});
  world_.Settle();
  world_.faults().SetPlan(
      Call::kCreate,
      {.probability = 1, .status = absl::InternalError("UNKNOWN")});
  world_.Advance(absl::Seconds(5));
  EXPECT_THAT(Error(), HasSubstr("GPU_IS_LOST"));
  Mend();
  Break(Call::kUsedBytes);
  world_.Advance(absl::Seconds(5));
  EXPECT_THAT(Error(), HasSubstr("GPU_IS_LOST")) << "by NVML's word it is lost";
}

TEST_F(DeviceLossTest, DescriptorsWaitForItsReturn) {
  FakeClient& a = world_.Start({.name = "a"});
  Break(Call::kExport);
  a.Ask({.at_least = 3});
  world_.Settle();
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_THAT(Error(), HasSubstr("GPU_IS_LOST"));
  const int64_t exports = world_.faults().calls(Call::kExport);
  world_.Advance(absl::Milliseconds(900));
  EXPECT_EQ(world_.faults().calls(Call::kExport), exports) << "no spin";
  EXPECT_THAT(world_.TakeLog("export-failed"), IsEmpty());
  Mend();
  world_.Advance(absl::Seconds(2));
  EXPECT_EQ(a.mapped(), 3);
  EXPECT_EQ(Error(), "");
}

TEST_F(DeviceLossTest, ASessionMayComeAndGoMeanwhile) {
  FakeClient& a = world_.Start({.name = "a"});
  a.Ask({.at_least = 4});
  world_.Settle();
  Break(Call::kCreate);
  a.Ask({.at_least = 1});
  world_.Settle();
  FakeClient& b = world_.Start({.name = "b"});
  const Sequence refused = b.Ask({.at_least = 1});
  a.Die();
  world_.Settle();
  EXPECT_NE(b.refused(refused), nullptr);
  EXPECT_EQ(world_.core().Snapshot().broker.held, Bytes(0));
  EXPECT_EQ(world_.core().Snapshot().broker.stock, Bytes(0))
      << "nothing of a lost device is kept";
}

TEST_F(DeviceLossTest, PoisonedIsLost) {
  FakeClient& a = world_.Start({.name = "a"});
  world_.device().FailNextCreate(
      MarkPoisoned(absl::InternalError("ECC_UNCORRECTABLE")));
  const Sequence refused = a.Ask({.at_least = 1});
  world_.Settle();
  ASSERT_NE(a.refused(refused), nullptr);
  EXPECT_THAT(a.refused(refused)->reason, HasSubstr("ECC_UNCORRECTABLE"));
}

class SharedDeviceLossTest : public DeviceLossTest {
 protected:
  SharedDeviceLossTest()
      : DeviceLossTest(
            {.capacity = MiB(10), .device = MiB(12), .headroom = MiB(2)}) {}
};

TEST_F(SharedDeviceLossTest, AReadingShowsItBeforeAnybodyAsks) {
  world_.Start({.name = "a"});
  world_.Advance(absl::Seconds(1));
  Break(Call::kUsedBytes);
  world_.Advance(absl::Milliseconds(400));
  EXPECT_THAT(Error(), HasSubstr("GPU_IS_LOST"));
  EXPECT_THAT(world_.TakeLog("device-lost"), SizeIs(1));
  EXPECT_THAT(world_.TakeLog("measure-failed"), IsEmpty());
  Mend();
  world_.Advance(absl::Seconds(1));
  EXPECT_EQ(Error(), "");
}

TEST_F(SharedDeviceLossTest, WhoAsksForRoomIsToldAtOnce) {
  FakeClient& a = world_.Start({.name = "a"});
  world_.Advance(absl::Seconds(1));
  Break(Call::kUsedBytes);
  world_.Advance(absl::Milliseconds(400));
  const Sequence room = a.AskRoom(MiB(1), absl::Minutes(1));
  world_.Settle();
  ASSERT_NE(a.refused(room), nullptr);
  EXPECT_EQ(a.refused(room)->reason, Error());
  Mend();
  world_.Advance(absl::Seconds(1));
}

}  // namespace
}  // namespace kvbroker
