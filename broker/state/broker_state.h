// BrokerState: what the next broker of a device has to know of the one before.
//
//   std::string text = FormatState(state);
//   ASSIGN_OR_RETURN(BrokerState state, ParseState(text));
//
// A text that people can read, one entry a line. The pages themselves are not
// in it: each engine says which ones it holds when it comes back.
#ifndef KVBROKER_BROKER_STATE_BROKER_STATE_H_
#define KVBROKER_BROKER_STATE_BROKER_STATE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"

namespace kvbroker {

// What this broker writes, and the oldest broker that reads it: see
// state_envelope.h.
inline constexpr uint32_t kStateVersion = 1;
inline constexpr uint32_t kStateReadableBy = 1;

inline constexpr size_t kMaxSavedLimits = 4096;
inline constexpr size_t kMaxSavedSessions = 65536;

// An instance's limits as an operator set them. At most one for each tenant and
// name.
struct SavedLimits {
  std::string tenant;
  std::string name;
  Bytes min, max;  // 0 <= min <= max <= kMaxBytes
  double weight = 1;
  uint64_t revision = 1;
  // Since when it has had no process, by the wall clock; infinite: it has one.
  absl::Time unused_since = absl::InfiniteFuture();

  friend bool operator==(const SavedLimits&, const SavedLimits&) = default;
};

// An engine that was connected, and by what its process is known again
// (transport/peer_identity.h says what the last three are; 0: not known).
struct SavedSession {
  std::string tenant;
  std::string instance;
  std::string member;
  uint32_t rank = 0;
  uint32_t pid = 0;
  uint64_t start_time = 0;
  uint64_t process_inode = 0;

  friend bool operator==(const SavedSession&, const SavedSession&) = default;
};

struct BrokerState {
  uint64_t incarnation = 0;
  std::vector<SavedLimits> limits;
  std::vector<SavedSession> sessions;

  friend bool operator==(const BrokerState&, const BrokerState&) = default;
};

// INVALID_ARGUMENT, naming the field, unless ParseState would take it.
absl::Status CheckState(const BrokerState& state);

// REQUIRES: CheckState(state).ok().
std::string FormatState(const BrokerState& state);

// DATA_LOSS: torn or damaged. FAILED_PRECONDITION: of a version that this
// broker cannot read; says what to do. INVALID_ARGUMENT: whole, but a field is
// missing or out of range; names it. Fields of newer versions are ignored.
absl::StatusOr<BrokerState> ParseState(std::string_view text);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_STATE_BROKER_STATE_H_
