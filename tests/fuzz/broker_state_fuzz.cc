// The broker's saved state. Input: whether the rest is a whole file or the body
// of one, to which a good first line is added; a body's versions; the text.
#include <string>

#include "broker/base/check.h"
#include "broker/state/broker_state.h"
#include "broker/state/state_envelope.h"
#include "tests/fuzz/fuzz_input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvbroker;
  testing::FuzzInput input(data, size);
  std::string text;
  if (input.Flip()) {
    StateEnvelope envelope;
    envelope.version = input.Byte();
    envelope.readable_by = input.Byte();
    envelope.body = input.TakeAll();
    text = Seal(envelope);
  } else {
    text = input.TakeAll();
  }
  const absl::StatusOr<BrokerState> state = ParseState(text);
  if (!state.ok()) {
    KVB_CHECK(absl::IsDataLoss(state.status()) ||
              absl::IsFailedPrecondition(state.status()) ||
              absl::IsInvalidArgument(state.status()));
    KVB_CHECK(!state.status().message().empty());
    return 0;
  }
  KVB_CHECK(CheckState(*state).ok());
  const absl::StatusOr<BrokerState> again = ParseState(FormatState(*state));
  KVB_CHECK(again.ok() && *again == *state);
  return 0;
}
