// Trace: the requests that one service received, and when.
//
//   ASSIGN_OR_RETURN(Trace trace, ReadTraceFile("code.csv"));
//   trace = Windowed(Shifted(std::move(trace), 600), 300);
//
// Files are CSV: a header line `TIMESTAMP,ContextTokens,GeneratedTokens`, then
// one line a request. A timestamp is a date and time of day
// (`2023-11-16 18:17:03.9799600`, up to nine decimals; `T` for the space and a
// trailing `Z` or `+00:00` are accepted) or plain seconds (`76.5`), the same
// way throughout a file. Lines need not be in order. Blank lines are skipped.
//
// Time zero of a file with dates is its earliest row, of one with seconds is 0.
// Traces recorded side by side that shall keep their distance from each other
// are read with the same `origin`.
#ifndef KVBROKER_CLIENT_REPLAY_TRACE_H_
#define KVBROKER_CLIENT_REPLAY_TRACE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace kvbroker::replay {

struct TraceRequest {
  double arrival_s = 0;          // since the trace's start
  int64_t prompt_tokens = 0;     // at least 1
  int64_t generated_tokens = 0;  // 0: ends with its prefill

  friend bool operator==(const TraceRequest&, const TraceRequest&) = default;
};

// Invariant: `requests` are sorted by arrival, each in [0, length_s).
struct Trace {
  std::vector<TraceRequest> requests;
  // What the trace stands for, its silent end included; shifts wrap around it.
  double length_s = 0;
};

// What a file may hold; more is an error that says so.
inline constexpr int64_t kMaxTraceRequests = 10'000'000;
inline constexpr int64_t kMaxTraceFileBytes = int64_t{1} << 30;
inline constexpr int64_t kMaxTokens = int64_t{1} << 24;    // prompt; generated
inline constexpr double kMaxTraceSeconds = 7 * 24 * 3600;  // first to last

// Reads a date and time of day as above, UTC.
absl::StatusOr<absl::Time> ParseTimestamp(std::string_view text);

// `name` is what errors call the text. The trace's length is the span from its
// origin to its last row, rounded up to a whole minute. `origin` applies to
// files with dates only; a row before it is an error.
absl::StatusOr<Trace> ParseTrace(
    std::string_view text, std::string_view name,
    std::optional<absl::Time> origin = std::nullopt);
absl::StatusOr<Trace> ReadTraceFile(
    const std::string& path, std::optional<absl::Time> origin = std::nullopt);

// The same requests with `length_s` set. REQUIRES: no arrival at or after it.
absl::StatusOr<Trace> WithLength(Trace trace, double length_s);

// Every request `shift_s` (of either sign) later; what leaves at one end of the
// trace comes in at the other.
Trace Shifted(Trace trace, double shift_s);

// The requests that arrive before `window_s`, which becomes the length if it
// is less.
Trace Windowed(Trace trace, double window_s);

// The same service with `factor` times the customers: each request comes
// `factor` times (the fraction by chance). The first copy keeps its time; the
// others fall anywhere within kRateScaleJitterSeconds of it, so that bursts and
// lulls keep their places and lengths and only grow taller. Below 1, requests
// are left out by chance. REQUIRES: 0 < factor <= kMaxRateScale.
inline constexpr double kRateScaleJitterSeconds = 5;
inline constexpr double kMaxRateScale = 1000;
absl::StatusOr<Trace> RateScaled(const Trace& trace, double factor,
                                 uint64_t seed);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_TRACE_H_
