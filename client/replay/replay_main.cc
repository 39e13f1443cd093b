// kvbroker-replay: see --help.

#include <stdio.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "broker/base/status_macros.h"
#include "client/replay/broker_block_source.h"
#include "client/replay/replay_clock.h"
#include "client/replay/replay_loop.h"
#include "client/replay/replay_options.h"
#include "client/replay/replay_summary.h"
#include "client/replay/scheduler.h"
#include "client/replay/static_block_source.h"
#include "client/replay/status_writer.h"

namespace kvbroker::replay {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

// How often an elastic pool is asked for what changed: well below what a person
// or another engine's request would notice.
constexpr absl::Duration kElasticPoll = absl::Milliseconds(1);

// More of them would say nothing new.
constexpr int64_t kRejectionsTold = 5;

void PrintError(const absl::Status& status) {
  absl::FPrintF(stderr, "kvbroker-replay: %s\n", status.message());
}

std::string CapacityToJson(const ReplayOptions& options, const Trace& trace) {
  const TokensInFlight tokens = MeasureTokensInFlight(trace, options.speed);
  return absl::StrFormat(
      R"({"requests":%d,"length_s":%.3f,"tokens_in_flight_mean":%.0f,)"
      R"("tokens_in_flight_p99":%d,"tokens_in_flight_peak":%d,)"
      R"("token_bytes":%d,"block_tokens":%d,"block_bytes":%d,)"
      R"("page_bytes":%d})"
      "\n",
      trace.requests.size(), trace.length_s, tokens.mean, tokens.p99,
      tokens.peak, options.geometry.token_bytes.count(), kBlockTokens,
      options.geometry.block_bytes.count(),
      options.geometry.page_bytes.count());
}

absl::StatusOr<std::unique_ptr<BlockSource>> MakeSource(
    const ReplayOptions& options) {
  if (!options.static_share.has_value()) return MakeBrokerBlockSource(options);
  return StaticBlockSource::Create(*options.static_share,
                                   options.geometry.block_bytes);
}

// When trace time begins, by the replay's clock.
absl::Time StartTime(const ReplayOptions& options, ReplayClock& clock) {
  const absl::Time now = clock.Now();
  if (!options.start_at.has_value()) return now;
  const absl::Duration ahead = *options.start_at - absl::Now();
  if (ahead >= absl::ZeroDuration()) return now + ahead;
  absl::FPrintF(stderr,
                "kvbroker-replay: --start-at is past by %s, starting now\n",
                absl::FormatDuration(-ahead));
  return now;
}

absl::StatusOr<ReplaySummary> Replay(const ReplayOptions& options, Trace trace,
                                     ReplayClock& clock) {
  ReplayListener listener;
  if (options.status_fd.has_value()) {
    ASSIGN_OR_RETURN(StatusWriter writer,
                     StatusWriter::Create(*options.status_fd));
    listener.on_status = [writer](const ReplayStatus& status) mutable {
      writer.Write(StatusToJson(status));
    };
  }
  int64_t rejections = 0;
  listener.on_rejection = [&rejections](const Rejection& rejection) {
    if (++rejections > kRejectionsTold) return;
    absl::FPrintF(stderr,
                  "kvbroker-replay: request can never fit: request %d needs "
                  "%d blocks, the pool may have %d\n",
                  rejection.request, rejection.needed_blocks,
                  rejection.capacity_blocks);
  };

  ASSIGN_OR_RETURN(const std::unique_ptr<BlockSource> source,
                   MakeSource(options));
  const bool elastic = !options.static_share.has_value();
  BlockPattern pattern(MakeEngineId(options.name, getpid(), getuid()));
  Scheduler scheduler({.speed = options.speed}, std::move(trace.requests),
                      *source, &pattern);
  const ReplayPace pace = {
      .start = StartTime(options, clock),
      .speedup = options.speedup,
      .until_s = options.until_s,
      .poll = elastic ? kElasticPoll : absl::InfiniteDuration()};
  const ReplayRun run = RunReplay(scheduler, *source, pace, listener, clock);

  RETURN_IF_ERROR(source->Health());
  if (const auto other = source->Other()) {
    absl::FPrintF(stderr, "kvbroker-replay: activations: %d taken, %d failed\n",
                  other->taken, other->failed);
    if (other->failed > 0) {
      return absl::ResourceExhaustedError(
          "memory that was declared to the broker was not there");
    }
  }
  const std::optional<FreshCounts> fresh = source->Fresh();
  if (fresh && fresh->errors > 0) {
    absl::FPrintF(stderr, "kvbroker-replay: page was not fresh: %s\n",
                  fresh->first_error);
  }
  if (rejections > kRejectionsTold) {
    absl::FPrintF(stderr, "kvbroker-replay: ... and %d more such requests\n",
                  rejections - kRejectionsTold);
  }

  ReplaySummary summary = Summarize(scheduler, pattern);
  summary.name = options.name;
  summary.mode = elastic ? "elastic" : "static";
  summary.late_max_ms = absl::ToDoubleMilliseconds(run.late_max);
  summary.seconds = absl::ToDoubleSeconds(run.elapsed);
  summary.fresh = fresh;
  if (pattern.errors() > 0) {
    absl::FPrintF(stderr, "kvbroker-replay: block was overwritten: %s\n",
                  pattern.first_error());
  }
  if (!options.requests_file.empty()) {
    RETURN_IF_ERROR(
        WriteFile(options.requests_file, RequestsToCsv(scheduler.records())));
  }
  return summary;
}

int Main(int argc, char** argv) {
  // First of all, since it blocks signals for every thread to come.
  SignalClock clock;

  const auto parsed = ParseReplayOptions(argc, argv);
  if (!parsed.ok()) {
    PrintError(parsed.status());
    absl::FPrintF(stderr, "Run kvbroker-replay --help for usage.\n");
    return kExitUsage;
  }
  if (const auto* help = std::get_if<HelpText>(&*parsed)) {
    absl::PrintF("%s", help->text);
    return 0;
  }
  const auto& options = std::get<ReplayOptions>(*parsed);

  absl::StatusOr<Trace> trace = MakeTrace(options);
  if (!trace.ok()) {
    PrintError(trace.status());
    return kExitFailed;
  }
  if (options.print_capacity) {
    absl::PrintF("%s", CapacityToJson(options, *trace));
    return 0;
  }
  const absl::StatusOr<ReplaySummary> summary =
      Replay(options, *std::move(trace), clock);
  if (!summary.ok()) {
    PrintError(summary.status());
    return kExitFailed;
  }
  absl::PrintF(
      "%s", options.json ? SummaryToJson(*summary) : SummaryToText(*summary));
  const bool whole = summary->integrity_errors == 0 &&
                     (!summary->fresh || summary->fresh->errors == 0);
  return whole ? 0 : kExitFailed;
}

}  // namespace
}  // namespace kvbroker::replay

int main(int argc, char** argv) { return kvbroker::replay::Main(argc, argv); }
