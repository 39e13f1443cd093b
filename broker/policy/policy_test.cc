#include "broker/policy/policy.h"

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace kvbroker {

bool operator==(const Take& a, const Take& b) {
  return std::tie(a.pool, a.tier, a.pages) == std::tie(b.pool, b.tier, b.pages);
}

std::ostream& operator<<(std::ostream& os, const Take& take) {
  return os << "{pool " << take.pool << ", tier " << static_cast<int>(take.tier)
            << ", pages " << take.pages << "}";
}

namespace {

using Verdict = Plan::Verdict;
using Takes = std::vector<Take>;

// An instance with one pool, in pages of `page`.
struct Engine {
  int held = 0;
  int idle = 0;
  std::optional<int> settled;  // all of `idle` where nothing is said
  int cached = 0;
  int min = 0;
  std::optional<int> max;  // capacity where nothing is said
  double weight = 1;
  bool held_off = false;
  bool answers = true;
  absl::Duration oldest_idle = absl::Seconds(1);
  Bytes page = MiB(1);
};

// Builds a snapshot whose instance and pool indexes are the same, unless
// AddPool is used.
class Scene {
 public:
  explicit Scene(int capacity, std::initializer_list<Engine> engines = {}) {
    snapshot_.capacity = snapshot_.free = MiB(capacity);
    for (const Engine& engine : engines) Add(engine);
  }

  size_t Add(const Engine& engine) {
    InstanceView instance;
    instance.name = std::string(1, 'a' + snapshot_.instances.size());
    instance.min = engine.page * engine.min;
    instance.max = engine.max ? engine.page * *engine.max : snapshot_.capacity;
    instance.weight = engine.weight;
    instance.held_off = engine.held_off;
    snapshot_.instances.push_back(instance);
    AddPool(snapshot_.instances.size() - 1, engine);
    return snapshot_.instances.size() - 1;
  }

  size_t AddPool(size_t instance, const Engine& engine) {
    PoolView pool;
    pool.id = PoolId(snapshot_.pools.size() + 1);
    pool.instance = instance;
    pool.page_bytes = engine.page;
    pool.held = engine.held;
    pool.idle = engine.idle;
    pool.settled = engine.settled.value_or(engine.idle);
    pool.cached = engine.cached;
    pool.oldest_idle = engine.idle > 0 ? engine.oldest_idle : absl::Duration();
    pool.answers = engine.answers;
    snapshot_.pools.push_back(pool);
    InstanceView& owner = snapshot_.instances[instance];
    owner.held += engine.page * engine.held;
    owner.demand += engine.page * (engine.held - engine.idle);
    snapshot_.free -= engine.page * engine.held;
    return snapshot_.pools.size() - 1;
  }

  // A claim that is part of its instance's demand.
  ClaimView Claim(size_t pool, PageCount at_least, PageCount want = 0) {
    ClaimView claim;
    claim.pool = pool;
    claim.instance = snapshot_.pools[pool].instance;
    claim.at_least = at_least;
    claim.want = std::max(want, at_least);
    snapshot_.instances[claim.instance].demand +=
        snapshot_.pools[pool].page_bytes * at_least;
    return claim;
  }

  Plan Decide(const ClaimView& claim) {
    ComputeShares(snapshot_);
    return kvbroker::Decide(snapshot_, claim, config);
  }

  std::vector<int64_t> Shares() {
    ComputeShares(snapshot_);
    std::vector<int64_t> shares;
    for (const InstanceView& instance : snapshot_.instances) {
      shares.push_back(instance.share / MiB(1));
    }
    return shares;
  }

  InstanceView& instance(size_t i) { return snapshot_.instances[i]; }
  PoolView& pool(size_t i) { return snapshot_.pools[i]; }
  PolicySnapshot& snapshot() { return snapshot_; }

  PolicyConfig config;

 private:
  PolicySnapshot snapshot_;
};

using Shares = std::vector<int64_t>;

// ---- shares ----------------------------------------------------------------

TEST(ComputeShares, NobodyHasNoShares) {
  Scene scene(10);
  EXPECT_EQ(scene.Shares(), Shares{});
}

TEST(ComputeShares, EnoughForAllGivesEachItsDemand) {
  Scene scene(100, {{.held = 30}, {.held = 20}});
  EXPECT_EQ(scene.Shares(), (Shares{30, 20}));
}

TEST(ComputeShares, ContendedMemoryIsSplitEvenly) {
  Scene scene(90, {{.held = 60}, {.held = 30}});
  scene.Claim(0, 30);
  scene.Claim(1, 60);
  EXPECT_EQ(scene.Shares(), (Shares{45, 45}));
}

TEST(ComputeShares, WeightsSplitWhatIsContended) {
  Scene scene(90, {{.weight = 2}, {.weight = 1}});
  scene.Claim(0, 90);
  scene.Claim(1, 90);
  EXPECT_EQ(scene.Shares(), (Shares{60, 30}));
}

TEST(ComputeShares, WhatOneDoesNotNeedGoesToTheOthers) {
  Scene scene(90, {{.weight = 1}, {.weight = 1}, {.weight = 1}});
  scene.Claim(0, 10);
  scene.Claim(1, 90);
  scene.Claim(2, 90);
  EXPECT_EQ(scene.Shares(), (Shares{10, 40, 40}));
}

TEST(ComputeShares, MinIsGuaranteedWhereItIsNeeded) {
  Scene scene(90, {{.min = 60}, {}, {}});
  for (size_t i : {0, 1, 2}) scene.Claim(i, 90);
  EXPECT_EQ(scene.Shares(), (Shares{60, 15, 15}));
}

TEST(ComputeShares, MinWithoutDemandIsLeftToTheOthers) {
  Scene scene(90, {{.min = 60}, {}});
  scene.Claim(0, 20);
  scene.Claim(1, 90);
  EXPECT_EQ(scene.Shares(), (Shares{20, 70}));
}

TEST(ComputeShares, NobodysShareIsAboveItsMax) {
  Scene scene(90, {{.max = 20}, {}});
  scene.Claim(0, 90);
  scene.Claim(1, 90);
  EXPECT_EQ(scene.Shares(), (Shares{20, 70}));
}

TEST(ComputeShares, MaxBelowMinWins) {
  Scene scene(90, {{.min = 40, .max = 20}, {}});
  scene.Claim(0, 90);
  scene.Claim(1, 90);
  EXPECT_EQ(scene.Shares(), (Shares{20, 70}));
}

TEST(ComputeShares, IdlePagesAreNoDemand) {
  Scene scene(90, {{.held = 60, .idle = 50}, {}});
  scene.Claim(1, 90);
  EXPECT_EQ(scene.Shares(), (Shares{10, 80}));
}

TEST(ComputeShares, ZeroDemandHasNoShareEvenWithMin) {
  Scene scene(90, {{.min = 30}, {}});
  EXPECT_EQ(scene.Shares(), (Shares{0, 0}));
}

TEST(ComputeShares, LimitOfZeroIsALimit) {
  Scene scene(90, {{.max = 0}, {}});
  scene.Claim(0, 10);
  scene.Claim(1, 10);
  EXPECT_EQ(scene.Shares(), (Shares{0, 10}));
}

TEST(ComputeShares, NeitherMoreThanThereIsNorLessThanIsNeeded) {
  std::mt19937_64 random(7);
  auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int round = 0; round < 20'000; ++round) {
    PolicySnapshot snapshot;
    snapshot.capacity = Bytes(draw(1, int64_t{1} << draw(4, 45)));
    Bytes mins;
    const int count = static_cast<int>(draw(1, 6));
    for (int i = 0; i < count; ++i) {
      InstanceView view;
      view.min = Bytes(draw(0, (snapshot.capacity - mins).count() / 2));
      mins += view.min;
      view.max = Bytes(draw(0, 2 * snapshot.capacity.count()));
      view.demand = Bytes(draw(0, 2 * snapshot.capacity.count()));
      view.weight = draw(0, 3) == 0 ? 1e6 : static_cast<double>(draw(1, 10));
      snapshot.instances.push_back(view);
    }
    ComputeShares(snapshot);
    Bytes sum, uses;
    for (const InstanceView& view : snapshot.instances) {
      const Bytes use = std::min({view.demand, view.max, snapshot.capacity});
      ASSERT_LE(view.share, use) << "round " << round;
      ASSERT_GE(view.share, std::min(view.min, use)) << "round " << round;
      sum += view.share;
      uses += use;
    }
    ASSERT_LE(sum, snapshot.capacity) << "round " << round;
    // Nothing is left over that somebody has a use for, but for rounding.
    Bytes slack = std::min(uses, snapshot.capacity) - sum;
    ASSERT_LE(slack.count(), 2 * count + (sum.count() >> 40))
        << "round " << round;
    // Of two who get less than they could use and more than their `min`, the
    // one with the greater weight has at least as much.
    for (const InstanceView& a : snapshot.instances) {
      for (const InstanceView& b : snapshot.instances) {
        bool bounded =
            a.share >= std::min({a.demand, a.max, snapshot.capacity});
        if (a.weight < b.weight || bounded || b.share <= b.min) continue;
        ASSERT_GE(a.share + Bytes(1), b.share) << "round " << round;
      }
    }
  }
}

// ---- decisions: the instance's own bounds ----------------------------------

TEST(Decide, FreeMemoryThatHasNoPlaceForTheClaimIsOfNoUseToIt) {
  Scene scene(10, {{.held = 6, .idle = 3}, {.held = 0}});
  ClaimView claim = scene.Claim(1, 2);
  claim.unusable = MiB(2);
  EXPECT_EQ(scene.Decide(claim).pages, 2) << "of the four that are free";
  claim.unusable = MiB(3);
  const Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  ASSERT_EQ(plan.takes.size(), 1u);
  EXPECT_EQ(plan.takes[0].pages, 1) << "beside the one that has a place";
  EXPECT_EQ(plan.reserve, MiB(2)) << "which may grow to one, or to two";
  // All that is free, and more: no more is of no use than there is.
  claim.unusable = MiB(100);
  EXPECT_EQ(scene.Decide(claim).takes[0].pages, 2);
  claim.urgency = Urgency::kSpeculative;
  EXPECT_NE(scene.Decide(claim).verdict, Verdict::kGrant);
}

TEST(Decide, FreeMemoryIsGrantedUpToWhatIsWanted) {
  Scene scene(10, {{}});
  Plan plan = scene.Decide(scene.Claim(0, 2, 5));
  EXPECT_EQ(plan.verdict, Verdict::kGrant);
  EXPECT_EQ(plan.pages, 5);
  EXPECT_TRUE(plan.takes.empty());
}

TEST(Decide, LessThanWantedIsGrantedWhereItIsEnough) {
  Scene scene(10, {{}, {.held = 7}});
  Plan plan = scene.Decide(scene.Claim(0, 2, 5));
  EXPECT_EQ(plan.verdict, Verdict::kGrant);
  EXPECT_EQ(plan.pages, 3);
}

TEST(Decide, GrantStopsAtTheInstancesLimit) {
  Scene scene(10, {{.held = 2, .max = 4}});
  Plan plan = scene.Decide(scene.Claim(0, 1, 5));
  EXPECT_EQ(plan.verdict, Verdict::kGrant);
  EXPECT_EQ(plan.pages, 2);
}

TEST(Decide, OverItsOwnLimitIsRefusedWithTheFigures) {
  Scene scene(10, {{.held = 3, .max = 4}});
  Plan plan = scene.Decide(scene.Claim(0, 2));
  EXPECT_EQ(plan.verdict, Verdict::kRefuse);
  EXPECT_EQ(plan.code, absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(plan.reason,
            "over the instance's own limit: it holds 3 MiB, asks for 2 MiB "
            "more, may hold 4 MiB");
}

TEST(Decide, LimitOfZeroRefusesEverything) {
  Scene scene(10, {{.max = 0}});
  Plan plan = scene.Decide(scene.Claim(0, 1));
  EXPECT_EQ(plan.code, absl::StatusCode::kResourceExhausted);
}

TEST(Decide, AtItsLimitAnInstancesOwnIdlePagesMoveBetweenItsPools) {
  Scene scene(10, {{.held = 4, .idle = 3, .max = 4}});
  size_t second = scene.AddPool(0, {});
  Plan plan = scene.Decide(scene.Claim(second, 2));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_EQ(plan.takes, (Takes{{0, Tier::kIdle, 2}}));
}

TEST(Decide, ItsOwnMinDoesNotKeepIdlePagesFromItsOtherPool) {
  Scene scene(4, {{.held = 4, .idle = 3, .min = 4, .max = 4}});
  size_t second = scene.AddPool(0, {});
  Plan plan = scene.Decide(scene.Claim(second, 2));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_EQ(plan.takes, (Takes{{0, Tier::kIdle, 2}}));
}

TEST(Decide, HeldOffInstanceWaitsAboveItsShare) {
  Scene scene(10, {{.held = 3, .held_off = true}, {.held = 2}});
  scene.Claim(1, 6);
  Plan plan = scene.Decide(scene.Claim(0, 4));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_TRUE(plan.takes.empty());
  EXPECT_EQ(plan.reserve, Bytes(0));
  EXPECT_NE(plan.reason.find("held off"), std::string::npos);
}

TEST(Decide, HeldOffInstanceGrowsToItsShareAndNoFurther) {
  Scene scene(10, {{.held = 3, .held_off = true}, {.held = 2}});
  scene.Claim(1, 6);
  Plan plan = scene.Decide(scene.Claim(0, 1, 5));
  EXPECT_EQ(plan.verdict, Verdict::kGrant);
  EXPECT_EQ(plan.pages, 1);  // its share is 4
}

TEST(Decide, HeldOffInstanceStillHasItsMin) {
  Scene scene(10, {{.held = 3, .min = 6, .held_off = true}, {.held = 2}});
  scene.instance(0).demand = MiB(3);
  ClaimView claim{.instance = 0, .pool = 0, .want = 3, .at_least = 3};
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.verdict, Verdict::kGrant);
}

// ---- decisions: tier by tier -----------------------------------------------

TEST(Decide, SpeculativeClaimTakesNothingThatIsOfUse) {
  Scene scene(10, {{}, {.held = 10, .cached = 6}});
  ClaimView claim = scene.Claim(0, 1);
  claim.urgency = Urgency::kSpeculative;
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.verdict, Verdict::kRefuse);
  EXPECT_EQ(plan.code, absl::StatusCode::kUnavailable);
}

TEST(Decide, SpeculativeClaimTakesIdlePagesUntilBothHaveAsMany) {
  Scene scene(12, {{.held = 2, .idle = 2}, {.held = 10, .idle = 8}});
  ClaimView claim = scene.Claim(0, 1, 9);
  claim.urgency = Urgency::kSpeculative;
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kIdle, 3}}));
  EXPECT_EQ(plan.reserve, Bytes(0)) << "free memory is for those who need it";
}

TEST(Decide, SpeculativeClaimIsRefusedWhereOthersHaveNoMoreThanItself) {
  Scene scene(10, {{.held = 4, .idle = 4}, {.held = 6, .idle = 5}});
  ClaimView claim = scene.Claim(0, 1, 4);
  claim.urgency = Urgency::kSpeculative;
  EXPECT_EQ(scene.Decide(claim).verdict, Verdict::kRefuse);
}

TEST(Decide, WhoIsAskedAnywayIsAskedForWhatIsWantedAsWell) {
  Scene scene(10, {{.held = 2}, {.held = 8, .idle = 7}});
  EXPECT_EQ(scene.Decide(scene.Claim(0, 1, 3)).takes,
            (Takes{{1, Tier::kIdle, 1}, {1, Tier::kIdle, 2}}));
  // One is needed; of the six that are left, each has three then.
  EXPECT_EQ(scene.Decide(scene.Claim(0, 1, 9)).takes,
            (Takes{{1, Tier::kIdle, 1}, {1, Tier::kIdle, 3}}));
}

TEST(Decide, WhatIsWantedPushesNobodyBelowItsMinAndTheClaimantAboveItsMax) {
  Scene scene(10, {{.held = 2}, {.held = 8, .idle = 8, .min = 6}});
  EXPECT_EQ(scene.Decide(scene.Claim(0, 1, 9)).takes,
            (Takes{{1, Tier::kIdle, 1}, {1, Tier::kIdle, 1}}));
  Scene limited(10, {{.held = 2, .max = 4}, {.held = 8, .idle = 8}});
  EXPECT_EQ(limited.Decide(limited.Claim(0, 1, 9)).takes,
            (Takes{{1, Tier::kIdle, 1}, {1, Tier::kIdle, 1}}));
}

TEST(Decide, WhereIdlePagesDoNotSufficeNothingIsTakenAhead) {
  Scene scene(10, {{}, {.held = 10, .idle = 2, .cached = 2}});
  Plan plan = scene.Decide(scene.Claim(0, 5, 9));
  PageCount asked = 0;
  for (const Take& take : plan.takes) asked += take.pages;
  EXPECT_EQ(asked, 5);
}

TEST(Decide, SpeculativeClaimGetsFreeMemory) {
  Scene scene(10, {{}, {.held = 9}});
  ClaimView claim = scene.Claim(0, 1, 4);
  claim.urgency = Urgency::kSpeculative;
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.verdict, Verdict::kGrant);
  EXPECT_EQ(plan.pages, 1);
}

TEST(Decide, SpeculativeClaimIsRefusedWhileHeldOff) {
  Scene scene(10, {{.held = 5, .held_off = true}, {.held = 2}});
  ClaimView claim{.instance = 0, .pool = 0, .want = 1, .at_least = 1};
  claim.urgency = Urgency::kSpeculative;
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.verdict, Verdict::kRefuse);
  EXPECT_EQ(plan.code, absl::StatusCode::kUnavailable);
}

TEST(Decide, OwnIdlePagesGoBeforeThoseOfOthers) {
  Scene scene(10, {{.held = 5, .idle = 2}, {.held = 5, .idle = 5}});
  size_t second = scene.AddPool(0, {});
  Plan plan = scene.Decide(scene.Claim(second, 3));
  EXPECT_EQ(plan.takes, (Takes{{0, Tier::kIdle, 2}, {1, Tier::kIdle, 1}}));
}

TEST(Decide, OnlyWhatIsMissingIsAskedFor) {
  Scene scene(10, {{}, {.held = 8, .idle = 8}});
  Plan plan = scene.Decide(scene.Claim(0, 5));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kIdle, 3}}));
  EXPECT_EQ(plan.reserve, MiB(2));
}

TEST(Decide, WhatIsOnItsWayIsNotAskedForAgain) {
  Scene scene(10, {{}, {.held = 8, .idle = 8}});
  scene.snapshot().free = Bytes(0);
  scene.snapshot().coming = MiB(2);
  Plan plan = scene.Decide(scene.Claim(0, 2));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_TRUE(plan.takes.empty());
  EXPECT_EQ(plan.awaited, MiB(2));
}

TEST(Decide, OnlyTheRestOfWhatIsOnItsWayIsAskedFor) {
  Scene scene(10, {{}, {.held = 7, .idle = 7}});
  scene.snapshot().free = MiB(1);
  scene.snapshot().coming = MiB(2);
  Plan plan = scene.Decide(scene.Claim(0, 5));
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kIdle, 2}}));
  EXPECT_EQ(plan.reserve, MiB(1));
  EXPECT_EQ(plan.awaited, MiB(2));
}

TEST(Decide, IdlePagesOfThoseAboveTheirShareGoFirst) {
  // `b` uses all it holds but two, `c` is idle altogether: above its share.
  Scene scene(10, {{},
                   {.held = 5, .idle = 2, .oldest_idle = absl::Minutes(1)},
                   {.held = 5, .idle = 5, .oldest_idle = absl::Seconds(1)}});
  scene.instance(1).demand = MiB(5);
  Plan plan = scene.Decide(scene.Claim(0, 5));
  EXPECT_EQ(plan.takes, (Takes{{2, Tier::kIdle, 5}}));
}

TEST(Decide, OldestIdlePagesGoFirst) {
  Scene scene(12, {{},
                   {.held = 4, .idle = 4, .oldest_idle = absl::Seconds(1)},
                   {.held = 4, .idle = 4, .oldest_idle = absl::Seconds(9)},
                   {.held = 4, .idle = 4, .oldest_idle = absl::Seconds(5)}});
  Plan plan = scene.Decide(scene.Claim(0, 9));
  EXPECT_EQ(
      plan.takes,
      (Takes{{2, Tier::kIdle, 4}, {3, Tier::kIdle, 4}, {1, Tier::kIdle, 1}}));
}

TEST(Decide, JustUsedPagesAreTakenOnlyWhenNoOlderOnesExist) {
  Scene scene(
      8, {{},
          {.held = 4, .idle = 4, .settled = 1, .oldest_idle = absl::Hours(1)},
          {.held = 4, .idle = 4, .settled = 4}});
  Plan plan = scene.Decide(scene.Claim(0, 6));
  EXPECT_EQ(
      plan.takes,
      (Takes{{1, Tier::kIdle, 1}, {2, Tier::kIdle, 4}, {1, Tier::kIdle, 1}}));
}

TEST(Decide, IdlePagesAreTakenBelowTheShareButNotBelowMin) {
  Scene scene(10, {{}, {.held = 10, .idle = 9, .min = 4}});
  Plan plan = scene.Decide(scene.Claim(0, 8));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  PageCount taken = 0;
  for (const Take& take : plan.takes) taken += take.pages;
  EXPECT_EQ(taken, 6);
}

TEST(Decide, CachedPagesOfThoseAboveTheirShareComeNext) {
  Scene scene(10, {{}, {.held = 10, .idle = 1, .cached = 9}});
  Plan plan = scene.Decide(scene.Claim(0, 4));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kIdle, 1}, {1, Tier::kCached, 3}}));
  EXPECT_EQ(plan.reason, "others give idle or cached pages");
}

TEST(Decide, CachedPagesOfThoseWithinTheirShareStay) {
  Scene scene(10, {{.held = 6}, {.held = 4, .cached = 4}});
  Plan plan = scene.Decide(scene.Claim(0, 1));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_TRUE(plan.takes.empty());
}

TEST(Decide, GreediestGivesCachedPagesFirst) {
  Scene scene(16, {{}, {.held = 6, .cached = 6}, {.held = 10, .cached = 10}});
  Plan plan = scene.Decide(scene.Claim(0, 3));
  EXPECT_EQ(plan.takes, (Takes{{2, Tier::kCached, 3}}));
}

TEST(Decide, AboveItsShareItTakesCachedPagesOnlyFromThoseFurtherAbove) {
  // Shares are 6 each. The claim leaves `a` at 7, and `b`, less a page, at 8.
  Scene scene(12, {{.held = 3}, {.held = 9, .cached = 9}});
  scene.instance(0).demand = scene.instance(1).demand = MiB(12);
  ClaimView claim{.instance = 0, .pool = 0, .want = 4, .at_least = 4};
  EXPECT_EQ(scene.Decide(claim).takes, (Takes{{1, Tier::kCached, 3}}));
  // One of 5 leaves both at 8.
  claim.at_least = claim.want = 5;
  EXPECT_EQ(scene.Decide(claim).takes, Takes{});
}

TEST(Decide, BelowItsShareOthersCloseTheirPages) {
  Scene scene(10, {{}, {.held = 10}});
  Plan plan = scene.Decide(scene.Claim(0, 2));
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kClosing, 2}}));
  EXPECT_EQ(plan.recheck, scene.config.patience);
  EXPECT_EQ(plan.reason, "below its share: others close pages");
}

TEST(Decide, AfterPatienceOthersPreempt) {
  Scene scene(10, {{}, {.held = 10}});
  ClaimView claim = scene.Claim(0, 2);
  claim.age = absl::Milliseconds(400);
  EXPECT_EQ(scene.Decide(claim).recheck, absl::Milliseconds(600));
  claim.age = scene.config.patience;
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kPreempt, 2}}));
  EXPECT_EQ(plan.recheck, absl::InfiniteDuration());
}

TEST(Decide, BelowItsMinOthersPreemptAtOnce) {
  Scene scene(10, {{.min = 2}, {.held = 10}});
  Plan plan = scene.Decide(scene.Claim(0, 2));
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kPreempt, 2}}));
  EXPECT_EQ(plan.reason, "below its min: others preempt at once");
}

TEST(Decide, ClaimBeyondMinWaitsForPatienceAgain) {
  Scene scene(10, {{.min = 2}, {.held = 10}});
  Plan plan = scene.Decide(scene.Claim(0, 3));
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kClosing, 3}}));
}

TEST(Decide, AboveItsShareNobodyClosesOrPreemptsForIt) {
  Scene scene(10, {{.held = 5}, {.held = 5}});
  scene.instance(1).demand = MiB(10);
  ClaimView claim = scene.Claim(0, 1);
  claim.age = absl::Hours(1);
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.verdict, Verdict::kWait);
  EXPECT_TRUE(plan.takes.empty());
  EXPECT_EQ(plan.reason,
            "above its share: waits for memory that others leave or no longer "
            "need");
}

TEST(Decide, InUsePagesComeFromTheGreediestFirst) {
  Scene scene(30, {{}, {.held = 12}, {.held = 18}});
  scene.instance(1).demand = scene.instance(2).demand = MiB(30);
  Plan plan = scene.Decide(scene.Claim(0, 9));
  EXPECT_EQ(plan.takes,
            (Takes{{2, Tier::kClosing, 8}, {1, Tier::kClosing, 1}}));
}

TEST(Decide, NobodyIsPushedBelowItsMinForAnotherOnesMin) {
  Scene scene(10, {{.min = 5}, {.held = 10, .min = 5}});
  Plan plan = scene.Decide(scene.Claim(0, 5));
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kPreempt, 5}}));
  scene.instance(1).min = MiB(7);
  plan = scene.Decide(
      ClaimView{.instance = 0, .pool = 0, .want = 5, .at_least = 5});
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kPreempt, 3}}));
}

TEST(Decide, MinIsNotBrokenByAPartOfAPage) {
  // `b` holds two pages of 6, its min is 7: one page may not go.
  Scene scene(12, {{}, {}});
  scene.pool(1).page_bytes = MiB(6);
  scene.pool(1).held = 2;
  scene.instance(1).held = scene.instance(1).demand = MiB(12);
  scene.instance(1).min = MiB(7);
  scene.snapshot().free = Bytes(0);
  ClaimView claim = scene.Claim(0, 2);
  claim.age = absl::Seconds(5);
  EXPECT_TRUE(scene.Decide(claim).takes.empty());
}

TEST(Decide, ShareMayBeCrossedByAPartOfAPage) {
  Scene scene(144 * 8, {{.page = MiB(144)}});
  size_t b = scene.Add({.held = 9, .page = MiB(128)});
  scene.instance(b).demand = MiB(144 * 8);
  Plan plan = scene.Decide(scene.Claim(0, 4));
  // Shares are 576 each; 4 pages of 144 need 5 of 128, which leave 512.
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kClosing, 5}}));
}

TEST(Decide, PageOf144TakesTwoOf128) {
  Scene scene(128 * 4, {{.page = MiB(144)}});
  scene.Add({.held = 4, .page = MiB(128)});
  Plan plan = scene.Decide(scene.Claim(0, 1));
  EXPECT_EQ(plan.takes, (Takes{{1, Tier::kClosing, 2}}));
}

TEST(Decide, WhoDoesNotAnswerIsNotAsked) {
  // Each gives what it holds above its share of 9, if it gives at all.
  Scene scene(20, {{}, {.held = 10, .answers = false}, {.held = 10}});
  ClaimView claim = scene.Claim(0, 2);
  claim.age = absl::Seconds(2);
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.takes, (Takes{{2, Tier::kPreempt, 1}}));
}

TEST(Decide, MemoryIsKeptForAnEntitledClaim) {
  Scene scene(10, {{}, {.held = 9}});
  Plan plan = scene.Decide(scene.Claim(0, 3));
  EXPECT_EQ(plan.reserve, MiB(1));
}

TEST(Decide, MemoryIsKeptForAClaimAboveItsShareOnlyAfterPatience) {
  Scene scene(10, {{.held = 5}, {.held = 4}});
  scene.instance(1).demand = MiB(10);
  ClaimView claim = scene.Claim(0, 2);
  Plan plan = scene.Decide(claim);
  EXPECT_EQ(plan.reserve, Bytes(0));
  EXPECT_EQ(plan.recheck, scene.config.patience);
  claim.age = scene.config.patience;
  plan = scene.Decide(claim);
  EXPECT_EQ(plan.reserve, MiB(1));
  EXPECT_EQ(plan.recheck, absl::InfiniteDuration());
}

// ---- free memory -----------------------------------------------------------

TEST(FromFree, GivesBetweenAtLeastAndWantOrNothing) {
  EXPECT_EQ(FromFree(MiB(10), MiB(10), MiB(2), 1, 3), 3);
  EXPECT_EQ(FromFree(MiB(5), MiB(10), MiB(2), 1, 3), 2);
  EXPECT_EQ(FromFree(MiB(10), MiB(5), MiB(2), 1, 3), 2);
  EXPECT_EQ(FromFree(MiB(3), MiB(10), MiB(2), 2, 3), 0);
  EXPECT_EQ(FromFree(MiB(10), MiB(1), MiB(2), 1, 3), 0);
  EXPECT_EQ(FromFree(MiB(-1), MiB(10), MiB(2), 1, 3), 0);
}

// ---- order of claims -------------------------------------------------------

class ServedBeforeTest : public testing::Test {
 protected:
  bool Before(const ClaimView& a, const ClaimView& b) {
    ComputeShares(scene_.snapshot());
    return ServedBefore(scene_.snapshot(), a, b, scene_.config);
  }
  void ExpectBefore(const ClaimView& a, const ClaimView& b) {
    EXPECT_TRUE(Before(a, b));
    EXPECT_FALSE(Before(b, a));
  }
  Scene scene_{20, {{.min = 4}, {.held = 2}, {.held = 18}, {.held = 0}}};
};

TEST_F(ServedBeforeTest, WithinMinThenWithinShareThenTheRest) {
  ClaimView below_min = scene_.Claim(0, 2);
  ClaimView below_share = scene_.Claim(1, 2);
  ClaimView above_share = scene_.Claim(2, 2);
  above_share.urgency = Urgency::kRunning;
  above_share.age = absl::Minutes(5);
  ExpectBefore(below_min, below_share);
  ExpectBefore(below_share, above_share);
}

TEST_F(ServedBeforeTest, RunningBeforeWaitingBeforeSpeculative) {
  ClaimView waiting = scene_.Claim(1, 1);
  ClaimView running = scene_.Claim(3, 1);
  ClaimView speculative = waiting;
  running.urgency = Urgency::kRunning;
  speculative.urgency = Urgency::kSpeculative;
  waiting.age = absl::Minutes(1);
  ExpectBefore(running, waiting);
  ExpectBefore(waiting, speculative);
}

TEST_F(ServedBeforeTest, WeightBeforeAge) {
  scene_.instance(1).weight = 2;
  ClaimView heavy = scene_.Claim(1, 1);
  ClaimView old = scene_.Claim(3, 1);
  old.age = absl::Seconds(9);
  ExpectBefore(heavy, old);
}

TEST_F(ServedBeforeTest, AgeingOvertakesWeight) {
  scene_.instance(1).weight = 2;
  ClaimView heavy = scene_.Claim(1, 1);
  ClaimView old = scene_.Claim(3, 1);
  old.age = scene_.config.ageing * 2;
  ExpectBefore(old, heavy);
}

TEST_F(ServedBeforeTest, OlderFirstWhereAllElseIsEqual) {
  ClaimView young = scene_.Claim(1, 1);
  ClaimView old = scene_.Claim(3, 1);
  old.age = absl::Milliseconds(1);
  ExpectBefore(old, young);
}

TEST_F(ServedBeforeTest, AgeingCanBeTurnedOff) {
  scene_.config.ageing = absl::ZeroDuration();
  scene_.instance(1).weight = 2;
  ClaimView heavy = scene_.Claim(1, 1);
  ClaimView old = scene_.Claim(3, 1);
  old.age = absl::Hours(1);
  ExpectBefore(heavy, old);
}

TEST_F(ServedBeforeTest, NothingIsBeforeItself) {
  ClaimView claim = scene_.Claim(1, 1);
  EXPECT_FALSE(Before(claim, claim));
}

// ---- effects ---------------------------------------------------------------

TEST(Apply, GrantMovesFreeMemoryToTheClaimant) {
  Scene scene(10, {{.held = 1}});
  ClaimView claim = scene.Claim(0, 2, 4);
  Apply(scene.Decide(claim), claim, scene.snapshot());
  EXPECT_EQ(scene.snapshot().free, MiB(5));
  EXPECT_EQ(scene.instance(0).held, MiB(5));
  EXPECT_EQ(scene.pool(0).held, 5);
}

TEST(Apply, RefusalChangesNothing) {
  Scene scene(10, {{.held = 1, .max = 1}});
  ClaimView claim = scene.Claim(0, 2);
  Apply(scene.Decide(claim), claim, scene.snapshot());
  EXPECT_EQ(scene.snapshot().free, MiB(9));
  EXPECT_EQ(scene.instance(0).held, MiB(1));
}

TEST(Apply, SecondClaimIsNotPromisedTheSamePages) {
  Scene scene(10, {{}, {}, {.held = 10, .idle = 4}});
  ClaimView first = scene.Claim(0, 3);
  ClaimView second = scene.Claim(1, 3);
  Plan plan = scene.Decide(first);
  EXPECT_EQ(plan.takes, (Takes{{2, Tier::kIdle, 3}}));
  Apply(plan, first, scene.snapshot());
  EXPECT_EQ(scene.pool(2).idle, 1);
  EXPECT_EQ(scene.pool(2).settled, 1);
  EXPECT_EQ(scene.pool(2).held, 7);
  plan = Decide(scene.snapshot(), second, scene.config);
  EXPECT_EQ(plan.takes, (Takes{{2, Tier::kIdle, 1}, {2, Tier::kClosing, 2}}));
}

TEST(Apply, ReservedMemoryIsNobodyElses) {
  Scene scene(10, {{}, {}, {.held = 9}});
  ClaimView first = scene.Claim(0, 3);
  ClaimView second = scene.Claim(1, 1);
  Apply(scene.Decide(first), first, scene.snapshot());
  EXPECT_EQ(scene.snapshot().free, Bytes(0));
  EXPECT_EQ(Decide(scene.snapshot(), second, scene.config).verdict,
            Verdict::kWait);
}

TEST(Apply, MemoryOnItsWayIsPromisedOnce) {
  Scene scene(10, {{}, {}, {.held = 8}});
  scene.snapshot().free = Bytes(0);
  scene.snapshot().coming = MiB(2);
  ClaimView first = scene.Claim(0, 2);
  ClaimView second = scene.Claim(1, 2);
  Apply(scene.Decide(first), first, scene.snapshot());
  EXPECT_EQ(scene.snapshot().coming, Bytes(0));
  EXPECT_EQ(scene.instance(0).promised, MiB(2));
  EXPECT_EQ(Decide(scene.snapshot(), second, scene.config).takes,
            (Takes{{2, Tier::kClosing, 2}}));
}

TEST(Apply, PromisedMemoryCountsForTheNextClaimOfTheSameInstance) {
  Scene scene(10, {{.held = 2, .max = 6}, {.held = 8, .idle = 8}});
  ClaimView first = scene.Claim(0, 3);
  ClaimView second = scene.Claim(0, 2);
  Apply(scene.Decide(first), first, scene.snapshot());
  EXPECT_EQ(Decide(scene.snapshot(), second, scene.config).code,
            absl::StatusCode::kResourceExhausted);
}

TEST(Apply, PagesAskedForCountAgainstTheLimitUntilTheyAreGone) {
  Scene scene(10, {{.held = 4, .idle = 4, .max = 4}, {.held = 5}});
  ClaimView others = scene.Claim(1, 3);
  ClaimView own = scene.Claim(0, 1);
  Plan plan = scene.Decide(others);
  EXPECT_EQ(plan.takes, (Takes{{0, Tier::kIdle, 2}}));
  Apply(plan, others, scene.snapshot());
  scene.snapshot().free = MiB(1);
  EXPECT_EQ(Decide(scene.snapshot(), own, scene.config).code,
            absl::StatusCode::kResourceExhausted);
}

TEST(Apply, PagesThatMoveBetweenOnesPoolsCountOnce) {
  Scene scene(10, {{.held = 4, .idle = 3, .max = 4}});
  size_t second = scene.AddPool(0, {});
  ClaimView first = scene.Claim(second, 1);
  ClaimView next = scene.Claim(second, 1);
  Apply(scene.Decide(first), first, scene.snapshot());
  EXPECT_EQ(Decide(scene.snapshot(), next, scene.config).takes,
            (Takes{{0, Tier::kIdle, 1}}));
}

TEST(Apply, NobodyGivesWhatItWasOnlyPromised) {
  // `a` waits for 8 pages of `c`; that leaves `b` nothing to take from `a`.
  Scene scene(12, {{.held = 2}, {}, {.held = 10, .idle = 10}});
  ClaimView first = scene.Claim(0, 8);
  ClaimView second = scene.Claim(1, 4);
  second.age = absl::Minutes(1);
  Apply(scene.Decide(first), first, scene.snapshot());
  EXPECT_EQ(Decide(scene.snapshot(), second, scene.config).takes,
            (Takes{{2, Tier::kIdle, 2}}));
}

TEST(Apply, WhatComesBeyondTheNeedIsForTheNext) {
  Scene scene(128 * 4, {{.page = MiB(100)}, {.page = MiB(100)}});
  scene.Add({.held = 4, .idle = 4, .page = MiB(128)});
  ClaimView first = scene.Claim(0, 2);
  ClaimView second = scene.Claim(1, 1);
  Plan plan = scene.Decide(first);
  EXPECT_EQ(plan.takes, (Takes{{2, Tier::kIdle, 2}}));
  Apply(plan, first, scene.snapshot());
  EXPECT_EQ(scene.instance(0).promised, MiB(200));
  EXPECT_EQ(scene.snapshot().coming, MiB(56));
  plan = Decide(scene.snapshot(), second, scene.config);
  EXPECT_EQ(plan.takes, (Takes{{2, Tier::kIdle, 1}}));
  EXPECT_EQ(plan.awaited, MiB(56));
}

TEST(Apply, JustUsedPagesStayJustUsed) {
  Scene scene(6, {{}, {.held = 6, .idle = 5, .settled = 3}});
  ClaimView claim = scene.Claim(0, 3);
  Apply(scene.Decide(claim), claim, scene.snapshot());
  EXPECT_EQ(scene.pool(1).idle, 2);
  EXPECT_EQ(scene.pool(1).settled, 0);
}

TEST(TakeOut, SumsWhatWasAskedFor) {
  Scene scene(10, {{.held = 6, .idle = 2, .cached = 1}});
  Bytes sum = TakeOut(
      {{0, Tier::kIdle, 2}, {0, Tier::kCached, 1}, {0, Tier::kClosing, 1}},
      scene.snapshot());
  EXPECT_EQ(sum, MiB(4));
  EXPECT_EQ(scene.pool(0).held, 2);
  EXPECT_EQ(scene.pool(0).idle, 0);
  EXPECT_EQ(scene.pool(0).cached, 0);
  EXPECT_EQ(scene.instance(0).leaving, MiB(4));
}

// ---- lowered limits --------------------------------------------------------

TEST(TakesToFitLimit, IdleThenCachedThenClosing) {
  Scene scene(10,
              {{.held = 10, .idle = 3, .settled = 1, .cached = 2, .max = 3}});
  EXPECT_EQ(
      TakesToFitLimit(scene.snapshot(), 0, absl::ZeroDuration(), scene.config),
      (Takes{{0, Tier::kIdle, 1},
             {0, Tier::kIdle, 2},
             {0, Tier::kCached, 2},
             {0, Tier::kClosing, 2}}));
}

TEST(TakesToFitLimit, PreemptsAfterItsPatience) {
  Scene scene(10, {{.held = 10, .max = 8}});
  EXPECT_EQ(TakesToFitLimit(scene.snapshot(), 0, scene.config.limit_patience,
                            scene.config),
            (Takes{{0, Tier::kPreempt, 2}}));
}

TEST(TakesToFitLimit, MinDoesNotProtectFromTheOwnLimit) {
  Scene scene(10, {{.held = 10, .min = 10, .max = 0}});
  EXPECT_EQ(
      TakesToFitLimit(scene.snapshot(), 0, absl::ZeroDuration(), scene.config),
      (Takes{{0, Tier::kClosing, 10}}));
}

TEST(TakesToFitLimit, PartOfAPageTooMuchIsAPageToGive) {
  Scene scene(10, {{.held = 10}});
  scene.instance(0).max = MiB(8) + Bytes(1);
  EXPECT_EQ(
      TakesToFitLimit(scene.snapshot(), 0, absl::ZeroDuration(), scene.config),
      (Takes{{0, Tier::kClosing, 2}}));
}

TEST(TakesToFitLimit, WithinTheLimitNothingIsTaken) {
  Scene scene(10, {{.held = 8, .idle = 8, .max = 8}});
  EXPECT_TRUE(TakesToFitLimit(scene.snapshot(), 0, absl::Hours(1), scene.config)
                  .empty());
}

// ---- memory that others need ------------------------------------------------

TEST(TakesForOthers, IdleOldestFirstThenCached) {
  Scene scene(20, {{.held = 8, .idle = 3, .settled = 3, .cached = 2},
                   {.held = 8, .idle = 2, .settled = 1}});
  scene.pool(1).oldest_idle = absl::Seconds(9);
  EXPECT_EQ(TakesForOthers(scene.snapshot(), MiB(6), Bytes(0),
                           absl::Hours(1), scene.config),
            (Takes{{1, Tier::kIdle, 1},
                   {0, Tier::kIdle, 3},
                   {1, Tier::kIdle, 1},
                   {0, Tier::kCached, 1}}));
}

TEST(TakesForOthers, PagesInUseOnlyForWhatWasPromised) {
  Scene scene(10, {{.held = 10, .idle = 1, .settled = 1}});
  EXPECT_EQ(TakesForOthers(scene.snapshot(), MiB(5), Bytes(0),
                           absl::ZeroDuration(), scene.config),
            (Takes{{0, Tier::kIdle, 1}}));
  EXPECT_EQ(TakesForOthers(scene.snapshot(), MiB(5), MiB(3),
                           absl::ZeroDuration(), scene.config),
            (Takes{{0, Tier::kIdle, 1}, {0, Tier::kClosing, 2}}));
  EXPECT_EQ(TakesForOthers(scene.snapshot(), MiB(5), MiB(3),
                           scene.config.patience, scene.config),
            (Takes{{0, Tier::kIdle, 1}, {0, Tier::kPreempt, 2}}));
}

TEST(TakesForOthers, NothingOfWhatIsGuaranteed) {
  Scene scene(10, {{.held = 6, .idle = 4, .settled = 4, .min = 5},
                   {.held = 4, .cached = 4, .min = 4}});
  EXPECT_EQ(TakesForOthers(scene.snapshot(), MiB(8), MiB(8), absl::Hours(1),
                           scene.config),
            (Takes{{0, Tier::kIdle, 1}}));
}

// ---- any snapshot ----------------------------------------------------------

// What must hold of each decision, whatever the figures.
class RandomSnapshots : public testing::TestWithParam<uint64_t> {
 protected:
  int64_t Draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  PolicySnapshot DrawSnapshot() {
    PolicySnapshot snapshot;
    snapshot.capacity = MiB(Draw(100, 4000));
    Bytes left = snapshot.capacity, mins_left = snapshot.capacity;
    constexpr int kPageSizes[] = {2, 112, 128, 144};
    const int instances = static_cast<int>(Draw(1, 5));
    for (int i = 0; i < instances; ++i) {
      InstanceView view;
      view.name = std::string(1, 'a' + i);
      view.min = Draw(0, 2) == 0 ? MiB(Draw(0, mins_left / MiB(1))) : Bytes(0);
      mins_left -= view.min;
      view.max = Draw(0, 3) == 0 ? MiB(Draw(0, snapshot.capacity / MiB(1)))
                                 : snapshot.capacity;
      view.min = std::min(view.min, view.max);
      view.weight = static_cast<double>(Draw(1, 4));
      view.held_off = Draw(0, 4) == 0;
      const int pools = static_cast<int>(Draw(1, 2));
      for (int p = 0; p < pools; ++p) {
        PoolView pool;
        pool.id = PoolId(snapshot.pools.size() + 1);
        pool.instance = i;
        pool.page_bytes = MiB(kPageSizes[Draw(0, 3)]);
        pool.held = Draw(0, left / pool.page_bytes);
        if (Draw(0, 3) == 0) pool.held = std::min<PageCount>(pool.held, 2);
        pool.idle = Draw(0, pool.held);
        pool.settled = Draw(0, pool.idle);
        pool.cached = Draw(0, pool.held - pool.idle);
        pool.oldest_idle = absl::Milliseconds(Draw(0, 1000));
        pool.answers = Draw(0, 5) != 0;
        view.held += pool.page_bytes * pool.held;
        view.demand += pool.page_bytes * (pool.held - pool.idle);
        left -= pool.page_bytes * pool.held;
        snapshot.pools.push_back(pool);
      }
      snapshot.instances.push_back(view);
    }
    snapshot.coming = MiB(Draw(0, left / MiB(1)) / Draw(1, 10));
    snapshot.free = left - snapshot.coming;
    return snapshot;
  }

  std::vector<ClaimView> DrawClaims(PolicySnapshot& snapshot) {
    std::vector<ClaimView> claims;
    const int64_t count = Draw(1, 5);
    for (int64_t i = 0; i < count; ++i) {
      ClaimView claim;
      claim.pool = Draw(0, snapshot.pools.size() - 1);
      claim.instance = snapshot.pools[claim.pool].instance;
      claim.at_least = Draw(1, 6);
      claim.want = claim.at_least + Draw(0, 3);
      claim.urgency = static_cast<Urgency>(Draw(1, 3));
      claim.age = absl::Milliseconds(Draw(0, 3000));
      if (claim.urgency != Urgency::kSpeculative) {
        snapshot.instances[claim.instance].demand +=
            snapshot.pools[claim.pool].page_bytes * claim.at_least;
      }
      claims.push_back(claim);
    }
    return claims;
  }

  static std::string Text(const Plan& plan) {
    std::ostringstream text;
    text << static_cast<int>(plan.verdict) << " " << plan.pages << " "
         << plan.reserve.count() << " " << plan.awaited.count() << " "
         << static_cast<int>(plan.code) << " " << plan.reason << " "
         << absl::FormatDuration(plan.recheck);
    for (const Take& take : plan.takes) text << " " << take;
    return text.str();
  }

  std::mt19937_64 random_{GetParam()};
};

TEST_P(RandomSnapshots, EveryPlanKeepsItsPromises) {
  const PolicyConfig config;
  for (int round = 0; round < 4'000; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    PolicySnapshot snapshot = DrawSnapshot();
    std::vector<ClaimView> claims = DrawClaims(snapshot);
    ComputeShares(snapshot);
    const PolicySnapshot original = snapshot;

    std::map<size_t, PageCount> asked;  // by pool
    for (auto next = claims.begin(); next != claims.end(); ++next) {
      std::iter_swap(
          next, std::min_element(next, claims.end(),
                                 [&](const ClaimView& a, const ClaimView& b) {
                                   return ServedBefore(snapshot, a, b, config);
                                 }));
      // As the core does: nobody gets more than it needs while others wait.
      if (claims.size() > 1) next->want = next->at_least;
      const ClaimView& claim = *next;
      const Plan plan = Decide(snapshot, claim, config);
      ASSERT_EQ(Text(plan), Text(Decide(snapshot, claim, config)));
      const InstanceView& claimant = snapshot.instances[claim.instance];
      const Bytes page = snapshot.pools[claim.pool].page_bytes;
      switch (plan.verdict) {
        case Verdict::kGrant:
          ASSERT_GE(plan.pages, claim.at_least);
          ASSERT_LE(plan.pages, claim.want);
          ASSERT_LE(page * plan.pages, snapshot.free);
          ASSERT_LE(claimant.held + claimant.promised + page * plan.pages,
                    claimant.max);
          ASSERT_TRUE(plan.takes.empty());
          break;
        case Verdict::kRefuse:
          ASSERT_NE(plan.code, absl::StatusCode::kOk);
          ASSERT_FALSE(plan.reason.empty());
          ASSERT_TRUE(plan.takes.empty());
          break;
        case Verdict::kWait:
          if (claim.urgency == Urgency::kSpeculative) {
            ASSERT_FALSE(plan.takes.empty());
            for (const Take& take : plan.takes) {
              ASSERT_EQ(take.tier, Tier::kIdle);
              ASSERT_NE(original.pools[take.pool].instance, claim.instance);
            }
          }
          ASSERT_FALSE(plan.reason.empty());
          ASSERT_LE(plan.reserve, snapshot.free);
          ASSERT_LE(plan.awaited, snapshot.coming);
          ASSERT_LE(plan.reserve + plan.awaited, page * claim.at_least);
          ASSERT_GT(plan.recheck, absl::ZeroDuration());
          break;
      }
      for (const Take& take : plan.takes) {
        const PoolView& pool = original.pools[take.pool];
        ASSERT_GT(take.pages, 0);
        ASSERT_TRUE(pool.answers);
        ASSERT_NE(take.pool, claim.pool);
        asked[take.pool] += take.pages;
        const bool dear =
            take.tier == Tier::kClosing || take.tier == Tier::kPreempt;
        const InstanceView& owner = snapshot.instances[pool.instance];
        if (dear || take.tier == Tier::kCached) {
          ASSERT_GT(owner.held, owner.share);
        }
        if (take.tier == Tier::kPreempt) {
          ASSERT_TRUE(claim.age >= config.patience ||
                      claimant.held + page * claim.at_least <= claimant.min);
        }
        if (dear) {
          ASSERT_LE(claimant.held + page * claim.at_least,
                    std::max(claimant.share, claimant.min));
        }
      }
      Apply(plan, claim, snapshot);
      ASSERT_GE(snapshot.free, Bytes(0));
      ASSERT_GE(claimant.promised, Bytes(0));
      ASSERT_GE(snapshot.coming, Bytes(0));
    }

    for (size_t i = 0; i < original.pools.size(); ++i) {
      // No page was promised twice.
      ASSERT_LE(asked[i], original.pools[i].held);
      ASSERT_GE(snapshot.pools[i].held, 0);
      ASSERT_GE(snapshot.pools[i].idle, 0);
      ASSERT_LE(snapshot.pools[i].settled, snapshot.pools[i].idle);
    }
    for (size_t i = 0; i < original.instances.size(); ++i) {
      const InstanceView& owner = original.instances[i];
      // Others' claims pushed nobody below its min; its own may move its pages
      // from one of its pools to another.
      Bytes given;
      for (size_t p = 0; p < original.pools.size(); ++p) {
        if (original.pools[p].instance != i) continue;
        given += original.pools[p].page_bytes * asked[p];
      }
      const bool claims_itself =
          std::any_of(claims.begin(), claims.end(),
                      [&](const ClaimView& c) { return c.instance == i; });
      if (given > Bytes(0) && !claims_itself) {
        ASSERT_GE(owner.held - given, owner.min);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomSnapshots,
                         testing::Range<uint64_t>(1, 6));

}  // namespace
}  // namespace kvbroker
