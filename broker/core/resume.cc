// Core: what outlives a connection, or a broker.
//
//   Open (resuming) --+-- same incarnation: the pages of the session named, if
//                     |   it was this process's
//                     +-- an earlier one: adopted, if this process was
//                         connected then
//   Resume ...        pages move or are adopted, one message after the other
//   Resume (last)     what was not listed is given back; grants go on
#include <algorithm>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/base/status_macros.h"
#include "broker/core/core.h"

namespace kvbroker {
namespace {

bool SameGeometry(const PoolGeometry& a, const PoolGeometry& b) {
  return a.handle_bytes == b.handle_bytes &&
         a.handles_per_page == b.handles_per_page && a.layout == b.layout &&
         a.max_pages == b.max_pages;
}

// Whether the record is of an earlier session of the same engine.
bool IsOf(const SessionState& session, const RememberedSession& record) {
  return SameProcess(record.peer, session.peer) &&
         record.member == session.member && record.rank == session.rank;
}

}  // namespace

bool SameProcess(const Peer& a, const Peer& b) {
  if (a.tenant != b.tenant) return false;
  if (a.process_inode != 0 && b.process_inode != 0) {
    return a.process_inode == b.process_inode;
  }
  return a.pid == b.pid && a.start_time == b.start_time;
}

void Core::Restore(const Remembered& remembered, Actions& actions) {
  const absl::Time now = Now();
  for (const RememberedLimits& limits : remembered.limits) {
    LedgerInstance& instance = ledger_.AddInstance(limits.tenant, limits.name);
    instance.max = limits.max;
    instance.min = std::min(limits.min, limits.max);
    if (ledger_.SumOfMins() > ledger_.capacity()) {
      actions.log.push_back(absl::StrCat(
          "restore instance=", limits.name, " tenant=", limits.tenant, " min=",
          instance.min.count(), " dropped: more is guaranteed than there is"));
      instance.min = Bytes(0);
    }
    instance.weight = limits.weight;
    instance.limit_revision = limits.revision;
    instance.set_by_operator = true;
    instance.empty_since = now - limits.unused_for;
    instances_.try_emplace({limits.tenant, limits.name});
    watched_.insert({limits.tenant, limits.name});
  }
  // What anybody held was the last broker's own memory.
  if (fixed_addresses_) return;
  expected_ = remembered.sessions;
  may_adopt_any_until_ = remembered.incomplete ? now + options_.resume_grace
                                               : absl::InfinitePast();
  if (!expected_.empty() || remembered.hold) {
    hold_until_ = now + options_.resume_grace;
  }
  hold_for_unknown_ = remembered.hold;
}

Remembered Core::Remember() {
  MutexLock lock(&mu_);
  Remembered remembered;
  for (const auto& [key, instance] : ledger_.instances()) {
    if (!instance.set_by_operator) continue;
    remembered.limits.push_back(
        {.tenant = instance.tenant,
         .name = instance.name,
         .min = instance.min,
         .max = instance.max,
         .weight = instance.weight,
         .revision = instance.limit_revision,
         .unused_for = instance.sessions.empty() ? Now() - instance.empty_since
                                                 : absl::ZeroDuration()});
  }
  if (fixed_addresses_) return remembered;
  for (const RememberedSession& session : expected_) {
    const bool connected = absl::c_any_of(sessions_, [&](const auto& entry) {
      return IsOf(entry.second, session);
    });
    if (!connected) remembered.sessions.push_back(session);
  }
  for (const auto& [id, session] : sessions_) {
    remembered.sessions.push_back(
        {.peer = session.peer,
         .instance = ledger_.FindSession(id)->instance.second,
         .member = session.member,
         .rank = session.rank});
  }
  return remembered;
}

void Core::ExpectedGone(const Peer& process) {
  Actions actions;
  {
    MutexLock lock(&mu_);
    const size_t gone =
        std::erase_if(expected_, [&](const RememberedSession& session) {
          return SameProcess(session.peer, process);
        });
    if (gone == 0) return;
    actions.remember = true;
    Arbitrate(actions);
  }
  Run(std::move(actions));
}

bool Core::HoldsForResume() {
  return Now() < hold_until_ && (hold_for_unknown_ || !expected_.empty());
}

std::string Core::WhoIsToResume() {
  std::vector<std::string> names;
  for (const RememberedSession& session : expected_) {
    names.push_back(session.instance);
  }
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return absl::StrCat(
      "the broker was restarted and waits for engines to say "
      "what they hold: ",
      names.empty() ? "any" : absl::StrJoin(names, ", "));
}

absl::StatusOr<Resumption> Core::CheckResuming(const Peer& peer,
                                               const Open& open) {
  if (fixed_addresses_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "resuming: pages of the backend ", options_.backend->info().name,
        " do not outlive their session: restart this process"));
  }
  Resumption resumption;
  if (open.resuming->incarnation == options_.incarnation) {
    auto it = sessions_.find(open.resuming->session);
    // It had nothing left, and left.
    if (it == sessions_.end()) return resumption;
    const SessionState& earlier = it->second;
    if (!SameProcess(earlier.peer, peer)) {
      return absl::PermissionDeniedError(absl::StrCat(
          "resuming: not a session of this process: ", earlier.id.value()));
    }
    if (earlier.fenced) {
      return absl::FailedPreconditionError(
          "resuming: the session was told to end");
    }
    const LedgerSession& session = *ledger_.FindSession(earlier.id);
    bool same = session.pools.size() == open.pools.size();
    for (size_t i = 0; same && i < open.pools.size(); ++i) {
      same = SameGeometry(ledger_.FindPool(session.pools[i])->geometry,
                          open.pools[i]);
    }
    if (!same) {
      return absl::InvalidArgumentError(
          "resuming: the pools are not those of the session");
    }
    if (earlier.resumption) resumption = *earlier.resumption;
    resumption.sources.push_back(earlier.id);
    return resumption;
  }
  resumption.may_adopt =
      Now() < may_adopt_any_until_ ||
      absl::c_any_of(expected_, [&](const RememberedSession& session) {
        return SameProcess(session.peer, peer);
      });
  return resumption;
}

absl::Status Core::On(SessionState& session, const Resume& resume,
                      Actions& actions) {
  if (!session.resumption) {
    return absl::FailedPreconditionError(
        "resume: the session was not opened to resume, or has resumed");
  }
  ASSIGN_OR_RETURN(LedgerPool * pool, OwnPool(session, resume.pool));
  const LedgerSession& own = *ledger_.FindSession(session.id);
  const size_t which = std::find(own.pools.begin(), own.pools.end(), pool->id) -
                       own.pools.begin();
  const LedgerInstance& instance = ledger_.InstanceOf(*pool);
  const Bytes page_bytes = pool->geometry.page_bytes();
  for (PageName name : resume.pages) {
    if (name.index.value() >= pool->geometry.max_pages ||
        name.generation == Generation()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "resume: no page of this pool: index ", name.index.value(),
          ", generation ", name.generation.value()));
    }
    if (pool->pages.contains(name.index)) {
      return absl::InvalidArgumentError(
          absl::StrCat("resume: page twice: ", name.index.value()));
    }
    LedgerPool* from = nullptr;
    for (SessionId source : session.resumption->sources) {
      const LedgerSession* earlier = ledger_.FindSession(source);
      if (earlier == nullptr) continue;
      LedgerPool* candidate = ledger_.FindPool(earlier->pools[which]);
      const LedgerPage* page = ledger_.FindPage(*candidate, name);
      if (page != nullptr && page->state != PageState::kMaking) {
        from = candidate;
      }
    }
    if (from != nullptr) {
      ledger_.Move(*from, *pool, name);
    } else if (!session.resumption->may_adopt) {
      return absl::PermissionDeniedError(absl::StrCat(
          "resume: the broker did not lend page ", name.index.value(),
          " to this process; restart the process"));
    } else if (ledger_.lent() + page_bytes > options_.backend->info().total) {
      return absl::PermissionDeniedError(
          "resume: more is listed than the device has");
    } else {
      ledger_.Adopt(*pool, name);
      adopted_at_ = Now();
      MeasureSoon(absl::ZeroDuration());
      session.resumption->adopted += page_bytes;
    }
    if (auto* event = Record(HistoryEvent::Kind::kResume, *pool, actions)) {
      event->pages = {name};
      if (from != nullptr) event->from = from->id;
    }
    ++session.resumption->pages;
    if (instance.held > instance.max) {
      watched_.insert({instance.tenant, instance.name});
    }
  }
  if (!resume.last) return absl::OkStatus();

  const Resumption resumption = *std::move(session.resumption);
  session.resumption.reset();
  actions.log.push_back(absl::StrCat(
      "resume session=", session.id.value(), " instance=", instance.name,
      " pages=", resumption.pages, " adopted=", resumption.adopted.count(),
      " held=", own.held.count(), " overdrawn=", ledger_.overdrawn().count()));
  for (SessionId source : resumption.sources) {
    if (sessions_.contains(source)) EraseSession(source, "resumed", actions);
  }
  // One record a session: a process may have had several.
  auto record = absl::c_find_if(
      expected_, [&](const RememberedSession& r) { return IsOf(session, r); });
  if (record != expected_.end()) expected_.erase(record);
  actions.remember = true;
  Arbitrate(actions);
  return absl::OkStatus();
}

}  // namespace kvbroker
