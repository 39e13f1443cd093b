#include "proto/fd_parse.h"

#include <string.h>

#include <cstdint>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

absl::Status Malformed(const char* what, uint64_t value) {
  return absl::InvalidArgumentError(absl::StrCat(
      "malformed packet on the descriptor socket: ", what, ": ", value));
}

// The packet of that type, with at most `most` descriptors.
template <typename Packet>
absl::StatusOr<Packet> Parse(std::string_view bytes, kvb_fd_type type,
                             size_t descriptors, size_t most) {
  Packet packet;
  if (bytes.size() != sizeof(packet)) return Malformed("size", bytes.size());
  memcpy(&packet, bytes.data(), sizeof(packet));
  if (packet.header.magic != KVB_FD_MAGIC) {
    return Malformed("magic", packet.header.magic);
  }
  if (packet.header.version != KVB_FD_VERSION) {
    return Malformed("version", packet.header.version);
  }
  if (packet.header.type != type) return Malformed("type", packet.header.type);
  if (descriptors > most) return Malformed("descriptors", descriptors);
  return packet;
}

}  // namespace

kvb_fd_header FdHeader(kvb_fd_type type) {
  return {.magic = KVB_FD_MAGIC,
          .version = KVB_FD_VERSION,
          .type = static_cast<uint16_t>(type)};
}

absl::StatusOr<kvb_fd_hello> ParseHello(std::string_view packet,
                                        size_t descriptors) {
  ASSIGN_OR_RETURN(kvb_fd_hello hello,
                   Parse<kvb_fd_hello>(packet, KVB_FD_HELLO, descriptors, 1));
  if (hello.reserved != 0) return Malformed("reserved", hello.reserved);
  return hello;
}

absl::StatusOr<kvb_fd_ack> ParseAck(std::string_view packet,
                                    size_t descriptors) {
  ASSIGN_OR_RETURN(kvb_fd_ack ack,
                   Parse<kvb_fd_ack>(packet, KVB_FD_ACK, descriptors, 0));
  if (ack.reserved != 0) return Malformed("reserved", ack.reserved);
  if (ack.handle_count == 0) return Malformed("acknowledged handles", 0);
  return ack;
}

absl::StatusOr<kvb_fd_welcome> ParseWelcome(std::string_view packet,
                                            size_t descriptors) {
  return Parse<kvb_fd_welcome>(packet, KVB_FD_WELCOME, descriptors, 0);
}

absl::StatusOr<kvb_fd_frame> ParseFrame(std::string_view packet,
                                        size_t descriptors) {
  ASSIGN_OR_RETURN(kvb_fd_frame frame,
                   Parse<kvb_fd_frame>(packet, KVB_FD_FRAME, descriptors,
                                       KVB_FD_MAX_PER_FRAME));
  if (frame.handle_count == 0 || frame.handle_count > KVB_FD_MAX_PER_FRAME) {
    return Malformed("handles", frame.handle_count);
  }
  if (descriptors > frame.handle_count) {
    return Malformed("descriptors", descriptors);
  }
  if (frame.first_handle >
      std::numeric_limits<uint32_t>::max() - frame.handle_count) {
    return Malformed("first handle", frame.first_handle);
  }
  return frame;
}

}  // namespace kvbroker
