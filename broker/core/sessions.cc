// Core: sessions and what they say, checked word by word.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/base/status_macros.h"
#include "broker/core/core.h"

namespace kvbroker {
namespace {

constexpr size_t kMaxNameLength = 128;
constexpr size_t kMaxPools = 64;
constexpr uint32_t kMaxPagesPerPool = 1u << 20;
constexpr uint32_t kMaxHandlesPerPage = 4096;
constexpr PageCount kMaxPagesPerClaim = 65536;
constexpr size_t kMaxRememberedAnswers = 1024;
// Seven answers as large as can be.
constexpr size_t kMaxAnswersSize = 4 << 20;
constexpr size_t kMaxClaimsPerSession = 64;
constexpr size_t kMaxLabels = 32;
constexpr size_t kMaxJoinedPids = 64;
constexpr int kMaxEmptyAnswers = 3;
constexpr absl::Duration kMaxDeadline = absl::Minutes(10);

template <typename... Words>
absl::Status Invalid(Words... words) {
  return absl::InvalidArgumentError(absl::StrCat(words...));
}

// What ends up on an operator's terminal.
bool IsPrintable(const std::string& text) {
  return std::all_of(text.begin(), text.end(),
                     [](unsigned char c) { return absl::ascii_isprint(c); });
}

absl::Status CheckGeometry(const PoolGeometry& pool, const BackendInfo& device,
                           size_t which) {
  const Bytes granularity = device.granularity;
  if (pool.handle_bytes <= Bytes(0) || pool.handle_bytes > kMaxBytes ||
      pool.handle_bytes.count() % granularity.count() != 0) {
    return Invalid("pools[", which,
                   "].handle_bytes: must be a positive "
                   "multiple of the device's granularity, ",
                   granularity.count(), " bytes; got ",
                   pool.handle_bytes.count());
  }
  if (!IsPrintable(pool.label)) {
    return Invalid("pools[", which, "].label: may hold printable ASCII only");
  }
  if (pool.handles_per_page < 1 || pool.handles_per_page > kMaxHandlesPerPage) {
    return Invalid("pools[", which, "].handles_per_page: must be 1 to ",
                   kMaxHandlesPerPage, "; got ", pool.handles_per_page);
  }
  if (device.fixed_addresses() &&
      (pool.layout != Layout::kContiguous || pool.handles_per_page != 1)) {
    return Invalid("pools[", which, "].layout: the backend ", device.name,
                   " lends pages in one piece only: set "
                   "KVCACHED_CONTIGUOUS_LAYOUT=true; handles of a page: ",
                   pool.handles_per_page);
  }
  if (pool.layout == Layout::kContiguous && pool.handles_per_page != 1) {
    return Invalid("pools[", which,
                   "].handles_per_page: the contiguous layout has 1; got ",
                   pool.handles_per_page);
  }
  if (pool.max_pages < 1 || pool.max_pages > kMaxPagesPerPool ||
      pool.page_bytes().count() > kMaxBytes.count() / pool.max_pages) {
    return Invalid("pools[", which, "].max_pages: must be 1 to ",
                   kMaxPagesPerPool, " and fit an address space; got ",
                   pool.max_pages);
  }
  return absl::OkStatus();
}

// Whether both are one process for sure: of two that are invisible from here
// nobody knows.
bool SurelySameProcess(const Peer& a, const Peer& b) {
  return (a.pid != 0 || a.process_inode != 0) && SameProcess(a, b);
}

constexpr char kSlotsTaken[] = "the slots asked for are not empty";

// How many pages the pool has a place for, of those the claim means.
PageCount EmptySlots(const LedgerPool& pool, const Claim& claim) {
  if (claim.indexes.empty()) return pool.geometry.max_pages - pool.held();
  return std::count_if(
      claim.indexes.begin(), claim.indexes.end(),
      [&](PageIndex index) { return !pool.pages.contains(index); });
}

}  // namespace

absl::Status CheckInstanceName(const std::string& name) {
  bool fits =
      !name.empty() && name.size() <= kMaxNameLength &&
      std::all_of(name.begin(), name.end(), [](unsigned char c) {
        return absl::ascii_isalnum(c) || c == '_' || c == '.' || c == '-';
      });
  if (fits) return absl::OkStatus();
  return Invalid(
      "instance: a name has 1 to 128 of the characters A-Z a-z 0-9 _ . -");
}

absl::StatusOr<std::unique_ptr<Core>> Core::Create(CoreOptions options) {
  const BackendInfo& device = options.backend->info();
  if (options.capacity <= Bytes(0) || options.capacity > device.total) {
    return Invalid("capacity: must be above 0 and at most the device's ",
                   FormatBytes(device.total), "; got ",
                   FormatBytes(options.capacity));
  }
  if (options.descriptor_window == 0) {
    return Invalid("descriptor_window: must be at least 1; got 0");
  }
  if (device.fixed_addresses() &&
      options.charge == CoreOptions::Charge::kEngine) {
    return Invalid("charge: must be broker where the backend is ", device.name,
                   ": all its memory is the broker's own");
  }
  if (device.fixed_addresses() && options.capacity != device.total) {
    return Invalid("capacity: is the slab's size, ", FormatBytes(device.total),
                   ", where the backend is ", device.name, "; got ",
                   FormatBytes(options.capacity));
  }
  if (!options.max_stock) {
    options.max_stock = std::min(Bytes(options.capacity.count() / 16), GiB(1));
  }
  if (!options.wake) options.wake = [] {};
  if (!options.device_changed) options.device_changed = [] {};
  if (!options.remember) options.remember = [](bool) {};
  if (!options.log) options.log = [](std::string_view) {};
  std::unique_ptr<Core> core(new Core(std::move(options)));
  Actions actions;
  {
    MutexLock lock(&core->mu_);
    if (auto* event = core->Record(HistoryEvent::Kind::kStart, actions)) {
      event->incarnation = core->options_.incarnation;
      event->capacity = core->ledger_.capacity();
    }
    core->Restore(core->options_.remembered, actions);
  }
  core->Run(std::move(actions));
  return core;
}

Core::Core(CoreOptions options)
    : options_(std::move(options)),
      fixed_addresses_(options_.backend->info().fixed_addresses()),
      started_(options_.clock->Now()),
      ledger_(options_.capacity, fixed_addresses_
                                     ? Ledger::Addresses::kFixed
                                     : Ledger::Addresses::kOfPools) {}

Core::~Core() = default;

absl::Status Core::CheckOpen(const Peer& peer, const Open& open,
                             const std::string& name,
                             const std::optional<Resumption>& resumption) {
  if (open.protocol_version != kProtocolVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("protocol_version: this broker speaks ", kProtocolVersion,
                     "; upgrade the older side; got ", open.protocol_version));
  }
  if (draining_) {
    return absl::UnavailableError("the broker is draining; try its successor");
  }
  const BackendInfo& device = options_.backend->info();
  if (fixed_addresses_ && (open.feature_bits & kFeatureSlab) == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "feature_bits: this broker's memory is one slab (", device.name,
        "), which this client library is too old for: upgrade it"));
  }
  if (only_tenant_ && *only_tenant_ != peer.tenant) {
    return absl::FailedPreconditionError(absl::StrCat(
        "tenant: with ", device.name,
        " a GPU is for one tenant, since each of "
        "its engines can reach all of the memory; this one is ",
        *only_tenant_, "'s until the broker is restarted, and not ",
        peer.tenant, "'s"));
  }
  RETURN_IF_ERROR(CheckInstanceName(open.instance));
  if (open.pools.empty() || open.pools.size() > kMaxPools) {
    return Invalid("pools: a session has 1 to ", kMaxPools, "; got ",
                   open.pools.size());
  }
  for (size_t i = 0; i < open.pools.size(); ++i) {
    RETURN_IF_ERROR(CheckGeometry(open.pools[i], options_.backend->info(), i));
  }
  for (const auto& [key, value] : open.labels) {
    if (!IsPrintable(key) || !IsPrintable(value)) {
      return Invalid("labels: may hold printable ASCII only");
    }
  }
  if (open.max_fraction &&
      !(*open.max_fraction > 0 && *open.max_fraction <= 1)) {
    return Invalid("max_fraction: must be above 0 and at most 1; got ",
                   *open.max_fraction);
  }
  if (open.min_fraction &&
      !(*open.min_fraction > 0 && *open.min_fraction <= 1)) {
    return Invalid("min_fraction: must be above 0 and at most 1; got ",
                   *open.min_fraction);
  }
  if (open.weight && !(*open.weight > 0 && *open.weight <= 1e6)) {
    return Invalid("weight: must be above 0 and at most 1,000,000; got ",
                   *open.weight);
  }
  if (open.min && (*open.min < Bytes(0) || *open.min > kMaxBytes)) {
    return Invalid("min: not a number of bytes; got ", open.min->count());
  }
  if (open.max && (*open.max < Bytes(0) || *open.max > kMaxBytes)) {
    return Invalid("max: not a number of bytes; got ", open.max->count());
  }
  RETURN_IF_ERROR(CheckQuotas(peer, name, resumption));
  LedgerInstance* instance = ledger_.FindInstance({peer.tenant, name});
  if (open.min && open.max && *open.min > *open.max) {
    return Invalid("min: is above max: ", FormatBytes(*open.min), " and ",
                   FormatBytes(*open.max));
  }
  if (!open.min && !open.max && open.min_fraction && open.max_fraction &&
      *open.min_fraction > *open.max_fraction) {
    return Invalid("min_fraction: is above max_fraction: ", *open.min_fraction,
                   " and ", *open.max_fraction);
  }
  // Others' wishes are not heard: see OpenSession.
  const std::optional<Bytes> min = MinWished(open);
  if (min && (instance == nullptr ||
              (instance->sessions.empty() && !instance->set_by_operator))) {
    Bytes others =
        ledger_.SumOfMins() - (instance == nullptr ? Bytes(0) : instance->min);
    if (others + *min > ledger_.capacity()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "min: more is guaranteed than there is; asked ",
          FormatBytes(*min), ", others have ", FormatBytes(others),
          ", capacity ", FormatBytes(ledger_.capacity())));
    }
  }
  if (instance != nullptr && !open.member.empty()) {
    for (SessionId id : instance->sessions) {
      const SessionState& other = sessions_.at(id);
      const bool resumed =
          resumption && absl::c_linear_search(resumption->sources, id);
      if (!resumed && other.connected && other.member == open.member &&
          other.rank == open.rank) {
        return absl::FailedPreconditionError(absl::StrCat(
            "member and rank are taken by a live process: instance ", name,
            ", member ", open.member, ", rank ", open.rank, ", pid ",
            ledger_.FindSession(id)->pid));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Core::CheckQuotas(const Peer& peer, const std::string& name,
                               const std::optional<Resumption>& resumption) {
  const size_t sessions =
      std::count_if(sessions_.begin(), sessions_.end(), [&](const auto& entry) {
        return entry.second.peer.uid == peer.uid &&
               !(resumption &&
                 absl::c_linear_search(resumption->sources, entry.first));
      });
  if (sessions >= options_.max_sessions_per_uid) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "quota.sessions: uid ", peer.uid, " has ", sessions,
        " sessions already; end some, or raise quota.sessions of kvbrokerd"));
  }
  if (auto existing = ledger_.FindInstance({peer.tenant, name});
      existing != nullptr && !existing->sessions.empty()) {
    return absl::OkStatus();
  }
  size_t instances = 0;
  for (const auto& [key, instance] : ledger_.instances()) {
    instances += key.first == peer.tenant && !instance.sessions.empty();
  }
  if (instances >= options_.max_instances_per_tenant) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "quota.instances: tenant ", peer.tenant, " has ", instances,
        " instances already; end some, or raise quota.instances of kvbrokerd"));
  }
  return absl::OkStatus();
}

void Core::KeepAnswer(SessionState& session, Sequence sequence, Answer answer) {
  session.answers_size += answer.size();
  auto [kept, added] = session.answers.try_emplace(sequence);
  if (!added) session.answers_size -= kept->second.size();
  kept->second = std::move(answer);
  // The oldest go, but for this one.
  while (session.answers.size() > 1 &&
         (session.answers.size() > kMaxRememberedAnswers ||
          session.answers_size > kMaxAnswersSize)) {
    auto oldest = session.answers.begin();
    if (oldest == kept) ++oldest;
    session.answers_size -= oldest->second.size();
    session.answers.erase(oldest);
  }
}

std::optional<Bytes> Core::MinWished(const Open& open) const {
  if (open.min || !open.min_fraction) return open.min;
  return Bytes(static_cast<int64_t>(
      static_cast<double>(options_.backend->info().total.count()) *
      *open.min_fraction));
}

std::vector<uint32_t> Core::OthersOf(const Peer& peer,
                                     const std::string& name) {
  std::vector<uint32_t> pids;
  const auto add = [&](const Peer& other) {
    if (!SurelySameProcess(other, peer)) pids.push_back(other.pid);
  };
  const LedgerInstance* instance = ledger_.FindInstance({peer.tenant, name});
  if (instance != nullptr) {
    for (SessionId id : instance->sessions) {
      // One that has hung up is dying, or about to say that it goes on.
      const SessionState& session = sessions_.at(id);
      if (session.connected) add(session.peer);
    }
  }
  if (Now() < hold_until_) {
    for (const RememberedSession& session : expected_) {
      if (session.peer.tenant == peer.tenant && session.instance == name) {
        add(session.peer);
      }
    }
  }
  // Several sessions of a process are one.
  std::set<uint32_t> seen;
  std::erase_if(pids, [&](uint32_t pid) {
    return pid != 0 && !seen.insert(pid).second;
  });
  return pids;
}

absl::StatusOr<std::string> Core::NameInForce(const Peer& peer,
                                              const Open& open) {
  const auto of_another_tenant = [&](const std::string& name) {
    mu_.AssertHeld();
    for (const auto& [key, instance] : ledger_.instances()) {
      if (key.second == name && key.first != peer.tenant &&
          !instance.sessions.empty()) {
        return true;
      }
    }
    return false;
  };
  const NameConflict conflict =
      open.resuming ? NameConflict::kJoin : open.name_conflict;
  const auto taken = [&](const std::string& name) {
    mu_.AssertHeld();
    return of_another_tenant(name) || (conflict == NameConflict::kSuffix &&
                                       !OthersOf(peer, name).empty());
  };
  std::string name = open.instance;
  for (int suffix = 1; taken(name); ++suffix) {
    std::string ending = absl::StrCat("_", suffix);
    name = open.instance.substr(0, kMaxNameLength - ending.size()) + ending;
  }
  if (conflict == NameConflict::kError) {
    if (std::vector<uint32_t> others = OthersOf(peer, name); !others.empty()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "instance: the name is in use by a live process, and name_conflict "
          "is error: instance ",
          name, ", pids ", absl::StrJoin(others, ", ")));
    }
  }
  return name;
}

absl::StatusOr<SessionId> Core::OpenSession(
    const Peer& peer, const Open& open,
    std::shared_ptr<SessionListener> listener) {
  Actions actions;
  SessionId id;
  Opened opened;
  {
    MutexLock lock(&mu_);
    ASSIGN_OR_RETURN(const std::string name, NameInForce(peer, open));
    std::optional<Resumption> resumption;
    if (open.resuming) {
      ASSIGN_OR_RETURN(resumption, CheckResuming(peer, open));
    }
    RETURN_IF_ERROR(CheckOpen(peer, open, name, resumption));
    id = SessionId(next_session_++);
    if (resumption) {
      for (SessionId source : resumption->sources) {
        auto it = sessions_.find(source);
        if (it == sessions_.end()) continue;
        // This one says what the process needs now.
        it->second.declared_peak = Bytes(0);
        if (!it->second.connected) continue;
        actions.close.emplace_back(it->second.listener,
                                   absl::CancelledError(absl::StrCat(
                                       "resumed as session ", id.value())));
        HangUp(it->second, actions);
      }
    }
    if (fixed_addresses_) only_tenant_ = peer.tenant;
    LedgerInstance& instance = ledger_.AddInstance(peer.tenant, name);
    if (instance.sessions.empty()) {
      // The first process brings the limits, unless an operator has set some.
      if (!instance.set_by_operator) {
        if (std::optional<Bytes> min = MinWished(open)) instance.min = *min;
        if (open.max) instance.max = *open.max;
        if (open.max_fraction && !open.max) {
          instance.max = Bytes(static_cast<int64_t>(
              static_cast<double>(options_.backend->info().total.count()) *
              *open.max_fraction));
        }
        instance.min = std::min(instance.min, instance.max);
        if (open.weight) instance.weight = *open.weight;
      }
    } else if (!resumption) {
      opened.joined_pids = OthersOf(peer, name);
      if (opened.joined_pids.size() > kMaxJoinedPids) {
        opened.joined_pids.resize(kMaxJoinedPids);
      }
      actions.log.push_back(absl::StrCat(
          "join instance=", name, " pid=", peer.pid, " with pids=",
          absl::StrJoin(instance.sessions, ",",
                        [&](std::string* out, SessionId other) {
                          mu_.AssertHeld();
                          absl::StrAppend(out, ledger_.FindSession(other)->pid);
                        })));
    }
    for (const auto& [key, value] : open.labels) {
      if (instance.labels.size() < kMaxLabels ||
          instance.labels.contains(key)) {
        instance.labels[key] = value;
      }
    }
    instances_.try_emplace({instance.tenant, instance.name});
    LedgerSession& session = ledger_.OpenSession(instance, id, peer.pid);
    SessionState& state = sessions_[id];
    state.id = id;
    state.peer = peer;
    state.resumption = std::move(resumption);
    state.member = open.member;
    state.rank = open.rank;
    state.declared_peak = open.declared_peak;
    state.listener = listener;
    MeasureSoon(absl::ZeroDuration());
    UpdateOthers(actions);

    opened.feature_bits = open.feature_bits & kFeatures;
    if (fixed_addresses_) opened.feature_bits &= ~kFeatureResume;
    opened.slab = options_.backend->info().slab;
    opened.incarnation = options_.incarnation;
    opened.session = id;
    opened.instance = name;
    opened.backend = options_.backend->info().name;
    for (const PoolGeometry& geometry : open.pools) {
      PoolId pool(next_pool_++);
      ledger_.OpenPool(session, pool, geometry);
      pools_[pool].report.pool = pool;
      opened.pools.push_back(pool);
    }
    opened.min = instance.min;
    opened.max = instance.max;
    opened.limit_revision = instance.limit_revision;
    opened.capacity = ledger_.capacity();
    actions.log.push_back(absl::StrCat(
        "open session=", id.value(), " instance=", name, " tenant=",
        peer.tenant, " pid=", peer.pid, " pools=", open.pools.size(),
        " min=", instance.min.count(), " max=", instance.max.count()));
    if (auto* event = Record(HistoryEvent::Kind::kOpen, instance, actions)) {
      event->session = id;
      event->pid = peer.pid;
      for (PoolId pool : session.pools) {
        event->pools.push_back(
            {pool, ledger_.FindPool(pool)->geometry.page_bytes()});
      }
    }
  }
  // Whom the next broker does not know it takes no pages from.
  options_.remember(/*wait=*/true);
  const uint64_t told = opened.limit_revision;
  listener->Tell(std::move(opened));
  {
    MutexLock lock(&mu_);
    // Another session may have gone on for it already.
    if (auto it = sessions_.find(id); it != sessions_.end()) {
      it->second.opened = true;
      const LedgerInstance& instance =
          ledger_.InstanceOf(*ledger_.FindSession(id));
      if (instance.limit_revision != told) {
        // Set meanwhile.
        actions.tell.emplace_back(
            listener,
            LimitChanged{instance.limit_revision, instance.min, instance.max});
      }
    }
    // What it has declared may have to come from others.
    if (ledger_.overdrawn() > Bytes(0)) Arbitrate(actions);
  }
  Run(std::move(actions));
  return id;
}

absl::Status Core::Handle(SessionId id, const ClientMessage& message) {
  Actions actions;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    auto it = sessions_.find(id);
    if (it == sessions_.end() || !it->second.connected) {
      return absl::FailedPreconditionError("the session has ended");
    }
    SessionState& session = it->second;
    if (session.resumption && !std::holds_alternative<Resume>(message) &&
        !std::holds_alternative<LimitAck>(message)) {
      status = absl::FailedPreconditionError(
          "the session has not said yet what it holds (Resume)");
    } else {
      status = std::visit(
          [&](const auto& kind) {
            mu_.AssertHeld();
            return On(session, kind, actions);
          },
          message);
    }
  }
  Run(std::move(actions));
  return status;
}

absl::Status Core::On(SessionState&, const Open&, Actions&) {
  return Invalid("open: the session is open already");
}

absl::Status Core::On(SessionState&, const LimitAck&, Actions&) {
  return absl::OkStatus();  // of use to the log of a failing peer only
}

absl::StatusOr<LedgerPool*> Core::OwnPool(const SessionState& session,
                                          PoolId id) {
  LedgerPool* pool = ledger_.FindPool(id);
  if (pool == nullptr || pool->session != session.id) {
    return absl::PermissionDeniedError(
        absl::StrCat("pool_id: not a pool of this session: ", id.value()));
  }
  return pool;
}

absl::Status Core::On(SessionState& session, const Acquire& acquire,
                      Actions& actions) {
  ASSIGN_OR_RETURN(LedgerPool * pool, OwnPool(session, acquire.pool));
  if (acquire.sequence == Sequence()) {
    return Invalid("acquire: sequence: the first one is 1; got 0");
  }
  if (acquire.at_least < 1 || acquire.want < acquire.at_least ||
      acquire.want > kMaxPagesPerClaim ||
      acquire.want > pool->geometry.max_pages) {
    return Invalid(
        "acquire: needs 1 <= at_least <= want <= the pool's pages; "
        "got ",
        acquire.at_least, " and ", acquire.want);
  }
  if (fixed_addresses_ && !acquire.indexes.empty()) {
    return Invalid("acquire: indexes: in a slab the broker chooses them");
  }
  if (!acquire.indexes.empty() && !acquire.credit) {
    if (static_cast<PageCount>(acquire.indexes.size()) != acquire.want) {
      return Invalid("acquire: indexes must be as many as want_pages; got ",
                     acquire.indexes.size(), " and ", acquire.want);
    }
    absl::flat_hash_set<PageIndex> seen;
    for (PageIndex index : acquire.indexes) {
      if (index.value() >= pool->geometry.max_pages) {
        return Invalid("acquire: index out of range: ", index.value());
      }
      if (!seen.insert(index).second) {
        return Invalid("acquire: index twice: ", index.value());
      }
    }
  }
  // Forget the answers that have arrived; give a repeated question its answer.
  if (acquire.acked > session.acked) session.acked = acquire.acked;
  while (!session.answers.empty() &&
         session.answers.begin()->first <= session.acked) {
    session.answers_size -= session.answers.begin()->second.size();
    session.answers.erase(session.answers.begin());
  }
  if (auto it = session.answers.find(acquire.sequence);
      it != session.answers.end()) {
    return On(session, Resend{acquire.sequence}, actions);
  }
  if (acquire.sequence <= session.acked ||
      session.making.contains(acquire.sequence)) {
    return absl::OkStatus();
  }
  size_t waiting = session.making.size();
  for (const Claim& claim : claims_) {
    if (claim.session != session.id) continue;
    if (claim.sequence == acquire.sequence) return absl::OkStatus();
    ++waiting;
  }
  if (waiting >= kMaxClaimsPerSession) {
    return absl::ResourceExhaustedError(
        absl::StrCat("acquire: a session may have ", kMaxClaimsPerSession,
                     " unanswered at a time"));
  }

  Claim claim;
  claim.session = session.id;
  claim.sequence = acquire.sequence;
  claim.pool = acquire.pool;
  claim.want = acquire.want;
  claim.at_least = acquire.at_least;
  if (!acquire.credit) claim.indexes = acquire.indexes;
  claim.urgency = acquire.urgency;
  claim.credit = acquire.credit;
  claim.since = Now();
  claim.deadline = claim.since + std::clamp(acquire.deadline,
                                            absl::ZeroDuration(), kMaxDeadline);
  if (acquire.replaces != Sequence()) {
    auto old =
        std::find_if(claims_.begin(), claims_.end(), [&](const Claim& c) {
          return c.session == session.id && c.sequence == acquire.replaces;
        });
    if (old != claims_.end()) {
      claim.since = old->since;
      Claim replaced = std::move(*old);
      claims_.erase(old);
      Refuse(replaced, absl::StatusCode::kCancelled, "replaced", actions);
    } else if (auto making = session.making.find(acquire.replaces);
               making != session.making.end()) {
      // It is about to be granted; where the backend fails, it does not wait
      // beside what takes its place.
      making->second = true;
    }
  }
  if (session.fenced) {
    Refuse(claim, absl::StatusCode::kFailedPrecondition,
           "the session was told to end", actions);
    return absl::OkStatus();
  }
  if (draining_) {
    Refuse(claim, absl::StatusCode::kUnavailable, "the broker is draining",
           actions);
    return absl::OkStatus();
  }
  if (!device_error_.ok()) {
    RefuseLost(claim, actions);
    return absl::OkStatus();
  }
  if (!claim.credit && EmptySlots(*pool, claim) < claim.at_least) {
    // Nobody gives memory for a claim that has nowhere to put it.
    Refuse(claim, absl::StatusCode::kFailedPrecondition, kSlotsTaken, actions);
    Arbitrate(actions);
    return absl::OkStatus();
  }
  const bool nobody_asked = claims_.empty() && acquire.replaces == Sequence();
  if (nobody_asked && GrantAtOnce(claim, actions)) return absl::OkStatus();
  claims_.push_back(std::move(claim));
  Arbitrate(actions);
  return absl::OkStatus();
}

absl::Status Core::On(SessionState& session, const Cancel& cancel,
                      Actions& actions) {
  auto it = std::find_if(claims_.begin(), claims_.end(), [&](const Claim& c) {
    return c.session == session.id && c.sequence == cancel.sequence;
  });
  if (it == claims_.end()) {
    // Crosses its answer; where the backend fails, there need be no other.
    auto making = session.making.find(cancel.sequence);
    if (making != session.making.end()) making->second = true;
    return absl::OkStatus();
  }
  Claim claim = std::move(*it);
  claims_.erase(it);
  Refuse(claim, absl::StatusCode::kCancelled, "cancelled", actions);
  Arbitrate(actions);
  return absl::OkStatus();
}

absl::Status Core::On(SessionState& session, const Mapped& mapped,
                      Actions& actions) {
  auto it = session.unmapped.find(mapped.grant);
  if (it == session.unmapped.end()) {
    return absl::OkStatus();  // a second acknowledgement of the same grant
  }
  Grant grant = it->second;
  if (!grant.sent && mapped.failed.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("mapped: grant ", grant.id.value(),
                     " cannot be mapped, its descriptors are not all sent"));
  }
  std::vector<PageName> failed = mapped.failed;
  std::sort(failed.begin(), failed.end());
  std::sort(grant.pages.begin(), grant.pages.end());
  if (!std::includes(grant.pages.begin(), grant.pages.end(), failed.begin(),
                     failed.end())) {
    return Invalid("mapped: failed page is not of grant ", grant.id.value());
  }
  std::vector<PageName> held;
  std::set_difference(grant.pages.begin(), grant.pages.end(), failed.begin(),
                      failed.end(), std::back_inserter(held));
  session.unmapped.erase(it);
  std::erase(session.to_send, grant.id);
  LedgerPool& pool = *ledger_.FindPool(grant.pool);
  ledger_.ConfirmMapped(pool, held);
  if (options_.charge == CoreOptions::Charge::kEngine) {
    for (PageName page : held) {
      // Returned before it was acknowledged.
      if (ledger_.FindPage(pool, page) == nullptr) continue;
      absl::c_move(ledger_.LetGo(pool, page),
                   std::back_inserter(actions.let_go));
    }
  }
  if (failed.empty()) {
    StockUp(ledger_.FindSession(session.id)->tenant, pool.geometry.handle_bytes,
            held.size() * pool.geometry.handles_per_page, actions);
    return absl::OkStatus();
  }
  actions.log.push_back(absl::StrCat("map-failed session=", session.id.value(),
                                     " grant=", grant.id.value(),
                                     " pages=", failed.size()));
  return TakeBack(session, grant.pool, failed, actions);
}

absl::Status Core::On(SessionState& session, const Return& message,
                      Actions& actions) {
  return TakeBack(session, message.pool, message.pages, actions);
}

absl::Status Core::TakeBack(SessionState& session, PoolId pool_id,
                            const std::vector<PageName>& pages,
                            Actions& actions) {
  ASSIGN_OR_RETURN(LedgerPool * pool, OwnPool(session, pool_id));
  PoolState& state = pools_.at(pool_id);
  std::vector<HandleRef> handles;
  std::vector<PageName> removed;
  PageCount returned = 0, reported = 0;
  // All or none: what was taken out would be nobody's after a failure.
  for (PageName name : pages) {
    const LedgerPage* page = ledger_.FindPage(*pool, name);
    if (page != nullptr && page->state == PageState::kMaking) {
      return absl::FailedPreconditionError(absl::StrCat(
          "return: page ", name.index.value(), " has not been granted yet"));
    }
  }
  for (PageName name : pages) {
    LedgerPage* page = ledger_.FindPage(*pool, name);
    if (page == nullptr) continue;  // an old generation: said before
    if (page->state == PageState::kMapped) ++reported;
    auto grant = session.unmapped.find(page->grant);
    if (grant != session.unmapped.end() &&
        ++grant->second.returned == grant->second.pages.size()) {
      // Nothing of it is left to send or to map.
      std::erase(session.to_send, grant->first);
      session.unmapped.erase(grant);
    }
    for (HandleRef& handle : ledger_.Remove(*pool, name)) {
      handles.push_back(std::move(handle));
    }
    removed.push_back(name);
    ++returned;
  }
  if (returned == 0) return absl::OkStatus();
  // Idle pages go first, then cached ones: what the last report said is that
  // much less true. Pages that were never mapped were in no report.
  const PageCount idle = std::min(state.report.idle, reported);
  state.report.idle -= idle;
  state.report.settled = std::min(state.report.settled, state.report.idle);
  state.report.cached -= std::min(state.report.cached, reported - idle);
  state.answered = true;
  session.ignoring = false;
  actions.log.push_back(absl::StrCat(
      "return session=", session.id.value(), " pool=", pool_id.value(),
      " pages=", returned, " held=", pool->held()));
  Recycle(ledger_.FindSession(session.id)->tenant, std::move(handles), actions);
  if (auto* event = Record(HistoryEvent::Kind::kBack, *pool, actions)) {
    event->pages = std::move(removed);
    event->why = "returned";
  }
  Arbitrate(actions);
  return absl::OkStatus();
}

absl::Status Core::On(SessionState& session, const ReclaimAnswer& answer,
                      Actions& actions) {
  ASSIGN_OR_RETURN(LedgerPool * pool, OwnPool(session, answer.pool));
  session.ignoring = false;
  PoolState& state = pools_.at(answer.pool);
  state.answered = true;
  // Closing and preempting end when the target is reached, whatever is said.
  const bool done = answer.kept == 0 || state.tier <= Tier::kCached;
  if (answer.revision == state.revision && answer.final && done) {
    state.settled_order = true;
    state.order_deadline = absl::InfiniteFuture();
    // It has no more of the tier than it gave: until its next report, believe
    // it.
    if (answer.kept > 0) {
      state.report.idle = state.report.settled = 0;
      if (state.tier != Tier::kIdle) state.report.cached = 0;
    }
    state.empty_answers =
        answer.kept > 0 && answer.given.empty() ? state.empty_answers + 1 : 0;
    if (state.empty_answers >= kMaxEmptyAnswers) {
      // Claims go on to dearer pages instead of waiting for these for ever.
      state.empty_answers = 0;
      state.disbelieved_until = Now() + options_.policy.reclaim_deadline;
    }
  }
  RETURN_IF_ERROR(TakeBack(session, pool->id, answer.given, actions));
  Arbitrate(actions);
  return absl::OkStatus();
}

absl::Status Core::On(SessionState& session, const Report& report,
                      Actions& actions) {
  ASSIGN_OR_RETURN(LedgerPool * pool, OwnPool(session, report.pool));
  PoolState& state = pools_.at(report.pool);
  state.report = report;
  // A peer cannot have more idle pages than it holds.
  state.report.idle = std::clamp<PageCount>(report.idle, 0, pool->held());
  state.report.cached =
      std::clamp<PageCount>(report.cached, 0, pool->held() - state.report.idle);
  state.report.settled =
      std::clamp<PageCount>(report.settled, 0, state.report.idle);
  state.report.oldest_idle =
      std::clamp(report.oldest_idle, absl::ZeroDuration(), absl::Hours(24));
  state.reported_at = Now();
  if (!claims_.empty()) Arbitrate(actions);
  return absl::OkStatus();
}

absl::Status Core::On(SessionState& session, const Resend& resend,
                      Actions& actions) {
  auto it = session.answers.find(resend.sequence);
  if (it == session.answers.end()) return absl::OkStatus();  // not answered yet
  const Answer& answer = it->second;
  if (answer.refused) {
    actions.tell.emplace_back(session.listener, *answer.refused);
    return absl::OkStatus();
  }
  actions.tell.emplace_back(session.listener, answer.granted);
  auto grant = session.unmapped.find(answer.granted.grant);
  if (grant == session.unmapped.end()) return absl::OkStatus();
  grant->second.next_handle = 0;
  if (std::find(session.to_send.begin(), session.to_send.end(), grant->first) ==
      session.to_send.end()) {
    session.to_send.push_back(grant->first);
  }
  PumpDescriptors(session, actions);
  return absl::OkStatus();
}

absl::Status Core::DescriptorsReceived(SessionId id, uint32_t count) {
  Actions actions;
  {
    MutexLock lock(&mu_);
    auto it = sessions_.find(id);
    if (it == sessions_.end() || !it->second.connected) {
      return absl::OkStatus();
    }
    SessionState& session = it->second;
    if (count > session.unacked_descriptors) {
      return Invalid("descriptor ack: more than were sent: ", count, " of ",
                     session.unacked_descriptors);
    }
    CloseWindow(session, count, actions);
  }
  Run(std::move(actions));
  return absl::OkStatus();
}

void Core::DropClaims(SessionId id) {
  claims_.remove_if([&](const Claim& claim) { return claim.session == id; });
}

void Core::HungUp(SessionId id) {
  Actions actions;
  {
    MutexLock lock(&mu_);
    auto it = sessions_.find(id);
    if (it == sessions_.end() || !it->second.connected) return;
    HangUp(it->second, actions);
    Arbitrate(actions);
  }
  Run(std::move(actions));
}

void Core::HangUp(SessionState& session, Actions& actions) {
  const SessionId id = session.id;
  session.connected = false;
  if (auto* event = Record(HistoryEvent::Kind::kHangUp, actions)) {
    event->session = id;
  }
  DropClaims(id);
  session.to_send.clear();
  TakeBackUnsent(session, actions);
  CloseWindow(session, session.unacked_descriptors, actions);
  // One that was about to resume is what the next attempt goes on from.
  if (ledger_.FindSession(id)->held == Bytes(0) && !session.resumption) {
    EraseSession(id, "left", actions);
  } else {
    actions.log.push_back(absl::StrCat("hang-up session=", id.value(), " held=",
                                       ledger_.FindSession(id)->held.count(),
                                       " (kept until its process is gone)"));
  }
}

void Core::TakeBackUnsent(SessionState& session, Actions& actions) {
  std::vector<HandleRef> handles;
  for (auto it = session.unmapped.begin(); it != session.unmapped.end();) {
    const Grant& grant = it->second;
    if (grant.frames > 0) {
      ++it;  // the peer may have it, and map it
      continue;
    }
    LedgerPool& pool = *ledger_.FindPool(grant.pool);
    std::vector<PageName> removed;
    for (PageName page : grant.pages) {
      if (ledger_.FindPage(pool, page) == nullptr) continue;
      for (HandleRef& handle : ledger_.Remove(pool, page)) {
        handles.push_back(std::move(handle));
      }
      removed.push_back(page);
    }
    if (auto* event = Record(HistoryEvent::Kind::kBack, pool, actions)) {
      event->pages = std::move(removed);
      event->why = "never sent";
    }
    it = session.unmapped.erase(it);
  }
  Recycle(ledger_.FindSession(session.id)->tenant, std::move(handles), actions);
}

void Core::ProcessGone(SessionId id) {
  Actions actions;
  {
    MutexLock lock(&mu_);
    if (!sessions_.contains(id)) return;
    EraseSession(id, "process gone", actions);
    Arbitrate(actions);
  }
  Run(std::move(actions));
}

void Core::EraseSession(SessionId id, std::string_view why, Actions& actions) {
  SessionState& state = sessions_.at(id);
  LedgerSession& session = *ledger_.FindSession(id);
  DropClaims(id);
  state.connected = false;
  CloseWindow(state, state.unacked_descriptors, actions);
  const std::string tenant = session.tenant;
  const Ledger::InstanceKey key = session.instance;
  actions.remember = true;
  const uint32_t pid = session.pid;
  const Bytes held = session.held;
  actions.log.push_back(
      absl::StrCat("gone session=", id.value(), " instance=", key.second,
                   " pid=", pid, " freed=", held.count(), " why=\"",
                   absl::string_view(why.data(), why.size()), "\""));
  for (PoolId pool : session.pools) {
    pools_.erase(pool);
    ordered_.erase(pool);
  }
  std::vector<HandleRef> handles = ledger_.CloseSession(id, Now());
  actions.forgotten.push_back(std::move(state.listener));
  sessions_.erase(id);
  UpdateOthers(actions);
  Recycle(tenant, std::move(handles), actions);
  if (absl::c_none_of(sessions_, [&](const auto& other) {
        return other.second.peer.tenant == tenant;
      })) {
    // Nobody is left who could be given it.
    std::set<Ledger::StockKey> of_others = ledger_.StockKeys();
    std::erase_if(of_others,
                  [&](const auto& stock) { return stock.first == tenant; });
    absl::c_move(ledger_.TrimStockExcept(of_others),
                 std::back_inserter(actions.release));
  }
  LedgerInstance* instance = ledger_.FindInstance(key);
  if (auto* event = Record(HistoryEvent::Kind::kGone, *instance, actions)) {
    event->session = id;
    event->pid = pid;
    event->bytes = held;
    event->why = why;
  }
  if (!instance->sessions.empty()) return;
  if (instance->set_by_operator) {
    watched_.insert(key);  // remembered for a while
  } else {
    watched_.erase(key);
    ledger_.RemoveInstance(key);
    instances_.erase(key);
  }
}

}  // namespace kvbroker
