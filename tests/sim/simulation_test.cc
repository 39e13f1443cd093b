// What the product is for, shown on the real policy, core and client library in
// virtual time: the same result on any machine.
#include "tests/sim/simulation.h"

#include <algorithm>

#include "client/replay/trace_generator.h"
#include "gtest/gtest.h"

namespace kvbroker::testing {
namespace {

using replay::Trace;

constexpr Bytes kTokenBytes = Bytes(256);
// Half of the built-in traces, which holds the bursts that a fixed split fails.
constexpr double kWindow = 600;

struct Traces {
  Trace conv, code, code2;
  Bytes capacity;
};

Traces BuiltinTraces() {
  Traces traces;
  Trace conv = replay::MakeConvTrace(replay::kDefaultTraceSeed);
  Trace code = replay::MakeCodeTrace(replay::kDefaultTraceSeed);
  traces.capacity =
      kTokenBytes * static_cast<int64_t>(
                        2.4 * replay::MeasureTokensInFlight(conv, {}).p99);
  traces.conv = Windowed(conv, kWindow);
  traces.code = Windowed(code, kWindow);
  traces.code2 = Windowed(Shifted(code, 600), kWindow);
  return traces;
}

SimulationOptions FixedSplitOf(SimulationOptions options) {
  for (SimulatedEngine& engine : options.engines) {
    engine.static_share =
        Bytes(options.capacity.count() /
              static_cast<int64_t>(options.engines.size()));
  }
  return options;
}

TEST(SimulationTest, LendingServesTheBurstsThatAFixedSplitMakesWait) {
  Traces traces = BuiltinTraces();
  SimulationOptions options;
  options.capacity = traces.capacity;
  options.until_s = kWindow + 300;
  options.engines = {{.name = "conv", .trace = traces.conv},
                     {.name = "code", .trace = traces.code},
                     {.name = "code2", .trace = traces.code2}};
  std::vector<EngineResult> fixed = Simulate(FixedSplitOf(options));
  std::vector<EngineResult> elastic = Simulate(options);
  ASSERT_EQ(fixed.size(), elastic.size());
  bool split_hurts = false;
  for (size_t i = 0; i < fixed.size(); ++i) {
    SCOPED_TRACE(fixed[i].name);
    EXPECT_EQ(elastic[i].requests, fixed[i].requests);
    if (fixed[i].wait_p99_ms > 500) {
      split_hurts = true;
      EXPECT_LE(elastic[i].wait_p99_ms, fixed[i].wait_p99_ms / 2);
    }
    EXPECT_LE(elastic[i].wait_p99_ms,
              std::max(1.1 * fixed[i].wait_p99_ms, 50.0));
  }
  EXPECT_TRUE(split_hurts) << "these traces show nothing";
}

TEST(SimulationTest, AGuaranteedEngineDoesNotFeelAnOverloadedNeighbour) {
  Traces traces = BuiltinTraces();
  SimulationOptions options;
  options.capacity = traces.capacity;
  options.until_s = kWindow + 30;
  options.engines = {
      {.name = "conv",
       .trace = traces.conv,
       .min = Bytes(traces.capacity.count() / 2)},
      {.name = "flood",
       .trace = *RateScaled(Shifted(traces.conv, kWindow / 2), 3, 1)}};
  std::vector<EngineResult> fixed = Simulate(FixedSplitOf(options));
  std::vector<EngineResult> elastic = Simulate(options);
  EXPECT_LE(elastic[0].wait_p99_ms, fixed[0].wait_p99_ms + 100);
  // Nor does the neighbour pay for it: what conv leaves is its.
  EXPECT_GT(elastic[1].requests, fixed[1].requests);
}

TEST(SimulationTest, TheSameInputGivesTheSameResult) {
  Traces traces = BuiltinTraces();
  SimulationOptions options;
  options.capacity = Bytes(traces.capacity.count() / 2);
  options.until_s = 120;
  options.engines = {{.name = "conv", .trace = Windowed(traces.conv, 60)},
                     {.name = "code", .trace = Windowed(traces.code, 60)}};
  std::vector<EngineResult> first = Simulate(options);
  std::vector<EngineResult> second = Simulate(options);
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(first[i].wait_mean_ms, second[i].wait_mean_ms);
    EXPECT_EQ(first[i].preemptions, second[i].preemptions);
  }
}

}  // namespace
}  // namespace kvbroker::testing
