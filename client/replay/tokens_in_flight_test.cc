#include "client/replay/tokens_in_flight.h"

#include "client/replay/recorded_traces.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

constexpr EngineSpeed kSpeed = {.prefill_tokens_per_s = 100,
                                .decode_tokens_per_s = 10};

TEST(TokensInFlightTest, CountsAllTokensFromArrivalToEnd) {
  // 2 s of prefill and 1 s of decode: 210 tokens for 3 of 10 s.
  const Trace trace = {.requests = {{1, 200, 10}}, .length_s = 10};
  const TokensInFlight tokens = MeasureTokensInFlight(trace, kSpeed);
  EXPECT_DOUBLE_EQ(tokens.mean, 63);
  EXPECT_EQ(tokens.p99, 210);
  EXPECT_EQ(tokens.peak, 210);
}

TEST(TokensInFlightTest, AddsUpRequests) {
  const Trace trace = {.requests = {{0, 100, 0}, {0.5, 100, 0}, {99, 50, 10}},
                       .length_s = 100};
  EXPECT_EQ(MeasureTokensInFlight(trace, kSpeed).peak, 200);
}

TEST(TokensInFlightTest, RareLoadShowsInThePeakOnly) {
  const Trace trace = {.requests = {{10, 50, 0}}, .length_s = 100};
  const TokensInFlight tokens = MeasureTokensInFlight(trace, kSpeed);
  EXPECT_EQ(tokens.p99, 0);
  EXPECT_EQ(tokens.peak, 50);
}

TEST(TokensInFlightTest, NoRequestsNoTokens) {
  EXPECT_EQ(MeasureTokensInFlight({.length_s = 10}, kSpeed).peak, 0);
  EXPECT_EQ(MeasureTokensInFlight({}, kSpeed).peak, 0);
}

TEST(TokensInFlightTest, LongestRequestsStayWithinTheTrace) {
  const Trace trace = {.requests = {{0, kMaxTokens, kMaxTokens}},
                       .length_s = 0.05};
  EXPECT_EQ(MeasureTokensInFlight(trace, kSpeed).peak, 2 * kMaxTokens);
}

TEST(TokensInFlightTest, RecordedTraces) {
  const std::optional<RecordedTraces> traces = LoadRecordedTraces();
  if (!traces.has_value()) GTEST_SKIP() << kNoRecordedTraces;
  const TokensInFlight conv = MeasureTokensInFlight(traces->conv, {});
  EXPECT_NEAR(conv.mean, 60'370, 10);
  EXPECT_EQ(conv.p99, 92'279);
  EXPECT_EQ(conv.peak, 107'444);
  const TokensInFlight code = MeasureTokensInFlight(traces->code, {});
  EXPECT_NEAR(static_cast<double>(code.p99), 66'500, 1'000);
  EXPECT_NEAR(static_cast<double>(code.peak), 153'500, 1'000);
}

}  // namespace
}  // namespace kvbroker::replay
