// Request traces. Input: a CSV file.
#include <cmath>

#include "broker/base/check.h"
#include "client/replay/trace.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvbroker::replay {
namespace {

void CheckTrace(const Trace& trace) {
  KVB_CHECK(std::isfinite(trace.length_s) && trace.length_s >= 0);
  double last = 0;
  for (const TraceRequest& request : trace.requests) {
    KVB_CHECK(request.arrival_s >= last && request.arrival_s < trace.length_s);
    KVB_CHECK(request.prompt_tokens >= 1 &&
              request.prompt_tokens <= kMaxTokens);
    KVB_CHECK(request.generated_tokens >= 0 &&
              request.generated_tokens <= kMaxTokens);
    last = request.arrival_s;
  }
}

void Run(testing::FuzzInput input) {
  const absl::StatusOr<Trace> trace = ParseTrace(input.TakeAll(), "fuzz");
  if (!trace.ok()) {
    KVB_CHECK(!trace.status().message().empty());
    return;
  }
  CheckTrace(*trace);
  for (double shift : {0.5, -0.5, trace->length_s, 1e9, -1e9}) {
    const Trace shifted = Shifted(*trace, shift);
    CheckTrace(shifted);
    KVB_CHECK(shifted.requests.size() == trace->requests.size());
  }
  CheckTrace(Windowed(*trace, trace->length_s / 2));
  const absl::StatusOr<Trace> scaled = RateScaled(*trace, 1.5, 1);
  if (scaled.ok()) CheckTrace(*scaled);
}

}  // namespace
}  // namespace kvbroker::replay

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvbroker::replay::Run(kvbroker::testing::FuzzInput(data, size));
  return 0;
}
