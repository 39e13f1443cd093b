// Core: who is served and who is asked, now and when time has passed.
#include <algorithm>
#include <iterator>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "broker/core/core.h"
#include "broker/policy/policy.h"

namespace kvbroker {
namespace {

constexpr absl::Duration kCreditLife = absl::Seconds(1);
constexpr absl::Duration kRememberLimits = absl::Hours(1);
constexpr size_t kMaxHolders = 8;

std::string_view NameOf(Tier tier) {
  switch (tier) {
    case Tier::kIdle:
      return "idle";
    case Tier::kCached:
      return "cached";
    case Tier::kClosing:
      return "closing";
    case Tier::kPreempt:
      return "preempt";
  }
  return "?";
}

absl::string_view View(std::string_view s) { return {s.data(), s.size()}; }

}  // namespace

PolicySnapshot Core::TakeSnapshot() {
  const absl::Time now = Now();
  PolicySnapshot snapshot;
  snapshot.capacity = ledger_.lendable();
  snapshot.free = ledger_.grantable();
  // What is overdrawn has to come back first.
  snapshot.coming = std::max(Bytes(0), ledger_.lendable() - ledger_.lent() -
                                           ledger_.credit()) -
                    snapshot.free;
  absl::flat_hash_map<PoolId, size_t> place;
  for (const auto& [key, instance] : ledger_.instances()) {
    InstanceView view;
    view.name = instance.name;
    view.min = instance.min;
    view.max = std::min(instance.max, ledger_.capacity());
    view.weight = instance.weight;
    view.held = instance.held;
    view.demand = instance.held;
    view.held_off = now < instances_.at(key).held_off_until;
    const size_t instance_index = snapshot.instances.size();
    for (SessionId session_id : instance.sessions) {
      const SessionState& session = sessions_.at(session_id);
      for (PoolId pool_id : ledger_.FindSession(session_id)->pools) {
        const LedgerPool& pool = *ledger_.FindPool(pool_id);
        const PoolState& state = pools_.at(pool_id);
        PoolView pool_view;
        pool_view.id = pool_id;
        pool_view.instance = instance_index;
        pool_view.page_bytes = pool.geometry.page_bytes();
        pool_view.held = pool.held();
        const bool believed = now >= state.disbelieved_until;
        pool_view.idle =
            believed ? std::min(state.report.idle, pool.held()) : 0;
        pool_view.cached = believed ? std::min(state.report.cached,
                                               pool.held() - pool_view.idle)
                                    : 0;
        absl::Duration since_report =
            pool_view.idle > 0 ? now - state.reported_at : absl::ZeroDuration();
        pool_view.settled =
            since_report >= options_.policy.idle_fresh
                ? pool_view.idle
                : std::min(state.report.settled, pool_view.idle);
        pool_view.oldest_idle = state.report.oldest_idle + since_report;
        pool_view.answers =
            session.connected && !session.ignoring && !session.resumption;
        view.demand -= pool_view.page_bytes * pool_view.idle;
        place[pool_id] = snapshot.pools.size();
        snapshot.pools.push_back(pool_view);
      }
    }
    snapshot.instances.push_back(std::move(view));
  }
  for (const Claim& claim : claims_) {
    if (claim.urgency == Urgency::kSpeculative) continue;
    const PoolView& pool = snapshot.pools[place.at(claim.pool)];
    snapshot.instances[pool.instance].demand +=
        pool.page_bytes * claim.at_least;
  }
  ComputeShares(snapshot);
  return snapshot;
}

bool Core::GrantAtOnce(const Claim& claim, Actions& actions) {
  const LedgerPool& pool = *ledger_.FindPool(claim.pool);
  const LedgerInstance& instance = ledger_.InstanceOf(pool);
  const InstanceState& state = instances_.at({instance.tenant, instance.name});
  if (Now() < state.held_off_until || instance.credit > Bytes(0)) return false;
  if (HoldsForResume()) return false;
  Bytes room = std::min(instance.max, ledger_.capacity()) - instance.held;
  PageCount pages =
      FromFree(ledger_.grantable(), room, pool.geometry.page_bytes(),
               claim.at_least, claim.want);
  return pages > 0 && StartGrant(claim, pages, actions).has_value();
}

std::optional<PageCount> Core::StartGrant(const Claim& claim, PageCount pages,
                                          Actions& actions) {
  LedgerPool& pool = *ledger_.FindPool(claim.pool);
  LedgerInstance& instance = ledger_.InstanceOf(pool);
  InstanceState& state = instances_.at({instance.tenant, instance.name});
  SessionState& session = sessions_.at(claim.session);
  const Bytes page = pool.geometry.page_bytes();

  if (claim.credit) {
    if (ledger_.free() < page * pages) {
      ReleaseStock(actions);
      return std::nullopt;
    }
    ledger_.AddCredit(instance, page * pages);
    watched_.insert({instance.tenant, instance.name});
    state.credit_until = Now() + kCreditLife;
    Granted granted;
    granted.sequence = claim.sequence;
    granted.pool = claim.pool;
    granted.credit = pages;
    granted.credit_for = kCreditLife;
    KeepAnswer(session, claim.sequence, {.granted = granted});
    actions.tell.emplace_back(session.listener, granted);
    actions.log.push_back(absl::StrCat(
        "credit session=", claim.session.value(), " instance=", instance.name,
        " pool=", claim.pool.value(), " pages=", pages));
    Record(HistoryEvent::Kind::kCredit, pool, actions);
    return pages;
  }

  // The claim's slots that are still empty, or the lowest empty ones.
  std::vector<PageIndex> indexes;
  if (claim.indexes.empty()) {
    indexes = ledger_.AbsentIndexes(pool, pages);
  } else {
    for (PageIndex index : claim.indexes) {
      if (static_cast<PageCount>(indexes.size()) == pages) break;
      if (!pool.pages.contains(index)) indexes.push_back(index);
    }
  }
  if (static_cast<PageCount>(indexes.size()) < claim.at_least) {
    // Slots are empty, but the slab has no place for them.
    if (fixed_addresses_ &&
        pool.geometry.max_pages - pool.held() >= claim.at_least) {
      return std::nullopt;
    }
    Refuse(claim, absl::StatusCode::kFailedPrecondition,
           "the slots asked for are not empty", actions);
    return 0;
  }
  pages = static_cast<PageCount>(indexes.size());

  MakePages make;
  make.claim = claim;
  make.geometry = pool.geometry;
  make.grant = GrantId(next_grant_++);
  // What is in stock for this tenant and size need not be made; other stock has
  // to go back to the driver where it is in the way.
  const size_t handle_count = pages * pool.geometry.handles_per_page;
  make.handles = ledger_.TakeStock(instance.tenant, pool.geometry.handle_bytes,
                                   handle_count);
  // Mapping ahead leaves the credit to what it was set aside for.
  Bytes draw = claim.urgency == Urgency::kSpeculative
                   ? Bytes(0)
                   : std::min(instance.credit, page * pages);
  if (ledger_.free() + draw < page * pages) {
    // What TakeStock took counts as free until it is charged or goes back.
    ledger_.BeginRelease(SizeOf(make.handles));
    for (HandleRef& handle : make.handles) {
      actions.release.push_back(std::move(handle));
    }
    ReleaseStock(actions);
    return std::nullopt;
  }
  ledger_.DropCredit(instance, draw);
  make.pages = ledger_.Charge(pool, make.grant, indexes);
  if (auto* event = Record(HistoryEvent::Kind::kGrant, pool, actions)) {
    event->grant = make.grant;
    event->pages = make.pages;
    event->drawn = draw;
  }
  session.making.emplace(claim.sequence, false);
  ++state.grants;
  actions.make.push_back(std::move(make));
  return pages;
}

Bytes Core::UnusableFor(const Claim& claim, Bytes free) {
  if (!fixed_addresses_) return Bytes(0);
  const LedgerPool& pool = *ledger_.FindPool(claim.pool);
  const size_t places = ledger_.AbsentIndexes(pool, claim.want).size();
  if (static_cast<PageCount>(places) == claim.want) return Bytes(0);
  return std::max(
      free - pool.geometry.page_bytes() * static_cast<int64_t>(places),
      Bytes(0));
}

std::vector<Holder> Core::Holders() {
  PolicySnapshot snapshot = TakeSnapshot();
  std::vector<Holder> holders;
  for (const InstanceView& view : snapshot.instances) {
    if (view.held > Bytes(0)) {
      holders.push_back({view.name, view.held, {}, {}, view.share});
    }
  }
  for (const PoolView& pool : snapshot.pools) {
    for (Holder& holder : holders) {
      if (holder.instance != snapshot.instances[pool.instance].name) continue;
      holder.idle += pool.page_bytes * pool.idle;
      holder.cached += pool.page_bytes * pool.cached;
    }
  }
  std::sort(holders.begin(), holders.end(),
            [](const Holder& a, const Holder& b) { return a.held > b.held; });
  if (holders.size() > kMaxHolders) holders.resize(kMaxHolders);
  return holders;
}

void Core::Refuse(const Claim& claim, absl::StatusCode code, std::string reason,
                  Actions& actions) {
  auto it = sessions_.find(claim.session);
  if (it == sessions_.end()) return;
  Refused refused;
  refused.sequence = claim.sequence;
  refused.code = code;
  refused.reason = std::move(reason);
  // A lost device is nobody's doing.
  const bool names_holders = code == absl::StatusCode::kUnavailable &&
                             device_error_.ok() &&
                             claim.urgency != Urgency::kSpeculative;
  if (names_holders) refused.holders = Holders();
  KeepAnswer(it->second, claim.sequence, {.refused = refused});
  actions.tell.emplace_back(it->second.listener, refused);
  if (auto* event = Record(HistoryEvent::Kind::kRefuse,
                           *ledger_.FindPool(claim.pool), actions)) {
    event->why = refused.reason;
  }
  if (code == absl::StatusCode::kCancelled) return;
  const LedgerSession& session = *ledger_.FindSession(claim.session);
  if (claim.urgency != Urgency::kSpeculative) {
    ++instances_.at(session.instance).refusals;
    if (!device_error_.ok()) return;  // said once, for all
    std::string holders;
    for (const Holder& holder : refused.holders) {
      absl::StrAppend(&holders, holders.empty() ? "" : ",", holder.instance,
                      ":", holder.held.count());
    }
    actions.log.push_back(absl::StrCat(
        "refuse session=", claim.session.value(),
        " instance=", session.instance.second, " pool=", claim.pool.value(),
        " pages=", claim.at_least,
        " waited_ms=", absl::ToInt64Milliseconds(Now() - claim.since),
        " reason=\"", refused.reason, "\" holders=", holders));
  }
}

void Core::Order(PoolId pool_id, PageCount hold_at_most, Tier tier,
                 Bytes for_others, Actions& actions) {
  PoolState& state = pools_.at(pool_id);
  const LedgerPool& pool = *ledger_.FindPool(pool_id);
  // The same again is an order of its own only to one who has done with the
  // first and holds too much again: pages were on their way to it then.
  const bool undone = state.settled_order && pool.held() > hold_at_most;
  if (state.hold_at_most == hold_at_most && state.tier == tier && !undone) {
    return;
  }
  SessionState& session = sessions_.at(pool.session);
  if (!session.connected) return;
  const bool lifted = hold_at_most == kHoldAny;
  // Who has done with an order keeps nothing of it in force.
  const bool tell = !lifted || !state.settled_order;
  if (tell) state.revision = Revision(state.revision.value() + 1);
  state.hold_at_most = hold_at_most;
  state.tier = tier;
  state.settled_order = lifted;
  if (lifted) {
    ordered_.erase(pool_id);
  } else {
    ordered_.insert(pool_id);
  }
  // Closing pages leave in their own time; the other tiers can answer at once.
  // A changed order gives no more time to one who has not answered the last.
  const absl::Time deadline = Now() + options_.policy.reclaim_deadline;
  state.order_deadline =
      lifted || tier == Tier::kClosing ? absl::InfiniteFuture()
      : state.answered                 ? deadline
                       : std::min(state.order_deadline, deadline);
  state.answered = lifted || tier == Tier::kClosing;
  if (tell) {
    actions.tell.emplace_back(
        session.listener,
        Reclaim{pool_id, state.revision, hold_at_most, tier,
                tier == Tier::kClosing ? absl::InfiniteDuration()
                                       : options_.policy.reclaim_deadline});
  }
  if (auto* event = Record(HistoryEvent::Kind::kOrder, pool, actions)) {
    event->hold_at_most = hold_at_most;
    event->tier = tier;
    event->for_others = for_others;
  }
  const LedgerInstance& instance = ledger_.InstanceOf(pool);
  InstanceState& owner = instances_.at({instance.tenant, instance.name});
  if (lifted) {
    if (!tell) return;
    actions.log.push_back(absl::StrCat(
        "lift session=", pool.session.value(), " instance=", instance.name,
        " pool=", pool_id.value(), " revision=", state.revision.value()));
    return;
  }
  ++owner.reclaims;
  if (tier == Tier::kPreempt) ++owner.preempts;
  actions.log.push_back(absl::StrCat(
      "reclaim session=", pool.session.value(), " instance=", instance.name,
      " pool=", pool_id.value(), " held=", pool.held(),
      " hold_at_most=", hold_at_most, " tier=", View(NameOf(tier)),
      " revision=", state.revision.value()));
}

void Core::Arbitrate(Actions& actions) {
  const absl::Time now = Now();
  bool above_limit = false;
  for (const Ledger::InstanceKey& key : watched_) {
    LedgerInstance& instance = *ledger_.FindInstance(key);
    InstanceState& state = instances_.at(key);
    // Credit above a limit is no reason to take pages.
    if (instance.held > instance.max && instance.credit > Bytes(0)) {
      ledger_.DropCredit(instance, instance.credit);
      Record(HistoryEvent::Kind::kCredit, instance, actions);
    }
    if (instance.held <= instance.max) {
      state.above_limit_since = absl::InfiniteFuture();
    } else {
      if (state.above_limit_since == absl::InfiniteFuture()) {
        state.above_limit_since = now;
      }
      above_limit = true;
    }
  }
  if (ledger_.overdrawn() == Bytes(0)) {
    overdrawn_since_ = absl::InfiniteFuture();
  } else if (overdrawn_since_ == absl::InfiniteFuture()) {
    overdrawn_since_ = now;
  }
  // Until a reading shows whose the adopted pages are, nobody gives any for it.
  const bool known = !options_.headroom || measured_at_ >= adopted_at_;
  if (HoldsForResume() || !known) overdrawn_since_ = absl::InfiniteFuture();
  if (overdrawn_since_ <= now) {
    // A promise that cannot be kept.
    for (auto& [key, instance] : ledger_.instances()) {
      if (instance.credit == Bytes(0)) continue;
      ledger_.DropCredit(instance, instance.credit);
      Record(HistoryEvent::Kind::kCredit, instance, actions);
    }
  }
  TrimStock(actions);
  SettleRooms(actions);
  const bool room_needed = known && ledger_.lent() > ledger_.lendable();
  if (claims_.empty() && !above_limit && !room_needed && ordered_.empty()) {
    return;
  }
  if (HoldsForResume()) {
    for (auto it = claims_.begin(); it != claims_.end();) {
      it->reason = WhoIsToResume();
      it->recheck_at = hold_until_;
      if (it->urgency == Urgency::kSpeculative) {
        Refuse(*it, absl::StatusCode::kUnavailable, it->reason, actions);
        it = claims_.erase(it);
      } else {
        ++it;
      }
    }
    return;
  }

  PolicySnapshot snapshot = TakeSnapshot();
  absl::flat_hash_map<PoolId, size_t> place;
  for (size_t i = 0; i < snapshot.pools.size(); ++i) {
    place[snapshot.pools[i].id] = i;
  }
  std::map<size_t, Tier> asked;  // pool -> the dearest tier
  // What each instance is asked to give to others.
  std::vector<Bytes> for_others(snapshot.instances.size());
  auto ask = [&](const std::vector<Take>& takes) {
    for (const Take& take : takes) {
      auto [it, added] = asked.try_emplace(take.pool, take.tier);
      it->second = std::max(it->second, take.tier);
    }
  };

  // Limits first: what must go for them must go whoever waits.
  if (above_limit) {
    size_t index = 0;
    for (const auto& [key, instance] : ledger_.instances()) {
      const InstanceState& state = instances_.at(key);
      if (instance.held > instance.max) {
        std::vector<Take> takes = TakesToFitLimit(
            snapshot, index, now - state.above_limit_since, options_.policy);
        ask(takes);
        snapshot.coming += TakeOut(takes, snapshot);
      }
      ++index;
    }
  }

  if (room_needed) {
    // What comes back for it is for the device.
    std::vector<Take> takes = TakesToMakeRoom(snapshot);
    ask(takes);
    TakeOut(takes, snapshot);
  }

  struct Waiting {
    std::list<Claim>::iterator claim;
    ClaimView view;
  };
  std::vector<Waiting> order;
  for (auto it = claims_.begin(); it != claims_.end(); ++it) {
    it->recheck_at = absl::InfiniteFuture();
    if (now < it->retry_at) {
      it->recheck_at = it->retry_at;
      continue;
    }
    size_t pool = place.at(it->pool);
    order.push_back({it,
                     {snapshot.pools[pool].instance, pool, it->want,
                      it->at_least, it->urgency, now - it->since}});
  }
  auto served_before = [&](const Waiting& a, const Waiting& b) {
    return ServedBefore(snapshot, a.view, b.view, options_.policy);
  };
  std::stable_sort(order.begin(), order.end(), served_before);
  std::vector<Bytes> credits;  // of each instance, not yet drawn on
  for (const auto& [key, instance] : ledger_.instances()) {
    credits.push_back(instance.credit);
  }
  for (auto turn = order.begin(); turn != order.end(); ++turn) {
    // What its instance was promised meanwhile may have moved a claim back.
    while (turn + 1 != order.end() && served_before(*(turn + 1), *turn)) {
      auto place = std::find_if(turn + 1, order.end(), [&](const Waiting& w) {
        return !served_before(w, *turn);
      });
      std::rotate(turn, turn + 1, place);
    }
    Waiting& waiting = *turn;
    Claim& claim = *waiting.claim;
    // Nobody maps ahead or takes more than it needs while others wait.
    if (order.size() > 1) waiting.view.want = waiting.view.at_least;
    InstanceView& claimant = snapshot.instances[waiting.view.instance];
    Bytes credit = Bytes(0);
    const bool may_draw =
        !claim.credit && claim.urgency != Urgency::kSpeculative;
    if (may_draw) {
      // The claimant's own credit is memory it holds already.
      credit = credits[waiting.view.instance];
      snapshot.free += credit;
      claimant.held -= credit;
    }
    waiting.view.unusable = UnusableFor(claim, snapshot.free);
    Plan plan = Decide(snapshot, waiting.view, options_.policy);
    bool answered = false;
    Bytes drawn = Bytes(0);
    if (plan.verdict == Plan::Verdict::kGrant) {
      std::optional<PageCount> lent = StartGrant(claim, plan.pages, actions);
      answered = lent.has_value();
      plan.pages = lent.value_or(0);
      drawn = snapshot.pools[waiting.view.pool].page_bytes * plan.pages;
      if (!answered) {
        // Stock is on its way to the driver; EndRelease brings us back here.
        plan = Plan{};
        plan.reserve = std::min(
            snapshot.free,
            snapshot.pools[waiting.view.pool].page_bytes * claim.at_least);
        plan.reason = fixed_addresses_ ? "no place for its pages in the slab"
                                       : "stock goes back to the device first";
      }
    } else if (plan.verdict == Plan::Verdict::kRefuse) {
      Refuse(claim, plan.code, plan.reason, actions);
      answered = true;
    }
    Apply(plan, waiting.view, snapshot);
    if (claim.credit && plan.verdict == Plan::Verdict::kGrant) {
      // Set aside, not lent: the next claims of the instance draw on it.
      snapshot.pools[waiting.view.pool].held -= plan.pages;
      credits[waiting.view.instance] += drawn;
    }
    ask(plan.takes);
    for (const Take& take : plan.takes) {
      const PoolView& giver = snapshot.pools[take.pool];
      if (giver.instance == waiting.view.instance) continue;
      for_others[giver.instance] += giver.page_bytes * take.pages;
    }
    // What the claim leaves of the credit is nobody else's.
    credit -= std::min(credit, drawn + plan.reserve);
    snapshot.free -= credit;
    claimant.held += credit;
    if (may_draw) credits[waiting.view.instance] = credit;
    if (answered) {
      claims_.erase(waiting.claim);
      continue;
    }
    claim.reason = claim.last_error.empty()
                       ? plan.reason
                       : absl::StrCat(plan.reason, "; ", claim.last_error);
    if (waiting.view.unusable > Bytes(0)) {
      absl::StrAppend(&claim.reason,
                      "; free, but in pieces too small for a page of ",
                      FormatBytes(snapshot.pools[waiting.view.pool].page_bytes),
                      ": ", FormatBytes(waiting.view.unusable));
    }
    claim.asked_tier.reset();
    for (const Take& take : plan.takes) {
      claim.asked_tier =
          std::max(claim.asked_tier.value_or(take.tier), take.tier);
    }
    claim.recheck_at = now + plan.recheck;
  }

  // Applied plans have left each pool with what it may hold.
  for (const auto& [pool, tier] : asked) {
    const PoolView& giver = snapshot.pools[pool];
    Order(giver.id, giver.held, tier, for_others[giver.instance], actions);
    if (tier == Tier::kPreempt) {
      const LedgerPool& victim = *ledger_.FindPool(snapshot.pools[pool].id);
      const LedgerInstance& instance = ledger_.InstanceOf(victim);
      instances_.at({instance.tenant, instance.name}).held_off_until =
          now + options_.policy.hold_off;
    }
  }
  for (size_t i = 0; i < snapshot.pools.size(); ++i) {
    PoolId id = snapshot.pools[i].id;
    if (!asked.contains(i) && pools_.at(id).ordered()) {
      Order(id, kHoldAny, Tier::kIdle, Bytes(0), actions);
    }
  }
  TrimStock(actions);
}

void Core::ExpireClaims(Actions& actions) {
  const absl::Time now = Now();
  for (auto it = claims_.begin(); it != claims_.end();) {
    if (now < it->deadline) {
      ++it;
      continue;
    }
    Claim claim = std::move(*it);
    it = claims_.erase(it);
    Refuse(claim, absl::StatusCode::kUnavailable,
           absl::StrCat(
               "not enough memory within the deadline: ",
               claim.last_error.empty() ? claim.reason : claim.last_error,
               OthersInWords()),
           actions);
  }
}

void Core::ExpireOrders(Actions& actions) {
  const absl::Time now = Now();
  for (PoolId id : ordered_) {
    PoolState& state = pools_.at(id);
    if (state.settled_order || now < state.order_deadline) continue;
    state.order_deadline = absl::InfiniteFuture();
    const LedgerPool& pool = *ledger_.FindPool(id);
    if (pool.held() <= state.hold_at_most) continue;
    SessionState& session = sessions_.at(pool.session);
    if (session.ignoring) continue;
    session.ignoring = true;
    const LedgerSession& holder = *ledger_.FindSession(pool.session);
    actions.log.push_back(absl::StrCat(
        "ignored-reclaim session=", pool.session.value(), " instance=",
        holder.instance.second, " pid=", holder.pid, " pool=", id.value(),
        " held=", pool.held(), " hold_at_most=", state.hold_at_most,
        options_.policy.fence_ignoring ? " fenced" : " not fenced"));
    if (options_.policy.fence_ignoring) {
      Fence(session, "did not answer a reclaim within its deadline", actions);
    }
  }
}

void Core::ExpireInstances(Actions& actions) {
  const absl::Time now = Now();
  for (auto it = watched_.begin(); it != watched_.end();) {
    const Ledger::InstanceKey key = *it;
    LedgerInstance& instance = *ledger_.FindInstance(key);
    InstanceState& state = instances_.at(key);
    if (now >= state.credit_until) {
      ledger_.DropCredit(instance, instance.credit);
      Record(HistoryEvent::Kind::kCredit, instance, actions);
      state.credit_until = absl::InfiniteFuture();
    }
    const bool empty = instance.sessions.empty();
    if (empty && now >= instance.empty_since + kRememberLimits) {
      actions.log.push_back(
          absl::StrCat("forget instance=", key.second, " tenant=", key.first));
      it = watched_.erase(it);
      ledger_.RemoveInstance(key);
      instances_.erase(key);
      actions.remember = true;
    } else if (!empty && instance.credit == Bytes(0) &&
               instance.held <= instance.max) {
      state.above_limit_since = absl::InfiniteFuture();
      it = watched_.erase(it);
    } else {
      ++it;
    }
  }
}

void Core::ExpireDescriptors(Actions& actions) {
  if (!IsWindowTight()) return;
  const absl::Time oldest = Now() - options_.acknowledge_within;
  std::vector<SessionId> late;
  for (const auto& [id, session] : sessions_) {
    if (!session.exported.empty() && session.exported.front().first <= oldest) {
      late.push_back(id);
    }
  }
  for (SessionId id : late) {
    SessionState& session = sessions_.at(id);
    const LedgerSession& entry = *ledger_.FindSession(id);
    const uint32_t unread = session.unacked_descriptors;
    actions.log.push_back(absl::StrCat(
        "unread session=", id.value(), " instance=", entry.instance.second,
        " pid=", entry.pid, " descriptors=", unread,
        " (ended: others wait for the window)"));
    actions.close.emplace_back(
        session.listener,
        absl::DeadlineExceededError(absl::StrCat(
            "descriptors were not acknowledged within ",
            absl::FormatDuration(options_.acknowledge_within), ": ", unread)));
    HangUp(session, actions);
  }
}

absl::Time Core::NextDue() {
  absl::Time due = std::min({pump_at_, measure_at_, probe_at_});
  for (const Room& room : rooms_) due = std::min(due, room.deadline);
  if (overdrawn_since_ <= Now() &&
      Now() < overdrawn_since_ + options_.policy.patience) {
    due = std::min(due, overdrawn_since_ + options_.policy.patience);
  }
  if (IsWindowTight()) {
    for (const auto& [id, session] : sessions_) {
      if (session.exported.empty()) continue;
      due = std::min(
          due, session.exported.front().first + options_.acknowledge_within);
    }
  }
  if (claims_.empty()) {
    due = std::min(due, ledger_.oldest_stock() + options_.stock_decay);
  }
  for (const Claim& claim : claims_) {
    due = std::min({due, claim.deadline, claim.recheck_at});
    auto held_off = instances_.at(ledger_.FindSession(claim.session)->instance)
                        .held_off_until;
    if (held_off > Now()) due = std::min(due, held_off);
  }
  for (PoolId id : ordered_) {
    const PoolState& pool = pools_.at(id);
    if (!pool.settled_order) due = std::min(due, pool.order_deadline);
  }
  for (const Ledger::InstanceKey& key : watched_) {
    const LedgerInstance& instance = *ledger_.FindInstance(key);
    const InstanceState& state = instances_.at(key);
    due = std::min(due, state.credit_until);
    if (instance.sessions.empty()) {
      due = std::min(due, instance.empty_since + kRememberLimits);
    }
    if (instance.held > instance.max &&
        state.above_limit_since != absl::InfiniteFuture()) {
      absl::Time escalate =
          state.above_limit_since + options_.policy.limit_patience;
      if (escalate > Now()) due = std::min(due, escalate);
    }
  }
  return due;
}

absl::Time Core::RunDue() {
  ProbeIfDue();
  MeasureIfDue();
  Actions actions;
  {
    MutexLock lock(&mu_);
    ExpireOrders(actions);
    ExpireClaims(actions);
    ExpireInstances(actions);
    ExpireDescriptors(actions);
    if (claims_.empty()) {
      absl::c_move(ledger_.TrimStock(Now() - options_.stock_decay),
                   std::back_inserter(actions.release));
    }
    if (Now() >= pump_at_) {
      pump_at_ = absl::InfiniteFuture();
      for (auto& [id, session] : sessions_) PumpDescriptors(session, actions);
    }
    Arbitrate(actions);
    // Until the work below is done, nobody need wake the caller: it asks again.
    promised_ = absl::InfinitePast();
  }
  Run(std::move(actions));
  MutexLock lock(&mu_);
  promised_ = NextDue();
  return promised_;
}

}  // namespace kvbroker
