#include "client/replay/tokens_in_flight.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvbroker::replay {
namespace {

constexpr double kSamplesPerSecond = 10;

}  // namespace

TokensInFlight MeasureTokensInFlight(const Trace& trace,
                                     const EngineSpeed& speed) {
  const auto samples =
      static_cast<int64_t>(std::ceil(trace.length_s * kSamplesPerSecond));
  if (samples <= 0) return {};
  // At first what each sample adds to the one before it, then the sums.
  std::vector<int64_t> tokens(samples + 1);
  const auto first_sample_at_or_after = [samples](double time_s) {
    return static_cast<int64_t>(std::min<double>(
        std::ceil(time_s * kSamplesPerSecond), static_cast<double>(samples)));
  };
  for (const TraceRequest& request : trace.requests) {
    const double end_s = request.arrival_s +
                         request.prompt_tokens / speed.prefill_tokens_per_s +
                         request.generated_tokens / speed.decode_tokens_per_s;
    const int64_t held = request.prompt_tokens + request.generated_tokens;
    tokens[first_sample_at_or_after(request.arrival_s)] += held;
    tokens[first_sample_at_or_after(end_s)] -= held;
  }
  tokens.pop_back();
  double sum = 0;
  int64_t running = 0;
  for (int64_t& sample : tokens) {
    running += sample;
    sample = running;
    sum += static_cast<double>(running);
  }
  const auto p99 = tokens.begin() + samples * 99 / 100;
  std::nth_element(tokens.begin(), p99, tokens.end());
  return {.mean = sum / static_cast<double>(samples),
          .p99 = *p99,
          .peak = *std::max_element(p99, tokens.end())};
}

}  // namespace kvbroker::replay
