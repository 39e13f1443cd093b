#include "client/replay/trace.h"

#include <errno.h>
#include <stdio.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/base/unique_fd.h"
#include "client/replay/random.h"

namespace kvbroker::replay {
namespace {

constexpr std::string_view kHeader = "TIMESTAMP,ContextTokens,GeneratedTokens";
constexpr int kFields = 3;
constexpr size_t kMaxLine = 1024;

absl::string_view ToAbsl(std::string_view text) {
  return absl::string_view(text.data(), text.size());
}

// What a message shows of a line that somebody else wrote.
std::string Quoted(std::string_view text) {
  constexpr size_t kShown = 60;
  const bool cut = text.size() > kShown;
  return absl::StrCat("\"", absl::CHexEscape(ToAbsl(text.substr(0, kShown))),
                      cut ? "..." : "", "\"");
}

std::string_view Trimmed(std::string_view text) {
  const absl::string_view t = absl::StripAsciiWhitespace(ToAbsl(text));
  return std::string_view(t.data(), t.size());
}

bool StartsWithDigit(std::string_view text) {
  return !text.empty() && text[0] >= '0' && text[0] <= '9';
}

// The timestamp as it stands in the file: a date, or seconds.
struct RowTime {
  std::optional<absl::Time> date;
  double seconds = 0;
};

std::optional<RowTime> ParseRowTime(std::string_view text) {
  if (!StartsWithDigit(text)) return std::nullopt;
  RowTime time;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), time.seconds,
                      std::chars_format::fixed);
  if (error == std::errc() && end == text.data() + text.size()) return time;
  absl::StatusOr<absl::Time> date = ParseTimestamp(text);
  if (!date.ok()) return std::nullopt;
  time.date = *date;
  return time;
}

std::optional<int64_t> ParseTokens(std::string_view text, int64_t least) {
  int64_t tokens = 0;
  if (!StartsWithDigit(text) || !absl::SimpleAtoi(ToAbsl(text), &tokens) ||
      tokens < least || tokens > kMaxTokens) {
    return std::nullopt;
  }
  return tokens;
}

// Collects the rows of one text.
class Reader {
 public:
  explicit Reader(std::string_view name) : name_(name) {}

  absl::Status ReadLine(std::string_view line) {
    ++line_number_;
    if (line.size() > kMaxLine) {
      return Error(absl::StrCat("line is longer than ", kMaxLine, " bytes"),
                   line);
    }
    line = Trimmed(line);
    if (line.empty()) return absl::OkStatus();
    if (!seen_text_) {
      seen_text_ = true;
      if (!StartsWithDigit(line)) return CheckHeader(line);
    }
    return ReadRow(line);
  }

  absl::StatusOr<Trace> Finish(std::optional<absl::Time> origin) && {
    if (requests_.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("trace has no requests: ", name_));
    }
    Trace trace;
    if (dated_) {
      absl::Time zero = *std::min_element(dates_.begin(), dates_.end());
      if (origin.has_value()) {
        if (zero < *origin) {
          return absl::InvalidArgumentError(absl::StrCat(
              "trace has a request before the origin: ", name_, ", first at ",
              absl::FormatTime(zero, absl::UTCTimeZone())));
        }
        zero = *origin;
      }
      for (size_t i = 0; i < requests_.size(); ++i) {
        requests_[i].arrival_s = absl::ToDoubleSeconds(dates_[i] - zero);
      }
    }
    trace.requests = std::move(requests_);
    std::stable_sort(trace.requests.begin(), trace.requests.end(),
                     [](const TraceRequest& a, const TraceRequest& b) {
                       return a.arrival_s < b.arrival_s;
                     });
    const double last = trace.requests.back().arrival_s;
    if (last > kMaxTraceSeconds) {
      return absl::InvalidArgumentError(
          absl::StrCat("trace is too long: ", name_, ", ", last,
                       " s, allowed are ", kMaxTraceSeconds, " s"));
    }
    // An arrival on the very minute belongs to the minute that it begins.
    trace.length_s = 60 * (std::floor(last / 60) + 1);
    return trace;
  }

 private:
  absl::Status Error(std::string_view what, std::string_view text) const {
    return absl::InvalidArgumentError(
        absl::StrCat("bad trace: ", name_, ":", line_number_, ": ",
                     ToAbsl(what), ": ", Quoted(text)));
  }

  absl::Status CheckHeader(std::string_view line) {
    constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
    if (line.substr(0, kByteOrderMark.size()) == kByteOrderMark) {
      line.remove_prefix(kByteOrderMark.size());
    }
    if (!absl::EqualsIgnoreCase(ToAbsl(line), ToAbsl(kHeader))) {
      return Error(absl::StrCat("expected the header ", ToAbsl(kHeader)), line);
    }
    return absl::OkStatus();
  }

  absl::Status ReadRow(std::string_view line) {
    std::string_view fields[kFields];
    std::string_view rest = line;
    for (int i = 0; i < kFields; ++i) {
      const size_t comma = rest.find(',');
      const bool last = i == kFields - 1;
      if ((comma == std::string_view::npos) != last) {
        return Error(absl::StrCat("expected 3 fields (", ToAbsl(kHeader), ")"),
                     line);
      }
      fields[i] = Trimmed(rest.substr(0, comma));
      if (!last) rest.remove_prefix(comma + 1);
    }

    const std::optional<RowTime> time = ParseRowTime(fields[0]);
    if (!time.has_value()) {
      return Error(
          "TIMESTAMP is neither YYYY-MM-DD hh:mm:ss[.fraction] nor seconds",
          fields[0]);
    }
    const std::optional<int64_t> prompt = ParseTokens(fields[1], 1);
    if (!prompt.has_value()) {
      return Error(
          absl::StrCat("ContextTokens is not a whole number from 1 to ",
                       kMaxTokens),
          fields[1]);
    }
    const std::optional<int64_t> generated = ParseTokens(fields[2], 0);
    if (!generated.has_value()) {
      return Error(
          absl::StrCat("GeneratedTokens is not a whole number from 0 to ",
                       kMaxTokens),
          fields[2]);
    }

    if (requests_.empty()) dated_ = time->date.has_value();
    if (time->date.has_value() != dated_) {
      return Error(dated_
                       ? "TIMESTAMP is in seconds where lines above have dates"
                       : "TIMESTAMP is a date where lines above have seconds",
                   fields[0]);
    }
    if (static_cast<int64_t>(requests_.size()) == kMaxTraceRequests) {
      return Error(absl::StrCat("more than ", kMaxTraceRequests, " requests"),
                   line);
    }
    if (dated_) dates_.push_back(*time->date);
    requests_.push_back({.arrival_s = time->seconds,
                         .prompt_tokens = *prompt,
                         .generated_tokens = *generated});
    return absl::OkStatus();
  }

  const std::string name_;
  int64_t line_number_ = 0;
  bool seen_text_ = false;
  bool dated_ = false;
  std::vector<TraceRequest> requests_;  // arrival_s set if not dated_
  std::vector<absl::Time> dates_;       // one a request if dated_
};

void SortByArrival(Trace& trace) {
  std::stable_sort(trace.requests.begin(), trace.requests.end(),
                   [](const TraceRequest& a, const TraceRequest& b) {
                     return a.arrival_s < b.arrival_s;
                   });
}

// `time` brought into [0, length).
double Wrapped(double time, double length) {
  time = std::fmod(time, length);
  if (time < 0) time += length;
  return time < length ? time : 0;
}

}  // namespace

absl::StatusOr<absl::Time> ParseTimestamp(std::string_view text) {
  absl::Time time;
  // ParseTime knows words ("infinite-future") too, which no trace needs.
  if (StartsWithDigit(text)) {
    for (const char* format :
         {"%E4Y-%m-%d%ET%H:%M:%E*S", "%E4Y-%m-%d %H:%M:%E*S",
          "%E4Y-%m-%d%ET%H:%M:%E*S%Ez", "%E4Y-%m-%d %H:%M:%E*S%Ez"}) {
      if (absl::ParseTime(format, ToAbsl(text), &time, nullptr)) return time;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("not a timestamp, expected YYYY-MM-DD hh:mm:ss[.fraction]: ",
                   Quoted(text)));
}

absl::StatusOr<Trace> ParseTrace(std::string_view text, std::string_view name,
                                 std::optional<absl::Time> origin) {
  Reader reader(name);
  while (!text.empty()) {
    const size_t end = text.find('\n');
    RETURN_IF_ERROR(reader.ReadLine(text.substr(0, end)));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return std::move(reader).Finish(origin);
}

absl::StatusOr<Trace> ReadTraceFile(const std::string& path,
                                    std::optional<absl::Time> origin) {
  std::unique_ptr<FILE, int (*)(FILE*)> file(fopen(path.c_str(), "re"), fclose);
  if (file == nullptr) {
    return ErrnoToStatus(errno, absl::StrCat("cannot open trace ", path));
  }
  std::string text;
  char buffer[1 << 16];
  size_t got;
  while ((got = fread(buffer, 1, sizeof(buffer), file.get())) > 0) {
    text.append(buffer, got);
    if (static_cast<int64_t>(text.size()) > kMaxTraceFileBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("trace file is too large: ", path, ", allowed are ",
                       kMaxTraceFileBytes, " bytes"));
    }
  }
  if (ferror(file.get())) {
    return ErrnoToStatus(errno, absl::StrCat("cannot read trace ", path));
  }
  return ParseTrace(text, path, origin);
}

absl::StatusOr<Trace> WithLength(Trace trace, double length_s) {
  if (!(length_s > 0 && length_s <= kMaxTraceSeconds)) {
    return absl::InvalidArgumentError(
        absl::StrCat("trace length must be above 0 and at most ",
                     kMaxTraceSeconds, " s: ", length_s));
  }
  if (!trace.requests.empty() && trace.requests.back().arrival_s >= length_s) {
    return absl::InvalidArgumentError(absl::StrCat(
        "trace length is shorter than the trace: ", length_s,
        " s, last request at ", trace.requests.back().arrival_s, " s"));
  }
  trace.length_s = length_s;
  return trace;
}

Trace Shifted(Trace trace, double shift_s) {
  for (TraceRequest& request : trace.requests) {
    request.arrival_s = Wrapped(request.arrival_s + shift_s, trace.length_s);
  }
  SortByArrival(trace);
  return trace;
}

Trace Windowed(Trace trace, double window_s) {
  std::erase_if(trace.requests, [window_s](const TraceRequest& request) {
    return request.arrival_s >= window_s;
  });
  trace.length_s = std::min(trace.length_s, window_s);
  return trace;
}

absl::StatusOr<Trace> RateScaled(const Trace& trace, double factor,
                                 uint64_t seed) {
  if (!(factor > 0 && factor <= kMaxRateScale)) {
    return absl::InvalidArgumentError(
        absl::StrCat("rate scale must be above 0 and at most ", kMaxRateScale,
                     ": ", factor));
  }
  if (static_cast<double>(trace.requests.size()) * factor > kMaxTraceRequests) {
    return absl::InvalidArgumentError(
        absl::StrCat("rate scale gives more than ", kMaxTraceRequests,
                     " requests: ", factor));
  }
  Random random(seed);
  Trace scaled;
  scaled.length_s = trace.length_s;
  for (const TraceRequest& request : trace.requests) {
    const double fraction = factor - std::floor(factor);
    const int copies = static_cast<int>(std::floor(factor)) +
                       (random.Uniform() < fraction ? 1 : 0);
    for (int copy = 0; copy < copies; ++copy) {
      scaled.requests.push_back(request);
      if (copy == 0) continue;
      const double jitter =
          (2 * random.Uniform() - 1) * kRateScaleJitterSeconds;
      double& arrival = scaled.requests.back().arrival_s;
      arrival = Wrapped(arrival + jitter, trace.length_s);
    }
  }
  SortByArrival(scaled);
  return scaled;
}

}  // namespace kvbroker::replay
