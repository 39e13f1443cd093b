// A good history breaks no rule; one that is broken in one way breaks just
// that.
#include "tests/history/history_checker.h"

#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using Kind = HistoryEvent::Kind;
using client::MappingEvent;

constexpr Bytes kPage = Bytes(10);

PageName Page(uint32_t index, uint32_t generation) {
  return {PageIndex(index), Generation(generation)};
}

// Writes histories as a broker and its processes would, the sums included.
// Session s is process 100 + s and has the pool 10 + s.
class HistoryCheckerTest : public testing::Test {
 protected:
  struct Figures {
    std::string tenant, name;
    Bytes min, max, lent, credit;
  };

  HistoryCheckerTest() {
    HistoryEvent& start = Event(Kind::kStart);
    start.capacity = Bytes(100);
    start.incarnation = 1;
  }

  // ---- the broker
  // -------------------------------------------------------------
  HistoryEvent& Event(Kind kind) {
    HistoryEvent event;
    event.kind = kind;
    event.number = ++number_;
    event.at = Tick();
    event.lent = lent_;
    event.credit = credit_;
    event.releasing = releasing_;
    return events_.emplace_back().emplace<HistoryEvent>(std::move(event));
  }
  HistoryEvent& Event(Kind kind, uint64_t session) {
    HistoryEvent& event = Event(kind);
    const Figures& of = FiguresOf(session);
    event.tenant = of.tenant;
    event.instance = of.name;
    event.held = of.lent + of.credit;
    event.instance_credit = of.credit;
    event.min = of.min;
    event.max = of.max;
    event.session = SessionId(session);
    event.pool = PoolId(10 + session);
    return event;
  }
  void Open(uint64_t session, std::string tenant, Bytes min, Bytes max) {
    Mapping(MappingEvent::Kind::kPool, session);
    FiguresOf(session) = {
        std::move(tenant), std::string(1, 'a' + session), min, max, {}, {}};
    HistoryEvent& event = Event(Kind::kOpen, session);
    event.pid = static_cast<uint32_t>(100 + session);
    event.pools = {{event.pool, kPage}};
  }
  HistoryEvent& Grant(uint64_t session, std::vector<PageName> pages,
                      Bytes drawn = Bytes(0)) {
    const Bytes bytes = kPage * static_cast<int64_t>(pages.size());
    FiguresOf(session).lent += bytes;
    FiguresOf(session).credit -= drawn;
    lent_ += bytes;
    credit_ -= drawn;
    HistoryEvent& event = Event(Kind::kGrant, session);
    event.pages = std::move(pages);
    event.drawn = drawn;
    return event;
  }
  void Back(uint64_t session, std::vector<PageName> pages) {
    const Bytes bytes = kPage * static_cast<int64_t>(pages.size());
    FiguresOf(session).lent -= bytes;
    lent_ -= bytes;
    releasing_ += bytes;
    Event(Kind::kBack, session).pages = std::move(pages);
  }
  void Credit(uint64_t session, Bytes bytes) {
    credit_ += bytes - FiguresOf(session).credit;
    FiguresOf(session).credit = bytes;
    Event(Kind::kCredit, session);
  }
  void Limits(uint64_t session, Bytes min, Bytes max) {
    FiguresOf(session).min = min;
    FiguresOf(session).max = max;
    Event(Kind::kLimits, session);
  }
  void Order(uint64_t session, PageCount hold_at_most, Bytes for_others) {
    HistoryEvent& event = Event(Kind::kOrder, session);
    event.hold_at_most = hold_at_most;
    event.for_others = for_others;
  }
  void Gone(uint64_t session, std::string why = "process gone") {
    const Bytes bytes = FiguresOf(session).lent - moved_[session];
    FiguresOf(session).lent -= bytes;
    credit_ -= std::exchange(FiguresOf(session).credit, Bytes(0));
    lent_ -= bytes;
    releasing_ += bytes;
    HistoryEvent& event = Event(Kind::kGone, session);
    event.bytes = bytes;
    event.pid = static_cast<uint32_t>(100 + session);
    event.why = std::move(why);
  }
  // The process of session `earlier` opens another one, of the same instance.
  void Reopen(uint64_t earlier, uint64_t session) {
    instance_of_[session] = earlier;
    HistoryEvent& event = Event(Kind::kOpen, session);
    event.pid = static_cast<uint32_t>(100 + earlier);
    event.pools = {{event.pool, kPage}};
  }
  // `from` a session, or 0: adopted.
  void Resume(uint64_t session, PageName page, uint64_t from) {
    if (from == 0) {
      FiguresOf(session).lent += kPage;
      lent_ += kPage;
    } else {
      moved_[from] += kPage;
    }
    HistoryEvent& event = Event(Kind::kResume, session);
    event.pages = {page};
    if (from != 0) event.from = PoolId(10 + from);
  }
  void Released(Bytes bytes) {
    releasing_ -= bytes;
    Event(Kind::kReleased).bytes = bytes;
  }
  void Drain() { Event(Kind::kDrain); }

  // ---- the processes
  // ----------------------------------------------------------
  MappingEvent& Mapping(MappingEvent::Kind kind, uint64_t session) {
    return events_.emplace_back().emplace<MappingEvent>(
        MappingEvent{.kind = kind,
                     .at = Tick(),
                     .pid = static_cast<uint32_t>(100 + session)});
  }
  void Map(uint64_t session, uint32_t page, uint64_t memory) {
    MappingEvent& event = Mapping(MappingEvent::Kind::kMap, session);
    event.page = PageIndex(page);
    event.memory = {{1, memory}};
  }
  void Unmap(uint64_t session, uint32_t page) {
    Mapping(MappingEvent::Kind::kUnmap, session).page = PageIndex(page);
  }
  void Exited(uint64_t session) {
    events_.emplace_back().emplace<ProcessExited>(
        ProcessExited{Tick(), static_cast<uint32_t>(100 + session)});
  }

  void Pass(absl::Duration by) { now_ += by; }
  absl::Time Tick() { return now_ += absl::Milliseconds(1); }

  // Two tenants, memory that passes on within one of them, an order, credit, a
  // limit, a death.
  void GoodHistory() {
    Open(1, "t", Bytes(20), Bytes(60));
    Open(2, "t", Bytes(0), Bytes(100));
    Open(3, "u", Bytes(0), Bytes(100));
    Grant(1, {Page(0, 1), Page(1, 2), Page(2, 3), Page(3, 4)});
    for (uint32_t page = 0; page < 4; ++page) Map(1, page, 50 + page);
    Grant(2, {Page(0, 1), Page(1, 2), Page(2, 3)});
    Map(2, 0, 60);
    Map(2, 1, 61);
    Map(2, 2, 62);
    Order(1, 2, Bytes(20));
    Unmap(1, 3);
    Unmap(1, 2);
    Back(1, {Page(3, 4), Page(2, 3)});
    Released(Bytes(20));
    Credit(3, Bytes(20));
    Grant(3, {Page(0, 1)}, Bytes(10));
    Map(3, 0, 70);
    Credit(3, Bytes(0));
    // Above its new limit, and down to it, less than a page too much.
    Limits(2, Bytes(15), Bytes(15));
    Order(2, 1, Bytes(0));
    Unmap(2, 1);
    Unmap(2, 2);
    Back(2, {Page(1, 2), Page(2, 3)});
    // Dies, and a page of it goes on to its tenant's other instance.
    Exited(1);
    Gone(1);
    Released(Bytes(40));
    Limits(2, Bytes(0), Bytes(100));
    Grant(2, {Page(1, 4)});
    Map(2, 1, 51);
  }

  // Runs the checker; which rules are broken, each named once.
  std::vector<std::string> Broken() {
    HistoryChecker checker;
    for (size_t i = 0; i < events_.size(); ++i) {
      std::visit([&](const auto& event) { checker.Add(i, event); }, events_[i]);
    }
    checker.Finish();
    violations_ = checker.violations();
    statistics_ = checker.statistics();
    std::vector<std::string> broken;
    for (size_t i = 0; i < kRules; ++i) {
      if (statistics_.violations[i] > 0) {
        broken.emplace_back(NameOf(static_cast<Rule>(i)));
      }
    }
    return broken;
  }

  std::vector<std::variant<HistoryEvent, MappingEvent, ProcessExited>> events_;
  std::vector<Violation> violations_;
  HistoryStatistics statistics_;

 private:
  Figures& FiguresOf(uint64_t session) {
    auto other = instance_of_.find(session);
    return figures_[other == instance_of_.end() ? session : other->second];
  }

  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
  uint64_t number_ = 0;
  Bytes lent_, credit_, releasing_;
  std::map<uint64_t, Figures> figures_;
  std::map<uint64_t, uint64_t> instance_of_;  // of sessions that came later
  std::map<uint64_t, Bytes> moved_;           // out of a session, into another
};

TEST_F(HistoryCheckerTest, AGoodHistoryBreaksNothing) {
  GoodHistory();
  Drain();
  EXPECT_THAT(Broken(), IsEmpty()) << violations_[0].what;
  EXPECT_EQ(statistics_.events, events_.size());
  EXPECT_EQ(statistics_.processes, 3);
  EXPECT_EQ(statistics_.grants, 4);
  EXPECT_EQ(statistics_.pages, 9);
  EXPECT_EQ(statistics_.intervals, 9);
  EXPECT_EQ(statistics_.passed_on, 1);
  EXPECT_EQ(statistics_.orders, 2);
  EXPECT_EQ(statistics_.deaths, 1);
  EXPECT_EQ(statistics_.unjudged_deaths, 0);
  EXPECT_EQ(statistics_.unmatched_mappings, 0);
}

// ---- one-owner, tenant, lent ------------------------------------------------

TEST_F(HistoryCheckerTest, OneOwnerMemoryMappedByTwoProcesses) {
  GoodHistory();
  Grant(2, {Page(2, 5)});
  Map(2, 2, 51);  // which its page 1 is
  EXPECT_THAT(Broken(), ElementsAre("one-owner"));
  ASSERT_THAT(violations_, SizeIs(1));
  EXPECT_THAT(violations_[0].events,
              ElementsAre(events_.size() - 3, events_.size() - 1));
}

TEST_F(HistoryCheckerTest, OneOwnerTwoPagesInOnePlace) {
  GoodHistory();
  Map(2, 1, 99);
  EXPECT_THAT(Broken(), ElementsAre("one-owner"));
}

TEST_F(HistoryCheckerTest, OneOwnerHoldsAcrossBrokers) {
  GoodHistory();
  HistoryEvent& start = Event(Kind::kStart);
  start.number = 1;
  start.capacity = Bytes(100);
  start.lent = start.releasing = Bytes(0);
  Mapping(MappingEvent::Kind::kPool, 7);
  Map(7, 0, 60);
  EXPECT_THAT(Broken(), ElementsAre("one-owner"));
}

TEST_F(HistoryCheckerTest, TenantMemoryPassesToAnother) {
  GoodHistory();
  Grant(3, {Page(1, 2)});
  Map(3, 1, 52);  // was process 1's
  EXPECT_THAT(Broken(), ElementsAre("tenant"));
}

TEST_F(HistoryCheckerTest, LentMappedWithoutAGrant) {
  GoodHistory();
  Map(2, 7, 99);
  EXPECT_THAT(Broken(), ElementsAre("lent"));
}

TEST_F(HistoryCheckerTest, LentMappedAfterItsReturn) {
  GoodHistory();
  Map(2, 2, 62);
  EXPECT_THAT(Broken(), ElementsAre("lent"));
  EXPECT_THAT(violations_[0].events, SizeIs(2));
}

TEST_F(HistoryCheckerTest, LentReturnedWhileItIsMapped) {
  GoodHistory();
  Back(2, {Page(1, 4)});
  EXPECT_THAT(Broken(), ElementsAre("lent"));
}

TEST_F(HistoryCheckerTest, LentMappedBeyondItsSessionsEnd) {
  Open(1, "t", Bytes(0), Bytes(100));
  Grant(1, {Page(0, 1)});
  Map(1, 0, 50);
  Unmap(1, 0);
  Back(1, {Page(0, 1)});
  Map(1, 0, 50);
  Gone(1, "left");
  EXPECT_THAT(Broken(), ElementsAre("lent"));
  EXPECT_EQ(statistics_.violations[static_cast<size_t>(Rule::kLent)], 2);
}

// ---- max, min ---------------------------------------------------------------

TEST_F(HistoryCheckerTest, MaxGrantAboveIt) {
  GoodHistory();
  Limits(2, Bytes(0), Bytes(39));
  Grant(2, {Page(2, 5)});
  EXPECT_THAT(Broken(), IsEmpty());
  Grant(2, {Page(3, 6)});
  EXPECT_THAT(Broken(), ElementsAre("max"));
}

TEST_F(HistoryCheckerTest, MaxCreditAboveIt) {
  GoodHistory();
  Limits(2, Bytes(0), Bytes(39));
  Credit(2, Bytes(20));
  EXPECT_THAT(Broken(), ElementsAre("max"));
}

TEST_F(HistoryCheckerTest, MaxLoweredBelowUseIsNoGrant) {
  GoodHistory();
  Limits(2, Bytes(0), Bytes(0));
  EXPECT_THAT(Broken(), IsEmpty());
}

TEST_F(HistoryCheckerTest, MinOrderBelowItForOthers) {
  GoodHistory();
  Limits(2, Bytes(20), Bytes(100));
  Order(2, 1, Bytes(10));
  EXPECT_THAT(Broken(), ElementsAre("min"));
}

TEST_F(HistoryCheckerTest, MinOrderBelowItWhoeverItIsSaidToBeFor) {
  GoodHistory();
  Limits(2, Bytes(20), Bytes(100));
  Order(2, 1, Bytes(0));
  EXPECT_THAT(Broken(), ElementsAre("min"));
}

TEST_F(HistoryCheckerTest, MinOrderFurtherDownThanToItsMax) {
  GoodHistory();
  Limits(2, Bytes(15), Bytes(15));
  Order(2, 0, Bytes(0));
  EXPECT_THAT(Broken(), ElementsAre("min"));
}

// ---- capacity, sums, generation ---------------------------------------------

TEST_F(HistoryCheckerTest, CapacityMoreLentThanThereIs) {
  GoodHistory();
  Limits(2, Bytes(0), Bytes(1000));
  std::vector<PageName> pages;
  for (uint32_t i = 0; i < 8; ++i) pages.push_back(Page(10 + i, 5 + i));
  Grant(2, pages);
  EXPECT_THAT(Broken(), ElementsAre("capacity"));
}

TEST_F(HistoryCheckerTest, CapacityStockCounts) {
  GoodHistory();
  Event(Kind::kHangUp).stock = Bytes(71);
  EXPECT_THAT(Broken(), ElementsAre("capacity"));
}

TEST_F(HistoryCheckerTest, SumsOfTheLedgerAreNotThoseOfItsGrants) {
  GoodHistory();
  Event(Kind::kHangUp).lent += Bytes(1);
  EXPECT_THAT(Broken(), ElementsAre("sums"));
}

TEST_F(HistoryCheckerTest, SumsOfAnInstanceAreNotThoseOfItsGrants) {
  GoodHistory();
  Event(Kind::kRefuse, 2).held -= Bytes(1);
  EXPECT_THAT(Broken(), ElementsAre("sums"));
}

TEST_F(HistoryCheckerTest, SumsLimitThatNobodySet) {
  GoodHistory();
  Event(Kind::kRefuse, 2).max += Bytes(1);
  EXPECT_THAT(Broken(), ElementsAre("sums"));
}

TEST_F(HistoryCheckerTest, GenerationGrantOfASlotThatIsNotEmpty) {
  GoodHistory();
  Grant(2, {Page(1, 5)}).pages = {Page(1, 5)};
  // The page that was there is lost, and the sums with it.
  EXPECT_THAT(Broken(), ElementsAre("sums", "generation"));
}

TEST_F(HistoryCheckerTest, GenerationThatDoesNotRise) {
  GoodHistory();
  Grant(2, {Page(2, 3)});
  EXPECT_THAT(Broken(), ElementsAre("generation"));
}

TEST_F(HistoryCheckerTest, GenerationReturnOfWhatIsNotLent) {
  GoodHistory();
  Unmap(2, 1);
  HistoryEvent& event = Event(Kind::kBack, 2);
  event.pages = {Page(1, 3)};
  EXPECT_THAT(Broken(), ElementsAre("generation"));
}

// ---- resuming ---------------------------------------------------------------

// Process 1 opens anew, as session 5 with pool 15; its earlier one is 1.
class ResumingTest : public HistoryCheckerTest {
 protected:
  // Holds two pages, of which it maps `mapped`.
  void OpenTwice(uint32_t mapped) {
    Open(1, "t", Bytes(0), Bytes(200));
    Grant(1, {Page(0, 1), Page(1, 2)});
    Map(1, mapped, 50);
    Reopen(1, 5);
  }
  // Page 1 is not resumed.
  void EarlierSessionEnds() {
    Gone(1, "resumed");
    Released(kPage);
  }
};

TEST_F(ResumingTest, PagesGoOnInTheNextSession) {
  OpenTwice(0);
  Resume(5, Page(0, 1), 1);
  EarlierSessionEnds();
  Unmap(1, 0);
  Back(5, {Page(0, 1)});
  EXPECT_THAT(Broken(), IsEmpty()) << violations_[0].what;
}

TEST_F(ResumingTest, LentWhatIsMappedMustBeResumed) {
  OpenTwice(1);
  Resume(5, Page(0, 1), 1);
  EarlierSessionEnds();
  EXPECT_THAT(Broken(), ElementsAre("lent"));
}

TEST_F(ResumingTest, GenerationOnlyWhatWasLentIsResumed) {
  OpenTwice(0);
  Resume(5, Page(0, 2), 1);
  EXPECT_THAT(Broken(), Contains("generation"));
}

TEST_F(ResumingTest, CapacityIsNotBrokenByWhatIsAdopted) {
  OpenTwice(0);
  for (uint32_t i = 0; i < 11; ++i) Resume(5, Page(5 + i, 5 + i), 0);
  EXPECT_THAT(Broken(), IsEmpty()) << violations_[0].what;
  Grant(5, {Page(20, 20)});
  EXPECT_THAT(Broken(), ElementsAre("capacity"));
}

// ---- death ------------------------------------------------------------------

TEST_F(HistoryCheckerTest, DeathThatIsNotNoticed) {
  GoodHistory();
  Exited(2);
  Pass(absl::Seconds(1));
  Drain();
  EXPECT_THAT(Broken(), ElementsAre("death"));
}

TEST_F(HistoryCheckerTest, DeathThatIsNoticedLate) {
  GoodHistory();
  Exited(2);
  Pass(absl::Seconds(1));
  Gone(2);
  Released(Bytes(20));
  EXPECT_THAT(Broken(), ElementsAre("death"));
}

TEST_F(HistoryCheckerTest, DeathWhoseMemoryIsReleasedLate) {
  GoodHistory();
  Gone(2);
  Exited(2);
  Pass(absl::Seconds(1));
  Released(Bytes(20));
  EXPECT_THAT(Broken(), ElementsAre("death"));
}

TEST_F(HistoryCheckerTest, DeathIsNotJudgedWhereTheBrokerDiesToo) {
  GoodHistory();
  Exited(2);
  Pass(absl::Seconds(10));
  EXPECT_THAT(Broken(), IsEmpty());
  EXPECT_EQ(statistics_.deaths, 1);
  EXPECT_EQ(statistics_.unjudged_deaths, 1);
}

TEST_F(HistoryCheckerTest, DeathEndsMappings) {
  GoodHistory();
  Exited(2);
  Gone(2);
  Open(4, "t", Bytes(0), Bytes(100));
  Grant(4, {Page(0, 1)});
  Map(4, 0, 51);  // was process 2's
  EXPECT_THAT(Broken(), IsEmpty());
}

// ---- complete ---------------------------------------------------------------

TEST_F(HistoryCheckerTest, CompleteAnEventMisses) {
  GoodHistory();
  events_.erase(events_.begin() + 10);
  Drain();
  EXPECT_THAT(Broken(), ElementsAre("complete"));
}

TEST_F(HistoryCheckerTest, CompleteTheLastEventsOfABrokerThatDiedMayMiss) {
  GoodHistory();
  Event(Kind::kHangUp);
  events_.pop_back();
  Event(Kind::kHangUp);
  EXPECT_THAT(Broken(), IsEmpty());
}

TEST_F(HistoryCheckerTest, CompleteAHoleIsNoEnd) {
  GoodHistory();
  Event(Kind::kHangUp);
  events_.pop_back();
  for (int i = 0; i < 300; ++i) Event(Kind::kHangUp);
  EXPECT_THAT(Broken(), ElementsAre("complete"));
}

TEST_F(HistoryCheckerTest, CompleteGrantToASessionThatIsNone) {
  GoodHistory();
  Event(Kind::kGrant, 2).session = SessionId(9);
  EXPECT_THAT(Broken(), ElementsAre("complete"));
}

TEST_F(HistoryCheckerTest, MappingsOfProcessesThatNoBrokerKnowsAreCounted) {
  Mapping(MappingEvent::Kind::kPool, 8);
  Map(8, 0, 1);
  EXPECT_THAT(Broken(), IsEmpty());
  EXPECT_EQ(statistics_.unmatched_mappings, 1);
}

TEST_F(HistoryCheckerTest, AllViolationsAreCountedAndTheFirstOnesKept) {
  GoodHistory();
  for (int i = 0; i < 50; ++i) Event(Kind::kHangUp).stock = Bytes(1000 + i);
  EXPECT_THAT(Broken(), ElementsAre("capacity"));
  EXPECT_EQ(statistics_.violations[static_cast<size_t>(Rule::kCapacity)], 50);
  EXPECT_THAT(violations_, SizeIs(20));
}

}  // namespace
}  // namespace kvbroker
