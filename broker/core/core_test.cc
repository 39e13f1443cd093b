// The core whole: with a fake clock, device and clients.
#include "broker/core/core.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/core/testing/fake_client.h"
#include "broker/core/testing/fake_world.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/fd_frame.h"

namespace kvbroker {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using Use = FakeClient::Use;

// 10 MiB to lend, pages of 1 MiB, unless a test says otherwise.
class CoreTest : public testing::Test {
 protected:
  explicit CoreTest(FakeWorld::Options options = {}) : world_(options) {}

  ~CoreTest() override { EXPECT_EQ(world_.Check(), absl::OkStatus()); }

  FakeClient& Start(const FakeEngine& engine) { return world_.Start(engine); }

  // Starts an engine that holds so many pages in use.
  FakeClient& StartWith(int pages, const FakeEngine& engine) {
    FakeClient& client = Start(engine);
    Hold(client, pages);
    return client;
  }

  void Hold(FakeClient& client, int pages) {
    const int before = client.mapped();
    client.Ask({.at_least = pages});
    world_.Settle();
    ASSERT_EQ(client.mapped(), before + pages);
  }

  void Settle() { world_.Settle(); }
  void Advance(absl::Duration by) { world_.Advance(by); }
  Core& core() { return world_.core(); }

  // All lines of an explanation.
  static std::string Explained(Core& core, std::string name) {
    absl::StatusOr<Explanation> explanation = core.Explain({.name = name});
    return explanation.ok() ? absl::StrJoin(explanation->lines, "\n")
                            : std::string(explanation.status().message());
  }

  absl::StatusOr<InstanceStatus> SetMax(std::string name, Bytes max) {
    return core().SetPolicy({.name = name}, {.max = max});
  }

  FakeWorld world_;
};

// ---- creation and opening --------------------------------------------------

TEST(CoreCreate, CapacityIsAboveZeroAndAtMostTheDevices) {
  FakeClock clock;
  FakeBackend device({.total = MiB(8)});
  for (Bytes capacity : {Bytes(0), Bytes(-1), MiB(8) + Bytes(1)}) {
    absl::Status status =
        Core::Create(
            {.backend = &device, .clock = &clock, .capacity = capacity})
            .status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("capacity"));
  }
  EXPECT_TRUE(
      Core::Create({.backend = &device, .clock = &clock, .capacity = MiB(8)})
          .ok());
}

TEST_F(CoreTest, OpenedSaysWhatIsInForce) {
  FakeClient& a =
      Start({.name = "a", .pools = 2, .min = MiB(2), .max = MiB(5)});
  const Opened& opened = a.opened();
  EXPECT_EQ(opened.protocol_version, kProtocolVersion);
  EXPECT_EQ(opened.instance, "a");
  EXPECT_EQ(opened.backend, "fake");
  EXPECT_EQ(opened.min, MiB(2));
  EXPECT_EQ(opened.max, MiB(5));
  EXPECT_EQ(opened.capacity, MiB(10));
  EXPECT_EQ(opened.incarnation, 1);
  ASSERT_EQ(opened.pools.size(), 2);
  EXPECT_NE(opened.pools[0], opened.pools[1]);
}

TEST_F(CoreTest, LimitsStartAtNothingGuaranteedAndTheWholeCapacity) {
  FakeClient& a = Start({.name = "a"});
  EXPECT_EQ(a.opened().min, Bytes(0));
  EXPECT_EQ(a.opened().max, MiB(10));
}

TEST_F(CoreTest, FractionOfTheDeviceIsALimitInBytes) {
  Open open = FakeWorld::OpenOf({.name = "a"});
  open.max_fraction = 0.25;
  FakeClient& a = **world_.TryStart({.tenant = "t"}, open);
  EXPECT_EQ(a.opened().max, GiB(1));
}

// One field of Open that is wrong, and what the refusal must name.
struct BadOpen {
  const char* what;
  std::function<void(Open&)> spoil;
  absl::StatusCode code;
  const char* names;
};

class RefusedOpenTest : public CoreTest,
                        public testing::WithParamInterface<BadOpen> {};

TEST_P(RefusedOpenTest, NamesTheFieldAndLeavesNothingBehind) {
  Open open = FakeWorld::OpenOf({.name = "a"});
  GetParam().spoil(open);
  absl::Status status = world_.TryStart({.tenant = "t"}, open).status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().names));
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
}

void PrintTo(const BadOpen& open, std::ostream* os) { *os << open.what; }

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

INSTANTIATE_TEST_SUITE_P(
    Fields, RefusedOpenTest,
    testing::Values(
        BadOpen{"Version", [](Open& o) { o.protocol_version = 7; },
                kPrecondition, "protocol_version"},
        BadOpen{"NoName", [](Open& o) { o.instance = ""; }, kInvalid,
                "instance"},
        BadOpen{"LongName", [](Open& o) { o.instance.assign(129, 'x'); },
                kInvalid, "instance"},
        BadOpen{"NameWithSlash", [](Open& o) { o.instance = "../x"; }, kInvalid,
                "instance"},
        BadOpen{"NameWithNewline", [](Open& o) { o.instance = "x\ny"; },
                kInvalid, "instance"},
        BadOpen{"NoPools", [](Open& o) { o.pools.clear(); }, kInvalid, "pools"},
        BadOpen{"ManyPools", [](Open& o) { o.pools.resize(65, o.pools[0]); },
                kInvalid, "pools"},
        BadOpen{"NoHandleBytes",
                [](Open& o) { o.pools[0].handle_bytes = Bytes(0); }, kInvalid,
                "pools[0].handle_bytes"},
        BadOpen{"OddHandleBytes",
                [](Open& o) {
                  o.pools.push_back(o.pools[0]);
                  o.pools[1].handle_bytes = Bytes(4097);
                },
                kInvalid, "pools[1].handle_bytes"},
        BadOpen{"HugeHandleBytes",
                [](Open& o) { o.pools[0].handle_bytes = kMaxBytes * 2; },
                kInvalid, "handle_bytes"},
        BadOpen{"NoHandles", [](Open& o) { o.pools[0].handles_per_page = 0; },
                kInvalid, "handles_per_page"},
        BadOpen{"ManyHandles",
                [](Open& o) {
                  o.pools[0].layout = Layout::kPerLayer;
                  o.pools[0].handles_per_page = 4097;
                },
                kInvalid, "handles_per_page"},
        BadOpen{"ContiguousWithTwoHandles",
                [](Open& o) { o.pools[0].handles_per_page = 2; }, kInvalid,
                "contiguous"},
        BadOpen{"NoPages", [](Open& o) { o.pools[0].max_pages = 0; }, kInvalid,
                "max_pages"},
        BadOpen{"ManyPages",
                [](Open& o) { o.pools[0].max_pages = (1u << 20) + 1; },
                kInvalid, "max_pages"},
        BadOpen{"MoreThanAnAddressSpace",
                [](Open& o) {
                  o.pools[0].handle_bytes = GiB(1 << 20);
                  o.pools[0].max_pages = 1 << 20;
                },
                kInvalid, "max_pages"},
        BadOpen{"LabelOfControlCharacters",
                [](Open& o) { o.labels["model"] = "x\x1b[2J"; }, kInvalid,
                "labels"},
        BadOpen{"PoolLabelOfControlCharacters",
                [](Open& o) { o.pools[0].label = "x\n"; }, kInvalid,
                "pools[0].label"},
        BadOpen{"MinFractionZero", [](Open& o) { o.min_fraction = 0; },
                kInvalid, "min_fraction"},
        BadOpen{"MinFractionNan", [](Open& o) { o.min_fraction = kNan; },
                kInvalid, "min_fraction"},
        BadOpen{"MinFractionAboveMax",
                [](Open& o) {
                  o.min_fraction = 0.5;
                  o.max_fraction = 0.25;
                },
                kInvalid, "min_fraction"},
        BadOpen{"FractionZero", [](Open& o) { o.max_fraction = 0; }, kInvalid,
                "max_fraction"},
        BadOpen{"FractionNan", [](Open& o) { o.max_fraction = kNan; }, kInvalid,
                "max_fraction"},
        BadOpen{"FractionAboveOne", [](Open& o) { o.max_fraction = 1.5; },
                kInvalid, "max_fraction"},
        BadOpen{"WeightZero", [](Open& o) { o.weight = 0; }, kInvalid,
                "weight"},
        BadOpen{"WeightNan", [](Open& o) { o.weight = kNan; }, kInvalid,
                "weight"},
        BadOpen{"WeightHuge", [](Open& o) { o.weight = 1e7; }, kInvalid,
                "weight"},
        BadOpen{"MinNegative", [](Open& o) { o.min = Bytes(-1); }, kInvalid,
                "min"},
        BadOpen{"MaxNegative", [](Open& o) { o.max = Bytes(-1); }, kInvalid,
                "max"},
        BadOpen{"MinAboveMax",
                [](Open& o) {
                  o.min = MiB(3);
                  o.max = MiB(2);
                },
                kInvalid, "min: is above max"},
        BadOpen{"MinAboveCapacity", [](Open& o) { o.min = MiB(11); },
                kPrecondition, "min: more is guaranteed than there is"}),
    [](const auto& info) { return info.param.what; });

TEST_F(CoreTest, SumOfMinsAboveCapacityIsRefusedWithTheFigures) {
  Start({.name = "a", .min = MiB(6)});
  absl::Status status = world_.TryStart({.name = "b", .min = MiB(5)}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("asked 5 MiB, others have 6 MiB, capacity 10 MiB"));
  EXPECT_TRUE(world_.TryStart({.name = "b", .min = MiB(4)}).ok());
}

TEST_F(CoreTest, MinOfARenamedInstanceCountsToo) {
  // "a" of another tenant makes this one "a_1"; what "a" of its own tenant was
  // preset to is not its own.
  ASSERT_TRUE(core()
                  .SetPolicy({.name = "a", .tenant = "u"},
                             {.min = MiB(10), .preset = true})
                  .ok());
  Start({.name = "a", .tenant = "t"});
  EXPECT_EQ(world_.TryStart({.name = "a", .tenant = "u", .min = MiB(10)})
                .status()
                .code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(CoreTest, WishThatAnOperatorOverruledIsNoReasonToRefuse) {
  ASSERT_TRUE(core()
                  .SetPolicy({.name = "a", .tenant = "uid:1"},
                             {.min = MiB(1), .preset = true})
                  .ok());
  Start({.name = "b", .min = MiB(9)});
  absl::StatusOr<FakeClient*> a = world_.TryStart({.name = "a", .min = MiB(5)});
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_EQ((*a)->opened().min, MiB(1));
}

TEST_F(CoreTest, MinIsAtMostTheLimitWishedAsAFraction) {
  Open open = FakeWorld::OpenOf({.name = "a", .min = MiB(9)});
  open.max_fraction = 0.001;
  FakeClient& a = **world_.TryStart({.tenant = "t"}, open);
  EXPECT_EQ(a.opened().min, a.opened().max);
}

TEST_F(CoreTest, AnotherTenantsNameGetsASuffix) {
  Start({.name = "a", .tenant = "t"});
  EXPECT_EQ(Start({.name = "a", .tenant = "u"}).instance(), "a_1");
  EXPECT_EQ(Start({.name = "a", .tenant = "v"}).instance(), "a_2");
  const std::string longest(128, 'x');
  Start({.name = longest, .tenant = "t"});
  EXPECT_EQ(Start({.name = longest, .tenant = "u"}).instance(),
            std::string(126, 'x') + "_1");
}

TEST_F(CoreTest, NameOfADeadProcessIsFreeAgain) {
  Start({.name = "a", .tenant = "t"}).Die();
  EXPECT_EQ(Start({.name = "a", .tenant = "u"}).instance(), "a");
}

TEST_F(CoreTest, SecondProcessOfATenantJoinsTheInstance) {
  Start({.name = "a", .pid = 11, .max = MiB(4)});
  world_.TakeLog();
  FakeClient& second = Start({.name = "a", .pid = 12, .max = MiB(9)});
  EXPECT_EQ(second.instance(), "a");
  EXPECT_EQ(second.opened().max, MiB(4));  // the first one's word counts
  EXPECT_THAT(world_.Status("a").pids, ElementsAre(11, 12));
  EXPECT_THAT(world_.TakeLog("join"), ElementsAre(HasSubstr("pids=11")));
  // One limit over the sum.
  Hold(second, 3);
  FakeClient& first = *world_.clients()[0];
  Sequence over = first.Ask({.at_least = 2});
  Settle();
  ASSERT_NE(first.refused(over), nullptr);
  EXPECT_EQ(first.refused(over)->code, absl::StatusCode::kResourceExhausted);
}

TEST_F(CoreTest, WhoJoinsIsToldWhom) {
  EXPECT_THAT(Start({.name = "a", .pid = 11}).opened().joined_pids, IsEmpty());
  EXPECT_THAT(Start({.name = "a", .pid = 12}).opened().joined_pids,
              ElementsAre(11));
  // Not the process itself, and nobody twice.
  EXPECT_THAT(Start({.name = "a", .pid = 12}).opened().joined_pids,
              ElementsAre(11));
  EXPECT_THAT(Start({.name = "a", .pid = 13}).opened().joined_pids,
              ElementsAre(11, 12));
  EXPECT_THAT(Start({.name = "b", .pid = 14}).opened().joined_pids, IsEmpty());
}

TEST_F(CoreTest, NameInUseGetsASuffixWhereThatIsWished) {
  const auto start = [&](uint32_t pid) {
    Open open = FakeWorld::OpenOf({.name = "a"});
    open.name_conflict = NameConflict::kSuffix;
    return (*world_.TryStart({.tenant = "t", .uid = 1, .pid = pid}, open))
        ->opened();
  };
  EXPECT_EQ(start(11).instance, "a");
  const Opened second = start(12);
  EXPECT_EQ(second.instance, "a_1");
  EXPECT_THAT(second.joined_pids, IsEmpty());
  EXPECT_EQ(start(13).instance, "a_2");
  // A process does not conflict with itself.
  EXPECT_EQ(start(11).instance, "a");
}

TEST_F(CoreTest, NameInUseIsAnErrorWhereThatIsWished) {
  Open open = FakeWorld::OpenOf({.name = "a"});
  open.name_conflict = NameConflict::kError;
  const auto start = [&](const std::string& tenant, uint32_t pid) {
    return world_.TryStart({.tenant = tenant, .uid = 1, .pid = pid}, open);
  };
  ASSERT_TRUE(start("t", 11).ok());
  const absl::Status status = start("t", 12).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("pids 11"));
  // Another tenant is none of its business.
  EXPECT_EQ((*start("u", 12))->instance(), "a_1");
  EXPECT_EQ(start("u", 13).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(CoreTest, NameOfADyingProcessIsTakenOverWithItsLimits) {
  for (NameConflict conflict :
       {NameConflict::kJoin, NameConflict::kSuffix, NameConflict::kError}) {
    const std::string name = absl::StrCat("a", static_cast<int>(conflict));
    FakeClient& dying = Start({.name = name, .tenant = "t", .max = MiB(2)});
    Hold(dying, 1);
    dying.HangUp();
    Open open = FakeWorld::OpenOf({.name = name, .max = MiB(9)});
    open.name_conflict = conflict;
    absl::StatusOr<FakeClient*> next =
        world_.TryStart({.tenant = "t", .uid = 1, .pid = 77}, open);
    ASSERT_TRUE(next.ok()) << next.status();
    EXPECT_EQ((*next)->instance(), name);
    EXPECT_EQ((*next)->opened().max, MiB(2));
    EXPECT_THAT((*next)->opened().joined_pids, IsEmpty());
    dying.Die();
  }
}

TEST_F(CoreTest, ProcessesThatNobodySeesConflictAsOthersDo) {
  Open open = FakeWorld::OpenOf({.name = "a"});
  ASSERT_TRUE(world_.TryStart({.tenant = "t", .uid = 1}, open).ok());
  EXPECT_THAT(
      (*world_.TryStart({.tenant = "t", .uid = 1}, open))->opened().joined_pids,
      ElementsAre(0));
  open.name_conflict = NameConflict::kSuffix;
  EXPECT_EQ((*world_.TryStart({.tenant = "t", .uid = 1}, open))->instance(),
            "a_1");
}

TEST_F(CoreTest, MinCanBeAFractionOfTheDevice) {
  Open open = FakeWorld::OpenOf({.name = "a"});
  const Bytes total = world_.device().info().total;
  open.min_fraction = static_cast<double>(MiB(4).count()) /
                      static_cast<double>(total.count());
  FakeClient& a = **world_.TryStart({.tenant = "t", .pid = 11}, open);
  EXPECT_EQ(a.opened().min, MiB(4));
  // It counts as others do, and bytes go before it.
  open.instance = "b";
  open.min_fraction = 1;
  EXPECT_EQ(world_.TryStart({.tenant = "t", .pid = 12}, open).status().code(),
            absl::StatusCode::kFailedPrecondition);
  open.min = MiB(1);
  EXPECT_EQ((*world_.TryStart({.tenant = "t", .pid = 12}, open))->opened().min,
            MiB(1));
}

TEST_F(CoreTest, MemberAndRankAreTakenByTheFirst) {
  Start({.name = "a", .pid = 11, .member = "dp0"});
  absl::Status status =
      world_.TryStart({.name = "a", .member = "dp0"}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("pid 11"));
  EXPECT_TRUE(world_.TryStart({.name = "a", .member = "dp1"}).ok());
  Open open = FakeWorld::OpenOf({.name = "a", .member = "dp0"});
  open.rank = 1;
  EXPECT_TRUE(world_.TryStart({.tenant = "uid:1"}, open).ok());
}

TEST_F(CoreTest, MemberOfAProcessThatHungUpIsFree) {
  Hold(Start({.name = "a", .member = "dp0"}), 1);
  world_.clients()[0]->HangUp();
  EXPECT_TRUE(world_.TryStart({.name = "a", .member = "dp0"}).ok());
}

TEST_F(CoreTest, LimitsSetWhileASessionOpensArriveAfterOpened) {
  // A listener in whose Opened an operator sets a limit: what follows must be
  // the new limit, not the lack of it.
  class SettingListener : public SessionListener {
   public:
    explicit SettingListener(Core& core) : core_(core) {}
    void Tell(BrokerMessage message) override {
      if (std::holds_alternative<Opened>(message)) {
        // From another thread, as an operator's call would come.
        std::thread([this] {
          EXPECT_TRUE(core_.SetPolicy({.name = "a"}, {.max = MiB(3)}).ok());
        }).join();
      }
      told.push_back(std::move(message));
    }
    void SendDescriptors(GrantId, uint32_t, std::vector<UniqueFd>) override {}
    void Close(const absl::Status&) override {}
    std::vector<BrokerMessage> told;

   private:
    Core& core_;
  };
  auto listener = std::make_shared<SettingListener>(core());
  SessionId id = *core().OpenSession(
      {.tenant = "t"}, FakeWorld::OpenOf({.name = "a"}), listener);
  ASSERT_THAT(listener->told, SizeIs(2));
  EXPECT_TRUE(std::holds_alternative<Opened>(listener->told[0]));
  EXPECT_EQ(std::get<LimitChanged>(listener->told[1]).max, MiB(3));
  core().ProcessGone(id);
}

// ---- grants ----------------------------------------------------------------

TEST_F(CoreTest, FreeMemoryIsGrantedAndMapped) {
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.want = 4, .at_least = 1});
  Settle();
  ASSERT_NE(a.granted(sequence), nullptr);
  EXPECT_THAT(a.granted(sequence)->pages, SizeIs(4));
  EXPECT_EQ(a.mapped(), 4);
  EXPECT_EQ(world_.Status("a").held, MiB(4));
  EXPECT_EQ(*world_.device().UsedBytes(), MiB(4));
  EXPECT_THAT(world_.TakeLog("grant id="), SizeIs(1));
}

TEST_F(CoreTest, PagesOfSeveralHandlesArriveWhole) {
  FakeClient& a =
      Start({.name = "a", .handle = KiB(64), .handles_per_page = 16});
  Hold(a, 3);
  EXPECT_EQ(world_.device().counts().exports, 48);
  EXPECT_EQ(world_.Status("a").held, MiB(3));
}

TEST_F(CoreTest, TheClaimantMayChooseItsSlots) {
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2, .indexes = {PageIndex(7), PageIndex(3)}});
  Settle();
  ASSERT_EQ(a.mapped(), 2);
  EXPECT_EQ(a.pages()[0].index, PageIndex(3));
  EXPECT_EQ(a.pages()[1].index, PageIndex(7));
}

TEST_F(CoreTest, SlotsThatAreTakenAreRefusedAtOnce) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = StartWith(9, {.name = "b"});
  a.Ask({.at_least = 1, .indexes = {PageIndex(3)}});
  Settle();
  Sequence again = a.Ask({.at_least = 1, .indexes = {PageIndex(3)}});
  Settle();
  ASSERT_NE(a.refused(again), nullptr);
  EXPECT_EQ(a.refused(again)->code, absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(b.orders(), IsEmpty());  // nobody was asked to give for it
}

TEST_F(CoreTest, FullPoolIsRefusedAtOnce) {
  FakeClient& a = StartWith(2, {.name = "a", .max_pages = 2});
  Sequence more = a.Ask({.at_least = 1});
  Settle();
  ASSERT_NE(a.refused(more), nullptr);
  EXPECT_EQ(a.refused(more)->code, absl::StatusCode::kFailedPrecondition);
}

TEST_F(CoreTest, EmptySlotsAmongThoseAskedForAreFilled) {
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 1, .indexes = {PageIndex(1)}});
  Settle();
  Sequence more =
      a.Ask({.want = 3,
             .at_least = 2,
             .indexes = {PageIndex(0), PageIndex(1), PageIndex(2)}});
  Settle();
  ASSERT_NE(a.granted(more), nullptr);
  EXPECT_THAT(a.granted(more)->pages, SizeIs(2));
}

TEST_F(CoreTest, ReturnedPagesAreFreeAgain) {
  FakeClient& a = StartWith(10, {.name = "a"});
  a.Return(a.pool(), a.pages());
  Settle();
  EXPECT_EQ(world_.Status("a").held, Bytes(0));
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  Hold(Start({.name = "b"}), 10);
}

TEST_F(CoreTest, OldGenerationsAreNoOp) {
  FakeClient& a = StartWith(1, {.name = "a"});
  const PageName old = a.pages()[0];
  a.Return(a.pool(), {old});
  Hold(a, 1);
  EXPECT_EQ(a.pages()[0].index, old.index);
  a.Return(a.pool(), {old, old});
  EXPECT_EQ(world_.Status("a").held, MiB(1));
  EXPECT_TRUE(a.connected());
}

TEST_F(CoreTest, OnlyWhatIsLentCounts) {
  StartWith(3, {.name = "a"});
  const BrokerStatus broker = core().Snapshot().broker;
  EXPECT_EQ(broker.held, MiB(3));
  EXPECT_EQ(broker.capacity, MiB(10));
  EXPECT_EQ(broker.sessions, 1);
  EXPECT_EQ(broker.stock, Bytes(0));
}

// ---- what a peer must not say ----------------------------------------------

struct BadMessage {
  const char* what;
  std::function<ClientMessage(const FakeClient& self, const FakeClient& other)>
      message;
  absl::StatusCode code;
};

class BadMessageTest : public CoreTest,
                       public testing::WithParamInterface<BadMessage> {};

TEST_P(BadMessageTest, EndsItsOwnSessionAndNobodyElses) {
  FakeClient& other = StartWith(2, {.name = "other"});
  FakeClient& self = StartWith(2, {.name = "self", .max_pages = 8});
  absl::Status status = self.Send(GetParam().message(self, other));
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_FALSE(status.message().empty());
  EXPECT_FALSE(self.connected());
  Hold(other, 1);
}

Acquire AcquireOf(const FakeClient& client, Acquire acquire) {
  acquire.pool = client.pool();
  acquire.sequence = Sequence(99);
  return acquire;
}

constexpr auto kDenied = absl::StatusCode::kPermissionDenied;

void PrintTo(const BadMessage& message, std::ostream* os) {
  *os << message.what;
}

INSTANTIATE_TEST_SUITE_P(
    Messages, BadMessageTest,
    testing::Values(
        BadMessage{"OpenTwice", [](auto&, auto&) { return Open(); }, kInvalid},
        BadMessage{"AcquireAnothersPool",
                   [](auto&, auto& other) {
                     return AcquireOf(other, {.want = 1, .at_least = 1});
                   },
                   kDenied},
        BadMessage{"AcquireNothing",
                   [](auto& self, auto&) {
                     return AcquireOf(self, {.want = 1, .at_least = 0});
                   },
                   kInvalid},
        BadMessage{"AcquireNegative",
                   [](auto& self, auto&) {
                     return AcquireOf(self, {.want = -1, .at_least = -5});
                   },
                   kInvalid},
        BadMessage{"AcquireWantBelowAtLeast",
                   [](auto& self, auto&) {
                     return AcquireOf(self, {.want = 1, .at_least = 2});
                   },
                   kInvalid},
        BadMessage{"AcquireMoreThanThePoolHas",
                   [](auto& self, auto&) {
                     return AcquireOf(self, {.want = 9, .at_least = 1});
                   },
                   kInvalid},
        BadMessage{"AcquireWithoutSequence",
                   [](auto& self, auto&) {
                     Acquire acquire =
                         AcquireOf(self, {.want = 1, .at_least = 1});
                     acquire.sequence = Sequence();
                     return acquire;
                   },
                   kInvalid},
        BadMessage{"AcquireFewerIndexes",
                   [](auto& self, auto&) {
                     return AcquireOf(
                         self,
                         {.want = 2, .at_least = 1, .indexes = {PageIndex(5)}});
                   },
                   kInvalid},
        BadMessage{"AcquireIndexOutOfRange",
                   [](auto& self, auto&) {
                     return AcquireOf(
                         self,
                         {.want = 1, .at_least = 1, .indexes = {PageIndex(8)}});
                   },
                   kInvalid},
        BadMessage{"AcquireIndexTwice",
                   [](auto& self, auto&) {
                     return AcquireOf(
                         self, {.want = 2,
                                .at_least = 2,
                                .indexes = {PageIndex(5), PageIndex(5)}});
                   },
                   kInvalid},
        BadMessage{"ReturnAnothersPages",
                   [](auto&, auto& other) {
                     return Return{other.pool(), other.pages()};
                   },
                   kDenied},
        BadMessage{"AnswerForAnothersPool",
                   [](auto&, auto& other) {
                     return ReclaimAnswer{.pool = other.pool()};
                   },
                   kDenied},
        BadMessage{
            "ReportForAnothersPool",
            [](auto&, auto& other) { return Report{.pool = other.pool()}; },
            kDenied},
        BadMessage{"ReportForNoPool",
                   [](auto&, auto&) { return Report{.pool = PoolId(77)}; },
                   kDenied}),
    [](const auto& info) { return info.param.what; });

TEST_F(CoreTest, EndedSessionIsNotHeard) {
  FakeClient& a = StartWith(1, {.name = "a"});
  a.HangUp();
  EXPECT_EQ(core().Handle(a.id(), Acquire{.pool = a.pool()}).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(core().Handle(SessionId(77), Cancel{}).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(CoreTest, MappedBeforeItsDescriptorsEndsTheSession) {
  FakeClient& a =
      Start({.name = "a", .handle = KiB(4), .handles_per_page = 256});
  a.manners().acknowledges_descriptors = false;
  a.manners().maps = false;
  Sequence sequence = a.Ask({.at_least = 3});
  Settle();
  EXPECT_EQ(a.Send(Mapped{.grant = a.granted(sequence)->grant}).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(a.connected());
}

TEST_F(CoreTest, FailedPageOfAnotherGrantEndsTheSession) {
  FakeClient& a = Start({.name = "a"});
  a.manners().maps = false;
  Sequence first = a.Ask({.at_least = 1});
  Sequence second = a.Ask({.at_least = 1});
  Settle();
  EXPECT_EQ(a.Send(Mapped{.grant = a.granted(first)->grant,
                          .failed = a.granted(second)->pages})
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CoreTest, UnknownGrantsAreNoOp) {
  FakeClient& a = Start({.name = "a"});
  EXPECT_TRUE(a.Send(Mapped{.grant = GrantId(77)}).ok());
  EXPECT_TRUE(a.Send(Resend{Sequence(77)}).ok());
  EXPECT_TRUE(a.Send(Cancel{Sequence(77)}).ok());
  EXPECT_TRUE(a.Send(LimitAck{77}).ok());
}

TEST_F(CoreTest, TooManyUnansweredClaimsEndTheSession) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().answers_reclaims = false;
  for (int i = 0; i < 64; ++i) a.Ask({.at_least = 1});
  EXPECT_TRUE(a.connected());
  a.Ask({.at_least = 1});
  EXPECT_EQ(a.error().code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(CoreTest, MoreDescriptorsAcknowledgedThanSentIsAnError) {
  FakeClient& a = StartWith(1, {.name = "a"});
  EXPECT_EQ(core().DescriptorsReceived(a.id(), 1).code(),
            absl::StatusCode::kInvalidArgument);
}

// ---- the same question gets the same answer --------------------------------

TEST_F(CoreTest, RepeatedAcquireGetsTheSameGrant) {
  FakeClient& a = Start({.name = "a"});
  Acquire acquire{.sequence = Sequence(5), .at_least = 2};
  a.Ask(acquire);
  Settle();
  for (int i = 0; i < 3; ++i) a.Ask(acquire);
  Settle();
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_EQ(world_.Status("a").held, MiB(2));
}

TEST_F(CoreTest, RepeatedAcquireGetsTheSameRefusal) {
  FakeClient& a = Start({.name = "a", .max = MiB(1)});
  Acquire acquire{.sequence = Sequence(5), .at_least = 2};
  a.Ask(acquire);
  Settle();
  ASSERT_TRUE(SetMax("a", MiB(9)).ok());
  a.Ask(acquire);
  Settle();
  EXPECT_EQ(a.mapped(), 0);
  ASSERT_NE(a.refused(Sequence(5)), nullptr);
}

TEST_F(CoreTest, RepeatedAcquireThatWaitsWaitsOnce) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  Acquire acquire{.sequence = Sequence(5), .at_least = 2};
  for (int i = 0; i < 3; ++i) a.Ask(acquire);
  EXPECT_THAT(core().Explain({.name = "a"})->claims, SizeIs(1));
}

TEST_F(CoreTest, AcquireRepeatedWhileItsPagesAreMadeIsGrantedOnce) {
  FakeClient& a = Start({.name = "a"});
  Acquire acquire{.sequence = Sequence(5), .at_least = 2};
  int calls = 0;
  world_.device().OnCreate([&](Bytes) {
    if (calls++ == 0) a.Ask(acquire);
  });
  a.Ask(acquire);
  Settle();
  EXPECT_EQ(calls, 2);
  EXPECT_EQ(a.mapped(), 2);
}

TEST_F(CoreTest, AcknowledgedAnswersAreForgotten) {
  FakeClient& a = Start({.name = "a"});
  a.Ask({.sequence = Sequence(5), .at_least = 1});
  Settle();
  a.Ask({.sequence = Sequence(6), .acked = Sequence(5), .at_least = 1});
  Settle();
  const size_t frames = a.frames().size();
  a.Resend(Sequence(5));
  // Nor does it become a claim again.
  a.Ask({.sequence = Sequence(5), .at_least = 1});
  Settle();
  EXPECT_EQ(a.frames().size(), frames);
  EXPECT_EQ(a.mapped(), 2);
}

TEST_F(CoreTest, NoMoreThanAThousandAnswersAreRemembered) {
  FakeClient& a = Start({.name = "a", .max = Bytes(0)});
  for (int i = 0; i < 1100; ++i) a.Ask({.at_least = 1});
  Settle();
  ASSERT_TRUE(SetMax("a", MiB(9)).ok());
  a.Resend(Sequence(10));  // forgotten
  a.Resend(Sequence(1100));
  EXPECT_TRUE(a.Pump());
  EXPECT_TRUE(a.connected());
}

TEST_F(CoreTest, CancelledClaimIsRefusedAsSuch) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.at_least = 1});
  Settle();
  ASSERT_NE(b.orders().size(), 0);
  a.Cancel(sequence);
  Settle();
  ASSERT_NE(a.refused(sequence), nullptr);
  EXPECT_EQ(a.refused(sequence)->code, absl::StatusCode::kCancelled);
  // Nobody is asked for it any more.
  EXPECT_EQ(b.orders().back().hold_at_most, kHoldAny);
}

TEST_F(CoreTest, CancelThatCrossesTheGrantReturnsThePages) {
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.at_least = 3});
  a.Cancel(sequence);  // it has been granted, but the client has not heard
  Settle();
  EXPECT_NE(a.granted(sequence), nullptr);
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_EQ(world_.Status("a").held, Bytes(0));
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
}

TEST_F(CoreTest, ClaimCancelledWhileTheBackendFailsIsNotTriedAgain) {
  FakeClient& a = Start({.name = "a"});
  world_.device().FailNextCreate(absl::ResourceExhaustedError("no"));
  world_.device().OnCreate([&](Bytes) { a.Cancel(Sequence(1)); });
  Sequence sequence = a.Ask({.at_least = 1});
  world_.device().OnCreate(nullptr);
  Advance(absl::Seconds(1));
  ASSERT_NE(a.refused(sequence), nullptr);
  EXPECT_EQ(a.refused(sequence)->code, absl::StatusCode::kCancelled);
  EXPECT_EQ(a.granted(sequence), nullptr);
}

TEST_F(CoreTest, ClaimThatReplacesAnotherKeepsItsAge) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  Sequence first = a.Ask({.at_least = 1});
  Settle();
  Advance(absl::Milliseconds(700));
  Sequence second = a.Ask({.at_least = 2, .replaces = first});
  Settle();
  absl::StatusOr<Explanation> explanation = core().Explain({.name = "a"});
  ASSERT_THAT(explanation->claims, SizeIs(1));
  EXPECT_EQ(explanation->claims[0].sequence, second);
  EXPECT_EQ(explanation->claims[0].waiting, absl::Milliseconds(700));
}

TEST_F(CoreTest, OrderForAReplacedClaimIsLifted) {
  FakeClient& b = StartWith(8, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  Sequence first = a.Ask({.at_least = 4});
  Settle();
  ASSERT_NE(b.order(), nullptr);
  a.Ask({.at_least = 2, .replaces = first});
  Settle();
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_EQ(b.order(), nullptr);
}

// ---- both channels, and what is missing on one -----------------------------

TEST_F(CoreTest, ResendTellsTheGrantAgainWithItsDescriptors) {
  FakeClient& a = Start({.name = "a"});
  a.manners().maps = false;
  Sequence sequence = a.Ask({.at_least = 2});
  Settle();
  EXPECT_THAT(a.frames(), SizeIs(1));
  a.manners().maps = true;  // what came before is lost
  a.Resend(sequence);
  Settle();
  EXPECT_THAT(a.frames(), SizeIs(2));
  EXPECT_EQ(a.mapped(), 2);
}

TEST_F(CoreTest, ResendOfAMappedGrantSendsNoDescriptors) {
  FakeClient& a = StartWith(2, {.name = "a"});
  a.Resend(Sequence(1));
  EXPECT_TRUE(a.Pump());
  EXPECT_THAT(a.frames(), SizeIs(1));
}

TEST_F(CoreTest, MappedMayCrossAResend) {
  // The window is full when the Resend comes, so that it cannot be served at
  // once; the peer has had everything and maps.
  FakeClient& a =
      Start({.name = "a", .handle = KiB(4), .handles_per_page = 256});
  a.manners().acknowledges_descriptors = false;
  Sequence sequence = a.Ask({.at_least = 2});  // 512 descriptors
  a.Resend(sequence);
  Settle();
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_TRUE(a.connected()) << a.error();
}

TEST_F(CoreTest, NoMoreThan512DescriptorsAreUnderWay) {
  FakeClient& a =
      Start({.name = "a", .handle = KiB(4), .handles_per_page = 256});
  a.manners().acknowledges_descriptors = false;
  a.Ask({.at_least = 5});  // 1,280 descriptors
  Settle();
  EXPECT_EQ(a.unacknowledged(), KVB_FD_WINDOW);
  EXPECT_EQ(a.mapped(), 0);
  a.Acknowledge();
  Settle();
  EXPECT_EQ(a.unacknowledged(), KVB_FD_WINDOW);
  a.Acknowledge();
  Settle();
  EXPECT_EQ(a.unacknowledged(), 256);
  EXPECT_EQ(a.mapped(), 5);
  for (const FakeClient::Frame& frame : a.frames()) {
    EXPECT_LE(frame.count, KVB_FD_MAX_PER_FRAME);
  }
}

TEST_F(CoreTest, MappedPagesThatFailComeBack) {
  FakeClient& a = Start({.name = "a"});
  a.manners().fails_to_map = 2;
  a.Ask({.at_least = 5});
  Settle();
  EXPECT_EQ(a.mapped(), 3);
  EXPECT_EQ(world_.Status("a").held, MiB(3));
  EXPECT_EQ(*world_.device().UsedBytes(), MiB(3));
  EXPECT_THAT(world_.TakeLog("map-failed"), SizeIs(1));
}

TEST_F(CoreTest, PagesThatFailToMapLeaveTheLastReportAsItWas) {
  FakeClient& a = StartWith(2, {.name = "a"});
  a.Mark(2, FakeClient::Use::kIdle);
  a.Report();
  ASSERT_EQ(world_.Status("a").idle, MiB(2));
  // A report says what is mapped; what never was is not in it.
  a.manners().fails_to_map = 1;
  a.manners().reports = false;
  a.Ask({.at_least = 1});
  Settle();
  EXPECT_EQ(world_.Status("a").held, MiB(2));
  EXPECT_EQ(world_.Status("a").idle, MiB(2));
}

TEST_F(CoreTest, PagesReturnedBeforeTheyAreSentAreSkipped) {
  FakeClient& a =
      Start({.name = "a", .handle = KiB(4), .handles_per_page = 256});
  a.manners().acknowledges_descriptors = false;
  Sequence sequence = a.Ask({.at_least = 5});
  Settle();
  const std::vector<PageName> pages = a.granted(sequence)->pages;
  a.Return(a.pool(), {pages[2], pages[4]});
  a.Acknowledge();
  Settle();
  EXPECT_EQ(a.unacknowledged(), 256);  // of page 3; page 2 and 4 are gone
  EXPECT_EQ(a.mapped(), 3);
}

TEST_F(CoreTest, GrantsThatComeBackUnmappedLeaveNothingBehind) {
  // The peer never says Mapped: the descriptors of the second grant wait for a
  // window that the first one's no longer needs.
  FakeClient& a =
      Start({.name = "a", .handle = KiB(4), .handles_per_page = 256});
  a.manners().maps = false;
  a.manners().acknowledges_descriptors = false;
  for (int i = 0; i < 50; ++i) {
    Sequence sequence = a.Ask({.at_least = 4});
    a.Pump();
    a.Return(a.pool(), a.granted(sequence)->pages);
    // Resend knows the answer but nothing to send for it.
    const size_t frames = a.frames().size();
    a.Resend(sequence);
    a.Acknowledge();
    a.Pump();
    EXPECT_EQ(a.frames().size(), frames);
  }
  EXPECT_TRUE(a.connected()) << a.error();
}

class SmallWindowTest : public CoreTest {
 protected:
  SmallWindowTest() : CoreTest({.descriptor_window = 8}) {}
};

TEST_F(SmallWindowTest, AllSessionsShareOneWindow) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  a.manners().acknowledges_descriptors = false;
  a.Ask({.at_least = 4});
  b.Ask({.at_least = 4});
  Settle();
  EXPECT_EQ(a.mapped(), 4);
  // `b` takes and acknowledges what fits, until all is there.
  EXPECT_EQ(b.mapped(), 4);
  EXPECT_GE(b.frames().size(), 2);
}

TEST_F(SmallWindowTest, WhoWaitsForTheWindowIsServedWhenAnotherAcknowledges) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  a.manners().acknowledges_descriptors = false;
  b.manners().acknowledges_descriptors = false;
  a.Ask({.at_least = 4});
  b.Ask({.at_least = 3});
  Settle();
  // Its even part of the second half.
  ASSERT_THAT(b.frames(), SizeIs(1));
  EXPECT_EQ(b.mapped(), 0);
  a.Acknowledge();
  Settle();
  EXPECT_EQ(b.mapped(), 3);
}

TEST_F(SmallWindowTest, WhoAcknowledgesIsServedHoweverManyDoNot) {
  for (int i = 0; i < 20; ++i) {
    FakeClient& hog = Start({.name = absl::StrCat("hog", i), .handle = KiB(4)});
    hog.manners().acknowledges_descriptors = false;
    hog.Ask({.at_least = 8});
  }
  Settle();
  FakeClient& good = Start({.name = "good", .handle = KiB(4)});
  good.Ask({.at_least = 100});
  Settle();
  EXPECT_EQ(good.mapped(), 100);
}

TEST_F(SmallWindowTest, WhoDoesNotAcknowledgeWhileOthersWaitIsEnded) {
  FakeClient& hog = Start({.name = "hog"});
  FakeClient& good = Start({.name = "good"});
  hog.manners().acknowledges_descriptors = false;
  hog.Ask({.at_least = 6});
  good.Ask({.at_least = 3});
  Advance(absl::Seconds(9));
  EXPECT_TRUE(hog.connected());
  Advance(absl::Seconds(2));
  EXPECT_FALSE(hog.connected());
  EXPECT_TRUE(absl::IsDeadlineExceeded(hog.error())) << hog.error();
  EXPECT_THAT(world_.TakeLog("unread session="), SizeIs(1));
  EXPECT_TRUE(good.connected());
  EXPECT_EQ(good.mapped(), 3);
}

TEST_F(SmallWindowTest, WhoDoesNotAcknowledgeAndHoldsUpNobodyIsLeftAlone) {
  FakeClient& stopped = Start({.name = "stopped"});
  stopped.manners().acknowledges_descriptors = false;
  stopped.Ask({.at_least = 3});
  Advance(absl::Minutes(10));
  EXPECT_TRUE(stopped.connected());
}

TEST_F(SmallWindowTest, AWindowForNoneIsRefused) {
  FakeBackend device({.total = MiB(1)});
  FakeClock clock;
  CoreOptions options;
  options.backend = &device;
  options.clock = &clock;
  options.capacity = MiB(1);
  options.descriptor_window = 0;
  absl::Status status = Core::Create(options).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("descriptor_window"));
}

TEST_F(SmallWindowTest, WhoWaitsForTheWindowIsServedWhenAnotherHangsUpOrDies) {
  for (bool dies : {true, false}) {
    FakeClient& a = Start({.name = "a"});
    FakeClient& b = Start({.name = "b"});
    a.manners().acknowledges_descriptors = false;
    b.manners().acknowledges_descriptors = false;
    a.Ask({.at_least = 4});
    b.Ask({.at_least = 3});
    Settle();
    EXPECT_EQ(b.mapped(), 0);
    if (dies) {
      a.Die();
    } else {
      a.HangUp();
    }
    Settle();
    EXPECT_EQ(b.mapped(), 3);
    a.Die();
    b.Die();
  }
}

// ---- bulk work -------------------------------------------------------------

class BulkTest : public CoreTest {
 protected:
  BulkTest()
      : CoreTest({.capacity = MiB(100),
                  .max_stock = Bytes(0),
                  .bulk_by_hand = true,
                  .inline_handles = 4}) {}

  int64_t Handles() { return world_.device().UsedBytes()->count() / (1 << 20); }
};

TEST_F(BulkTest, ALargeGrantIsMadeInStepsAndASmallOneAtOnce) {
  FakeClient& large = Start({.name = "large"});
  FakeClient& small = Start({.name = "small"});
  large.Ask({.at_least = 10});
  EXPECT_EQ(Handles(), 0);
  EXPECT_TRUE(world_.RunBulk());
  EXPECT_EQ(Handles(), 4);
  EXPECT_EQ(world_.Check(), absl::OkStatus());
  small.Ask({.at_least = 1});
  small.Pump();
  EXPECT_EQ(small.mapped(), 1);
  Settle();
  EXPECT_EQ(large.mapped(), 10);
}

TEST_F(BulkTest, TwoLargeGrantsTakeTurns) {
  FakeClient& one = Start({.name = "one"});
  FakeClient& two = Start({.name = "two"});
  one.Ask({.at_least = 40});
  two.Ask({.at_least = 8});
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(world_.RunBulk());
  // Its two steps are done, its descriptors are on their way.
  EXPECT_EQ(Handles(), 16);
  while (two.mapped() < 8) {
    ASSERT_TRUE(world_.RunBulk());
    two.Pump();
  }
  EXPECT_EQ(one.mapped(), 0);
  Settle();
  EXPECT_EQ(one.mapped(), 40);
}

TEST_F(BulkTest, WhatADeadProcessHeldIsReleasedInSteps) {
  FakeClient& a = StartWith(10, {.name = "a"});
  a.Die();
  EXPECT_EQ(Handles(), 10);
  EXPECT_TRUE(world_.RunBulk());
  EXPECT_EQ(Handles(), 6);
  EXPECT_EQ(core().CheckInvariants(), absl::OkStatus());
  // Not free before it is back.
  FakeClient& b = Start({.name = "b"});
  b.Ask({.at_least = 97});
  EXPECT_EQ(b.mapped(), 0);
  Settle();
  EXPECT_EQ(b.mapped(), 97);
}

TEST_F(BulkTest, WhoLeavesWhileItIsServedIsNotServedToTheEnd) {
  for (bool dies : {true, false}) {
    FakeClient& a = Start({.name = "a"});
    a.Ask({.at_least = 80});
    EXPECT_TRUE(world_.RunBulk());
    if (dies) {
      a.Die();
    } else {
      a.HangUp();
    }
    EXPECT_TRUE(world_.RunBulk());
    EXPECT_LE(Handles(), 8);
    EXPECT_EQ(core().CheckInvariants(), absl::OkStatus());
    Settle();
    EXPECT_EQ(Handles(), 0);
    a.Die();
  }
}

TEST_F(BulkTest, AFailureInMidGrantIsRolledBackAndTriedAgain) {
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 20});
  EXPECT_TRUE(world_.RunBulk());
  world_.device().FailNextCreate(absl::ResourceExhaustedError("injected"));
  Settle();
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_EQ(Handles(), 0);
  Advance(absl::Seconds(1));
  EXPECT_EQ(a.mapped(), 20);
}

// ---- answers ---------------------------------------------------------------

class AnswersTest : public CoreTest {
 protected:
  AnswersTest() : CoreTest({.capacity = MiB(300)}) {}

  // Keeps the last grant, and counts.
  struct Counter : SessionListener {
    void Tell(BrokerMessage message) override {
      if (auto* said = std::get_if<Opened>(&message)) opened = *said;
      if (auto* said = std::get_if<Granted>(&message)) {
        granted = *said;
        ++grants;
      }
    }
    void SendDescriptors(GrantId, uint32_t, std::vector<UniqueFd>) override {}
    void Close(const absl::Status&) override {}
    Opened opened;
    Granted granted;
    int grants = 0;
  };
};

TEST_F(AnswersTest, ThatArriveUnsaidAreForgottenOldestFirst) {
  auto counter = std::make_shared<Counter>();
  Open open =
      FakeWorld::OpenOf({.name = "a", .handle = KiB(4), .max_pages = 1 << 17});
  const SessionId id = *core().OpenSession(
      {.tenant = "uid:1", .uid = 1, .pid = 7}, open, counter);
  const PoolId pool = counter->opened.pools[0];
  constexpr int kAnswers = 12;  // of some 480 KB each
  for (int i = 1; i <= kAnswers; ++i) {
    ASSERT_TRUE(core()
                    .Handle(id, Acquire{.sequence = Sequence(i),
                                        .pool = pool,
                                        .want = 60'000,
                                        .at_least = 60'000})
                    .ok());
    ASSERT_EQ(counter->grants, i);
    ASSERT_TRUE(core().Handle(id, Return{pool, counter->granted.pages}).ok());
  }
  auto is_remembered = [&](int sequence) {
    counter->grants = 0;
    EXPECT_TRUE(core().Handle(id, Resend{Sequence(sequence)}).ok());
    return counter->grants == 1;
  };
  EXPECT_FALSE(is_remembered(1));
  EXPECT_FALSE(is_remembered(3));
  EXPECT_TRUE(is_remembered(kAnswers - 6));
  EXPECT_TRUE(is_remembered(kAnswers));
  core().ProcessGone(id);
}

// ---- quotas ----------------------------------------------------------------

class QuotaTest : public CoreTest {
 protected:
  QuotaTest()
      : CoreTest({.max_sessions_per_uid = 3, .max_instances_per_tenant = 2}) {}

  std::string Refusal(const Peer& peer, const std::string& name) {
    absl::Status status =
        world_.TryStart(peer, FakeWorld::OpenOf({.name = name})).status();
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    return std::string(status.message());
  }
};

TEST_F(QuotaTest, SessionsOfAUserAndInstancesOfATenantAreBounded) {
  FakeClient& a = Start({.name = "a"});
  Start({.name = "b"});
  EXPECT_THAT(Refusal({.tenant = "uid:1", .uid = 1, .pid = 7}, "c"),
              HasSubstr("raise quota.instances"));
  Start({.name = "a"});
  EXPECT_THAT(Refusal({.tenant = "uid:1", .uid = 1, .pid = 7}, "a"),
              HasSubstr("raise quota.sessions"));
  // In another PID namespace it is the same user.
  EXPECT_THAT(Refusal({.tenant = "other", .uid = 1, .pid = 7}, "d"),
              HasSubstr("raise quota.sessions"));
  EXPECT_TRUE(world_
                  .TryStart({.tenant = "uid:2", .uid = 2, .pid = 8},
                            FakeWorld::OpenOf({.name = "c"}))
                  .ok());
  a.Die();
  Start({.name = "a"});
}

// ---- reclaim, tier by tier -------------------------------------------------

TEST_F(CoreTest, IdlePagesOfAnotherArePassedOn) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(4, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.at_least = 3});
  Settle();
  EXPECT_NE(a.granted(sequence), nullptr);
  EXPECT_EQ(b.mapped(), 7);
  EXPECT_EQ(b.Count(Use::kIdle), 1);
  ASSERT_GE(b.orders().size(), 1);
  EXPECT_EQ(b.orders()[0].tier, Tier::kIdle);
  EXPECT_EQ(b.orders()[0].hold_at_most, 7);
  EXPECT_EQ(b.order(), nullptr);
  EXPECT_THAT(b.orders(), SizeIs(1)) << "it knows that it has done with it";
}

TEST_F(CoreTest, MemoryOnItsWayBackIsNotAskedForTwice) {
  // Pages of another size cannot be passed on: they go back to the driver
  // first. No more may be asked for meanwhile.
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(10, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a", .handle = KiB(512)});
  a.Ask({.at_least = 4});
  Settle();
  EXPECT_EQ(a.mapped(), 4);
  EXPECT_EQ(b.mapped(), 8);
  for (const Reclaim& order : b.orders()) EXPECT_GE(order.hold_at_most, 8);
}

TEST_F(CoreTest, CachedPagesOfOneAboveItsShareComeNext) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(8, Use::kCached);
  Settle();
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 3});
  Settle();
  EXPECT_EQ(a.mapped(), 3);
  EXPECT_EQ(b.Count(Use::kCached), 5);
  EXPECT_EQ(b.Count(Use::kInUse), 2);
  EXPECT_EQ(b.orders()[0].tier, Tier::kCached);
}

TEST_F(CoreTest, ThenPagesAreClosedAndComeAsTheyEmpty) {
  FakeClient& b = StartWith(10, {.name = "b"});
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Settle();
  ASSERT_NE(b.order(), nullptr);
  EXPECT_EQ(b.order()->tier, Tier::kClosing);
  EXPECT_EQ(b.order()->hold_at_most, 8);
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_EQ(core().Explain({.name = "a"})->claims[0].state, "closing");
  b.Mark(1, Use::kIdle);
  Settle();
  EXPECT_EQ(b.mapped(), 9);
  EXPECT_EQ(a.mapped(), 0);
  b.Mark(1, Use::kIdle);
  Settle();
  EXPECT_EQ(a.mapped(), 2);
}

TEST_F(CoreTest, AfterPatienceRequestsArePreempted) {
  FakeClient& b = StartWith(10, {.name = "b"});
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Advance(absl::Milliseconds(999));
  EXPECT_EQ(b.mapped(), 10);
  Advance(absl::Milliseconds(1));
  EXPECT_EQ(b.mapped(), 8);
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_EQ(world_.Status("b").preempts, 1);
}

TEST_F(CoreTest, BelowMinRequestsArePreemptedAtOnce) {
  FakeClient& b = StartWith(10, {.name = "b"});
  FakeClient& a = Start({.name = "a", .min = MiB(3)});
  a.Ask({.at_least = 3});
  Settle();
  EXPECT_EQ(a.mapped(), 3);
  EXPECT_EQ(b.mapped(), 7);
}

TEST_F(CoreTest, NobodyIsPushedBelowItsMin) {
  FakeClient& b = StartWith(10, {.name = "b", .min = MiB(7)});
  b.Mark(10, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.at_least = 5, .deadline = absl::Seconds(5)});
  Advance(absl::Seconds(4));
  EXPECT_GE(b.mapped(), 7);
  Advance(absl::Seconds(1));
  EXPECT_NE(a.refused(sequence), nullptr);
}

TEST_F(CoreTest, ExampleOfTheDesignHoldsForOtherPageSizes) {
  FakeWorld world({.capacity = MiB(128 * 4)});
  FakeClient& b = world.Start({.name = "b", .handle = MiB(128)});
  b.Ask({.at_least = 4});
  world.Settle();
  FakeClient& a = world.Start({.name = "a", .handle = MiB(144)});
  a.Ask({.at_least = 1});
  world.Settle();
  ASSERT_NE(b.order(), nullptr);
  EXPECT_EQ(b.order()->hold_at_most, 2);  // two of 128 for one of 144
  absl::StatusOr<Explanation> explained = world.core().Explain({.name = "a"});
  EXPECT_EQ(explained->claims[0].page_bytes, MiB(144));
  EXPECT_EQ(explained->claims[0].state, "closing");
  EXPECT_THAT(Explained(world.core(), "a"), HasSubstr("1 page(s) of 144 MiB"));
  EXPECT_THAT(Explained(world.core(), "b"),
              HasSubstr("4 pages of 128 MiB, asked to hold at most 2"));
  b.Mark(2, Use::kIdle);
  world.Settle();
  EXPECT_EQ(a.mapped(), 1);
  EXPECT_EQ(b.mapped(), 2);
  // The rest stays free.
  const BrokerStatus broker = world.core().Snapshot().broker;
  EXPECT_EQ(broker.held, MiB(144 + 256));
  EXPECT_EQ(broker.stock, Bytes(0));
  EXPECT_EQ(world.Check(), absl::OkStatus());
}

// `b` was made to preempt for `a` a moment ago. Then `c` leaves two pages,
// which are less than `a` waits for: `b` would get them.
class HoldOffTest : public CoreTest {
 protected:
  HoldOffTest() {
    a_.Ask({.at_least = 3});
    Advance(absl::Seconds(1));
    EXPECT_EQ(a_.mapped(), 3);
    EXPECT_EQ(b_.mapped(), 5);
    claim_of_a_ = a_.Ask({.at_least = 4});
    claim_of_b_ = b_.Ask({.at_least = 2, .urgency = Urgency::kRunning});
    c_.Return(c_.pool(), c_.pages());
    Settle();
  }

  FakeClient& b_ = StartWith(8, {.name = "b"});
  FakeClient& c_ = StartWith(2, {.name = "c"});
  FakeClient& a_ = Start({.name = "a"});
  Sequence claim_of_a_, claim_of_b_;
};

TEST_F(HoldOffTest, WhoWasMadeToPreemptDoesNotGrowAboveItsShare) {
  EXPECT_EQ(b_.granted(claim_of_b_), nullptr);
  EXPECT_THAT(Explained(core(), "b"), HasSubstr("was made to preempt"));
  EXPECT_THAT(Explained(core(), "b"), HasSubstr("held off"));
}

TEST_F(HoldOffTest, ItGrowsAgainWhenItsShareDoes) {
  a_.Cancel(claim_of_a_);
  Settle();
  EXPECT_NE(b_.granted(claim_of_b_), nullptr);
}

TEST_F(HoldOffTest, TheHoldOffEnds) {
  Advance(absl::Milliseconds(4999));
  EXPECT_EQ(b_.granted(claim_of_b_), nullptr);
  Advance(absl::Milliseconds(1));
  EXPECT_NE(b_.granted(claim_of_b_), nullptr);
  EXPECT_THAT(Explained(core(), "b"),
              testing::Not(HasSubstr("was made to preempt")));
}

TEST_F(CoreTest, AClaimOfOnesOwnOtherPoolTakesItsIdlePagesFirst) {
  FakeClient& a = Start({.name = "a", .pools = 2, .max = MiB(4)});
  FakeClient& b = StartWith(6, {.name = "b"});
  b.Mark(6, Use::kIdle);
  Hold(a, 4);
  a.Mark(3, Use::kIdle);
  Settle();
  a.Ask({.pool = a.pool(1), .at_least = 2});
  Settle();
  EXPECT_EQ(a.mapped(0), 2);
  EXPECT_EQ(a.mapped(1), 2);
  EXPECT_EQ(b.mapped(), 6);
}

TEST_F(CoreTest, CrossingReturnsDoNotOverReclaim) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(5, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  // Before `b` hears the order it gives two idle pages by itself.
  b.Return(b.pool(), {b.pages()[0], b.pages()[1]});
  Settle();
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_EQ(b.mapped(), 8);
}

TEST_F(CoreTest, FinalAnswerWithNothingLeftGoesOnToTheNextTier) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(5, Use::kIdle);
  Settle();
  b.manners().reports = false;
  b.Mark(5, Use::kInUse);  // the broker does not know
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Settle();
  ASSERT_NE(b.order(), nullptr);
  EXPECT_EQ(b.order()->tier, Tier::kClosing);
}

TEST_F(CoreTest, AnswerThatGivesOnlyOldPagesStillCounts) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(5, Use::kIdle);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Settle();
  ReclaimAnswer answer{.pool = b.pool(), .revision = b.order()->revision};
  answer.given = {{PageIndex(0), Generation(77)}};
  answer.kept = 2;
  answer.final = true;
  ASSERT_TRUE(b.Send(answer).ok());
  b.Pump();
  EXPECT_EQ(b.order()->tier, Tier::kClosing);
}

TEST_F(CoreTest, ReportsCannotClaimMorePagesThanAreHeld) {
  FakeClient& b = StartWith(4, {.name = "b"});
  ASSERT_TRUE(b.Send(Report{.pool = b.pool(),
                            .in_use = 99,
                            .cached = 99,
                            .idle = 99,
                            .settled = 99,
                            .oldest_idle = absl::InfiniteDuration()})
                  .ok());
  const InstanceStatus status = world_.Status("b");
  EXPECT_EQ(status.idle, MiB(4));
  EXPECT_EQ(status.cached, Bytes(0));
  EXPECT_EQ(status.in_use, MiB(4));
}

// ---- refusals, and who ignores an order ------------------------------------

TEST_F(CoreTest, RefusalAtTheDeadlineNamesTheHolders) {
  FakeClient& b = StartWith(6, {.name = "b"});
  FakeClient& c = StartWith(4, {.name = "c"});
  b.manners().answers_reclaims = c.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  Sequence sequence =
      a.Ask({.at_least = 2, .deadline = absl::Milliseconds(500)});
  Advance(absl::Milliseconds(499));
  EXPECT_EQ(a.refused(sequence), nullptr);
  Advance(absl::Milliseconds(1));
  const Refused* refused = a.refused(sequence);
  ASSERT_NE(refused, nullptr);
  EXPECT_EQ(refused->code, absl::StatusCode::kUnavailable);
  EXPECT_THAT(refused->reason,
              HasSubstr("not enough memory within the deadline"));
  ASSERT_THAT(refused->holders, SizeIs(2));
  EXPECT_EQ(refused->holders[0].instance, "b");
  EXPECT_EQ(refused->holders[0].held, MiB(6));
  EXPECT_EQ(refused->holders[1].instance, "c");
  EXPECT_THAT(world_.TakeLog("refuse "), ElementsAre(HasSubstr("holders=b:")));
  EXPECT_EQ(world_.Status("a").refusals, 1);
}

TEST_F(CoreTest, AtMostEightHoldersAreNamed) {
  for (int i = 0; i < 10; ++i) {
    StartWith(1, {.name = absl::StrCat("b", i)}).manners().preempts = false;
  }
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.at_least = 1, .deadline = absl::Nanoseconds(1)});
  Advance(absl::Seconds(1));
  ASSERT_NE(a.refused(sequence), nullptr);
  EXPECT_THAT(a.refused(sequence)->holders, SizeIs(8));
}

TEST_F(CoreTest, SpeculativeClaimsAreRefusedAtOnceAndQuietly) {
  FakeClient& b = StartWith(9, {.name = "b"});
  b.Mark(9, Use::kCached);
  Settle();
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.at_least = 2, .urgency = Urgency::kSpeculative});
  Settle();
  ASSERT_NE(a.refused(sequence), nullptr);
  EXPECT_THAT(a.refused(sequence)->holders, IsEmpty());
  EXPECT_EQ(b.mapped(), 9);
  EXPECT_THAT(world_.TakeLog("refuse "), IsEmpty());
  sequence = a.Ask({.at_least = 1, .urgency = Urgency::kSpeculative});
  Settle();
  EXPECT_EQ(a.mapped(), 1);
}

TEST_F(CoreTest, MappingAheadEvensOutIdlePages) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(8, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.want = 9,
                             .at_least = 1,
                             .urgency = Urgency::kSpeculative,
                             .deadline = absl::Milliseconds(100)});
  Settle();
  ASSERT_NE(a.granted(sequence), nullptr);
  EXPECT_EQ(a.mapped(), 4);
  EXPECT_EQ(b.mapped(), 6);
  a.Mark(4, Use::kIdle);
  Settle();
  // They are not taken back and forth.
  sequence = b.Ask({.at_least = 1, .urgency = Urgency::kSpeculative});
  Settle();
  EXPECT_NE(b.refused(sequence), nullptr);
}

TEST_F(CoreTest, WhoIsAskedGivesWhatIsWantedAsWell) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(8, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.want = 3, .at_least = 1});
  Settle();
  ASSERT_NE(a.granted(sequence), nullptr);
  EXPECT_EQ(a.mapped(), 3);
  EXPECT_EQ(b.mapped(), 7);
}

TEST_F(CoreTest, AMappingAheadThatNobodyGivesForEndsAtItsDeadline) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(8, Use::kIdle);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  Sequence sequence = a.Ask({.at_least = 1,
                             .urgency = Urgency::kSpeculative,
                             .deadline = absl::Milliseconds(100)});
  Advance(absl::Milliseconds(99));
  EXPECT_EQ(a.refused(sequence), nullptr);
  Advance(absl::Milliseconds(1));
  EXPECT_NE(a.refused(sequence), nullptr);
  EXPECT_THAT(world_.TakeLog("refuse "), IsEmpty());
  EXPECT_EQ(world_.Status("b").pressure, "none");
}

TEST_F(CoreTest, WhoIgnoresAnOrderIsReportedAndNotAskedAgain) {
  FakeClient& b = StartWith(5, {.name = "b", .pid = 77});
  FakeClient& c = StartWith(5, {.name = "c"});
  b.Mark(5, Use::kIdle);
  c.Mark(2, Use::kIdle);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Advance(absl::Milliseconds(1999));
  EXPECT_EQ(a.mapped(), 0);
  world_.TakeLog();
  Advance(absl::Milliseconds(1));
  EXPECT_THAT(world_.TakeLog("ignored-reclaim"),
              ElementsAre(testing::AllOf(HasSubstr("pid=77"),
                                         HasSubstr("not fenced"))));
  EXPECT_EQ(world_.Status("b").pressure, "ignoring");
  EXPECT_THAT(b.fenced(), IsEmpty());
  EXPECT_EQ(a.mapped(), 2);  // `c` gave instead
  EXPECT_EQ(c.mapped(), 3);
}

TEST_F(CoreTest, AnAnswerEndsTheReproach) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(5, Use::kIdle);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Advance(absl::Seconds(3));
  ASSERT_EQ(world_.Status("b").pressure, "ignoring");
  b.manners().answers_reclaims = true;
  b.Return(b.pool(), {b.pages()[0]});
  Settle();
  EXPECT_NE(world_.Status("b").pressure, "ignoring");
  EXPECT_EQ(a.mapped(), 2);
}

TEST_F(CoreTest, ChangingTheOrderGivesNoMoreTimeToOneWhoDoesNotAnswer) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(10, Use::kIdle);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  for (int i = 0; i < 4; ++i) {
    a.Ask({.at_least = 1});
    Advance(absl::Milliseconds(500));
  }
  EXPECT_THAT(world_.TakeLog("ignored-reclaim"), SizeIs(1));
}

TEST_F(CoreTest, ChangingTheOrderGivesMoreTimeToOneWhoAnswered) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(10, Use::kIdle);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Advance(absl::Milliseconds(1900));
  b.Return(b.pool(), {b.pages()[0]});
  a.Ask({.at_least = 1});
  Advance(absl::Milliseconds(1900));
  EXPECT_THAT(world_.TakeLog("ignored-reclaim"), IsEmpty());
  Advance(absl::Milliseconds(100));
  EXPECT_THAT(world_.TakeLog("ignored-reclaim"), SizeIs(1));
}

class FencingTest : public CoreTest {
 protected:
  FencingTest() : CoreTest({.policy = {.fence_ignoring = true}}) {}
};

TEST_F(FencingTest, WhoIgnoresAnOrderIsFenced) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(10, Use::kIdle);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Advance(absl::Seconds(2));
  EXPECT_THAT(b.fenced(), SizeIs(1));
  EXPECT_THAT(world_.TakeLog("ignored-reclaim"),
              ElementsAre(HasSubstr(" fenced")));
  b.Die();  // as the client library does
  Settle();
  EXPECT_EQ(a.mapped(), 2);
}

// ---- limits, guarantees, weights -------------------------------------------

TEST_F(CoreTest, LoweredLimitIsToldAndDrainsCheapestFirst) {
  FakeClient& a = StartWith(8, {.name = "a"});
  a.Mark(2, Use::kIdle);
  a.Mark(3, Use::kCached, Use::kInUse);
  Settle();
  ASSERT_TRUE(SetMax("a", MiB(4)).ok());
  Settle();
  ASSERT_THAT(a.limits(), SizeIs(1));
  EXPECT_EQ(a.limits()[0].max, MiB(4));
  EXPECT_GT(a.limits()[0].revision, a.opened().limit_revision);
  EXPECT_EQ(a.mapped(), 4);
  EXPECT_EQ(a.Count(Use::kInUse), 3);
  EXPECT_EQ(a.Count(Use::kCached), 1);
}

TEST_F(CoreTest, LoweredLimitClosesThenPreempts) {
  FakeClient& a = StartWith(8, {.name = "a"});
  ASSERT_TRUE(SetMax("a", MiB(4)).ok());
  Settle();
  EXPECT_EQ(a.order()->tier, Tier::kClosing);
  EXPECT_EQ(world_.Status("a").pressure, "draining");
  Advance(absl::Milliseconds(249));
  EXPECT_EQ(a.mapped(), 8);
  Advance(absl::Milliseconds(1));
  EXPECT_EQ(a.mapped(), 4);
  EXPECT_EQ(a.order(), nullptr);
}

TEST_F(CoreTest, NoGrantAboveALoweredLimitAndGrowthWhenItIsRaised) {
  FakeClient& a = StartWith(8, {.name = "a"});
  ASSERT_TRUE(SetMax("a", MiB(4)).ok());
  Sequence sequence = a.Ask({.at_least = 1});
  Settle();
  ASSERT_NE(a.refused(sequence), nullptr);
  EXPECT_EQ(a.refused(sequence)->code, absl::StatusCode::kResourceExhausted);
  Advance(absl::Seconds(1));
  ASSERT_EQ(a.mapped(), 4);
  ASSERT_TRUE(SetMax("a", MiB(9)).ok());
  Hold(a, 5);
}

TEST_F(CoreTest, RaisedLimitLiftsTheOrder) {
  FakeClient& a = StartWith(8, {.name = "a"});
  ASSERT_TRUE(SetMax("a", MiB(4)).ok());
  Settle();
  ASSERT_NE(a.order(), nullptr);
  ASSERT_TRUE(SetMax("a", MiB(8)).ok());
  Settle();
  EXPECT_EQ(a.order(), nullptr);
  Advance(absl::Seconds(5));
  EXPECT_EQ(a.mapped(), 8);
}

TEST_F(CoreTest, WhatALimitFreesServesTheClaimsToo) {
  // `a` gives 4 for its limit; the claim needs no more than these.
  FakeClient& a = StartWith(6, {.name = "a"});
  FakeClient& c = StartWith(4, {.name = "c"});
  ASSERT_TRUE(SetMax("a", MiB(2)).ok());
  FakeClient& b = Start({.name = "b"});
  b.Ask({.at_least = 3});
  Advance(absl::Seconds(3));
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_EQ(b.mapped(), 3);
  EXPECT_EQ(c.mapped(), 4);
  EXPECT_THAT(c.orders(), IsEmpty());
}

TEST_F(CoreTest, LimitsAndClaimsTogetherPushNobodyBelowMin) {
  FakeClient& a = StartWith(10, {.name = "a", .min = MiB(6)});
  a.Mark(10, Use::kIdle);
  Settle();
  FakeClient& b = Start({.name = "b"});
  b.Ask({.at_least = 4});
  ASSERT_TRUE(SetMax("a", MiB(6)).ok());
  Settle();
  EXPECT_EQ(a.mapped(), 6);
  EXPECT_EQ(b.mapped(), 4);
  for (const Reclaim& order : a.orders()) EXPECT_GE(order.hold_at_most, 6);
}

TEST_F(CoreTest, LimitOfZeroTakesEverything) {
  FakeClient& a = StartWith(8, {.name = "a"});
  ASSERT_TRUE(SetMax("a", Bytes(0)).ok());
  Advance(absl::Seconds(1));
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_EQ(world_.Status("a").held, Bytes(0));
}

TEST_F(CoreTest, LimitIsEchoedToTheByteAndRoundedInForce) {
  Start({.name = "a"});
  absl::StatusOr<InstanceStatus> status = SetMax("a", MiB(3) + Bytes(17));
  EXPECT_EQ(status->max, MiB(3) + Bytes(17));
  EXPECT_EQ(status->effective_limit, MiB(3));
  status = SetMax("a", GiB(3));
  EXPECT_EQ(status->max, GiB(3));
  EXPECT_EQ(status->effective_limit, MiB(10));
}

TEST_F(CoreTest, PercentIsOfTheDevice) {
  Start({.name = "a"});
  EXPECT_EQ(core().SetPolicy({.name = "a"}, {.max_percent = 50})->max, GiB(2));
  for (double bad : {0.0, -1.0, 101.0, kNan}) {
    EXPECT_EQ(
        core().SetPolicy({.name = "a"}, {.max_percent = bad}).status().code(),
        absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(CoreTest, GuaranteesBeyondTheCapacityAreRefusedWhenSet) {
  Start({.name = "a", .min = MiB(6)});
  Start({.name = "b"});
  EXPECT_EQ(core().SetPolicy({.name = "b"}, {.min = MiB(5)}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(core().SetPolicy({.name = "b"}, {.min = MiB(4)}).ok());
  // Its own is not counted twice.
  EXPECT_TRUE(core().SetPolicy({.name = "b"}, {.min = MiB(3)}).ok());
}

TEST_F(CoreTest, BadPoliciesAreRefused) {
  Start({.name = "a"});
  auto code = [&](const PolicyChange& change) {
    return core().SetPolicy({.name = "a"}, change).status().code();
  };
  EXPECT_EQ(code({.min = Bytes(-1)}), kInvalid);
  EXPECT_EQ(code({.max = Bytes(-1)}), kInvalid);
  EXPECT_EQ(code({.max = kMaxBytes + Bytes(1)}), kInvalid);
  EXPECT_EQ(code({.min = MiB(5), .max = MiB(4)}), kInvalid);
  EXPECT_EQ(code({.weight = 0}), kInvalid);
  EXPECT_EQ(code({.weight = kNan}), kInvalid);
  EXPECT_EQ(world_.Status("a").max, MiB(10));
}

TEST_F(CoreTest, LimitBelowTheGuaranteeLowersTheGuarantee) {
  Start({.name = "a", .min = MiB(6)});
  EXPECT_EQ(SetMax("a", MiB(4))->min, MiB(4));
}

TEST_F(CoreTest, GuaranteeHoldsWhateverTheWeight) {
  FakeClient& b = StartWith(10, {.name = "b", .weight = 100});
  FakeClient& a = Start({.name = "a", .min = MiB(4)});
  a.Ask({.at_least = 4});
  Sequence more = a.Ask({.at_least = 1, .deadline = absl::Seconds(5)});
  Advance(absl::Seconds(6));
  EXPECT_EQ(a.mapped(), 4);
  EXPECT_NE(a.refused(more), nullptr);
  EXPECT_EQ(b.mapped(), 6);
}

TEST_F(CoreTest, WeightDividesWhatIsContended) {
  FakeWorld world({.capacity = MiB(12)});
  FakeClient& b = world.Start({.name = "b"});
  b.Ask({.at_least = 12});
  world.Settle();
  FakeClient& a = world.Start({.name = "a", .weight = 2});
  for (int i = 0; i < 12; ++i) {
    a.Ask({.at_least = 1, .deadline = absl::Seconds(20)});
  }
  world.Advance(absl::Seconds(10));
  EXPECT_EQ(a.mapped(), 8);
  EXPECT_EQ(b.mapped(), 4);
  EXPECT_EQ(world.Check(), absl::OkStatus());
}

TEST_F(CoreTest, RunningRequestsBeforeWaitingOnes) {
  FakeClient& c = StartWith(10, {.name = "c"});
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  a.Ask({.at_least = 1, .urgency = Urgency::kWaiting});
  Advance(absl::Milliseconds(10));
  b.Ask({.at_least = 1, .urgency = Urgency::kRunning});
  Settle();
  c.Mark(1, Use::kIdle);
  Settle();
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_EQ(b.mapped(), 1);
}

TEST_F(CoreTest, WaitingLongCountsAsWeight) {
  // Nobody preempts here, so that claims can age.
  FakeWorld world({.policy = {.patience = absl::Hours(1)}});
  FakeClient& c = world.Start({.name = "c"});
  c.Ask({.at_least = 10});
  world.Settle();
  FakeClient& a = world.Start({.name = "a"});
  FakeClient& b = world.Start({.name = "b", .weight = 2});
  a.Ask({.at_least = 1});
  world.Advance(absl::Seconds(25));
  b.Ask({.at_least = 1});
  world.Settle();
  c.Mark(1, Use::kIdle);
  world.Settle();
  EXPECT_EQ(a.mapped(), 1);
  EXPECT_EQ(b.mapped(), 0);
}

TEST_F(CoreTest, NobodyTakesMoreThanItNeedsWhileOthersWait) {
  FakeClient& c = StartWith(10, {.name = "c"});
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  a.Ask({.want = 8, .at_least = 2});
  b.Ask({.want = 8, .at_least = 2});
  Settle();
  c.Mark(4, Use::kIdle);
  Settle();
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_EQ(b.mapped(), 2);
}

// ---- credit ----------------------------------------------------------------

TEST_F(CoreTest, CreditIsSetAsideAndDrawnOn) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  Sequence credit = a.Ask({.at_least = 6, .credit = true});
  Settle();
  ASSERT_NE(a.granted(credit), nullptr);
  EXPECT_EQ(a.granted(credit)->credit, 6);
  EXPECT_EQ(a.granted(credit)->credit_for, absl::Seconds(1));
  EXPECT_THAT(a.granted(credit)->pages, IsEmpty());
  EXPECT_EQ(world_.Status("a").held, MiB(6));
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  // Others cannot have it.
  Sequence others = b.Ask({.at_least = 5, .urgency = Urgency::kSpeculative});
  Settle();
  EXPECT_NE(b.refused(others), nullptr);
  Hold(a, 6);
  EXPECT_EQ(world_.Status("a").held, MiB(6));
}

TEST_F(CoreTest, CreditLapses) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  a.Ask({.at_least = 6, .credit = true});
  b.Ask({.at_least = 5});
  Advance(absl::Milliseconds(999));
  EXPECT_EQ(b.mapped(), 0);
  Advance(absl::Milliseconds(1));
  EXPECT_EQ(b.mapped(), 5);
  EXPECT_EQ(world_.Status("a").held, Bytes(0));
}

TEST_F(CoreTest, CreditThatAClaimCannotUseIsNotFreeForTheNextClaim) {
  // The claim of `a` comes first and cannot be served, its credit included; `b`
  // must not be decided as if that were free.
  StartWith(4, {.name = "c"});
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  a.Ask({.at_least = 4, .credit = true});
  Settle();
  a.Ask({.at_least = 10, .urgency = Urgency::kRunning});
  b.Ask({.at_least = 5});
  Settle();
  EXPECT_EQ(b.mapped(), 0);
  EXPECT_THAT(Explained(core(), "b"), testing::Not(HasSubstr("stock")));
}

TEST_F(CoreTest, CreditOfOneIsNotGrantedToAnother) {
  // The claim of `a` is decided first and needs more than its credit; what it
  // leaves of the credit is not free for `b`.
  FakeClient& c = StartWith(4, {.name = "c"});
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  a.Ask({.at_least = 4, .credit = true});
  Settle();
  a.Ask({.at_least = 7, .urgency = Urgency::kRunning});
  b.Ask({.at_least = 3});
  Settle();
  EXPECT_EQ(world_.Check(), absl::OkStatus());
  EXPECT_EQ(b.mapped(), 0);
  c.Die();
  Settle();
  EXPECT_EQ(a.mapped(), 7);
  EXPECT_EQ(b.mapped(), 3);
}

TEST_F(CoreTest, TwoClaimsDrawOnOneCredit) {
  FakeClient& c = StartWith(4, {.name = "c"});
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 6, .credit = true});
  Settle();
  a.Ask({.at_least = 4});
  a.Ask({.at_least = 4});
  Settle();
  EXPECT_EQ(a.mapped(), 4);
  c.Mark(2, Use::kIdle);
  Settle();
  EXPECT_EQ(a.mapped(), 8);
  EXPECT_EQ(c.mapped(), 2);
}

TEST_F(CoreTest, CreditGoesWithItsInstance) {
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 6, .credit = true});
  Settle();
  a.Die();
  EXPECT_EQ(core().Snapshot().broker.held, Bytes(0));
}

// ---- death, at every stage -------------------------------------------------

TEST_F(CoreTest, DeathWhileItWaitsDropsItsClaims) {
  FakeClient& b = StartWith(10, {.name = "b"});
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 1});
  Settle();
  ASSERT_NE(b.order(), nullptr);
  a.Die();
  Settle();
  EXPECT_EQ(b.order(), nullptr);
  Advance(absl::Seconds(5));
  EXPECT_EQ(b.mapped(), 10);
  EXPECT_THAT(core().Snapshot().instances, SizeIs(1));
}

TEST_F(CoreTest, DeathWithPagesOfferedOrMappedFreesThem) {
  for (bool mapped : {false, true}) {
    FakeClient& a = Start({.name = "a"});
    a.Ask({.at_least = 10});
    if (mapped) Settle();
    a.Die();
    EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
    EXPECT_EQ(core().Snapshot().broker.held, Bytes(0));
    EXPECT_EQ(world_.Check(), absl::OkStatus());
  }
  EXPECT_THAT(world_.TakeLog("gone session="), SizeIs(2));
}

TEST_F(CoreTest, DeathWhileItsPagesAreMadeFreesWhatWasMade) {
  FakeClient& a = Start({.name = "a"});
  int calls = 0;
  world_.device().OnCreate([&](Bytes) {
    if (++calls == 3) a.Die();
  });
  a.Ask({.at_least = 5});
  EXPECT_EQ(calls, 5);
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  EXPECT_EQ(core().Snapshot().broker.held, Bytes(0));
}

TEST_F(CoreTest, PagesBeingMadeForTheDeadAreNotFreeYet) {
  // The device is as large as the capacity: what is made for `a` still takes
  // its place when `b` asks.
  FakeWorld world({.capacity = MiB(10), .device = MiB(10)});
  FakeClient& a = world.Start({.name = "a"});
  FakeClient& b = world.Start({.name = "b"});
  int calls = 0;
  world.device().OnCreate([&](Bytes) {
    if (++calls != 10) return;
    a.Die();
    b.Ask({.at_least = 10});
    EXPECT_EQ(world.core().CheckInvariants(), absl::OkStatus());
  });
  a.Ask({.at_least = 10});
  world.Settle();
  EXPECT_EQ(b.mapped(), 10);
  EXPECT_THAT(world.TakeLog("create-failed"), IsEmpty());
  EXPECT_EQ(world.Check(), absl::OkStatus());
}

TEST_F(CoreTest, DeathWhileTheBackendFailsLeavesNothing) {
  FakeClient& a = Start({.name = "a"});
  int calls = 0;
  world_.device().OnCreate([&](Bytes) {
    if (++calls != 3) return;
    a.Die();
    world_.device().FailNextCreate(absl::ResourceExhaustedError("no"));
  });
  a.Ask({.at_least = 5});
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  EXPECT_EQ(core().Snapshot().broker.held, Bytes(0));
}

TEST_F(CoreTest, HangUpKeepsThePagesUntilTheProcessIsGone) {
  FakeClient& a = StartWith(10, {.name = "a"});
  a.HangUp();
  EXPECT_EQ(world_.Status("a").held, MiB(10));
  FakeClient& b = Start({.name = "b"});
  b.Ask({.at_least = 1});
  Advance(absl::Seconds(3));
  EXPECT_EQ(b.mapped(), 0);
  EXPECT_THAT(a.orders(), IsEmpty());  // nobody hears it
  a.Die();
  Settle();
  EXPECT_EQ(b.mapped(), 1);
  EXPECT_THAT(world_.TakeLog("hang-up session="), SizeIs(1));
}

TEST_F(CoreTest, HangUpWithoutPagesIsTheEnd) {
  FakeClient& a = Start({.name = "a"});
  a.HangUp();
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
  EXPECT_EQ(core().Snapshot().broker.sessions, 0);
  a.Die();  // comes later, and is no news
}

TEST_F(CoreTest, WhatAPeerNeverSawDoesNotStayAfterItHungUp) {
  // While it is made.
  FakeClient& a = Start({.name = "a"});
  world_.device().OnCreate([&](Bytes) { a.HangUp(); });
  a.Ask({.at_least = 2});
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
  // While its descriptors wait for the window.
  world_.device().OnCreate(nullptr);
  FakeClient& b =
      Start({.name = "b", .handle = KiB(4), .handles_per_page = 256});
  b.manners().acknowledges_descriptors = false;
  b.Ask({.at_least = 2});
  b.Ask({.at_least = 3});
  Settle();
  b.HangUp();
  EXPECT_EQ(world_.Status("b").held, MiB(2));
  EXPECT_EQ(*world_.device().UsedBytes(),
            MiB(2) + core().Snapshot().broker.stock);
  b.Die();
}

TEST_F(CoreTest, WhatAPeerHasSeenStaysAfterItHungUpThoughItWantedAResend) {
  FakeClient& a =
      Start({.name = "a", .handle = KiB(4), .handles_per_page = 256});
  a.manners().acknowledges_descriptors = false;
  Sequence sequence = a.Ask({.at_least = 2});  // fills the window
  a.Resend(sequence);
  a.HangUp();
  EXPECT_EQ(world_.Status("a").held, MiB(2));
  a.Die();
}

TEST_F(CoreTest, DeathOfOneMemberLeavesTheOther) {
  FakeClient& first = StartWith(3, {.name = "a"});
  FakeClient& second = StartWith(2, {.name = "a"});
  first.Die();
  EXPECT_EQ(world_.Status("a").held, MiB(2));
  Hold(second, 1);
}

TEST_F(CoreTest, ThousandKillsLeakNothing) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 1000; ++i) {
    FakeClient& a = Start({.name = "a", .tenant = i % 3 == 0 ? "t" : "u"});
    a.Ask({.want = 6, .at_least = 2});
    if (random() % 2 == 0) Settle();
    if (random() % 2 == 0) a.Ask({.want = 6, .at_least = 6});
    if (random() % 4 == 0) a.HangUp();
    a.Die();
    world_.Forget(a);
    world_.TakeLog();
  }
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  EXPECT_EQ(world_.device().live_handles(), 0);
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
}

// ---- stock -----------------------------------------------------------------

TEST_F(CoreTest, PagePassesWithinATenantAsItIs) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(3, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a"});
  const std::vector<uint64_t> before = b.Tokens();
  a.Ask({.at_least = 3});
  Settle();
  ASSERT_EQ(a.mapped(), 3);
  for (uint64_t token : a.Tokens()) {
    EXPECT_THAT(before, testing::Contains(token));
  }
  EXPECT_EQ(world_.device().counts().creates, 10);
}

TEST_F(CoreTest, PageForAnotherTenantIsMadeAnew) {
  FakeClient& b = StartWith(10, {.name = "b", .tenant = "t"});
  b.Mark(3, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a", .tenant = "u"});
  const std::vector<uint64_t> before = b.Tokens();
  a.Ask({.at_least = 3});
  Settle();
  ASSERT_EQ(a.mapped(), 3);
  for (uint64_t token : a.Tokens()) {
    EXPECT_THAT(before, testing::Not(testing::Contains(token)));
  }
  EXPECT_EQ(world_.device().counts().creates, 13);
}

TEST_F(CoreTest, PageOfTheDeadPassesWithinItsTenantOnly) {
  FakeClient& b = StartWith(5, {.name = "b", .tenant = "t"});
  FakeClient& c = StartWith(5, {.name = "c", .tenant = "u"});
  FakeClient& a = Start({.name = "a", .tenant = "t"});
  b.manners().preempts = c.manners().preempts = false;
  const std::vector<uint64_t> of_c = c.Tokens();
  a.Ask({.at_least = 3});
  Settle();
  c.Die();
  Settle();
  ASSERT_EQ(a.mapped(), 3);
  for (uint64_t token : a.Tokens()) {
    EXPECT_THAT(of_c, testing::Not(testing::Contains(token)));
  }
}

TEST_F(CoreTest, StockInTheWayGoesBackToTheDriver) {
  // `a` waits for 3 pages; one comes and is kept for it. Then `c`, of another
  // size and below its min, needs the memory.
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 3});
  Settle();
  b.Mark(1, Use::kIdle);
  Settle();
  EXPECT_EQ(core().Snapshot().broker.stock, MiB(1));
  FakeClient& c = Start({.name = "c", .handle = KiB(256), .min = MiB(1)});
  c.Ask({.at_least = 4});
  Settle();
  EXPECT_EQ(c.mapped(), 4);
  EXPECT_EQ(core().Snapshot().broker.stock, Bytes(0));
}

TEST_F(CoreTest, StockThatNobodyWaitsForGoesBackToTheDriver) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  for (int way = 0; way < 3; ++way) {
    Sequence sequence = a.Ask({.at_least = 3, .deadline = absl::Seconds(1)});
    Settle();
    b.Mark(1, Use::kIdle);
    Settle();
    EXPECT_EQ(core().Snapshot().broker.stock, MiB(1));
    if (way == 0) a.Cancel(sequence);
    if (way == 1) Advance(absl::Seconds(2));
    if (way == 2) a.Die();
    Settle();
    EXPECT_EQ(core().Snapshot().broker.stock, Bytes(0));
    EXPECT_EQ(*world_.device().UsedBytes(), b.lent());
    if (way < 2) Hold(b, 1);
  }
}

// With room for four pages in stock while nobody waits.
class WarmStockTest : public CoreTest {
 protected:
  WarmStockTest() : CoreTest({.max_stock = MiB(4), .max_stocked_handles = 6}) {}

  void ReturnAll(FakeClient& client) {
    client.Return(client.pool(), client.pages());
    Settle();
  }
  Bytes Stock() { return core().Snapshot().broker.stock; }
  int64_t Creates() { return world_.device().counts().creates; }
};

TEST_F(WarmStockTest, WhatComesBackIsLentAgainWithinTheTenant) {
  FakeClient& a = StartWith(3, {.name = "a"});
  ReturnAll(a);
  EXPECT_EQ(Stock(), MiB(3));
  Hold(a, 2);
  EXPECT_EQ(Stock(), MiB(1));
  StartWith(1, {.name = "b"});
  EXPECT_EQ(Stock(), Bytes(0));
  EXPECT_EQ(Creates(), 3);
}

class StockAheadTest : public CoreTest {
 protected:
  StockAheadTest()
      : CoreTest({.max_stock = MiB(4), .bulk_by_hand = true}) {}

  Bytes Stock() { return core().Snapshot().broker.stock; }
  int64_t Creates() { return world_.device().counts().creates; }
  // Asks and maps, without what the executor has to do.
  void Grow(FakeClient& client, PageCount pages) {
    client.Ask({.at_least = pages});
    while (client.Pump()) {
    }
  }
};

TEST_F(StockAheadTest, AsMuchAsWasGrantedIsMadeForTheNextGrant) {
  FakeClient& a = Start({.name = "a"});
  Grow(a, 2);
  EXPECT_EQ(a.mapped(), 2);
  EXPECT_EQ(Creates(), 2);
  EXPECT_EQ(world_.Check(), absl::OkStatus());
  EXPECT_TRUE(world_.RunBulk());
  EXPECT_EQ(Stock(), MiB(2));
  Grow(a, 2);
  EXPECT_EQ(a.mapped(), 4);
  EXPECT_EQ(Creates(), 4) << "nothing is made while a claim waits for it";
  Settle();
  EXPECT_EQ(Stock(), MiB(2));
  Advance(absl::Seconds(1));
  EXPECT_EQ(Stock(), Bytes(0));
  EXPECT_EQ(*world_.device().UsedBytes(), MiB(4));
}

TEST_F(StockAheadTest, WithinItsBoundAndOfFreeMemoryOnly) {
  FakeClient& a = Start({.name = "a"});
  Grow(a, 5);
  Settle();
  EXPECT_EQ(Stock(), MiB(4));
  Grow(a, 4);
  Settle();
  EXPECT_EQ(a.mapped(), 9);
  EXPECT_EQ(Stock(), MiB(1));
}

TEST_F(StockAheadTest, WhoNeedsTheMemoryMeanwhileGetsIt) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b", .tenant = "u"});
  Grow(a, 3);
  b.Ask({.at_least = 7});
  EXPECT_EQ(b.mapped(), 0) << "three are to be made";
  Settle();
  EXPECT_EQ(b.mapped(), 7);
  EXPECT_EQ(Stock(), Bytes(0));
}

TEST_F(StockAheadTest, WhatCannotBeMadeIsFreeAgain) {
  FakeClient& a = Start({.name = "a"});
  Grow(a, 3);
  world_.device().FailNextCreate(absl::ResourceExhaustedError("injected"));
  EXPECT_TRUE(world_.RunBulk());
  EXPECT_EQ(Stock(), Bytes(0));
  EXPECT_EQ(core().CheckInvariants(), absl::OkStatus());
  Grow(a, 7);
  EXPECT_EQ(a.mapped(), 10);
}

TEST_F(StockAheadTest, NothingIsKeptForATenantThatHasGone) {
  FakeClient& a = Start({.name = "a"});
  Grow(a, 3);
  a.Die();
  Settle();
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  EXPECT_EQ(core().CheckInvariants(), absl::OkStatus());
}

TEST_F(WarmStockTest, NothingPassesToAnotherTenant) {
  FakeClient& a = StartWith(3, {.name = "a", .tenant = "t"});
  ReturnAll(a);
  FakeClient& b = StartWith(3, {.name = "b", .tenant = "u"});
  EXPECT_EQ(Creates(), 6);
  EXPECT_EQ(Stock(), MiB(3));
  ReturnAll(b);
  EXPECT_EQ(Stock(), MiB(4));  // the bound is for all tenants together
}

TEST_F(WarmStockTest, IsBoundedByBytesAndByHandles) {
  FakeClient& a = StartWith(6, {.name = "a"});
  ReturnAll(a);
  EXPECT_EQ(Stock(), MiB(4));
  EXPECT_EQ(*world_.device().UsedBytes(), MiB(4));
  Advance(absl::Seconds(1));
  FakeClient& small = StartWith(8, {.name = "small", .handle = KiB(4)});
  ReturnAll(small);
  EXPECT_EQ(Stock(), KiB(24));
}

TEST_F(WarmStockTest, DecaysAndLeavesNothingDue) {
  FakeClient& a = StartWith(4, {.name = "a"});
  ASSERT_EQ(core().RunDue(), absl::InfiniteFuture());
  const std::vector<PageName> pages = a.pages();
  a.Return(a.pool(), {pages[0], pages[1]});
  EXPECT_EQ(world_.wakes(), 1);
  const absl::Time first = world_.clock().Now();
  Advance(absl::Milliseconds(500));
  a.Return(a.pool(), {pages[2]});
  EXPECT_EQ(core().RunDue(), first + absl::Seconds(1));
  Advance(absl::Milliseconds(500));
  EXPECT_EQ(Stock(), MiB(1));
  EXPECT_EQ(core().RunDue(), first + absl::Milliseconds(1500));
  Advance(absl::Milliseconds(500));
  EXPECT_EQ(Stock(), Bytes(0));
  EXPECT_EQ(*world_.device().UsedBytes(), MiB(1));
  EXPECT_EQ(core().RunDue(), absl::InfiniteFuture());
}

TEST_F(WarmStockTest, GivesWayToAnotherTenantOrSizeAndToCredit) {
  struct Claimant {
    FakeEngine engine;
    PageCount pages;
    bool credit;
  };
  for (const Claimant& claimant :
       {Claimant{{.name = "b", .tenant = "other"}, 9, false},
        Claimant{{.name = "b", .handle = MiB(2)}, 4, false},
        Claimant{{.name = "b"}, 9, true}}) {
    FakeClient& a = StartWith(4, {.name = "a"});
    const std::vector<PageName> pages = a.pages();
    a.Return(a.pool(), {pages[0], pages[1], pages[2]});
    Settle();
    ASSERT_EQ(Stock(), MiB(3));
    FakeClient& b = Start(claimant.engine);
    const Sequence sequence =
        b.Ask({.at_least = claimant.pages, .credit = claimant.credit});
    Settle();
    EXPECT_NE(b.granted(sequence), nullptr);
    EXPECT_THAT(a.orders(), IsEmpty());  // stock first
    EXPECT_EQ(Stock(), Bytes(0));
    EXPECT_EQ(world_.Check(), absl::OkStatus());
    a.Die();
    b.Die();
    Advance(absl::Seconds(2));
  }
}

TEST_F(WarmStockTest, IsNotKeptFromThoseWhoWait) {
  // `c` waits for more than comes back: what it cannot use is free at once.
  FakeClient& a = StartWith(8, {.name = "a"});
  a.manners().preempts = false;
  const std::vector<PageName> pages = a.pages();
  a.Return(a.pool(), {pages[0], pages[1]});
  EXPECT_EQ(Stock(), MiB(2));
  FakeClient& c = Start({.name = "c", .handle = KiB(512)});
  c.Ask({.at_least = 10});
  Settle();
  EXPECT_EQ(Stock(), Bytes(0));
  a.Return(a.pool(), {pages[2]});
  Settle();
  EXPECT_EQ(Stock(), Bytes(0));
  EXPECT_EQ(c.mapped(), 10);
}

TEST_F(WarmStockTest, GoesWhenTheDeviceIsShort) {
  FakeClient& a = StartWith(3, {.name = "a"});
  ReturnAll(a);
  world_.device().FailNextCreate(absl::ResourceExhaustedError("no memory"));
  FakeClient& b = Start({.name = "b", .tenant = "other"});
  b.Ask({.at_least = 1});
  EXPECT_EQ(Stock(), Bytes(0));
  Advance(absl::Milliseconds(20));
  EXPECT_EQ(b.mapped(), 1);
}

TEST_F(WarmStockTest, GoesWithTheLastProcessOfItsTenant) {
  FakeClient& a = StartWith(3, {.name = "a", .tenant = "t"});
  FakeClient& b = StartWith(1, {.name = "b", .tenant = "t"});
  StartWith(1, {.name = "c", .tenant = "u"});
  a.Die();
  EXPECT_EQ(Stock(), MiB(3));
  b.Die();
  EXPECT_EQ(Stock(), Bytes(0));
  EXPECT_EQ(*world_.device().UsedBytes(), MiB(1));
}

TEST_F(WarmStockTest, IsNotKeptByABrokerThatDrains) {
  FakeClient& a = StartWith(3, {.name = "a"});
  const std::vector<PageName> pages = a.pages();
  a.Return(a.pool(), {pages[0]});
  EXPECT_EQ(Stock(), MiB(1));
  core().Drain();
  EXPECT_EQ(Stock(), Bytes(0));
  a.Return(a.pool(), {pages[1]});
  EXPECT_EQ(Stock(), Bytes(0));
}

TEST_F(CoreTest, PoolsOfTheDeadAreSortedBySize) {
  // The dead one leaves pages of two sizes; only one of them is of use.
  Open open = FakeWorld::OpenOf({.name = "b", .pools = 2});
  open.pools[0].handle_bytes = KiB(512);
  FakeClient& b = **world_.TryStart({.tenant = "uid:1"}, open);
  b.Ask({.pool = b.pool(0), .at_least = 4});
  b.Ask({.pool = b.pool(1), .at_least = 4});
  FakeClient& c = StartWith(4, {.name = "c"});
  c.manners().preempts = false;
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 3, .deadline = absl::Minutes(5)});
  Settle();
  const int64_t creates = world_.device().counts().creates;
  b.Die();
  Settle();
  EXPECT_EQ(a.mapped(), 3);
  EXPECT_EQ(world_.device().counts().creates, creates);
}

// ---- a failing backend -----------------------------------------------------

TEST_F(CoreTest, BackendFailureIsRolledBackAndTriedAgain) {
  FakeClient& a = Start({.name = "a"});
  world_.faults().SetPlan(FaultInjectingBackend::Call::kCreate, {.calls = {3}});
  a.Ask({.at_least = 5});
  Settle();
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_EQ(world_.Status("a").held, Bytes(0));
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
  EXPECT_THAT(world_.TakeLog("create-failed"),
              ElementsAre(HasSubstr("injected fault")));
  Advance(absl::Milliseconds(20));
  EXPECT_EQ(a.mapped(), 5);
}

TEST_F(CoreTest, BackendThatKeepsFailingRefusesAtTheDeadlineWithItsWords) {
  FakeClient& a = Start({.name = "a"});
  world_.faults().SetPlan(FaultInjectingBackend::Call::kCreate,
                          {.probability = 1});
  Sequence sequence = a.Ask({.at_least = 5, .deadline = absl::Seconds(1)});
  Advance(absl::Seconds(1));
  ASSERT_NE(a.refused(sequence), nullptr);
  EXPECT_THAT(a.refused(sequence)->reason, HasSubstr("injected fault"));
  EXPECT_EQ(world_.Status("a").held, Bytes(0));
  EXPECT_THAT(world_.TakeLog("create-failed"), SizeIs(testing::Le(51)));
}

TEST_F(CoreTest, SpeculativeClaimIsRefusedWhereTheBackendFails) {
  FakeClient& a = Start({.name = "a"});
  world_.device().FailNextCreate(absl::ResourceExhaustedError("no"));
  Sequence sequence = a.Ask({.at_least = 1, .urgency = Urgency::kSpeculative});
  Settle();
  ASSERT_NE(a.refused(sequence), nullptr);
  EXPECT_EQ(a.refused(sequence)->code, absl::StatusCode::kUnavailable);
}

TEST_F(CoreTest, WhatAFailedGrantLeavesServesTheNextClaim) {
  FakeClient& a = Start({.name = "a"});
  FakeClient& b = Start({.name = "b"});
  bool first = true;
  world_.device().OnCreate([&](Bytes) {
    if (!std::exchange(first, false)) return;
    // While the pages of `a` are made, all memory is charged to it: `b` waits.
    b.Ask({.at_least = 8, .deadline = absl::Minutes(1)});
    world_.device().FailNextCreate(absl::ResourceExhaustedError("no"));
  });
  a.Ask({.at_least = 8, .urgency = Urgency::kSpeculative});
  Settle();
  EXPECT_EQ(b.mapped(), 8);
}

TEST_F(CoreTest, ExportFailureIsTriedAgain) {
  FakeClient& a = Start({.name = "a"});
  world_.faults().SetPlan(FaultInjectingBackend::Call::kExport, {.calls = {1}});
  a.Ask({.at_least = 5});
  Settle();
  EXPECT_EQ(a.mapped(), 0);
  EXPECT_THAT(world_.TakeLog("export-failed"), SizeIs(1));
  Advance(absl::Milliseconds(20));
  EXPECT_EQ(a.mapped(), 5);
}

TEST_F(CoreTest, ExportFailureInTheMiddleSendsNothingTwice) {
  FakeClient& a = Start({.name = "a"});
  world_.faults().SetPlan(FaultInjectingBackend::Call::kExport, {.calls = {3}});
  a.Ask({.at_least = 5});
  Advance(absl::Milliseconds(20));
  EXPECT_EQ(a.mapped(), 5);
  uint32_t sent = 0;
  for (const FakeClient::Frame& frame : a.frames()) sent += frame.count;
  EXPECT_EQ(sent, 5);
}

// ---- operators -------------------------------------------------------------

TEST_F(CoreTest, UnknownNamesListThoseThatExist) {
  EXPECT_THAT(std::string(core().Explain({.name = "x"}).status().message()),
              HasSubstr("none exists"));
  Start({.name = "a"});
  Start({.name = "b"});
  for (const absl::Status& status :
       {core().Explain({.name = "x"}).status(),
        core().SetPolicy({.name = "x"}, {.max = MiB(1)}).status(),
        core().Delete({.name = "x"}, false).status(),
        core().Explain({.name = "a", .tenant = "x"}).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
    EXPECT_THAT(std::string(status.message()), HasSubstr("a, b"));
  }
}

TEST_F(CoreTest, TenantChoosesAmongInstancesOfOneName) {
  Start({.name = "a", .tenant = "t"});
  ASSERT_TRUE(core()
                  .SetPolicy({.name = "a", .tenant = "u"},
                             {.max = MiB(3), .preset = true})
                  .ok());
  absl::Status status = core().Explain({.name = "a"}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("t, u"));
  EXPECT_EQ(core().Explain({.name = "a", .tenant = "t"})->instance.max,
            MiB(10));
  EXPECT_EQ(core().Explain({.name = "a", .tenant = "u"})->instance.max, MiB(3));
}

TEST_F(CoreTest, ShareIsThatOfTheOwnTenantsInstance) {
  StartWith(4, {.name = "a", .tenant = "t"});
  ASSERT_TRUE(core()
                  .SetPolicy({.name = "a", .tenant = "u"},
                             {.max = MiB(3), .preset = true})
                  .ok());
  EXPECT_EQ(core().Explain({.name = "a", .tenant = "t"})->instance.share,
            MiB(4));
}

TEST_F(CoreTest, PresetLimitsWaitForTheirProcess) {
  EXPECT_EQ(core()
                .SetPolicy({.name = "a"}, {.max = MiB(3), .preset = true})
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(core()
                  .SetPolicy({.name = "a", .tenant = "uid:1"},
                             {.max = MiB(3), .preset = true})
                  .ok());
  EXPECT_EQ(Start({.name = "a", .max = MiB(9)}).opened().max, MiB(3));
}

TEST_F(CoreTest, OperatorsLimitsOutliveTheProcessForAnHour) {
  Start({.name = "a"});
  ASSERT_TRUE(SetMax("a", MiB(3)).ok());
  world_.clients()[0]->Die();
  Advance(absl::Minutes(59));
  EXPECT_EQ(Start({.name = "a", .max = MiB(9)}).opened().max, MiB(3));
  world_.clients()[1]->Die();
  Advance(absl::Minutes(60));
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
  EXPECT_EQ(Start({.name = "a", .max = MiB(9)}).opened().max, MiB(9));
}

TEST_F(CoreTest, ProcessesOwnLimitsGoWithIt) {
  Start({.name = "a", .max = MiB(3)}).Die();
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
}

TEST_F(CoreTest, InstanceWithAProcessIsDeletedByForceOnly) {
  FakeClient& a = StartWith(2, {.name = "a", .pid = 42});
  absl::StatusOr<std::vector<uint32_t>> pids =
      core().Delete({.name = "a"}, false);
  EXPECT_EQ(pids.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(pids.status().message()), HasSubstr("42"));
  pids = core().Delete({.name = "a"}, true);
  EXPECT_THAT(*pids, ElementsAre(42));
  Settle();
  EXPECT_THAT(a.fenced(), SizeIs(1));
  a.Die();
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
}

TEST_F(CoreTest, FencedSessionGetsNothingMore) {
  FakeClient& b = StartWith(9, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 3});
  b.Mark(1, Use::kIdle);
  Settle();
  ASSERT_NE(b.order(), nullptr);
  ASSERT_TRUE(core().Delete({.name = "a"}, /*force=*/true).ok());
  Settle();
  EXPECT_EQ(b.order(), nullptr);  // its claim is gone
  EXPECT_EQ(core().Snapshot().broker.stock, Bytes(0));
  Sequence more = a.Ask({.at_least = 1});
  Settle();
  ASSERT_NE(a.refused(more), nullptr);
  EXPECT_EQ(a.refused(more)->code, absl::StatusCode::kFailedPrecondition);
}

TEST_F(CoreTest, InstanceWithoutAProcessIsDeleted) {
  Start({.name = "a"});
  ASSERT_TRUE(SetMax("a", MiB(3)).ok());
  world_.clients()[0]->Die();
  EXPECT_THAT(*core().Delete({.name = "a"}, false), IsEmpty());
  EXPECT_THAT(core().Snapshot().instances, IsEmpty());
}

TEST_F(CoreTest, SnapshotShowsWhatIsAsked) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(2, Use::kCached);
  Settle();
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 3});
  Settle();
  EXPECT_EQ(world_.Status("a").waiting, MiB(3));
  EXPECT_EQ(world_.Status("a").pressure, "waiting");
  EXPECT_EQ(world_.Status("b").cached, MiB(2));
  EXPECT_EQ(world_.Status("b").in_use, MiB(8));
  EXPECT_GE(world_.Status("b").reclaims, 1);
}

TEST_F(CoreTest, DrainRefusesWhatWaitsAndWhatComes) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  Sequence waiting = a.Ask({.at_least = 2});
  b.Mark(1, Use::kIdle);
  Settle();
  core().Drain();
  Settle();
  EXPECT_NE(a.refused(waiting), nullptr);
  Sequence later = a.Ask({.at_least = 1});
  Settle();
  ASSERT_NE(a.refused(later), nullptr);
  EXPECT_EQ(a.refused(later)->code, absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::IsUnavailable(world_.TryStart({.name = "c"}).status()));
  EXPECT_TRUE(core().Snapshot().broker.draining);
  // What is lent stays, and may come back.
  EXPECT_EQ(b.mapped(), 9);
  b.Return(b.pool(), b.pages());
  Settle();
  EXPECT_EQ(*world_.device().UsedBytes(), Bytes(0));
}

TEST_F(CoreTest, ReturnThatNamesAPageBeingMadeTakesNothingOut) {
  FakeClient& a = StartWith(1, {.name = "a"});
  const PageName mapped = a.pages()[0];
  const PageName making = {PageIndex(mapped.index.value() + 1),
                           Generation(mapped.generation.value() + 1)};
  world_.device().OnCreate([&](Bytes) {
    world_.device().OnCreate(nullptr);
    EXPECT_EQ(core().Handle(a.id(), Return{a.pool(), {mapped, making}}).code(),
              absl::StatusCode::kFailedPrecondition);
  });
  a.Ask({.at_least = 1});
  Settle();
  a.Die();
  FakeClient& b = Start({.name = "b"});
  const Sequence all = b.Ask({.at_least = 10});
  Settle();
  EXPECT_NE(b.granted(all), nullptr);
}

TEST_F(CoreTest, FailedGrantIsNotTriedAgainAfterADrain) {
  FakeClient& a = Start({.name = "a"});
  world_.device().OnCreate([&](Bytes) {
    core().Drain();
    world_.device().FailNextCreate(absl::ResourceExhaustedError("no"));
  });
  Sequence sequence = a.Ask({.at_least = 1});
  Advance(absl::Seconds(1));
  EXPECT_NE(a.refused(sequence), nullptr);
  EXPECT_EQ(a.granted(sequence), nullptr);
}

// ---- time ------------------------------------------------------------------

TEST_F(CoreTest, NothingIsDueWhenNothingPends) {
  EXPECT_EQ(core().RunDue(), absl::InfiniteFuture());
  FakeClient& a = StartWith(4, {.name = "a"});
  a.Mark(4, Use::kIdle);
  Settle();
  EXPECT_EQ(core().RunDue(), absl::InfiniteFuture());
  EXPECT_EQ(world_.wakes(), 0);
}

TEST_F(CoreTest, WhatIsDueFirstIsSaid) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  const absl::Time start = world_.clock().Now();
  a.Ask({.at_least = 1, .deadline = absl::Minutes(1)});
  EXPECT_EQ(core().RunDue(), start + absl::Seconds(1));  // patience
  a.Ask({.at_least = 1, .deadline = absl::Milliseconds(300)});
  EXPECT_EQ(core().RunDue(), start + absl::Milliseconds(300));
}

TEST_F(CoreTest, WakeIsCalledWhenSomethingIsDueEarlierThanPromised) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().preempts = false;
  FakeClient& a = Start({.name = "a"});
  ASSERT_EQ(core().RunDue(), absl::InfiniteFuture());
  ASSERT_EQ(world_.wakes(), 0);
  a.Ask({.at_least = 1, .deadline = absl::Minutes(1)});
  EXPECT_EQ(world_.wakes(), 1);
  // Not due any earlier: no second call.
  a.Ask({.at_least = 1, .deadline = absl::Minutes(2)});
  EXPECT_EQ(world_.wakes(), 1);
  a.Ask({.at_least = 1, .deadline = absl::Milliseconds(1)});
  EXPECT_EQ(world_.wakes(), 2);
}

TEST_F(CoreTest, WhatRunDueDoesItselfNeedsNoWake) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.manners().answers_reclaims = false;
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 1});
  core().RunDue();
  const int wakes = world_.wakes();
  world_.clock().Advance(absl::Seconds(1));
  // Orders b to preempt, with a deadline that its answer tells.
  EXPECT_EQ(core().RunDue(), world_.clock().Now() + absl::Seconds(2));
  EXPECT_EQ(world_.wakes(), wakes);
}

TEST_F(CoreTest, IdleBrokerWithOrdersAnsweredIsQuiet) {
  FakeClient& b = StartWith(10, {.name = "b"});
  b.Mark(5, Use::kIdle);
  Settle();
  FakeClient& a = Start({.name = "a"});
  a.Ask({.at_least = 2});
  Settle();
  EXPECT_EQ(core().RunDue(), absl::InfiniteFuture());
}

// ---- many threads ----------------------------------------------------------

// Meant for ThreadSanitizer: every entry point at once, from several threads.
TEST(CoreThreads, HammeredFromAllSides) {
  FakeWorld world({.capacity = MiB(24), .device = MiB(64)});
  Core& core = world.core();
  std::atomic<bool> done = false;
  std::vector<std::thread> engines;
  std::vector<std::string> failures(6);
  for (int t = 0; t < 6; ++t) {
    engines.emplace_back([&, t] {
      std::mt19937_64 random(t);
      auto draw = [&](int below) { return static_cast<int>(random() % below); };
      for (int life = 0; life < 12; ++life) {
        const FakeEngine engine{.name = absl::StrCat("e", t % 4),
                                .tenant = t % 2 == 0 ? "t" : "u",
                                .handle = KiB(256 << (t % 3)),
                                .handles_per_page = t % 2 == 0 ? 1u : 3u};
        auto opened = FakeClient::Open(
            core, world.device(), world.clock(),
            {.tenant = engine.tenant, .pid = static_cast<uint32_t>(t + 1)},
            FakeWorld::OpenOf(engine));
        if (!opened.ok()) {
          failures[t] = std::string(opened.status().message());
          return;
        }
        FakeClient& client = **opened;
        for (int step = 0; step < 60; ++step) {
          switch (draw(7)) {
            case 0:
            case 1:
              client.Ask({.want = 4,
                          .at_least = 1 + draw(4),
                          .urgency = static_cast<Urgency>(1 + draw(3)),
                          .deadline = absl::Milliseconds(1 + draw(3000)),
                          .credit = draw(8) == 0});
              break;
            case 2:
              client.Mark(draw(4), static_cast<Use>(draw(3)));
              break;
            case 3: {
              std::vector<PageName> pages = client.pages();
              pages.resize(std::min<size_t>(pages.size(), draw(3)));
              client.Return(client.pool(), pages);
              break;
            }
            case 4:
              client.Cancel(Sequence(1 + draw(60)));
              break;
            case 5:
              client.Resend(Sequence(1 + draw(60)));
              break;
            case 6:
              client.Report();
              break;
          }
          client.Pump();
        }
        if (draw(3) == 0) client.HangUp();
        client.Die();
        if (!client.error().ok()) {
          failures[t] = std::string(client.error().message());
        } else if (!client.complaints().empty()) {
          failures[t] = client.complaints().front();
        }
      }
    });
  }
  std::thread timer([&] {
    while (!done) {
      world.clock().Advance(absl::Milliseconds(5));
      core.RunDue();
    }
  });
  std::thread admin([&] {
    std::mt19937_64 random(99);
    while (!done) {
      const InstanceSelector which{.name = absl::StrCat("e", random() % 4),
                                   .tenant = random() % 2 == 0 ? "t" : "u"};
      core.Snapshot();
      core.SetPolicy(which, {.max = MiB(4 + random() % 24), .weight = 2})
          .status()
          .IgnoreError();
      core.Explain(which).status().IgnoreError();
      core.Delete(which, /*force=*/false).status().IgnoreError();
      EXPECT_EQ(core.CheckInvariants(), absl::OkStatus());
    }
  });
  for (std::thread& thread : engines) thread.join();
  done = true;
  timer.join();
  admin.join();
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  EXPECT_EQ(core.CheckInvariants(), absl::OkStatus());
  EXPECT_EQ(world.device().CheckInvariants(), absl::OkStatus());
  world.Advance(absl::Seconds(1));  // what is in stock decays
  EXPECT_EQ(*world.device().UsedBytes(), Bytes(0));
  EXPECT_EQ(core.Snapshot().broker.held, Bytes(0));
  EXPECT_EQ(core.Snapshot().broker.sessions, 0);
}

}  // namespace
}  // namespace kvbroker
