#include "client/replay/trace_generator.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/replay/random.h"

namespace kvbroker::replay {
namespace {

// One point of a distribution: a share of `rank` lies at or below `value`.
struct Quantile {
  double rank;
  double value;
};

// The value at `rank` in [0, 1), linear between the points of `table`.
double ValueAtRank(std::span<const Quantile> table, double rank) {
  const auto above = std::upper_bound(
      table.begin() + 1, table.end() - 1, rank,
      [](double r, const Quantile& quantile) { return r < quantile.rank; });
  const Quantile& high = *above;
  const Quantile& low = *(above - 1);
  return low.value +
         (high.value - low.value) * (rank - low.rank) / (high.rank - low.rank);
}

int64_t TokensAtRank(std::span<const Quantile> table, double rank) {
  return std::llround(ValueAtRank(table, rank));
}

// Arrivals to the microsecond, so that the last bits of a library's logarithm
// do not show.
double ToMicroseconds(double time_s) { return std::round(time_s * 1e6) / 1e6; }

// Sorts, and drops what rounding or an echo carried past the end.
Trace Finish(std::vector<TraceRequest> requests, double length_s) {
  std::erase_if(requests, [length_s](const TraceRequest& request) {
    return request.arrival_s >= length_s;
  });
  std::stable_sort(requests.begin(), requests.end(),
                   [](const TraceRequest& a, const TraceRequest& b) {
                     return a.arrival_s < b.arrival_s;
                   });
  return {.requests = std::move(requests), .length_s = length_s};
}

// ---- conv -------------------------------------------------------------------

// Answers depend on the kind of prompt: short questions, one popular template
// of about 1,050 tokens with long answers, prompts cut at 4,096 with short
// ones.
constexpr int kLengthPoints = 12;
constexpr std::array<double, kLengthPoints> kLengthRanks = {
    0, .02, .1, .25, .4, .5, .6, .75, .9, .97, .995, 1};
struct PromptKind {
  double share;
  std::array<int, kLengthPoints> prompt;
  std::array<int, kLengthPoints> generated;
};
constexpr PromptKind kConvKinds[] = {
    {.068,
     {2, 9, 21, 91, 124, 161, 180, 181, 194, 197, 197, 197},
     {12, 12, 16, 119, 144, 161, 172, 198, 217, 246, 356, 1000}},
    {.050,
     {200, 200, 200, 203, 203, 206, 209, 212, 242, 245, 298, 299},
     {14, 14, 14, 162, 165, 179, 181, 202, 217, 217, 217, 223}},
    {.190,
     {302, 317, 373, 382, 391, 395, 398, 404, 417, 431, 437, 439},
     {18, 18, 57, 75, 86, 91, 94, 102, 126, 146, 175, 200}},
    {.067,
     {440, 444, 596, 862, 902, 923, 954, 973, 983, 987, 989, 989},
     {10, 30, 59, 92, 117, 378, 395, 410, 442, 554, 604, 739}},
    {.348,
     {990, 996, 1009, 1028, 1046, 1059, 1073, 1094, 1120, 1135, 1139, 1139},
     {33, 93, 379, 394, 398, 405, 412, 427, 477, 605, 835, 1000}},
    {.126,
     {1140, 1141, 1147, 1162, 1180, 1199, 1230, 1313, 1316, 1318, 1324, 1327},
     {36, 68, 142, 198, 380, 395, 402, 418, 465, 591, 909, 939}},
    {.051,
     {1333, 1339, 1353, 1474, 1669, 1814, 1917, 2110, 2237, 2367, 2388, 2396},
     {15, 40, 50, 66, 78, 86, 94, 112, 165, 232, 477, 519}},
    {.023,
     {2406, 2426, 2468, 2584, 2600, 2666, 2740, 2903, 3246, 3605, 3893, 4069},
     {27, 32, 46, 60, 77, 84, 99, 117, 150, 170, 300, 300}},
    {.077,
     {4070, 4073, 4075, 4078, 4083, 4085, 4088, 4093, 4122, 4649, 6472, 14050},
     {25, 28, 35, 41, 48, 52, 59, 71, 105, 164, 459, 665}},
};

constexpr double kConvRequestsPerSecond = 4.987;
// The rate drifts around its mean: one level a minute, each half remembering
// the one before, linear in between.
constexpr double kConvDriftSeconds = 60;
constexpr double kConvDriftSpread = 0.13;
constexpr double kConvDriftMemory = 0.5;
// Some requests draw another one shortly after (a retry, a second tab), which
// makes counts over a second vary a little more than a Poisson process's.
constexpr double kConvEchoShare = 0.05;
constexpr double kConvEchoMeanSeconds = 0.2;

int64_t ConvTokens(const std::array<int, kLengthPoints>& values, double rank) {
  std::array<Quantile, kLengthPoints> table;
  for (int i = 0; i < kLengthPoints; ++i) {
    table[i] = {kLengthRanks[i], static_cast<double>(values[i])};
  }
  return TokensAtRank(table, rank);
}

TraceRequest ConvRequest(double arrival_s, Random& random) {
  double rank = random.Uniform();
  const PromptKind* kind = std::begin(kConvKinds);
  while (rank >= kind->share && kind + 1 != std::end(kConvKinds)) {
    rank -= kind->share;
    ++kind;
  }
  const int64_t prompt = ConvTokens(kind->prompt, random.Uniform());
  const int64_t generated = ConvTokens(kind->generated, random.Uniform());
  return {ToMicroseconds(arrival_s), prompt, generated};
}

// ---- code -------------------------------------------------------------------

constexpr Quantile kCodePrompt[] = {
    {0, 6},     {.02, 36},   {.05, 72},  {.1, 146},   {.15, 237},  {.2, 387},
    {.3, 778},  {.4, 1056},  {.5, 1402}, {.6, 1884},  {.7, 2417},  {.75, 2715},
    {.8, 3219}, {.85, 3780}, {.9, 5008}, {.95, 6641}, {.96, 7408}, {1, 7437},
};
// Independent of the prompt's length.
constexpr Quantile kCodeGenerated[] = {
    {0, 6},     {.1, 7},    {.2, 8},     {.3, 9},     {.4, 11},
    {.5, 13},   {.6, 15},   {.7, 19},    {.75, 22},   {.8, 27},
    {.85, 37},  {.9, 55},   {.93, 69},   {.95, 88},   {.97, 128},
    {.98, 174}, {.99, 252}, {.995, 380}, {.998, 786}, {1, 1899},
};

// The service is silent, then busy, then silent again: seconds of each.
constexpr Quantile kCodeSilence[] = {
    {0, 1},     {.1, 1.5},  {.2, 2.3},  {.3, 2.6},  {.4, 2.9},
    {.5, 5.8},  {.6, 8.1},  {.7, 17.8}, {.8, 32.4}, {.85, 37.7},
    {.9, 81.3}, {.93, 112}, {.97, 143}, {1, 174},
};
constexpr Quantile kCodeBusy[] = {
    {0, 0},    {.1, .5},  {.2, 1},   {.3, 1.5},  {.4, 1.7}, {.5, 3.2},
    {.6, 6.3}, {.7, 9.5}, {.8, 9.9}, {.9, 21.8}, {.95, 28}, {1, 33.9},
};
// Requests per second while busy. Each second keeps the rate of the one before
// or, by chance, takes a new one.
constexpr Quantile kCodeBusyRate[] = {
    {0, 2},   {.1, 4},   {.2, 5},   {.3, 6},   {.4, 7},
    {.5, 8},  {.6, 10},  {.7, 12},  {.8, 15},  {.85, 19},
    {.9, 23}, {.94, 31}, {.97, 40}, {.99, 50}, {1, 64},
};
constexpr double kCodeNewRateShare = 0.22;
// Requests come in clusters (one keystroke asks for several completions) of
// this many, milliseconds apart, and often on the tick of a 10 Hz clock.
constexpr double kCodeClusterOfAtLeast[] = {1, .22, .075, .03, .014, .007};
constexpr double kCodeClusterMean = 1.346;  // the sum of the line above
constexpr Quantile kCodeClusterGap[] = {
    {0, 0},       {.1, .00006}, {.25, .00016}, {.5, .001},
    {.75, .0021}, {.9, .0036},  {1, .005},
};
constexpr double kCodeTickSeconds = 0.1;
constexpr double kCodeOnTickShare = 0.5;

// Appends the requests of one busy period.
void AppendBusyPeriod(double begin_s, double end_s, Random& random,
                      std::vector<TraceRequest>& requests) {
  const double tick_phase = random.Uniform() * kCodeTickSeconds;
  double rate = ValueAtRank(kCodeBusyRate, random.Uniform());
  for (double second = begin_s; second < end_s; second += 1) {
    if (random.Uniform() < kCodeNewRateShare) {
      rate = ValueAtRank(kCodeBusyRate, random.Uniform());
    }
    const double second_end = std::min(second + 1, end_s);
    double time = second;
    while (true) {
      time += random.Exponential(kCodeClusterMean / rate);
      if (time >= second_end) break;
      double arrival = time;
      if (random.Uniform() < kCodeOnTickShare) {
        const double tick = std::floor(arrival / kCodeTickSeconds);
        arrival = std::max(tick * kCodeTickSeconds + tick_phase, begin_s);
      }
      const double size_rank = random.Uniform();
      for (double at_least : kCodeClusterOfAtLeast) {
        if (size_rank >= at_least) break;
        const int64_t prompt = TokensAtRank(kCodePrompt, random.Uniform());
        const int64_t generated =
            TokensAtRank(kCodeGenerated, random.Uniform());
        requests.push_back({ToMicroseconds(arrival), prompt, generated});
        arrival += ValueAtRank(kCodeClusterGap, random.Uniform());
      }
    }
  }
}

}  // namespace

Trace MakeConvTrace(uint64_t seed, double length_s) {
  Random random(seed);
  std::vector<TraceRequest> requests;
  const double fresh_rate = kConvRequestsPerSecond / (1 + kConvEchoShare);
  const double fresh_spread =
      std::sqrt(1 - kConvDriftMemory * kConvDriftMemory);
  double level_before = random.NearNormal();
  for (double minute = 0; minute < length_s; minute += kConvDriftSeconds) {
    const double level_after =
        kConvDriftMemory * level_before + fresh_spread * random.NearNormal();
    const double minute_end = std::min(minute + kConvDriftSeconds, length_s);
    // Thinning: candidates come at the highest rate there can be.
    const double top = std::max(level_before, level_after);
    const double top_rate = fresh_rate * (1 + kConvDriftSpread * top);
    double time = minute;
    while (true) {
      time += random.Exponential(1 / top_rate);
      if (time >= minute_end) break;
      const double level = level_before + (level_after - level_before) *
                                              (time - minute) /
                                              kConvDriftSeconds;
      const double rate = fresh_rate * (1 + kConvDriftSpread * level);
      if (random.Uniform() * top_rate >= rate) continue;
      requests.push_back(ConvRequest(time, random));
      if (random.Uniform() < kConvEchoShare) {
        requests.push_back(ConvRequest(
            time + random.Exponential(kConvEchoMeanSeconds), random));
      }
    }
    level_before = level_after;
  }
  return Finish(std::move(requests), length_s);
}

Trace MakeCodeTrace(uint64_t seed, double length_s) {
  Random random(seed);
  std::vector<TraceRequest> requests;
  // The trace begins somewhere within a silence.
  double time = random.Uniform() * ValueAtRank(kCodeSilence, random.Uniform());
  while (time < length_s) {
    const double busy_end = time + ValueAtRank(kCodeBusy, random.Uniform());
    AppendBusyPeriod(time, std::min(busy_end, length_s), random, requests);
    time = busy_end + ValueAtRank(kCodeSilence, random.Uniform());
  }
  return Finish(std::move(requests), length_s);
}

absl::StatusOr<Trace> MakeBuiltinTrace(std::string_view name, uint64_t seed,
                                       double length_s) {
  if (!(length_s > 0 && length_s <= kMaxTraceSeconds)) {
    return absl::InvalidArgumentError(
        absl::StrCat("trace length must be above 0 and at most ",
                     kMaxTraceSeconds, " s: ", length_s));
  }
  if (name == "conv") return MakeConvTrace(seed, length_s);
  if (name == "code") return MakeCodeTrace(seed, length_s);
  return absl::NotFoundError(
      absl::StrCat("no such built-in trace, there are conv and code: ",
                   absl::string_view(name.data(), name.size())));
}

}  // namespace kvbroker::replay
