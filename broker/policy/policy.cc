#include "broker/policy/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "absl/strings/str_cat.h"

namespace kvbroker {
namespace {

// What an instance holds when its earlier claims have got what they wait for.
Bytes HeldAndPromised(const InstanceView& instance) {
  return instance.held + instance.promised;
}

// What it holds when it has given what others asked of it.
Bytes Stays(const InstanceView& instance) {
  return instance.held - instance.leaving;
}

// Finds pages of others (and of the claimant's other pools) for one need, tier
// by tier, without promising the same page twice.
class Collector {
 public:
  Collector(const PolicySnapshot& snapshot, Bytes need)
      : snapshot_(snapshot), need_(need) {
    for (const PoolView& pool : snapshot.pools) {
      left_.push_back(
          {pool.settled, pool.idle - pool.settled, pool.cached, pool.held});
    }
    for (const InstanceView& instance : snapshot.instances) {
      held_.push_back(Stays(instance));
    }
  }

  bool satisfied() const { return need_ <= Bytes(0); }
  // From now on so much more is needed than is satisfied.
  void NeedMore(Bytes more) { need_ = std::max(need_, Bytes(0)) + more; }
  // Not more than so much from now on, beside what was collected.
  void LowerNeed(Bytes need) { need_ = std::min(need_, need); }
  Bytes need() const { return need_; }
  const std::vector<Take>& takes() const& { return takes_; }
  std::vector<Take> takes() && { return std::move(takes_); }

  enum Source { kSettled, kFresh, kCached, kAny };

  // Takes up to `available` pages of `source` from the pool, as many as the
  // need still asks for, without pushing its instance below `floor` or its
  // `min`. `may_cross`: the last page may push it below `floor` by a part of a
  // page.
  void TakeFrom(size_t pool_index, Source source, Tier tier, Bytes floor,
                bool may_cross) {
    const size_t instance = snapshot_.pools[pool_index].instance;
    TakeAbove(pool_index, source, tier, floor, may_cross,
              snapshot_.instances[instance].min, kAllPages);
  }

  // Idle pages for a claimant that has use for them soon, so many at most. Says
  // how many.
  PageCount TakeAhead(size_t pool_index, Source source, PageCount most) {
    const size_t instance = snapshot_.pools[pool_index].instance;
    return TakeAbove(pool_index, source, Tier::kIdle, Bytes(0), false,
                     snapshot_.instances[instance].min, most);
  }

  // The same for pages that an instance gives for its own sake: within one
  // instance nothing is guaranteed against itself.
  void TakeOwn(size_t pool_index, Source source, Tier tier) {
    TakeAbove(pool_index, source, tier, Bytes(0), false, Bytes(0), kAllPages);
  }

 private:
  static constexpr PageCount kAllPages = std::numeric_limits<PageCount>::max();

  struct Left {
    PageCount count[4];
  };

  PageCount TakeAbove(size_t pool_index, Source source, Tier tier, Bytes floor,
                      bool may_cross, Bytes min, PageCount most) {
    if (satisfied()) return 0;
    const PoolView& pool = snapshot_.pools[pool_index];
    if (!pool.answers) return 0;
    Left& left = left_[pool_index];
    PageCount available = std::min(left.count[source], left.count[kAny]);

    Bytes above_floor = held_[pool.instance] - floor;
    PageCount by_floor = above_floor <= Bytes(0) ? 0
                         : may_cross ? CeilDivide(above_floor, pool.page_bytes)
                                     : above_floor / pool.page_bytes;
    Bytes above_min = held_[pool.instance] - min;
    PageCount by_min = above_min <= Bytes(0) ? 0 : above_min / pool.page_bytes;
    PageCount pages = std::min(
        {available, by_floor, by_min, CeilDivide(need_, pool.page_bytes), most});
    if (pages <= 0) return 0;

    left.count[source] -= pages;
    if (source != kAny) left.count[kAny] -= pages;
    held_[pool.instance] -= pool.page_bytes * pages;
    need_ -= pool.page_bytes * pages;
    takes_.push_back({pool_index, tier, pages});
    return pages;
  }

  const PolicySnapshot& snapshot_;
  Bytes need_;
  std::vector<Left> left_;
  std::vector<Bytes> held_;
  std::vector<Take> takes_;
};

double AboveShare(const InstanceView& instance, Bytes held, Bytes page) {
  double share = std::max<double>(instance.share.count(), page.count());
  return static_cast<double>(held.count()) / share;
}

// Pool indexes in the order `key` gives, smallest first.
template <typename Key>
std::vector<size_t> PoolsBy(const PolicySnapshot& snapshot, Key key) {
  std::vector<size_t> order;
  for (size_t i = 0; i < snapshot.pools.size(); ++i) order.push_back(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return key(a) < key(b); });
  return order;
}

bool IsOwn(const PolicySnapshot& snapshot, const ClaimView& claim,
           size_t pool) {
  return snapshot.pools[pool].instance == claim.instance;
}

void TakeOwnIdle(const PolicySnapshot& snapshot, const ClaimView& claim,
                 Collector& collector) {
  for (size_t i = 0; i < snapshot.pools.size(); ++i) {
    if (!IsOwn(snapshot, claim, i) || i == claim.pool) continue;
    for (auto source : {Collector::kSettled, Collector::kFresh}) {
      collector.TakeOwn(i, source, Tier::kIdle);
    }
  }
}

void TakeOthersIdle(const PolicySnapshot& snapshot, const ClaimView& claim,
                    Collector& collector) {
  std::vector<size_t> oldest_first = PoolsBy(snapshot, [&](size_t i) {
    return std::tuple(-snapshot.pools[i].oldest_idle, i);
  });
  for (auto source : {Collector::kSettled, Collector::kFresh}) {
    for (bool down_to_share : {true, false}) {
      for (size_t i : oldest_first) {
        if (IsOwn(snapshot, claim, i)) continue;
        const InstanceView& owner =
            snapshot.instances[snapshot.pools[i].instance];
        collector.TakeFrom(i, source, Tier::kIdle,
                           down_to_share ? owner.share : owner.min,
                           /*may_cross=*/down_to_share);
      }
    }
  }
}

// Idle pages for what a claimant wants beside what it needs: from those who have
// more of them than it has then, so that nobody's are taken to and fro.
void TakeIdleAhead(const PolicySnapshot& snapshot, const ClaimView& claim,
                   Bytes more, Collector& collector) {
  std::vector<Bytes> idle(snapshot.instances.size());
  for (const PoolView& pool : snapshot.pools) {
    idle[pool.instance] += pool.page_bytes * pool.idle;
  }
  for (const Take& take : collector.takes()) {
    const PoolView& giver = snapshot.pools[take.pool];
    if (take.tier == Tier::kIdle) {
      idle[giver.instance] -= giver.page_bytes * take.pages;
    }
  }
  collector.NeedMore(more);
  std::vector<size_t> oldest_first = PoolsBy(snapshot, [&](size_t i) {
    return std::tuple(-snapshot.pools[i].oldest_idle, i);
  });
  for (auto source : {Collector::kSettled, Collector::kFresh}) {
    for (size_t i : oldest_first) {
      if (IsOwn(snapshot, claim, i)) continue;
      const PoolView& giver = snapshot.pools[i];
      const Bytes gap = idle[giver.instance] - idle[claim.instance];
      const PageCount even = gap / (giver.page_bytes * 2);
      const Bytes taken =
          giver.page_bytes * collector.TakeAhead(i, source, even);
      idle[giver.instance] -= taken;
      idle[claim.instance] += taken;
    }
  }
}

// Pools of the others, those furthest above their share first.
std::vector<size_t> GreediestFirst(const PolicySnapshot& snapshot) {
  return PoolsBy(snapshot, [&](size_t i) {
    const PoolView& pool = snapshot.pools[i];
    const InstanceView& owner = snapshot.instances[pool.instance];
    return std::tuple(-AboveShare(owner, Stays(owner), pool.page_bytes), i);
  });
}

void TakeCached(const PolicySnapshot& snapshot, const ClaimView& claim,
                bool entitled, Collector& collector) {
  const InstanceView& claimant = snapshot.instances[claim.instance];
  Bytes page = snapshot.pools[claim.pool].page_bytes;
  double after = AboveShare(
      claimant, HeldAndPromised(claimant) + page * claim.at_least, page);
  for (size_t i : GreediestFirst(snapshot)) {
    if (IsOwn(snapshot, claim, i)) continue;
    const PoolView& pool = snapshot.pools[i];
    const InstanceView& owner = snapshot.instances[pool.instance];
    // A claimant above its own share takes only from those who are further
    // above.
    if (!entitled && AboveShare(owner, Stays(owner) - pool.page_bytes,
                                pool.page_bytes) <= after) {
      continue;
    }
    collector.TakeFrom(i, Collector::kCached, Tier::kCached, owner.share, true);
  }
}

void TakeInUse(const PolicySnapshot& snapshot, const ClaimView& claim,
               Tier tier, Collector& collector) {
  for (size_t i : GreediestFirst(snapshot)) {
    if (IsOwn(snapshot, claim, i)) continue;
    const InstanceView& owner = snapshot.instances[snapshot.pools[i].instance];
    collector.TakeFrom(i, Collector::kAny, tier, owner.share, true);
  }
}

// 0: leaves the instance within `min`; 1: within its share; 2: neither.
int Rank(const PolicySnapshot& snapshot, const ClaimView& claim) {
  const InstanceView& instance = snapshot.instances[claim.instance];
  Bytes after = HeldAndPromised(instance) +
                snapshot.pools[claim.pool].page_bytes * claim.at_least;
  if (after <= instance.min) return 0;
  return after <= instance.share ? 1 : 2;
}

Plan Refuse(absl::StatusCode code, std::string reason) {
  Plan plan;
  plan.verdict = Plan::Verdict::kRefuse;
  plan.code = code;
  plan.reason = std::move(reason);
  return plan;
}

}  // namespace

void ComputeShares(PolicySnapshot& snapshot) {
  struct Bounds {
    double low, high, weight;
  };
  std::vector<Bounds> bounds;
  double most = 0, steepest = 0;
  const double capacity = static_cast<double>(snapshot.capacity.count());
  for (const InstanceView& instance : snapshot.instances) {
    double high = static_cast<double>(
        std::min({instance.demand, instance.max, snapshot.capacity}).count());
    double low = std::min<double>(instance.min.count(), high);
    bounds.push_back({low, high, instance.weight});
    most += high;
    if (instance.weight > 0) {
      steepest = std::max(steepest, high / instance.weight);
    }
  }
  auto share = [&](const Bounds& b, double level) {
    return std::clamp(level * b.weight, b.low, b.high);
  };
  // The water level at which the clamped shares fill the capacity.
  double level = steepest;
  if (most > capacity) {
    double low = 0, high = steepest;
    for (int i = 0; i < 64; ++i) {
      level = (low + high) / 2;
      double sum = 0;
      for (const Bounds& b : bounds) sum += share(b, level);
      (sum > capacity ? high : low) = level;
    }
    level = low;
  }
  for (size_t i = 0; i < bounds.size(); ++i) {
    snapshot.instances[i].share =
        Bytes(static_cast<int64_t>(share(bounds[i], level)));
  }
}

PageCount FromFree(Bytes free, Bytes room, Bytes page_bytes, PageCount at_least,
                   PageCount want) {
  Bytes available = std::min(free, room);
  if (available < page_bytes * at_least) return 0;
  return std::min(std::max(want, at_least), available / page_bytes);
}

Plan Decide(const PolicySnapshot& snapshot, const ClaimView& claim,
            const PolicyConfig& config) {
  const InstanceView& instance = snapshot.instances[claim.instance];
  const Bytes page = snapshot.pools[claim.pool].page_bytes;

  // The instance's own bounds: its limit, and its share while it is held off.
  Bytes room = instance.max - HeldAndPromised(instance);
  if (room < page * claim.at_least) {
    Collector own(snapshot, page * claim.at_least - room);
    TakeOwnIdle(snapshot, claim, own);
    if (!own.satisfied() || claim.urgency == Urgency::kSpeculative) {
      return Refuse(
          absl::StatusCode::kResourceExhausted,
          absl::StrCat("over the instance's own limit: it holds ",
                       FormatBytes(HeldAndPromised(instance)), ", asks for ",
                       FormatBytes(page * claim.at_least), " more, may hold ",
                       FormatBytes(instance.max)));
    }
    Plan plan;
    plan.takes = std::move(own).takes();
    plan.reason = "its own other pools give idle pages first";
    return plan;
  }
  if (instance.held_off) {
    room = std::min(room, std::max(instance.share, instance.min) -
                              HeldAndPromised(instance));
  }
  if (room < page * claim.at_least) {
    if (claim.urgency == Urgency::kSpeculative) {
      return Refuse(absl::StatusCode::kUnavailable,
                    "held off: it was made to give and may not grow yet");
    }
    Plan plan;
    plan.reason =
        "held off: it was made to give and may not grow above its "
        "share yet";
    return plan;
  }
  const Bytes usable = std::max(snapshot.free - claim.unusable, Bytes(0));
  if (PageCount pages =
          FromFree(usable, room, page, claim.at_least, claim.want);
      pages > 0) {
    Plan plan;
    plan.verdict = Plan::Verdict::kGrant;
    plan.pages = pages;
    return plan;
  }
  const PageCount want =
      std::min(std::max(claim.want, claim.at_least), room / page);
  if (claim.urgency == Urgency::kSpeculative) {
    Collector collector(snapshot, Bytes(0));
    TakeIdleAhead(snapshot, claim, page * want - usable, collector);
    if (collector.takes().empty()) {
      return Refuse(absl::StatusCode::kUnavailable,
                    "no memory to map ahead with");
    }
    Plan plan;
    plan.takes = std::move(collector).takes();
    plan.reason = "others have more idle pages";
    return plan;
  }

  const int rank = Rank(snapshot, claim);
  const bool entitled = rank < 2;
  Collector collector(snapshot,
                      page * claim.at_least - usable - snapshot.coming);
  const bool on_its_way = collector.satisfied();
  TakeOwnIdle(snapshot, claim, collector);
  TakeOthersIdle(snapshot, claim, collector);
  TakeCached(snapshot, claim, entitled, collector);
  const bool cheap = collector.satisfied();
  Plan plan;
  if (on_its_way) {
    plan.reason = "memory is on its way back to the device";
  } else if (cheap) {
    plan.reason = "others give idle or cached pages";
  } else if (!entitled) {
    plan.reason =
        "above its share: waits for memory that others leave or no longer need";
  } else if (rank == 0 || claim.age >= config.patience) {
    TakeInUse(snapshot, claim, Tier::kPreempt, collector);
    plan.reason = rank == 0 ? "below its min: others preempt at once"
                            : "below its share: others preempt";
  } else {
    TakeInUse(snapshot, claim, Tier::kClosing, collector);
    plan.recheck = config.patience - claim.age;
    plan.reason = "below its share: others close pages";
  }
  // Memory is kept for a claim that it will serve, and for one that has waited.
  if (collector.satisfied() || entitled || claim.age >= config.patience) {
    plan.reserve = std::min(snapshot.free, page * claim.at_least);
    plan.awaited =
        std::min(snapshot.coming, page * claim.at_least - plan.reserve);
  } else {
    plan.recheck = config.patience - claim.age;
  }
  // Whoever is asked anyway is asked once.
  if (cheap && !on_its_way && want > claim.at_least) {
    TakeIdleAhead(snapshot, claim, page * (want - claim.at_least), collector);
  }
  plan.takes = std::move(collector).takes();
  return plan;
}

Bytes TakeOut(const std::vector<Take>& takes, PolicySnapshot& snapshot) {
  Bytes sum;
  for (const Take& take : takes) {
    PoolView& pool = snapshot.pools[take.pool];
    PageCount idle = take.tier == Tier::kIdle ? take.pages : 0;
    pool.held -= take.pages;
    pool.idle -= std::min(pool.idle, idle);
    pool.settled -= std::min(pool.settled, idle);
    if (take.tier == Tier::kCached) {
      pool.cached -= std::min(pool.cached, take.pages);
    }
    // In-use takes come out of whatever the pool holds last.
    pool.idle = std::min(pool.idle, pool.held);
    pool.settled = std::min(pool.settled, pool.idle);
    pool.cached = std::min(pool.cached, pool.held);
    snapshot.instances[pool.instance].leaving += pool.page_bytes * take.pages;
    sum += pool.page_bytes * take.pages;
  }
  return sum;
}

void Apply(const Plan& plan, const ClaimView& claim, PolicySnapshot& snapshot) {
  if (plan.verdict == Plan::Verdict::kRefuse) return;
  InstanceView& instance = snapshot.instances[claim.instance];
  const Bytes page = snapshot.pools[claim.pool].page_bytes;
  if (plan.verdict == Plan::Verdict::kGrant) {
    Bytes bytes = page * plan.pages;
    snapshot.free -= bytes;
    snapshot.pools[claim.pool].held += plan.pages;
    instance.held += bytes;
    return;
  }
  snapshot.free -= plan.reserve;
  snapshot.coming -= plan.awaited;
  const Bytes kept = plan.reserve + plan.awaited;
  // Where page sizes differ more comes than the claim needs: others have that.
  const Bytes taken = TakeOut(plan.takes, snapshot);
  const Bytes used = std::min(taken, page * claim.at_least - kept);
  snapshot.coming += taken - used;
  Bytes own;  // from one of its pools to another
  for (const Take& take : plan.takes) {
    const PoolView& pool = snapshot.pools[take.pool];
    if (pool.instance == claim.instance) own += pool.page_bytes * take.pages;
  }
  instance.promised += std::max(kept + used - own, Bytes(0));
}

bool ServedBefore(const PolicySnapshot& snapshot, const ClaimView& a,
                  const ClaimView& b, const PolicyConfig& config) {
  auto key = [&](const ClaimView& claim) {
    double weight = snapshot.instances[claim.instance].weight;
    double ageing = absl::ToDoubleSeconds(config.ageing);
    double aged =
        ageing > 0
            ? weight *
                  (1 + std::floor(absl::ToDoubleSeconds(claim.age) / ageing))
            : weight;
    return std::tuple(Rank(snapshot, claim), -static_cast<int>(claim.urgency),
                      -aged, -claim.age);
  };
  return key(a) < key(b);
}

std::vector<Take> TakesForOthers(const PolicySnapshot& snapshot, Bytes need,
                                 Bytes hard, absl::Duration needed_for,
                                 const PolicyConfig& config) {
  Collector collector(snapshot, need);
  const std::vector<size_t> oldest_first = PoolsBy(snapshot, [&](size_t i) {
    return std::tuple(-snapshot.pools[i].oldest_idle, i);
  });
  auto owner = [&](size_t pool) -> const InstanceView& {
    return snapshot.instances[snapshot.pools[pool].instance];
  };
  auto take = [&](const std::vector<size_t>& order, Collector::Source source,
                  Tier tier) {
    for (auto floor : {&InstanceView::share, &InstanceView::min}) {
      for (size_t i : order) {
        collector.TakeFrom(i, source, tier, owner(i).*floor, true);
      }
    }
  };
  take(oldest_first, Collector::kSettled, Tier::kIdle);
  take(oldest_first, Collector::kFresh, Tier::kIdle);
  const std::vector<size_t> greediest_first = GreediestFirst(snapshot);
  take(greediest_first, Collector::kCached, Tier::kCached);
  collector.LowerNeed(hard - (need - collector.need()));
  take(greediest_first, Collector::kAny,
       needed_for >= config.patience ? Tier::kPreempt : Tier::kClosing);
  return std::move(collector).takes();
}

std::vector<Take> TakesToFitLimit(const PolicySnapshot& snapshot,
                                  size_t instance, absl::Duration above_for,
                                  const PolicyConfig& config) {
  const InstanceView& view = snapshot.instances[instance];
  Collector collector(snapshot, Stays(view) - view.max);
  Tier in_use =
      above_for >= config.limit_patience ? Tier::kPreempt : Tier::kClosing;
  const std::pair<Collector::Source, Tier> steps[] = {
      {Collector::kSettled, Tier::kIdle},
      {Collector::kFresh, Tier::kIdle},
      {Collector::kCached, Tier::kCached},
      {Collector::kAny, in_use}};
  for (auto [source, tier] : steps) {
    for (size_t i = 0; i < snapshot.pools.size(); ++i) {
      if (snapshot.pools[i].instance != instance) continue;
      collector.TakeOwn(i, source, tier);
    }
  }
  return std::move(collector).takes();
}

}  // namespace kvbroker
