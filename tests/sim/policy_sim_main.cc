// policy_sim: tries the policy on traces, in virtual time.
//
//   policy_sim [conv=FILE code=FILE] [shift2=600] [tokens=auto] [window=1200]
//              [patience_ms=1000] [hold_off_ms=5000] [act=1|2] [log=1] [seed=17]
//
// Prints what a fixed split and the broker make of the same requests.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "client/replay/trace_generator.h"
#include "tests/sim/simulation.h"

namespace {

using kvbroker::Bytes;
using kvbroker::replay::Trace;
using kvbroker::testing::EngineResult;
using kvbroker::testing::SimulatedEngine;
using kvbroker::testing::SimulationOptions;

constexpr Bytes kTokenBytes = Bytes(256);

void Print(const char* how, const std::vector<EngineResult>& results) {
  for (const EngineResult& r : results) {
    std::printf("%-8s %-6s %6ld requests  wait mean %8.1f p99 %9.1f max %9.1f "
                "ms  preemptions %ld\n",
                how, r.name.c_str(), static_cast<long>(r.requests),
                r.wait_mean_ms, r.wait_p99_ms, r.wait_max_ms,
                static_cast<long>(r.preemptions));
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> args;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    size_t equals = word.find('=');
    if (equals == std::string::npos) {
      std::fprintf(stderr, "policy_sim: not NAME=VALUE: %s\n", argv[i]);
      return 2;
    }
    args[word.substr(0, equals)] = word.substr(equals + 1);
  }
  auto number = [&](const char* name, double fallback) {
    return args.contains(name) ? std::atof(args[name].c_str()) : fallback;
  };
  const double window = number("window", 1200);
  const uint64_t seed =
      static_cast<uint64_t>(number("seed", kvbroker::replay::kDefaultTraceSeed));
  auto origin = kvbroker::replay::ParseTimestamp("2023-11-16 18:15:46.68");
  auto load = [&](const std::string& name) {
    if (!args.contains(name)) {
      return *kvbroker::replay::MakeBuiltinTrace(name, seed);
    }
    auto trace = kvbroker::replay::ReadTraceFile(args[name], *origin);
    if (!trace.ok()) {
      std::fprintf(stderr, "%s\n", std::string(trace.status().message()).c_str());
      std::exit(1);
    }
    return *kvbroker::replay::WithLength(*trace, 1200);
  };
  Trace conv = load("conv"), code = load("code");
  SimulationOptions options;
  double tokens = number(
      "tokens", 2.4 * static_cast<double>(
                          MeasureTokensInFlight(conv, options.speed).p99));
  conv = Windowed(Shifted(conv, number("shift0", 0)), window);
  Trace code1 = Windowed(Shifted(code, number("shift1", 0)), window);
  Trace code2 = Windowed(Shifted(code, number("shift2", 600)), window);
  std::printf("capacity %.0f tokens\n", tokens);
  options.capacity = kTokenBytes * static_cast<int64_t>(tokens);
  options.until_s = number("until", window + 600);
  options.log = number("log", 0) != 0;
  options.policy.patience = absl::Milliseconds(number("patience_ms", 1000));
  options.policy.hold_off = absl::Milliseconds(number("hold_off_ms", 5000));
  const int act = static_cast<int>(number("act", 1));
  if (act == 1) {
    options.engines = {{.name = "conv", .trace = conv},
                       {.name = "code", .trace = code1},
                       {.name = "code2", .trace = code2}};
  } else {
    options.until_s = window + 30;
    options.engines = {
        {.name = "conv", .trace = conv, .min = Bytes(options.capacity.count() / 2)},
        {.name = "flood",
         .trace = *RateScaled(Shifted(conv, window / 2), 3, seed)}};
  }
  SimulationOptions fixed = options;
  for (SimulatedEngine& engine : fixed.engines) {
    engine.static_share = Bytes(options.capacity.count() /
                                static_cast<int64_t>(fixed.engines.size()));
  }
  Print("static", Simulate(fixed));
  Print("elastic", Simulate(options));
  return 0;
}
