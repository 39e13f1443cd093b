// StateEnvelope: the line before a saved state's body, which tells a whole file
// from a torn one, and a broker whether it can read the body.
//
//   kvbroker-state version=1 readable_by=1 body_bytes=134 crc32=0c2d98a6
//
// This line never changes its form, whatever becomes of the body. The checksum
// is of all that stands before it in the line, and of the body.
#ifndef KVBROKER_BROKER_STATE_STATE_ENVELOPE_H_
#define KVBROKER_BROKER_STATE_STATE_ENVELOPE_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace kvbroker {

struct StateEnvelope {
  uint32_t version = 0;  // of the broker's format that wrote it
  // The oldest version whose reader understands it: a field that may be ignored
  // raises `version` alone, one that may not raises both.
  uint32_t readable_by = 0;
  std::string_view body;
};

std::string Seal(const StateEnvelope& envelope);

// DATA_LOSS unless `text` is exactly what Seal made. The body lies in `text`.
absl::StatusOr<StateEnvelope> Unseal(std::string_view text);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_STATE_STATE_ENVELOPE_H_
