// Core: memory of the device that is not lent: what others use, what engines have
// declared that they will need, and what has to stay free.
//
// What others use is what the device has in use less what is ours. Ours changes
// while it is read, so it is known within bounds only: pages that are being made
// or released may be there or not, nor is it known which of those that were
// lent or came back meanwhile were there at that moment. A reading moves the
// figure no further than its bounds prove, however busy the broker is.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/core/core.h"
#include "broker/device/device_lost.h"
#include "broker/policy/policy.h"

namespace kvbroker {
namespace {

constexpr absl::Duration kMeasureEvery = absl::Milliseconds(200);
// Between the two readings that a growth needs.
constexpr absl::Duration kMeasureAgain = absl::Milliseconds(50);
// Whoever asks for a reading: no more often than that.
constexpr absl::Duration kMeasureAtMost = absl::Milliseconds(20);
// Figures that are older say nothing, so that a growth needs no second reading.
constexpr absl::Duration kForgotten = absl::Seconds(1);

}  // namespace

Core::Books Core::ReadBooks() {
  return {.surely = ledger_.lent() - ledger_.making() + ledger_.stock(),
          .possibly = ledger_.lent() + ledger_.stock() + ledger_.stocking() +
                      ledger_.releasing(),
          .ever_charged = ledger_.ever_charged(),
          .ever_taken = ledger_.ever_taken()};
}

void Core::MeasureSoon(absl::Duration delay) {
  if (!options_.headroom) return;
  measure_at_ = std::min(
      measure_at_, std::max(Now() + delay, measured_at_ + kMeasureAtMost));
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
    // Pages that nobody else has a handle of are charged to it as well.
    lent[session.peer.pid] += ledger_.FindSession(id)->adopted;
  }
  lent.erase(0);
  auto in = [](const ByProcess& reading, uint32_t pid) {
    auto it = reading.find(pid);
    return it == reading.end() ? Bytes(0) : it->second;
  };
  ByProcess ours;
  for (const auto& [pid, pages] : lent) {
    ours[pid] =
        std::max(Bytes(0), std::min(in(first, pid), in(last, pid)) - pages);
  }
  return ours;
}

Bytes Core::LendableBeside(Bytes foreign) const {
  const Bytes left =
      options_.backend->info().total - *options_.headroom - foreign;
  return std::clamp(left, Bytes(0), options_.capacity);
}

void Core::MeasureIfDue() {
  {
    MutexLock lock(&mu_);
    if (Now() < measure_at_) return;
    measure_at_ = absl::InfiniteFuture();
  }
  if (options_.executor) {
    options_.executor([this] { Measure(); });
  } else {
    Measure();
  }
}

void Core::Measure() {
  Books before;
  const absl::Time now = Now();
  {
    MutexLock lock(&mu_);
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
    if (IsDeviceLost(used.status())) {
      LoseDevice(used.status(), actions);
      Arbitrate(actions);
    } else if (!used.ok()) {
      if (!std::exchange(measuring_fails_, true)) {
        actions.log.push_back(absl::StrCat("measure-failed error=\"",
                                           used.status().message(), "\""));
      }
    } else if (HoldsForResume()) {
      // What engines of before hold and have not listed would pass for others'.
    } else {
      measuring_fails_ = false;
      const bool forgotten = now - measured_at_ > kForgotten;
      measured_at_ = now;
      const Books after = ReadBooks();
      const Bytes possibly =
          before.possibly + (after.ever_charged - before.ever_charged);
      const Bytes surely =
          before.surely - (after.ever_taken - before.ever_taken);
      const Bytes low = std::max(Bytes(0), *used - possibly);
      const Bytes high = std::max(Bytes(0), *used - surely);
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
      } else if (forgotten) {
        take(low);
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
      Arbitrate(actions);
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
  auto last = std::find_if(
      rooms_.begin(), rooms_.end(),
      [&](const Room& room) { return room.session == session.id; });
  if (last != rooms_.end()) {
    Refused refused;
    refused.sequence = last->sequence;
    refused.code = absl::StatusCode::kCancelled;
    refused.reason = "another question for room has taken its place";
    actions.tell.emplace_back(session.listener, std::move(refused));
    rooms_.erase(last);
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
    // By a reading that is newer than the question, with nothing that a second
    // one may yet show. What the driver has to give back still counts as ours.
    const bool measured = !options_.headroom ||
                          (measured_at_ >= room->since && !suspected_);
    if (measured && ledger_.overdrawn() == Bytes(0)) {
      actions.tell.emplace_back(session->second.listener,
                                RoomMade{room->sequence});
      room = rooms_.erase(room);
      continue;
    }
    if (now < room->deadline && device_error_.ok()) {
      ++room;
      continue;
    }
    Refused refused;
    refused.sequence = room->sequence;
    refused.code = absl::StatusCode::kUnavailable;
    refused.reason =
        !device_error_.ok() ? std::string(device_error_.message())
        : measured ? absl::StrCat("no room within the deadline: ",
                                FormatBytes(ledger_.overdrawn()),
                                " more are lent than ",
                                FormatBytes(session->second.declared_peak),
                                " leave", OthersInWords())
                 : "no room within the deadline: what the device has in use "
                   "could not be read";
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
