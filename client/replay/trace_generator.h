// Made-up traces that behave like two production LLM services.
//
// `conv` is a chat service: steady arrivals whose rate drifts by a tenth over
// minutes, prompts of about 1,150 tokens, answers of about 250. `code` is a
// code completion service: silence for up to three minutes, then bursts of up
// to about sixty requests a second, prompts of about 2,000 tokens, answers of
// about 28.
//
// The models were fitted to the first 20 minutes of the public "Azure LLM
// inference trace 2023" (Patel et al., "Splitwise", ISCA 2024); no row of it is
// in here. Fitted were: mean rate; the coefficient of variation and quantiles
// of the gaps between arrivals; the dispersion of counts over 0.1, 1, 10 and 60
// s; lengths of bursts and silences; the distributions of both token counts and
// how they hang together. Tokens in flight (mean, p99, peak) were not fitted
// and agree. trace_generator_test.cc compares where the real files are at hand.
//
// kDefaultTraceSeed is the one of the first 300 whose two traces come nearest
// to the recorded ones over 20 minutes in number of requests, tokens in flight
// (mean, p99, peak), dispersion of counts, and what requests wait when each
// service has a fixed third of 2.4 times conv's p99 of tokens in flight. Other
// seeds scatter around it, `conv` by a tenth, `code` by a factor of two, as
// 20-minute pieces of one bursty day do; on about four of five seeds that fixed
// third hurts both services (p99 wait above half a second).
#ifndef KVBROKER_CLIENT_REPLAY_TRACE_GENERATOR_H_
#define KVBROKER_CLIENT_REPLAY_TRACE_GENERATOR_H_

#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"
#include "client/replay/trace.h"

namespace kvbroker::replay {

inline constexpr uint64_t kDefaultTraceSeed = 17;
inline constexpr double kDefaultTraceSeconds = 1200;

// The same trace for the same arguments on every machine. REQUIRES: 0 <
// length_s <= kMaxTraceSeconds (checked by MakeBuiltinTrace).
Trace MakeConvTrace(uint64_t seed, double length_s = kDefaultTraceSeconds);
Trace MakeCodeTrace(uint64_t seed, double length_s = kDefaultTraceSeconds);

// By name: "conv" or "code"; any other is an error that lists these.
absl::StatusOr<Trace> MakeBuiltinTrace(std::string_view name, uint64_t seed,
                                       double length_s = kDefaultTraceSeconds);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_TRACE_GENERATOR_H_
