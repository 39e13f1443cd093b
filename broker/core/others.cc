// Core: memory of the device that is not lent: what others use, what engines have
// declared that they will need, and what has to stay free.
//
// What others use is what the device has in use less what is ours. Ours changes
// while it is read, so it is known within bounds only: pages that are being made
// or released may be there or not. A reading moves the figure no further than
// its bounds prove, however busy the broker is.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/core/core.h"
#include "broker/policy/policy.h"

namespace kvbroker {
namespace {

constexpr absl::Duration kMeasureEvery = absl::Milliseconds(200);
// Between the two readings that a growth needs.
constexpr absl::Duration kMeasureAgain = absl::Milliseconds(50);

}  // namespace

Core::Books Core::ReadBooks() {
  return {.surely = ledger_.lent() - ledger_.making() + ledger_.stock(),
          .possibly = ledger_.lent() + ledger_.stock() + ledger_.releasing()};
}

void Core::MeasureSoon(absl::Duration delay) {
  if (options_.headroom) measure_at_ = std::min(measure_at_, Now() + delay);
}

Bytes Core::SumOfDeclared() {
  Bytes sum;
  const Bytes total = options_.backend->info().total;
  for (const auto& [id, session] : sessions_) {
    sum = std::min(total, sum + session.declared_peak);
  }
  return sum;
}

Bytes Core::Needed(Bytes used, const ByProcess& by_process) {
  // Of processes that the device knows: the rest of what each has declared. Of
  // the others, who may be anywhere in what is used: the rest of their sum.
  ByProcess declared;
  for (const auto& [id, session] : sessions_) {
    declared[session.peer.pid] += session.declared_peak;
  }
  Bytes rest, unknown, of_known;
  for (const auto& [pid, peak] : declared) {
    auto seen = by_process.find(pid);
    if (pid == 0 || seen == by_process.end()) {
      unknown += peak;
    } else {
      of_known += seen->second;
      rest += std::max(Bytes(0), peak - seen->second);
    }
  }
  const Bytes of_unknown = std::max(Bytes(0), used - of_known);
  return used + rest + std::max(Bytes(0), unknown - of_unknown);
}

Core::ByProcess Core::OfOurs(const ByProcess& first, const ByProcess& last) {
  ByProcess lent;
  for (const auto& [id, session] : sessions_) {
    lent[session.peer.pid] += ledger_.FindSession(id)->held;
  }
  ByProcess ours;
  for (const auto& [pid, held] : lent) {
    auto a = first.find(pid), b = last.find(pid);
    if (pid == 0 || a == first.end() || b == last.end()) continue;
    // With charge=engine its pages are charged to it as well.
    const Bytes pages =
        options_.charge == CoreOptions::Charge::kEngine ? held : Bytes(0);
    ours[pid] = std::max(Bytes(0), std::min(a->second, b->second) - pages);
  }
  return ours;
}

Bytes Core::LendableBeside(Bytes foreign) const {
  const Bytes left =
      options_.backend->info().total - *options_.headroom - foreign;
  return std::clamp(left, Bytes(0), options_.capacity);
}

void Core::Measure() {
  Books before;
  const absl::Time now = Now();
  {
    MutexLock lock(&mu_);
    if (now < measure_at_) return;
    measure_at_ = absl::InfiniteFuture();
    before = ReadBooks();
  }
  // First and last: what a process has taken or given meanwhile is counted as
  // needed rather than as there to lend.
  const auto first = options_.backend->UsedByProcess();
  const absl::StatusOr<Bytes> used = options_.backend->UsedBytes();
  const auto last = options_.backend->UsedByProcess();
  Actions actions;
  {
    MutexLock lock(&mu_);
    if (!sessions_.empty()) MeasureSoon(kMeasureEvery);
    if (!used.ok()) {
      if (!std::exchange(measuring_fails_, true)) {
        actions.log.push_back(absl::StrCat("measure-failed error=\"",
                                           used.status().message(), "\""));
      }
    } else {
      measuring_fails_ = false;
      measured_at_ = now;
      const Books after = ReadBooks();
      const Bytes low = std::max(
          Bytes(0), *used - std::max(before.possibly, after.possibly));
      const Bytes high =
          std::max(Bytes(0), *used - std::min(before.surely, after.surely));
      const ByProcess by_process =
          first.ok() && last.ok() ? OfOurs(*first, *last) : ByProcess();
      const Bytes needed = Needed(foreign_, foreign_by_process_);
      const Bytes needed_low = Needed(low, by_process);
      auto take = [&](Bytes foreign) {
        mu_.AssertHeld();
        foreign_ = foreign;
        foreign_by_process_ = by_process;
        suspected_.reset();
      };
      if (needed_low <= needed) {
        suspected_.reset();
        if (Needed(high, by_process) <= needed) take(high);
      } else if (!suspected_) {
        // An allocation that is gone a moment later moves nobody's pages.
        suspected_ = {now, needed_low};
        MeasureSoon(kMeasureAgain);
      } else if (now - suspected_->first < kMeasureAgain) {
        MeasureSoon(suspected_->first + kMeasureAgain - now);
      } else if (suspected_->second > needed) {
        take(low);
      }
      UpdateOthers(actions);
    }
  }
  Run(std::move(actions));
}

void Core::UpdateOthers(Actions& actions) {
  if (!options_.headroom) return;
  const Bytes declared = SumOfDeclared();
  const Bytes others = options_.capacity -
                       LendableBeside(Needed(foreign_, foreign_by_process_));
  if (others == ledger_.others()) return;
  ledger_.SetOthers(others);
  actions.log.push_back(absl::StrCat(
      "others lendable=", ledger_.lendable().count(),
      " foreign=", foreign_.count(), " declared=", declared.count(),
      " lent=", ledger_.lent().count()));
}

std::vector<Take> Core::TakesToMakeRoom(const PolicySnapshot& snapshot) {
  const Bytes need = ledger_.lent() - ledger_.lendable();
  // What was promised and is not used yet; who uses more already has it.
  const Bytes promised = Needed(foreign_, foreign_by_process_) - foreign_;
  return TakesForOthers(snapshot, need, std::min(need, promised),
                        Now() - overdrawn_since_, options_.policy);
}

absl::Status Core::On(SessionState& session, const MakeRoom& message,
                      Actions& actions) {
  if (message.sequence == Sequence()) {
    return absl::InvalidArgumentError(
        "make_room: sequence: the first one is 1; got 0");
  }
  // One at a time is enough for anybody.
  if (std::any_of(rooms_.begin(), rooms_.end(), [&](const Room& room) {
        return room.session == session.id;
      })) {
    return absl::FailedPreconditionError(
        "make_room: the last one has not been answered");
  }
  session.declared_peak = message.declared_peak;
  rooms_.push_back({session.id, message.sequence, Now(),
                    Now() + message.deadline});
  actions.log.push_back(absl::StrCat(
      "make-room session=", session.id.value(), " instance=",
      ledger_.FindSession(session.id)->instance.second,
      " declared=", message.declared_peak.count()));
  MeasureSoon(absl::ZeroDuration());
  UpdateOthers(actions);
  Arbitrate(actions);
  return absl::OkStatus();
}

void Core::SettleRooms(Actions& actions) {
  const absl::Time now = Now();
  for (auto room = rooms_.begin(); room != rooms_.end();) {
    auto session = sessions_.find(room->session);
    if (session == sessions_.end() || !session->second.connected) {
      room = rooms_.erase(room);
      continue;
    }
    // By a reading that is newer than the question, and with the driver done.
    const bool measured = !options_.headroom || measured_at_ >= room->since;
    if (measured && ledger_.overdrawn() == Bytes(0) &&
        ledger_.releasing() == Bytes(0)) {
      actions.tell.emplace_back(session->second.listener,
                                RoomMade{room->sequence});
      room = rooms_.erase(room);
      continue;
    }
    if (now < room->deadline) {
      ++room;
      continue;
    }
    Refused refused;
    refused.sequence = room->sequence;
    refused.code = absl::StatusCode::kUnavailable;
    refused.reason = absl::StrCat(
        "no room within the deadline: ", FormatBytes(ledger_.overdrawn()),
        " more are lent than ", FormatBytes(session->second.declared_peak),
        " leave", OthersInWords());
    refused.holders = Holders();
    actions.log.push_back(absl::StrCat("refuse-room session=",
                                       room->session.value(), " reason=\"",
                                       refused.reason, "\""));
    actions.tell.emplace_back(session->second.listener, std::move(refused));
    room = rooms_.erase(room);
  }
}

std::string Core::OthersInWords() {
  if (ledger_.others() == Bytes(0)) return "";
  return absl::StrCat("; of ", FormatBytes(options_.backend->info().total),
                      ", others use ", FormatBytes(foreign_),
                      ", engines have declared ", FormatBytes(SumOfDeclared()),
                      " and ", FormatBytes(*options_.headroom),
                      " stay free: ", FormatBytes(ledger_.lendable()),
                      " may be lent");
}

}  // namespace kvbroker
