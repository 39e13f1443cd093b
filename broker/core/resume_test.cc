// What outlives a connection or a broker, by what the core is told and tells.
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/clock.h"
#include "broker/core/core.h"
#include "broker/device/fake_backend.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr Bytes kPage = MiB(1);
constexpr Bytes kCapacity = MiB(10);

// Keeps what it is told.
class Ear : public SessionListener {
 public:
  void Tell(BrokerMessage message) override {
    if (auto* said = std::get_if<Opened>(&message)) opened = *said;
    if (auto* said = std::get_if<Granted>(&message)) granted.push_back(*said);
    if (auto* said = std::get_if<Refused>(&message)) refused.push_back(*said);
    if (auto* said = std::get_if<Reclaim>(&message)) orders.push_back(*said);
  }
  void SendDescriptors(GrantId, uint32_t, std::vector<UniqueFd>) override {}
  void Close(const absl::Status& reason) override { closed = reason; }

  Opened opened;
  std::vector<Granted> granted;
  std::vector<Refused> refused;
  std::vector<Reclaim> orders;
  std::optional<absl::Status> closed;
};

// One engine's sessions, one after the other.
struct Engine {
  Peer peer;
  std::string name = "a";
  std::shared_ptr<Ear> ear;
  NameConflict name_conflict = NameConflict::kJoin;

  SessionId session() const { return ear->opened.session; }
  PoolId pool() const { return ear->opened.pools[0]; }
};

class ResumeTest : public ::testing::Test {
 protected:
  void SetUp() override { Restart(Remembered{}); }
  void TearDown() override {
    EXPECT_EQ(core_->CheckInvariants(), absl::OkStatus());
  }

  void Restart(Remembered remembered, Bytes capacity = kCapacity) {
    core_.reset();
    device_ =
        std::make_unique<FakeBackend>(FakeBackendOptions{.total = MiB(16)});
    CoreOptions options;
    options.backend = device_.get();
    options.clock = &clock_;
    options.capacity = capacity;
    options.incarnation = ++incarnation_;
    options.remembered = std::move(remembered);
    options.remember = [this](bool) { ++remembers_; };
    options.log = [this](std::string_view line) { log_.emplace_back(line); };
    core_ = *Core::Create(std::move(options));
  }
  void Restart() { Restart(core_->Remember()); }

  static Engine AnEngine(uint32_t pid, std::string name = "a",
                         std::string tenant = "uid:1") {
    return {.peer = {.tenant = std::move(tenant),
                     .uid = 1,
                     .pid = pid,
                     .start_time = pid * 10},
            .name = std::move(name)};
  }

  absl::Status TryOpen(Engine& engine,
                       std::optional<Resuming> resuming = std::nullopt,
                       uint32_t max_pages = 100) {
    Open open;
    open.instance = engine.name;
    open.pools.push_back({.handle_bytes = kPage, .max_pages = max_pages});
    open.resuming = resuming;
    open.name_conflict = engine.name_conflict;
    engine.ear = std::make_shared<Ear>();
    return core_->OpenSession(engine.peer, open, engine.ear).status();
  }
  void OpenFresh(Engine& engine) {
    ASSERT_EQ(TryOpen(engine), absl::OkStatus());
  }
  // Opens anew, going on from the engine's last session.
  absl::Status OpenAgain(Engine& engine) {
    const Opened& last = engine.ear->opened;
    return TryOpen(engine, Resuming{last.incarnation, last.session});
  }
  absl::Status Say(Engine& engine, std::vector<PageName> pages, bool last) {
    return core_->Handle(engine.session(),
                         Resume{engine.pool(), std::move(pages), last});
  }

  void Ask(Engine& engine, PageCount pages,
           Urgency urgency = Urgency::kWaiting) {
    Acquire acquire;
    acquire.sequence = Sequence(++sequence_);
    acquire.pool = engine.pool();
    acquire.want = acquire.at_least = pages;
    acquire.urgency = urgency;
    acquire.deadline = absl::Minutes(1);
    ASSERT_EQ(core_->Handle(engine.session(), acquire), absl::OkStatus());
  }
  // Asks, gets and maps.
  std::vector<PageName> Get(Engine& engine, PageCount pages) {
    const size_t before = engine.ear->granted.size();
    Ask(engine, pages);
    if (engine.ear->granted.size() != before + 1) {
      ADD_FAILURE() << "not granted at once";
      return {};
    }
    const Granted& granted = engine.ear->granted.back();
    EXPECT_TRUE(
        core_->Handle(engine.session(), Mapped{granted.grant, {}}).ok());
    return granted.pages;
  }

  Bytes Held(const std::string& name) {
    for (const InstanceStatus& instance : core_->Snapshot().instances) {
      if (instance.name == name) return instance.held;
    }
    return Bytes(0);
  }
  void Advance(absl::Duration by) {
    clock_.Advance(by);
    core_->RunDue();
  }
  bool Logged(const std::string& words) const {
    for (const std::string& line : log_) {
      if (line.find(words) != line.npos) return true;
    }
    return false;
  }

  FakeClock clock_;
  std::unique_ptr<FakeBackend> device_;
  std::unique_ptr<Core> core_;
  uint64_t incarnation_ = 0;
  uint64_t sequence_ = 0;
  int remembers_ = 0;
  std::vector<std::string> log_;
};

// ---- over a restart --------------------------------------------------------

TEST_F(ResumeTest, NamesOfThoseWhoAreExpectedBackAreInUse) {
  Engine old = AnEngine(11), next = AnEngine(12);
  OpenFresh(old);
  Restart();
  next.name_conflict = NameConflict::kError;
  const absl::Status taken = TryOpen(next);
  EXPECT_TRUE(absl::IsFailedPrecondition(taken)) << taken;
  EXPECT_THAT(std::string(taken.message()), ::testing::HasSubstr("pids 11"));
  next.name_conflict = NameConflict::kSuffix;
  OpenFresh(next);
  EXPECT_EQ(next.ear->opened.instance, "a_1");
  // Who resumes keeps its name, whatever it wishes.
  old.name_conflict = NameConflict::kError;
  ASSERT_EQ(OpenAgain(old), absl::OkStatus());
  EXPECT_EQ(old.ear->opened.instance, "a");
  ASSERT_EQ(Say(old, {}, /*last=*/true), absl::OkStatus());
}

TEST_F(ResumeTest, WhoResumesJoinsWhoHasTakenItsName) {
  Engine old = AnEngine(11), next = AnEngine(12);
  OpenFresh(old);
  core_->HungUp(old.session());  // its connection broke; it is not dying
  next.name_conflict = NameConflict::kSuffix;
  OpenFresh(next);
  EXPECT_EQ(next.ear->opened.instance, "a");
  old.name_conflict = NameConflict::kSuffix;
  ASSERT_EQ(OpenAgain(old), absl::OkStatus());
  EXPECT_EQ(old.ear->opened.instance, "a");
  EXPECT_THAT(old.ear->opened.joined_pids, ::testing::IsEmpty());
  ASSERT_EQ(Say(old, {}, /*last=*/true), absl::OkStatus());
}

TEST_F(ResumeTest, WhatAnEngineHoldsIsAdoptedAndCounts) {
  Engine a = AnEngine(10);
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 4);
  Restart();
  EXPECT_EQ(Held("a"), Bytes(0));
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  EXPECT_EQ(a.ear->opened.feature_bits, kFeatures);
  ASSERT_EQ(Say(a, {pages[0], pages[1]}, false), absl::OkStatus());
  ASSERT_EQ(Say(a, {pages[3]}, true), absl::OkStatus());
  EXPECT_EQ(Held("a"), kPage * 3);

  // New pages get generations of their own.
  for (PageName page : Get(a, 2)) {
    for (PageName old : pages) EXPECT_NE(page.generation, old.generation);
  }
  EXPECT_EQ(Held("a"), kPage * 5);
  // Of adopted pages there is nothing to release.
  ASSERT_EQ(core_->Handle(a.session(), Return{a.pool(), {pages[0]}}),
            absl::OkStatus());
  EXPECT_EQ(Held("a"), kPage * 4);
  core_->ProcessGone(a.session());
  EXPECT_EQ(core_->Snapshot().broker.held, Bytes(0));
}

TEST_F(ResumeTest, NothingIsGrantedUntilAllAreBack) {
  Engine a = AnEngine(10, "a"), b = AnEngine(11, "b"), c = AnEngine(12, "c");
  OpenFresh(a);
  OpenFresh(b);
  const std::vector<PageName> pages = Get(a, 8);
  Get(b, 1);
  Restart();

  // c is new, and would get what is a's.
  OpenFresh(c);
  Ask(c, 1, Urgency::kSpeculative);
  ASSERT_THAT(c.ear->refused, SizeIs(1));
  EXPECT_THAT(c.ear->refused[0].reason, HasSubstr("restarted"));
  EXPECT_THAT(c.ear->refused[0].reason, HasSubstr("a, b"));
  Ask(c, 4);
  EXPECT_THAT(c.ear->granted, IsEmpty());

  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  ASSERT_EQ(Say(a, pages, true), absl::OkStatus());
  EXPECT_THAT(c.ear->granted, IsEmpty());
  // b died while there was no broker.
  core_->ExpectedGone(b.peer);
  EXPECT_THAT(c.ear->granted, IsEmpty()) << "8 of 10 are lent";
  ASSERT_EQ(core_->Handle(a.session(),
                          Return{a.pool(), {pages.begin(), pages.begin() + 2}}),
            absl::OkStatus());
  EXPECT_THAT(c.ear->granted, SizeIs(1));
}

TEST_F(ResumeTest, TheGraceEndsByItself) {
  Engine a = AnEngine(10, "a"), c = AnEngine(12, "c");
  OpenFresh(a);
  Get(a, 8);
  Restart();
  OpenFresh(c);
  Ask(c, 4);
  Advance(absl::Milliseconds(4900));
  EXPECT_THAT(c.ear->granted, IsEmpty());
  Advance(absl::Milliseconds(200));
  EXPECT_THAT(c.ear->granted, SizeIs(1));
}

TEST_F(ResumeTest, WhoComesTooLateOverdrawsAndNobodyGetsMore) {
  Engine a = AnEngine(10, "a"), c = AnEngine(12, "c");
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 8);
  Restart();
  OpenFresh(c);
  Advance(absl::Seconds(6));
  std::vector<PageName> others = Get(c, 6);
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  ASSERT_EQ(Say(a, pages, true), absl::OkStatus());
  EXPECT_EQ(core_->Snapshot().broker.held, kPage * 14);
  EXPECT_TRUE(Logged(absl::StrCat("overdrawn=", MiB(4).count())));

  Ask(a, 1);
  EXPECT_THAT(a.ear->granted, IsEmpty());
  auto give_back = [&](size_t first, size_t count) {
    ASSERT_EQ(
        core_->Handle(c.session(), Return{c.pool(),
                                          {others.begin() + first,
                                           others.begin() + first + count}}),
        absl::OkStatus());
  };
  give_back(0, 4);
  EXPECT_THAT(a.ear->granted, IsEmpty()) << "that was the overdraft";
  give_back(4, 1);
  EXPECT_THAT(a.ear->granted, SizeIs(1));
}

TEST_F(ResumeTest, OnlyWhoWasConnectedMayClaimPages) {
  Engine a = AnEngine(10);
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 2);
  const Opened last = a.ear->opened;
  Restart();
  Engine other_process = AnEngine(11);
  Engine reused_pid = AnEngine(10);
  reused_pid.peer.start_time = 999;
  Engine other_tenant = AnEngine(10, "a", "uid:2");
  for (Engine* engine : {&other_process, &reused_pid, &other_tenant}) {
    ASSERT_EQ(TryOpen(*engine, Resuming{last.incarnation, last.session}),
              absl::OkStatus());
    EXPECT_TRUE(absl::IsPermissionDenied(Say(*engine, pages, true)));
    // Who lists nothing is as one that starts.
    core_->ProcessGone(engine->session());
    ASSERT_EQ(TryOpen(*engine, Resuming{last.incarnation, last.session}),
              absl::OkStatus());
    EXPECT_EQ(Say(*engine, {}, true), absl::OkStatus());
    core_->ProcessGone(engine->session());
  }
  EXPECT_EQ(OpenAgain(a), absl::OkStatus());
  EXPECT_EQ(Say(a, pages, true), absl::OkStatus());
}

TEST_F(ResumeTest, WithoutARecordAnybodyMayWithinTheGrace) {
  Engine a = AnEngine(10), b = AnEngine(11, "b");
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 2);
  b.ear = a.ear;
  Restart({.incomplete = true, .hold = true});
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  ASSERT_EQ(Say(a, pages, true), absl::OkStatus());
  Ask(a, 1);
  EXPECT_THAT(a.ear->granted, IsEmpty()) << "others may come as well";
  Advance(absl::Seconds(6));
  EXPECT_THAT(a.ear->granted, SizeIs(1));
  ASSERT_EQ(OpenAgain(b), absl::OkStatus());
  EXPECT_TRUE(absl::IsPermissionDenied(Say(b, pages, true)));
}

TEST_F(ResumeTest, NobodyCanHoldMoreThanTheDeviceHas) {
  Engine a = AnEngine(10);
  OpenFresh(a);
  Get(a, 1);
  Restart();
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  std::vector<PageName> pages;
  for (uint32_t i = 0; i < 17; ++i) {
    pages.push_back({PageIndex(i), Generation(i + 1)});
  }
  EXPECT_TRUE(absl::IsPermissionDenied(Say(a, pages, true)));
}

TEST_F(ResumeTest, NonsenseEndsTheSession) {
  Engine a = AnEngine(10);
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 2);
  const Opened last = a.ear->opened;
  EXPECT_TRUE(absl::IsFailedPrecondition(Say(a, {}, true)))
      << "it was not opened to resume";
  Restart();
  auto said = [&](std::vector<PageName> list) {
    EXPECT_EQ(TryOpen(a, Resuming{last.incarnation, last.session}),
              absl::OkStatus());
    absl::Status status = Say(a, std::move(list), true);
    core_->ProcessGone(a.session());
    return status;
  };
  EXPECT_TRUE(absl::IsInvalidArgument(said({pages[0], pages[0]})));
  EXPECT_TRUE(absl::IsInvalidArgument(said({{PageIndex(100), Generation(1)}})));
  EXPECT_TRUE(absl::IsInvalidArgument(said({{PageIndex(0), Generation(0)}})));

  ASSERT_EQ(TryOpen(a, Resuming{last.incarnation, last.session}),
            absl::OkStatus());
  EXPECT_TRUE(absl::IsFailedPrecondition(
      core_->Handle(a.session(), Return{a.pool(), pages})))
      << "before the last Resume";
}

TEST_F(ResumeTest, ThoseWhoAreStillToResumeOutliveASecondRestart) {
  Engine a = AnEngine(10, "a"), b = AnEngine(11, "b");
  OpenFresh(a);
  OpenFresh(b);
  const std::vector<PageName> pages = Get(a, 3);
  const std::vector<PageName> others = Get(b, 3);
  Restart();
  ASSERT_EQ(OpenAgain(b), absl::OkStatus());
  ASSERT_EQ(Say(b, others, true), absl::OkStatus());
  Restart();
  EXPECT_THAT(core_->Remember().sessions, SizeIs(2));
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  ASSERT_EQ(Say(a, pages, true), absl::OkStatus());
  EXPECT_EQ(Held("a"), kPage * 3);
}

// ---- over a broken connection ----------------------------------------------

TEST_F(ResumeTest, PagesGoOnInTheNextSessionOfTheProcess) {
  Engine a = AnEngine(10);
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 4);
  const std::shared_ptr<Ear> old = a.ear;
  // The broker has not noticed the end of the first connection.
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  EXPECT_TRUE(old->closed.has_value());
  ASSERT_EQ(Say(a, {pages[0], pages[2]}, true), absl::OkStatus());
  EXPECT_EQ(Held("a"), kPage * 2);
  EXPECT_EQ(device_->live_handles(), 2) << "what was not listed is released";
  EXPECT_EQ(core_->Snapshot().broker.sessions, 1u);
  // Handles have moved along: returned, they are released.
  ASSERT_EQ(core_->Handle(a.session(), Return{a.pool(), {pages[0]}}),
            absl::OkStatus());
  EXPECT_EQ(device_->live_handles(), 1);
  // The old session's end means nothing any more.
  core_->ProcessGone(SessionId(1));
  EXPECT_EQ(Held("a"), kPage);
}

TEST_F(ResumeTest, AThirdSessionGoesOnFromAHalfResumedSecond) {
  Engine a = AnEngine(10);
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 4);
  core_->HungUp(a.session());
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  ASSERT_EQ(Say(a, {pages[0]}, false), absl::OkStatus());
  core_->HungUp(a.session());
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  core_->HungUp(a.session());  // before it said anything
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  ASSERT_EQ(Say(a, {pages[0], pages[3]}, true), absl::OkStatus());
  EXPECT_EQ(Held("a"), kPage * 2);
  EXPECT_EQ(device_->live_handles(), 2);
  EXPECT_EQ(core_->Snapshot().broker.sessions, 1u);
}

// Keeps what it is told, once another session has gone on for its own.
class OvertakenEar : public Ear {
 public:
  explicit OvertakenEar(std::function<void(const Opened&)> overtake)
      : overtake_(std::move(overtake)) {}
  void Tell(BrokerMessage message) override {
    if (auto* said = std::get_if<Opened>(&message)) overtake_(*said);
    Ear::Tell(std::move(message));
  }
  void Forgotten() override { forgotten = true; }
  bool forgotten = false;

 private:
  std::function<void(const Opened&)> overtake_;
};

// Numbers of sessions can be guessed.
TEST_F(ResumeTest, ASessionMayBeGoneOnFromBeforeItsOpenHasReturned) {
  Engine engine = AnEngine(7);
  auto ear = std::make_shared<OvertakenEar>([&](const Opened& opened) {
    EXPECT_EQ(TryOpen(engine, Resuming{opened.incarnation, opened.session}),
              absl::OkStatus());
  });
  Open open;
  open.instance = engine.name;
  open.pools.push_back({.handle_bytes = kPage, .max_pages = 100});
  EXPECT_TRUE(core_->OpenSession(engine.peer, open, ear).ok());
  EXPECT_TRUE(ear->forgotten);
  EXPECT_EQ(Say(engine, {}, /*last=*/true), absl::OkStatus());
}

TEST_F(ResumeTest, NobodyGoesOnFromAnothersSession) {
  Engine a = AnEngine(10), b = AnEngine(11);
  OpenFresh(a);
  Get(a, 1);
  b.ear = a.ear;
  EXPECT_TRUE(absl::IsPermissionDenied(OpenAgain(b)));
  EXPECT_EQ(
      TryOpen(a, Resuming{incarnation_, a.session()}, /*max_pages=*/7).code(),
      absl::StatusCode::kInvalidArgument)
      << "other pools";
}

TEST_F(ResumeTest, APageThatWasNeverLentIsNotMoved) {
  Engine a = AnEngine(10);
  OpenFresh(a);
  const std::vector<PageName> pages = Get(a, 1);
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  EXPECT_TRUE(absl::IsPermissionDenied(
      Say(a, {pages[0], {PageIndex(50), Generation(9)}}, true)));
}

// ---- limits ----------------------------------------------------------------

TEST_F(ResumeTest, AnOperatorsLimitsAreBackBeforeTheEngineIs) {
  Engine a = AnEngine(10), b = AnEngine(11, "b");
  OpenFresh(a);
  OpenFresh(b);
  ASSERT_TRUE(core_
                  ->SetPolicy({.name = "a"},
                              {.min = MiB(2), .max = MiB(3), .weight = 2})
                  .ok());
  EXPECT_GT(remembers_, 0);
  const Remembered remembered = core_->Remember();
  ASSERT_THAT(remembered.limits, SizeIs(1)) << "b's are its own";
  core_->ProcessGone(b.session());
  Restart(remembered);
  absl::StatusOr<Explanation> a_is = core_->Explain({.name = "a"});
  ASSERT_TRUE(a_is.ok());
  EXPECT_EQ(a_is->instance.max, MiB(3));
  EXPECT_EQ(a_is->instance.min, MiB(2));
  EXPECT_EQ(a_is->instance.weight, 2);
  ASSERT_EQ(OpenAgain(a), absl::OkStatus());
  EXPECT_EQ(a.ear->opened.max, MiB(3));
  EXPECT_EQ(a.ear->opened.limit_revision, remembered.limits[0].revision);
}

TEST_F(ResumeTest, UnusedLimitsAreForgottenAnHourAfterTheLastProcess) {
  ASSERT_TRUE(core_
                  ->SetPolicy({.name = "x", .tenant = "uid:1"},
                              {.max = MiB(3), .preset = true})
                  .ok());
  Advance(absl::Minutes(40));
  Remembered remembered = core_->Remember();
  EXPECT_EQ(remembered.limits[0].unused_for, absl::Minutes(40));
  Restart(remembered);
  Advance(absl::Minutes(19));
  EXPECT_TRUE(core_->Explain({.name = "x"}).ok());
  Advance(absl::Minutes(2));
  EXPECT_FALSE(core_->Explain({.name = "x"}).ok());
}

TEST_F(ResumeTest, GuaranteesThatNoLongerFitAreDroppedAndSaid) {
  Restart(
      {.limits = {
           {.tenant = "uid:1", .name = "x", .min = MiB(6), .max = MiB(20)},
           {.tenant = "uid:1", .name = "y", .min = MiB(6), .max = MiB(20)}}});
  EXPECT_EQ(core_->Explain({.name = "x"})->instance.min, MiB(6));
  EXPECT_EQ(core_->Explain({.name = "y"})->instance.min, Bytes(0));
  EXPECT_TRUE(Logged("more is guaranteed than there is"));
}

}  // namespace
}  // namespace kvbroker
