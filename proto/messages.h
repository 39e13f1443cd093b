// The session's messages as plain structs with typed fields: what the core and
// the client library speak. proto/kvbroker/v1/session.proto is the same on the
// wire and says what each field means; proto/convert.h goes between the two and
// rejects what does not fit (unknown enum values, oversize lists).
#ifndef KVBROKER_PROTO_MESSAGES_H_
#define KVBROKER_PROTO_MESSAGES_H_

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/ids.h"

namespace kvbroker {

inline constexpr uint32_t kProtocolVersion = 1;
// Bits of Open.feature_bits and Opened.feature_bits.
inline constexpr uint64_t kFeatureResume = 1;
inline constexpr uint64_t kFeatureMakeRoom = 2;
// The client maps a slab (Opened.slab).
inline constexpr uint64_t kFeatureSlab = 4;
inline constexpr uint64_t kFeatures =
    kFeatureResume | kFeatureMakeRoom | kFeatureSlab;
// A Reclaim with this target lifts the order in force.
inline constexpr PageCount kHoldAny = 0xffffffff;

enum class Layout { kContiguous = 1, kPerLayer = 2 };
enum class Tier { kIdle = 1, kCached = 2, kClosing = 3, kPreempt = 4 };
enum class Role { kEngine = 1, kWorker = 2 };
// Where another live process of the tenant has the name.
enum class NameConflict { kJoin = 0, kSuffix = 1, kError = 2 };
enum class Urgency { kSpeculative = 1, kWaiting = 2, kRunning = 3 };

struct PageName {
  PageIndex index;
  Generation generation;
  friend auto operator<=>(const PageName&, const PageName&) = default;
};

struct PoolGeometry {
  Bytes handle_bytes;
  uint32_t handles_per_page = 1;
  Layout layout = Layout::kContiguous;
  uint32_t max_pages = 0;
  std::string label;

  Bytes page_bytes() const { return handle_bytes * handles_per_page; }
};

struct Holder {
  std::string instance;
  Bytes held, idle, cached, share;
};

using Nonce = std::array<uint8_t, 16>;

// ---- engine to broker ----

// The session that a new one goes on from.
struct Resuming {
  uint64_t incarnation = 0;
  SessionId session;
};

struct Open {
  uint32_t protocol_version = kProtocolVersion;
  uint64_t feature_bits = kFeatures;
  Nonce nonce{};
  std::string instance;
  std::string member;
  Role role = Role::kEngine;
  uint32_t rank = 0;
  std::vector<PoolGeometry> pools;
  Bytes declared_peak;
  std::optional<Bytes> min;
  std::optional<Bytes> max;
  std::optional<double> max_fraction;
  std::optional<double> weight;
  std::map<std::string, std::string> labels;
  std::optional<Resuming> resuming;
  NameConflict name_conflict = NameConflict::kJoin;
  std::optional<double> min_fraction;
};

struct Resume {
  PoolId pool;
  std::vector<PageName> pages;
  bool last = false;
};

struct Acquire {
  Sequence sequence;
  Sequence acked;
  PoolId pool;
  PageCount want = 0;
  PageCount at_least = 0;
  std::vector<PageIndex> indexes;
  Urgency urgency = Urgency::kWaiting;
  absl::Duration deadline;
  Sequence replaces;
  bool credit = false;
};

struct Cancel {
  Sequence sequence;
};

struct Mapped {
  GrantId grant;
  std::vector<PageName> failed;
};

struct Return {
  PoolId pool;
  std::vector<PageName> pages;
};

struct ReclaimAnswer {
  PoolId pool;
  Revision revision;
  std::vector<PageName> given;
  PageCount kept = 0;
  std::string reason;
  bool final = false;
};

struct Report {
  PoolId pool;
  PageCount in_use = 0;
  PageCount cached = 0;
  PageCount idle = 0;
  PageCount settled = 0;
  absl::Duration oldest_idle;
  Revision revision;
};

struct Resend {
  Sequence sequence;
};

struct LimitAck {
  uint64_t revision = 0;
};

struct MakeRoom {
  Sequence sequence;
  Bytes declared_peak;
  absl::Duration deadline;
};

using ClientMessage =
    std::variant<Open, Acquire, Cancel, Mapped, Return, ReclaimAnswer, Report,
                 Resend, LimitAck, Resume, MakeRoom>;

// ---- broker to engine ----

struct Opened {
  uint32_t protocol_version = kProtocolVersion;
  uint64_t feature_bits = 0;
  uint64_t incarnation = 0;
  SessionId session;
  std::string instance;
  std::string backend;
  std::vector<PoolId> pools;
  Bytes min, max;
  uint64_t limit_revision = 0;
  Bytes capacity;
  // With fixed addresses: the slab that all pages lie in (proto/slab_frame.h).
  // The broker chooses the indexes of pages then.
  std::string slab;
  // Other live processes of the instance; 0 for one that the broker cannot see.
  std::vector<uint32_t> joined_pids;
};

struct Granted {
  Sequence sequence;
  GrantId grant;
  PoolId pool;
  std::vector<PageName> pages;
  PageCount credit = 0;
  absl::Duration credit_for;
};

struct Refused {
  Sequence sequence;
  absl::StatusCode code = absl::StatusCode::kUnavailable;
  std::string reason;
  std::vector<Holder> holders;
};

struct Reclaim {
  PoolId pool;
  Revision revision;
  PageCount hold_at_most = kHoldAny;
  Tier tier = Tier::kIdle;
  absl::Duration deadline;
};

struct LimitChanged {
  uint64_t revision = 0;
  Bytes min, max;
};

struct Fenced {
  std::string reason;
};

struct RoomMade {
  Sequence sequence;
};

using BrokerMessage = std::variant<Opened, Granted, Refused, Reclaim,
                                   LimitChanged, Fenced, RoomMade>;

}  // namespace kvbroker

#endif  // KVBROKER_PROTO_MESSAGES_H_
