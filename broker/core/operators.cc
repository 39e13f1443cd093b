// Core: what operators see and set.
#include <algorithm>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "broker/base/status_macros.h"
#include "broker/core/core.h"
#include "broker/policy/policy.h"
#include "proto/fd_frame.h"

namespace kvbroker {
namespace {

// Names with limits and no process that are remembered for one tenant.
constexpr size_t kMaxRemembered = 256;

std::string StateOf(const Claim& claim) {
  if (!claim.asked_tier) return "queued";
  switch (*claim.asked_tier) {
    case Tier::kIdle:
      return "reclaiming-idle";
    case Tier::kCached:
      return "reclaiming-cached";
    case Tier::kClosing:
      return "closing";
    case Tier::kPreempt:
      return "preempting";
  }
  return "queued";
}

}  // namespace

absl::StatusOr<LedgerInstance*> Core::Select(const InstanceSelector& which) {
  LedgerInstance* found = nullptr;
  std::vector<std::string> names, tenants;
  for (auto& [key, instance] : ledger_.instances()) {
    names.push_back(instance.name);
    if (instance.name != which.name) continue;
    if (!which.tenant.empty() && instance.tenant != which.tenant) continue;
    found = &instance;
    tenants.push_back(instance.tenant);
  }
  if (tenants.size() > 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("several tenants have this name, say which: ",
                     absl::StrJoin(tenants, ", ")));
  }
  if (found != nullptr) return found;
  return absl::NotFoundError(absl::StrCat(
      "no instance \"", which.name, "\"; ",
      names.empty() ? std::string("none exists")
                    : absl::StrCat("there are: ", absl::StrJoin(names, ", "))));
}

size_t Core::CountWithoutProcess(const std::string& tenant) {
  size_t count = 0;
  for (const Ledger::InstanceKey& key : watched_) {
    count += key.first == tenant && ledger_.FindInstance(key)->sessions.empty();
  }
  return count;
}

InstanceStatus Core::StatusOf(const LedgerInstance& instance,
                              const PolicySnapshot& snapshot) {
  InstanceStatus status;
  status.name = instance.name;
  status.tenant = instance.tenant;
  status.min = instance.min;
  status.max = instance.max;
  status.weight = instance.weight;
  status.held = instance.held;
  status.labels = instance.labels;
  Bytes limit = std::min(instance.max, ledger_.capacity());
  Bytes unit = Bytes(1);
  size_t place = 0;
  for (const auto& [key, other] : ledger_.instances()) {
    if (&other == &instance) status.share = snapshot.instances[place].share;
    ++place;
  }
  const InstanceState& state = instances_.at({instance.tenant, instance.name});
  bool reclaiming = false, ignoring = false;
  for (SessionId id : instance.sessions) {
    const LedgerSession& session = *ledger_.FindSession(id);
    status.pids.push_back(session.pid);
    ignoring |= sessions_.at(id).ignoring;
    for (PoolId pool_id : session.pools) {
      const LedgerPool& pool = *ledger_.FindPool(pool_id);
      const PoolState& pool_state = pools_.at(pool_id);
      const Bytes page = pool.geometry.page_bytes();
      unit = session.pools.size() == 1 ? page : unit;
      status.idle += page * std::min(pool_state.report.idle, pool.held());
      status.cached += page * std::min(pool_state.report.cached, pool.held());
      status.in_use += page * std::min(pool_state.report.in_use, pool.held());
      reclaiming |= pool_state.ordered() && !pool_state.settled_order;
    }
  }
  status.effective_limit = unit * (limit / unit);
  for (const Claim& claim : claims_) {
    const LedgerSession& session = *ledger_.FindSession(claim.session);
    if (session.instance.first != instance.tenant ||
        session.instance.second != instance.name ||
        claim.urgency == Urgency::kSpeculative) {
      continue;
    }
    status.waiting +=
        ledger_.FindPool(claim.pool)->geometry.page_bytes() * claim.at_least;
  }
  status.grants = state.grants;
  status.refusals = state.refusals;
  status.reclaims = state.reclaims;
  status.preempts = state.preempts;
  status.pressure = ignoring                       ? "ignoring"
                    : instance.held > instance.max ? "draining"
                    : status.waiting > Bytes(0)    ? "waiting"
                    : reclaiming                   ? "reclaiming"
                                                   : "none";
  return status;
}

CoreSnapshot Core::Snapshot() {
  MutexLock lock(&mu_);
  CoreSnapshot result;
  const BackendInfo& device = options_.backend->info();
  BrokerStatus& broker = result.broker;
  broker.backend = device.name;
  broker.device_uuid = device.device_uuid;
  broker.incarnation = options_.incarnation;
  broker.total = device.total;
  broker.capacity = ledger_.capacity();
  broker.held = ledger_.lent() + ledger_.credit();
  broker.stock = ledger_.stock();
  broker.others = ledger_.others();
  broker.foreign = foreign_;
  broker.declared = SumOfDeclared();
  broker.sessions = static_cast<uint32_t>(sessions_.size());
  broker.uptime = Now() - started_;
  broker.draining = draining_;
  broker.device_error = std::string(device_error_.message());
  PolicySnapshot snapshot = TakeSnapshot();
  for (const auto& [key, instance] : ledger_.instances()) {
    result.instances.push_back(StatusOf(instance, snapshot));
  }
  return result;
}

void Core::AnnounceLimits(LedgerInstance& instance, Actions& actions) {
  ++instance.limit_revision;
  for (SessionId id : instance.sessions) {
    SessionState& session = sessions_.at(id);
    if (!session.connected || !session.opened) continue;
    actions.tell.emplace_back(
        session.listener,
        LimitChanged{instance.limit_revision, instance.min, instance.max});
  }
  actions.log.push_back(absl::StrCat(
      "limits instance=", instance.name, " tenant=", instance.tenant,
      " min=", instance.min.count(), " max=", instance.max.count(),
      " weight=", instance.weight, " revision=", instance.limit_revision));
  Record(HistoryEvent::Kind::kLimits, instance, actions);
}

absl::StatusOr<InstanceStatus> Core::SetPolicy(const InstanceSelector& which,
                                               const PolicyChange& change) {
  Actions actions;
  InstanceStatus status;
  {
    MutexLock lock(&mu_);
    absl::StatusOr<LedgerInstance*> found = Select(which);
    const bool preset =
        !found.ok() && absl::IsNotFound(found.status()) && change.preset;
    if (preset) RETURN_IF_ERROR(CheckInstanceName(which.name));
    if (preset && CountWithoutProcess(which.tenant) >= kMaxRemembered) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "preset: the tenant has too many instances without a process, ",
          kMaxRemembered, "; delete some"));
    }
    if (preset && which.tenant.empty()) {
      return absl::InvalidArgumentError(
          "preset: needs the tenant whose instance it will be");
    }
    if (!found.ok() && !preset) return found.status();
    LedgerInstance none;
    none.max = ledger_.capacity();
    const LedgerInstance& old = preset ? none : **found;
    Bytes min = change.min.value_or(old.min);
    Bytes max = change.max.value_or(old.max);
    if (change.max_percent) {
      if (!(*change.max_percent > 0 && *change.max_percent <= 100)) {
        return absl::InvalidArgumentError(
            absl::StrCat("percent: must be above 0 and at most 100; got ",
                         *change.max_percent));
      }
      max = Bytes(static_cast<int64_t>(
          static_cast<double>(options_.backend->info().total.count()) *
          *change.max_percent / 100));
    }
    double weight = change.weight.value_or(old.weight);
    if (min < Bytes(0) || min > kMaxBytes || max < Bytes(0) ||
        max > kMaxBytes) {
      return absl::InvalidArgumentError("min and max: not a number of bytes");
    }
    if (change.min && min > max) {
      return absl::InvalidArgumentError(absl::StrCat(
          "min: is above max: ", FormatBytes(min), " and ", FormatBytes(max)));
    }
    // A limit lowered below the guarantee lowers the guarantee with it.
    min = std::min(min, max);
    if (!(weight > 0 && weight <= 1e6)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "weight: must be above 0 and at most 1,000,000; got ", weight));
    }
    Bytes others = ledger_.SumOfMins() - (preset ? Bytes(0) : old.min);
    if (change.min && others + min > ledger_.capacity()) {
      return absl::FailedPreconditionError(
          absl::StrCat("min: more is guaranteed than there is; asked ",
                       FormatBytes(min), ", others have ", FormatBytes(others),
                       ", capacity ", FormatBytes(ledger_.capacity())));
    }
    LedgerInstance& instance =
        preset ? ledger_.AddInstance(which.tenant, which.name) : **found;
    instances_.try_emplace({instance.tenant, instance.name});
    if (preset) instance.empty_since = Now();
    instance.min = min;
    instance.max = max;
    instance.weight = weight;
    instance.set_by_operator = true;
    watched_.insert({instance.tenant, instance.name});
    AnnounceLimits(instance, actions);
    Arbitrate(actions);
    status = StatusOf(instance, TakeSnapshot());
  }
  Run(std::move(actions));
  options_.remember(/*wait=*/true);
  return status;
}

absl::StatusOr<std::vector<uint32_t>> Core::Delete(
    const InstanceSelector& which, bool force) {
  Actions actions;
  std::vector<uint32_t> fenced;
  {
    MutexLock lock(&mu_);
    absl::StatusOr<LedgerInstance*> found = Select(which);
    if (!found.ok()) return found.status();
    LedgerInstance& instance = **found;
    actions.remember = true;
    if (instance.sessions.empty()) {
      Ledger::InstanceKey key(instance.tenant, instance.name);
      actions.log.push_back(absl::StrCat("delete instance=", instance.name));
      watched_.erase(key);
      ledger_.RemoveInstance(key);
      instances_.erase(key);
    } else {
      for (SessionId id : instance.sessions) {
        fenced.push_back(ledger_.FindSession(id)->pid);
      }
      if (!force) {
        return absl::FailedPreconditionError(absl::StrCat(
            "the instance has live processes (use force to end them): pids ",
            absl::StrJoin(fenced, ", ")));
      }
      for (SessionId id : instance.sessions) {
        Fence(sessions_.at(id), "deleted by an operator", actions);
      }
      actions.log.push_back(absl::StrCat("fence instance=", instance.name,
                                         " pids=", absl::StrJoin(fenced, ",")));
      instance.set_by_operator = false;
      Arbitrate(actions);  // its claims are no more
    }
  }
  Run(std::move(actions));
  return fenced;
}

absl::StatusOr<Explanation> Core::Explain(const InstanceSelector& which) {
  MutexLock lock(&mu_);
  absl::StatusOr<LedgerInstance*> found = Select(which);
  if (!found.ok()) return found.status();
  const LedgerInstance& instance = **found;
  const PolicySnapshot snapshot = TakeSnapshot();
  Explanation result;
  result.instance = StatusOf(instance, snapshot);
  const InstanceStatus& status = result.instance;
  auto& lines = result.lines;
  if (!device_error_.ok()) lines.emplace_back(device_error_.message());
  lines.push_back(absl::StrCat(
      "holds ", FormatBytes(status.held), " of ",
      FormatBytes(ledger_.capacity()), ": ", FormatBytes(status.in_use),
      " in use, ", FormatBytes(status.cached), " cached, ",
      FormatBytes(status.idle), " idle (by its last report)"));
  lines.push_back(
      absl::StrCat("min ", FormatBytes(status.min), ", max ",
                   FormatBytes(status.max), ", weight ", status.weight,
                   instance.set_by_operator ? " (set by an operator)"
                                            : " (as its process asked)"));
  lines.push_back(absl::StrCat(
      "its share at the present demand of all is ", FormatBytes(status.share),
      status.held > status.share
          ? "; what it holds above that may be taken for others"
          : "; nothing in use may be taken from it"));
  lines.push_back(absl::StrCat(
      "free ", FormatBytes(snapshot.free), ", on its way back to the device ",
      FormatBytes(ledger_.releasing()), ", set aside as credit ",
      FormatBytes(ledger_.credit())));
  const absl::Time now = Now();
  const InstanceState& state = instances_.at({instance.tenant, instance.name});
  if (now < state.held_off_until) {
    lines.push_back(absl::StrFormat(
        "was made to preempt: may not grow above its share for another %.1f s",
        absl::ToDoubleSeconds(state.held_off_until - now)));
  }
  for (SessionId id : instance.sessions) {
    const SessionState& session = sessions_.at(id);
    for (PoolId pool_id : ledger_.FindSession(id)->pools) {
      const LedgerPool& pool = *ledger_.FindPool(pool_id);
      const PoolState& pool_state = pools_.at(pool_id);
      std::string line = absl::StrCat(
          "pool ", pool_id.value(),
          pool.geometry.label.empty()
              ? std::string()
              : absl::StrCat(" (", pool.geometry.label, ")"),
          " of pid ", ledger_.FindSession(id)->pid, ": ", pool.held(),
          " pages of ", FormatBytes(pool.geometry.page_bytes()));
      if (pool_state.ordered()) {
        absl::StrAppend(&line, ", asked to hold at most ",
                        pool_state.hold_at_most,
                        pool_state.settled_order ? " (answered)" : "");
      }
      if (!session.connected) absl::StrAppend(&line, ", hung up");
      if (session.ignoring) {
        absl::StrAppend(&line, ", ignores its orders");
      }
      lines.push_back(std::move(line));
    }
  }
  for (const Claim& claim : claims_) {
    const LedgerSession& session = *ledger_.FindSession(claim.session);
    if (session.instance.first != instance.tenant ||
        session.instance.second != instance.name) {
      continue;
    }
    ClaimStatus view;
    view.sequence = claim.sequence;
    view.pool = claim.pool;
    view.want = claim.want;
    view.at_least = claim.at_least;
    view.page_bytes = ledger_.FindPool(claim.pool)->geometry.page_bytes();
    view.waiting = now - claim.since;
    view.state = StateOf(claim);
    lines.push_back(absl::StrFormat(
        "claim %d waits %.0f ms for %d page(s) of %s: %s",
        claim.sequence.value(), absl::ToDoubleMilliseconds(view.waiting),
        claim.at_least, FormatBytes(view.page_bytes), claim.reason));
    result.claims.push_back(std::move(view));
  }
  return result;
}

void Core::Fence(SessionState& session, std::string reason, Actions& actions) {
  session.fenced = true;
  DropClaims(session.id);
  if (!session.connected) return;
  actions.tell.emplace_back(session.listener, Fenced{std::move(reason)});
}

void Core::Drain() {
  Actions actions;
  {
    MutexLock lock(&mu_);
    draining_ = true;
    std::list<Claim> claims = std::move(claims_);
    claims_.clear();
    for (const Claim& claim : claims) {
      Refuse(claim, absl::StatusCode::kUnavailable, "the broker is draining",
             actions);
    }
    ReleaseStock(actions);
    actions.log.push_back(absl::StrCat("drain sessions=", sessions_.size(),
                                       " lent=", ledger_.lent().count()));
    Record(HistoryEvent::Kind::kDrain, actions);
  }
  Run(std::move(actions));
}

absl::Status Core::CheckInvariants() {
  MutexLock lock(&mu_);
  RETURN_IF_ERROR(ledger_.CheckInvariants());
  uint32_t unacked = 0;
  for (const auto& [id, session] : sessions_) {
    unacked += session.unacked_descriptors;
    if (session.unacked_descriptors > KVB_FD_WINDOW) {
      return absl::InternalError("core: a session's window is overrun");
    }
    if (ledger_.FindSession(id) == nullptr) {
      return absl::InternalError("core: a session the ledger does not know");
    }
  }
  if (unacked != unacked_descriptors_) {
    return absl::InternalError("core: descriptor windows do not add up");
  }
  for (const auto& [id, pool] : pools_) {
    if (pool.ordered() != ordered_.contains(id)) {
      return absl::InternalError("core: an order that is not listed, or none");
    }
  }
  for (const auto& [key, instance] : ledger_.instances()) {
    if ((instance.held > instance.max || instance.credit > Bytes(0) ||
         instance.sessions.empty()) &&
        !watched_.contains(key)) {
      return absl::InternalError(absl::StrCat(
          "core: an instance is not watched: ", instance.name, " holds ",
          instance.held.count(), " of ", instance.max.count(), ", credit ",
          instance.credit.count()));
    }
  }
  for (const Claim& claim : claims_) {
    auto it = sessions_.find(claim.session);
    if (it == sessions_.end() || !it->second.connected) {
      return absl::InternalError("core: a claim without its session");
    }
  }
  if (claims_.empty() &&
      (ledger_.stock() > *options_.max_stock ||
       ledger_.stocked_handles() > options_.max_stocked_handles)) {
    return absl::InternalError("core: more stock than its bound");
  }
  if (!claims_.empty() &&
      !absl::c_includes(WantedStock(), ledger_.StockKeys())) {
    return absl::InternalError(
        "core: stock that nobody waits for, while others do");
  }
  if (draining_ && ledger_.stock() > Bytes(0)) {
    return absl::InternalError("core: stock of a broker that is draining");
  }
  for (const auto& [key, instance] : ledger_.instances()) {
    if (!instances_.contains(key)) {
      return absl::InternalError("core: an instance without its state");
    }
    if (instance.sessions.empty() && !instance.set_by_operator) {
      return absl::InternalError("core: an instance that nobody needs");
    }
  }
  return absl::OkStatus();
}

}  // namespace kvbroker
