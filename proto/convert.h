// Convert: between the session's plain structs (messages.h) and protobuf.
//
//   stream->Write(ToWire(message));
//   ASSIGN_OR_RETURN(ClientMessage message, FromWire(wire));
//
// To the wire nothing can fail. From the wire everything is hostile input: a
// message without a kind, an unknown enum value, a list or string longer than
// below, a byte count beyond kMaxBytes or a number that is none is
// InvalidArgument, naming the field, what is allowed and what was there.
// Whether ids, indexes and names mean anything is the core's to check.
#ifndef KVBROKER_PROTO_CONVERT_H_
#define KVBROKER_PROTO_CONVERT_H_

#include "absl/status/statusor.h"
#include "proto/messages.h"

namespace kvbroker {

namespace v1 {
class BrokerMessage;
class ClientMessage;
}  // namespace v1

// What a message may hold at most.
inline constexpr int kMaxPools = 64;
inline constexpr int kMaxPagesPerMessage = 65536;
inline constexpr uint32_t kMaxHandlesPerPage = 65536;
// Slots of one pool's address range.
inline constexpr uint32_t kMaxPagesPerPool = 1 << 20;
inline constexpr int kMaxHolders = 64;
inline constexpr int kMaxLabels = 32;
inline constexpr size_t kMaxLabelKeyLength = 63;
inline constexpr size_t kMaxLabelValueLength = 255;
inline constexpr size_t kMaxNameLength = 128;
inline constexpr size_t kMaxSlabSize = 1024;
inline constexpr size_t kMaxJoinedPids = 64;
inline constexpr size_t kMaxReasonLength = 4096;
inline constexpr double kMaxWeight = 1e6;
inline constexpr absl::Duration kMaxDeadline = absl::Minutes(10);

// Durations become milliseconds, rounded up; what is longer than its field
// allows becomes the most that it allows. Too long a reason is cut.
void ToWire(const ClientMessage& message, v1::ClientMessage* wire);
void ToWire(const BrokerMessage& message, v1::BrokerMessage* wire);

absl::StatusOr<ClientMessage> FromWire(const v1::ClientMessage& wire);
absl::StatusOr<BrokerMessage> FromWire(const v1::BrokerMessage& wire);

}  // namespace kvbroker

#endif  // KVBROKER_PROTO_CONVERT_H_
