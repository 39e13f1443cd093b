// DescriptorClient: the engine's end of a descriptor socket, for tests: as bare
// as the wire, so that tests can misuse it. Blocking.
#ifndef KVBROKER_BROKER_TRANSPORT_DESCRIPTOR_CLIENT_H_
#define KVBROKER_BROKER_TRANSPORT_DESCRIPTOR_CLIENT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "broker/base/unique_fd.h"
#include "proto/fd_frame.h"
#include "proto/messages.h"

namespace kvbroker {

class DescriptorClient {
 public:
  // Not connected where that fails.
  explicit DescriptorClient(const std::string& path);

  bool connected() const { return bool(socket_); }
  int fd() const { return socket_.get(); }
  void HangUp() { socket_.Reset(); }

  // With a pidfd of this process, where asked for.
  void SayHello(bool with_pidfd = false);
  void SendPacket(std::string_view bytes,
                  const std::vector<int>& descriptors = {});
  void Ack(GrantId grant, uint32_t count);

  // Nothing: the broker has closed the connection, or sent something else.
  std::optional<kvb_fd_welcome> ReadWelcome();
  std::optional<Nonce> GetNonce(bool with_pidfd = false);
  struct Frame {
    kvb_fd_frame header;
    std::vector<UniqueFd> descriptors;
  };
  std::optional<Frame> ReadFrame();
  // Reads until the broker closes the connection; false after ten seconds.
  bool WaitForEnd();

 private:
  UniqueFd socket_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_DESCRIPTOR_CLIENT_H_
