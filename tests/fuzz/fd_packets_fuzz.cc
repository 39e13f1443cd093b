// Packets of the descriptor socket, as both ends read them (proto/fd_parse.h).
// Input: how many descriptors came, and the packet.
#include <string.h>

#include "absl/status/statusor.h"
#include "broker/base/check.h"
#include "proto/fd_parse.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvbroker {
namespace {

// What is taken is what came, byte for byte.
template <typename Packet>
void CheckTaken(const absl::StatusOr<Packet>& taken, std::string_view packet,
                kvb_fd_type type) {
  if (!taken.ok()) {
    KVB_CHECK(absl::IsInvalidArgument(taken.status()));
    return;
  }
  KVB_CHECK(packet.size() == sizeof(Packet));
  KVB_CHECK(memcmp(&*taken, packet.data(), sizeof(Packet)) == 0);
  const kvb_fd_header good = FdHeader(type);
  KVB_CHECK(memcmp(&taken->header, &good, sizeof(good)) == 0);
}

void Run(testing::FuzzInput input) {
  const size_t descriptors = input.Byte();
  const std::string_view packet = input.TakeAll();
  const absl::StatusOr<kvb_fd_hello> hello = ParseHello(packet, descriptors);
  CheckTaken(hello, packet, KVB_FD_HELLO);
  if (hello.ok()) KVB_CHECK(descriptors <= 1);

  const absl::StatusOr<kvb_fd_ack> ack = ParseAck(packet, descriptors);
  CheckTaken(ack, packet, KVB_FD_ACK);
  if (ack.ok()) KVB_CHECK(descriptors == 0 && ack->handle_count > 0);

  CheckTaken(ParseWelcome(packet, descriptors), packet, KVB_FD_WELCOME);

  const absl::StatusOr<kvb_fd_frame> frame = ParseFrame(packet, descriptors);
  CheckTaken(frame, packet, KVB_FD_FRAME);
  if (frame.ok()) {
    KVB_CHECK(frame->handle_count >= 1 && descriptors <= frame->handle_count &&
              frame->handle_count <= KVB_FD_MAX_PER_FRAME);
    KVB_CHECK(frame->first_handle + frame->handle_count >= frame->handle_count);
  }
  KVB_CHECK(hello.ok() + ack.ok() + frame.ok() <= 1);
}

}  // namespace
}  // namespace kvbroker

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvbroker::Run(kvbroker::testing::FuzzInput(data, size));
  return 0;
}
