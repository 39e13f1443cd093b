#include "client/cli/verbs.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/cli/listing_json.h"
#include "client/cli/listing_text.h"

namespace kvbroker::cli {
namespace {

// How often `--wait` looks: brokers announce nothing to those who have no
// session.
constexpr absl::Duration kDrainPoll = absl::Milliseconds(50);

void WriteError(absl::string_view text, Console& console) {
  for (absl::string_view line :
       absl::StrSplit(text, '\n', absl::SkipWhitespace())) {
    console.err << "kvctl: " << line << "\n";
  }
}

// Says what some brokers did not do, and how that leaves the verb as a whole.
template <typename Response>
int ReportMissing(const Replies<Response>& replies, Console& console) {
  for (const absl::Status& status : replies.absent) {
    WriteError(absl::StrCat("warning: ", status.message()), console);
  }
  int exit = kExitDone;
  for (const absl::Status& status : replies.failures) {
    exit = std::max(exit, ReportFailure(status, console));
  }
  return exit;
}

// "conv", or with several GPUs "conv on GPU-1a2b".
std::string Subject(const std::string& name, const std::string& device_uuid,
                    size_t answers) {
  return answers > 1 ? absl::StrCat(name, " on ", device_uuid) : name;
}

class Runner {
 public:
  Runner(Fleet& fleet, Console& console, const Pacing& pacing)
      : fleet_(fleet), console_(console), pacing_(pacing) {}

  int operator()(const ListCommand& command) {
    absl::StatusOr<Listing> listing = fleet_.List(command.names);
    if (!listing.ok()) return ReportFailure(listing.status(), console_);
    console_.out << (command.json
                         ? ListingToJson(*listing, JsonLayout::kIndented)
                         : ListingToText(*listing, console_.color));
    return ReportMissing(*listing, console_);
  }

  int operator()(const WatchCommand& command) {
    bool first = true;
    do {
      absl::StatusOr<Listing> listing = fleet_.List(command.names);
      if (listing.ok()) {
        Draw(command.json ? ListingToJson(*listing, JsonLayout::kLine)
                          : ListingToText(*listing, console_.color),
             /*block=*/!command.json, first);
        if (first) ReportMissing(*listing, console_);
      } else if (first) {
        return ReportFailure(listing.status(), console_);
      } else {
        // Brokers restart and instances come and go while somebody watches.
        ReportFailure(listing.status(), console_);
      }
      first = false;
    } while (pacing_.sleep(command.interval));
    return kExitDone;
  }

  int operator()(const PolicyCommand& command) {
    const PolicyChange& change = command.change;
    absl::StatusOr<Replies<v1::SetPolicyResponse>> replies =
        fleet_.SetPolicy(change);
    if (!replies.ok()) {
      int exit = ReportFailure(replies.status(), console_);
      if (absl::IsNotFound(replies.status())) {
        WriteError("to set it before the engine starts, add --preset",
                   console_);
      }
      return exit;
    }
    for (const auto& answer : replies->answers) {
      console_.out << Subject(change.name, answer.device_uuid,
                              replies->answers.size())
                   << ": " << Settings(change, answer.response.instance())
                   << "\n";
    }
    int exit = ReportMissing(*replies, console_);
    if (exit == kExitDone && command.wait) {
      console_.out.flush();
      exit = WaitForDrain(command, replies->answers);
    } else {
      for (const auto& answer : replies->answers) {
        if (!answer.response.draining()) continue;
        console_.out << Subject(change.name, answer.device_uuid,
                                replies->answers.size())
                     << ": draining, still holds "
                     << BytesInWords(answer.response.instance().held_bytes())
                     << "\n";
      }
    }
    return exit;
  }

  int operator()(const DeleteCommand& command) {
    v1::DeleteRequest request;
    request.set_name(command.name);
    request.set_tenant(command.tenant);
    request.set_force(command.force);
    absl::StatusOr<Replies<v1::DeleteResponse>> replies =
        fleet_.Delete(request);
    if (!replies.ok()) {
      int exit = ReportFailure(replies.status(), console_);
      if (absl::IsFailedPrecondition(replies.status()) && !command.force) {
        WriteError("to end its processes, add --force", console_);
      }
      return exit;
    }
    for (const auto& answer : replies->answers) {
      console_.out << Subject(command.name, answer.device_uuid,
                              replies->answers.size());
      if (answer.response.fenced_pids().empty()) {
        console_.out << ": forgotten\n";
      } else {
        console_.out << ": told to end: pid "
                     << absl::StrJoin(answer.response.fenced_pids(), ", ")
                     << "\n";
      }
    }
    return ReportMissing(*replies, console_);
  }

  int operator()(const ExplainCommand& command) {
    v1::ExplainRequest request;
    request.set_name(command.name);
    request.set_tenant(command.tenant);
    absl::StatusOr<Replies<v1::ExplainResponse>> replies =
        fleet_.Explain(request);
    if (!replies.ok()) return ReportFailure(replies.status(), console_);
    if (command.json) {
      console_.out << ExplanationsToJson(replies->answers);
    } else {
      for (const auto& answer : replies->answers) {
        if (replies->answers.size() > 1) {
          console_.out << "On " << answer.device_uuid << ":\n";
        }
        console_.out << ExplanationToText(answer.response);
      }
    }
    return ReportMissing(*replies, console_);
  }

 private:
  // One frame of `watch`.
  void Draw(std::string frame, bool block, bool first) {
    if (console_.redraw) {
      // Home, each line up to its end, then what is left below: no flicker.
      console_.out << (first ? "\x1b[2J\x1b[H" : "\x1b[H")
                   << absl::StrReplaceAll(frame, {{"\n", "\x1b[K\n"}})
                   << "\x1b[J";
    } else {
      if (block && !first) console_.out << "\n";
      console_.out << frame;
    }
    console_.out.flush();
  }

  // What was set, as the broker has it now.
  static std::string Settings(const PolicyChange& change,
                              const v1::InstanceStatus& instance) {
    std::vector<std::string> parts;
    if (change.min.has_value()) {
      parts.push_back("min " + BytesInWords(instance.min_bytes()));
    }
    if (change.max.has_value()) {
      std::string part = "limit " + BytesInWords(instance.max_bytes());
      if (instance.effective_limit_bytes() != instance.max_bytes()) {
        absl::StrAppend(&part, ", in effect ",
                        BytesInWords(instance.effective_limit_bytes()));
      }
      parts.push_back(std::move(part));
    }
    if (change.weight.has_value()) {
      parts.push_back(absl::StrCat("weight ", instance.weight()));
    }
    return absl::StrJoin(parts, "; ");
  }

  int WaitForDrain(
      const PolicyCommand& command,
      const std::vector<Replies<v1::SetPolicyResponse>::Answer>& answers) {
    const absl::Time deadline = pacing_.clock.Now() + command.timeout;
    for (;;) {
      absl::StatusOr<Listing> listing = fleet_.List({});
      if (!listing.ok()) return ReportFailure(listing.status(), console_);
      std::optional<std::string> excess = Excess(*listing, answers);
      if (!excess.has_value()) return kExitDone;
      absl::Duration left = deadline - pacing_.clock.Now();
      if (left <= absl::ZeroDuration()) {
        return ReportFailure(
            absl::DeadlineExceededError(absl::StrCat(
                "limit set, but not drained within ",
                absl::FormatDuration(command.timeout), ": ", *excess)),
            console_);
      }
      if (!pacing_.sleep(std::min(kDrainPoll, left))) return kExitFailed;
    }
  }

  // Which of the instances that `answers` speak of holds more than it may; none
  // where all have drained or gone.
  static std::optional<std::string> Excess(
      const Listing& listing,
      const std::vector<Replies<v1::SetPolicyResponse>::Answer>& answers) {
    for (const auto& device : listing.answers) {
      for (const auto& answer : answers) {
        if (device.device_uuid != answer.device_uuid) continue;
        for (const v1::InstanceStatus& now : device.response.instances()) {
          const v1::InstanceStatus& then = answer.response.instance();
          if (now.name() == then.name() && now.tenant() == then.tenant() &&
              now.held_bytes() > now.max_bytes()) {
            return absl::StrCat(
                Subject(now.name(), device.device_uuid, answers.size()),
                " holds ", BytesInWords(now.held_bytes()), " above its limit ",
                BytesInWords(now.max_bytes()));
          }
        }
      }
    }
    return std::nullopt;
  }

  Fleet& fleet_;
  Console& console_;
  const Pacing& pacing_;
};

}  // namespace

int RunCommand(const Command& command, Fleet& fleet, Console& console,
               const Pacing& pacing) {
  return std::visit(Runner(fleet, console, pacing), command);
}

int ReportFailure(const absl::Status& status, Console& console) {
  WriteError(status.message(), console);
  if (absl::IsUnavailable(status)) SuggestBroker(console);
  return absl::IsInvalidArgument(status) ? kExitUsage : kExitFailed;
}

void SuggestBroker(Console& console) {
  WriteError(
      "start one (kvbrokerd --help), or say where it listens: --address or "
      "KVBROKER_ADDRESS",
      console);
}

}  // namespace kvbroker::cli
