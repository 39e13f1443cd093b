#include "client/replay/trace_generator.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "absl/strings/match.h"
#include "client/replay/recorded_traces.h"
#include "client/replay/tokens_in_flight.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

uint64_t Fingerprint(const Trace& trace) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&hash](int64_t value) {
    hash = (hash ^ static_cast<uint64_t>(value)) * 0x100000001b3;
  };
  for (const TraceRequest& request : trace.requests) {
    add(std::llround(request.arrival_s * 1e6));
    add(request.prompt_tokens);
    add(request.generated_tokens);
  }
  return hash;
}

TEST(TraceGeneratorTest, SameTraceOnEveryMachine) {
  EXPECT_EQ(Fingerprint(MakeConvTrace(1)), 2980426509728523918u);
  EXPECT_EQ(Fingerprint(MakeCodeTrace(1)), 3404449901476320151u);
}

TEST(TraceGeneratorTest, SeedsDiffer) {
  EXPECT_NE(Fingerprint(MakeConvTrace(1)), Fingerprint(MakeConvTrace(2)));
  EXPECT_NE(Fingerprint(MakeCodeTrace(1)), Fingerprint(MakeCodeTrace(2)));
}

TEST(TraceGeneratorTest, KeepsATracesInvariants) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    for (const double length_s : {0.5, 90.0, 1200.0}) {
      for (const Trace& trace :
           {MakeConvTrace(seed, length_s), MakeCodeTrace(seed, length_s)}) {
        EXPECT_EQ(trace.length_s, length_s);
        double before = 0;
        for (const TraceRequest& request : trace.requests) {
          ASSERT_GE(request.arrival_s, before);
          ASSERT_LT(request.arrival_s, length_s);
          ASSERT_GE(request.prompt_tokens, 1);
          ASSERT_GE(request.generated_tokens, 1);
          before = request.arrival_s;
        }
      }
    }
  }
}

TEST(TraceGeneratorTest, GoesByName) {
  EXPECT_EQ(Fingerprint(*MakeBuiltinTrace("code", 3)),
            Fingerprint(MakeCodeTrace(3)));
  const auto unknown = MakeBuiltinTrace("chat", 3);
  ASSERT_FALSE(unknown.ok());
  EXPECT_TRUE(absl::StrContains(unknown.status().message(), "conv and code"));
  EXPECT_FALSE(MakeBuiltinTrace("code", 3, 0).ok());
  EXPECT_FALSE(MakeBuiltinTrace("code", 3, 1e300).ok());
}

// ---- Against the recorded traces --------------------------------------------

// What a service asks of a scheduler, in figures.
struct Character {
  double rate = 0;              // requests per second
  double gap_variation = 0;     // standard deviation of gaps / their mean
  double dispersion_100ms = 0;  // variance of counts / their mean
  double dispersion_1s = 0;
  double dispersion_10s = 0;
  double dispersion_60s = 0;
  double most_in_1s = 0;
  double longest_gap_s = 0;
  double mean_prompt = 0;
  double mean_generated = 0;
  double tokens_mean = 0;  // in flight
  double tokens_p99 = 0;
  double tokens_peak = 0;
};

// Each figure of `Character`, by name.
constexpr struct {
  const char* name;
  double Character::*figure;
} kFigures[] = {
    {"rate", &Character::rate},
    {"gap_variation", &Character::gap_variation},
    {"dispersion_100ms", &Character::dispersion_100ms},
    {"dispersion_1s", &Character::dispersion_1s},
    {"dispersion_10s", &Character::dispersion_10s},
    {"dispersion_60s", &Character::dispersion_60s},
    {"most_in_1s", &Character::most_in_1s},
    {"longest_gap_s", &Character::longest_gap_s},
    {"mean_prompt", &Character::mean_prompt},
    {"mean_generated", &Character::mean_generated},
    {"tokens_mean", &Character::tokens_mean},
    {"tokens_p99", &Character::tokens_p99},
    {"tokens_peak", &Character::tokens_peak},
};

std::vector<double> CountsPer(const Trace& trace, double span_s) {
  std::vector<double> counts(
      static_cast<size_t>(std::llround(trace.length_s / span_s)));
  for (const TraceRequest& request : trace.requests) {
    const auto index = static_cast<size_t>(request.arrival_s / span_s);
    if (index < counts.size()) ++counts[index];
  }
  return counts;
}

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

double Variance(const std::vector<double>& values) {
  const double mean = Mean(values);
  double sum = 0;
  for (double value : values) sum += (value - mean) * (value - mean);
  return sum / static_cast<double>(values.size());
}

double Dispersion(const std::vector<double>& counts) {
  return Variance(counts) / Mean(counts);
}

std::vector<double> Gaps(const Trace& trace) {
  std::vector<double> gaps;
  for (size_t i = 1; i < trace.requests.size(); ++i) {
    gaps.push_back(trace.requests[i].arrival_s -
                   trace.requests[i - 1].arrival_s);
  }
  return gaps;
}

std::vector<double> PromptTokens(const Trace& trace) {
  std::vector<double> tokens;
  for (const TraceRequest& r : trace.requests) {
    tokens.push_back(static_cast<double>(r.prompt_tokens));
  }
  return tokens;
}

std::vector<double> GeneratedTokens(const Trace& trace) {
  std::vector<double> tokens;
  for (const TraceRequest& r : trace.requests) {
    tokens.push_back(static_cast<double>(r.generated_tokens));
  }
  return tokens;
}

Character CharacterOf(const Trace& trace) {
  const std::vector<double> gaps = Gaps(trace);
  const std::vector<double> per_second = CountsPer(trace, 1);
  const TokensInFlight tokens = MeasureTokensInFlight(trace, {});
  return {
      .rate = static_cast<double>(trace.requests.size()) / trace.length_s,
      .gap_variation = std::sqrt(Variance(gaps)) / Mean(gaps),
      .dispersion_100ms = Dispersion(CountsPer(trace, 0.1)),
      .dispersion_1s = Dispersion(per_second),
      .dispersion_10s = Dispersion(CountsPer(trace, 10)),
      .dispersion_60s = Dispersion(CountsPer(trace, 60)),
      .most_in_1s = *std::max_element(per_second.begin(), per_second.end()),
      .longest_gap_s = *std::max_element(gaps.begin(), gaps.end()),
      .mean_prompt = Mean(PromptTokens(trace)),
      .mean_generated = Mean(GeneratedTokens(trace)),
      .tokens_mean = tokens.mean,
      .tokens_p99 = static_cast<double>(tokens.p99),
      .tokens_peak = static_cast<double>(tokens.peak),
  };
}

// Kolmogorov and Smirnov's distance: the largest difference between the shares
// of both samples that lie at or below a value.
double Distance(std::vector<double> a, std::vector<double> b) {
  std::sort(a.begin(), a.end());
  std::sort(b.begin(), b.end());
  double largest = 0;
  size_t i = 0, j = 0;
  while (i < a.size() && j < b.size()) {
    const double value = std::min(a[i], b[j]);
    while (i < a.size() && a[i] <= value) ++i;
    while (j < b.size() && b[j] <= value) ++j;
    largest = std::max(largest, std::abs(static_cast<double>(i) / a.size() -
                                         static_cast<double>(j) / b.size()));
  }
  return largest;
}

constexpr int kSeeds = 40;

using Generator = Trace (*)(uint64_t seed, double length_s);

// Each figure's mean over many seeds lies within `tolerance` of the recorded
// one (a fraction of it), but for the figure named last.
void ExpectAlikeOnAverage(const Trace& recorded, Generator generate,
                          double tolerance,
                          double Character::*left_out = nullptr) {
  const Character wanted = CharacterOf(recorded);
  Character mean;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Character one = CharacterOf(generate(seed, kDefaultTraceSeconds));
    for (const auto& [name, figure] : kFigures) {
      mean.*figure += one.*figure / kSeeds;
    }
  }
  for (const auto& [name, figure] : kFigures) {
    if (figure == left_out) continue;
    EXPECT_NEAR(mean.*figure / (wanted.*figure), 1, tolerance)
        << name << ": generated " << mean.*figure << ", recorded "
        << wanted.*figure;
  }
}

// Both distributions of lengths, and that of gaps, are near the recorded ones.
void ExpectAlikeDistributions(const Trace& recorded, Generator generate,
                              double gap_distance) {
  Trace generated;
  std::vector<double> gaps;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Trace one = generate(seed, kDefaultTraceSeconds);
    generated.requests.insert(generated.requests.end(), one.requests.begin(),
                              one.requests.end());
    const std::vector<double> one_gaps = Gaps(one);
    gaps.insert(gaps.end(), one_gaps.begin(), one_gaps.end());
  }
  EXPECT_LT(Distance(PromptTokens(recorded), PromptTokens(generated)), 0.03);
  // Half of code's answers have one of ten lengths, so a step to the next
  // shows.
  EXPECT_LT(Distance(GeneratedTokens(recorded), GeneratedTokens(generated)),
            0.06);
  EXPECT_LT(Distance(Gaps(recorded), gaps), gap_distance);
}

class RecordedTest : public testing::Test {
 protected:
  void SetUp() override {
    traces_ = LoadRecordedTraces();
    if (!traces_.has_value()) GTEST_SKIP() << kNoRecordedTraces;
  }
  std::optional<RecordedTraces> traces_;
};

TEST_F(RecordedTest, ConvIsAlikeOnAverage) {
  // The recording's two longest gaps are its first ones: the service had just
  // started. The generator knows no such beginning.
  ExpectAlikeOnAverage(traces_->conv, MakeConvTrace, 0.25,
                       &Character::longest_gap_s);
}

TEST_F(RecordedTest, ConvDistributionsAreAlike) {
  ExpectAlikeDistributions(traces_->conv, MakeConvTrace, 0.03);
}

TEST_F(RecordedTest, CodeIsAlikeOnAverage) {
  ExpectAlikeOnAverage(traces_->code, MakeCodeTrace, 0.3);
}

TEST_F(RecordedTest, CodeDistributionsAreAlike) {
  ExpectAlikeDistributions(traces_->code, MakeCodeTrace, 0.12);
}

TEST_F(RecordedTest, DefaultSeedIsTypical) {
  for (const auto& [recorded, generated] :
       {std::pair(traces_->conv, MakeConvTrace(kDefaultTraceSeed)),
        std::pair(traces_->code, MakeCodeTrace(kDefaultTraceSeed))}) {
    const Character wanted = CharacterOf(recorded);
    const Character got = CharacterOf(generated);
    for (double Character::*figure :
         {&Character::rate, &Character::dispersion_10s,
          &Character::dispersion_60s, &Character::tokens_mean,
          &Character::tokens_p99, &Character::tokens_peak}) {
      EXPECT_NEAR(got.*figure / (wanted.*figure), 1, 0.3)
          << got.*figure << " against " << wanted.*figure;
    }
  }
}

}  // namespace
}  // namespace kvbroker::replay
