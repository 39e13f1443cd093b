// TokensInFlight: how much KV cache a trace asks for over time.
//
// A request in flight counts with all tokens that it will ever have, prompt and
// generated, from its arrival until it would end if it never waited.
#ifndef KVBROKER_CLIENT_REPLAY_TOKENS_IN_FLIGHT_H_
#define KVBROKER_CLIENT_REPLAY_TOKENS_IN_FLIGHT_H_

#include <cstdint>

#include "client/replay/trace.h"

namespace kvbroker::replay {

// How fast the imagined GPU is, the same for each request however many run.
struct EngineSpeed {
  double prefill_tokens_per_s = 20'000;
  double decode_tokens_per_s = 30;
};

struct TokensInFlight {
  double mean = 0;
  int64_t p99 = 0;
  int64_t peak = 0;
};

// Sampled every 100 ms over the trace's length. What is in flight at the end
// does not wrap to the start.
TokensInFlight MeasureTokensInFlight(const Trace& trace,
                                     const EngineSpeed& speed);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_TOKENS_IN_FLIGHT_H_
