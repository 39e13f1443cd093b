// FdParse: packets of the descriptor socket (fd_frame.h) from the other end,
// checked. Both ends read what comes with these, and act on nothing else.
//
//   char packet[kFdPacketRoom];
//   ... recvmsg ...
//   ASSIGN_OR_RETURN(kvb_fd_ack ack, ParseAck({packet, size}, descriptors));
//
// InvalidArgument for everything that the other end must not send: it says what
// is wrong, and the connection has to end. `descriptors` is how many came with
// the packet.
#ifndef KVBROKER_PROTO_FD_PARSE_H_
#define KVBROKER_PROTO_FD_PARSE_H_

#include <cstddef>
#include <string_view>

#include "absl/status/statusor.h"
#include "proto/fd_frame.h"

namespace kvbroker {

// Room for any packet and more, so that one that is too long is seen to be.
inline constexpr size_t kFdPacketRoom = 64;

kvb_fd_header FdHeader(kvb_fd_type type);

// ---- the broker reads ----
// With no descriptor, or one.
absl::StatusOr<kvb_fd_hello> ParseHello(std::string_view packet,
                                        size_t descriptors);
// handle_count is above 0; whether so many were sent is the caller's to check.
absl::StatusOr<kvb_fd_ack> ParseAck(std::string_view packet,
                                    size_t descriptors);

// ---- the client reads ----
absl::StatusOr<kvb_fd_welcome> ParseWelcome(std::string_view packet,
                                            size_t descriptors);
// handle_count is 1 to KVB_FD_MAX_PER_FRAME, and the last ordinal fits 32 bits.
// Fewer descriptors than handles have come where this process may not open
// more.
absl::StatusOr<kvb_fd_frame> ParseFrame(std::string_view packet,
                                        size_t descriptors);

}  // namespace kvbroker

#endif  // KVBROKER_PROTO_FD_PARSE_H_
