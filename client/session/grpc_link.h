// GrpcLink: the real way to the broker: its descriptor socket and its gRPC
// stream.
#ifndef KVBROKER_CLIENT_SESSION_GRPC_LINK_H_
#define KVBROKER_CLIENT_SESSION_GRPC_LINK_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/unique_fd.h"
#include "client/address/broker_address.h"
#include "client/session/broker_link.h"
#include "proto/messages.h"

namespace kvbroker::client {

class GrpcLink : public BrokerLink {
 public:
  // Connects both and says hello. `listener` outlives the link. UNAVAILABLE: no
  // broker listens there; PERMISSION_DENIED: it does not admit this user.
  static absl::StatusOr<std::unique_ptr<GrpcLink>> Connect(
      const BrokerAddress& address, LinkListener& listener,
      absl::Duration timeout);
  ~GrpcLink() override;

  // For Open.
  const Nonce& nonce() const { return nonce_; }

  void Send(ClientMessage message) override;
  void AcknowledgeDescriptors(GrantId grant, uint32_t count) override;

 private:
  class Stream;

  GrpcLink(LinkListener& listener, UniqueFd socket, const Nonce& nonce);

  void ReceiveDescriptors();

  LinkListener& listener_;
  const UniqueFd socket_;
  const Nonce nonce_;
  // Descriptors whose acknowledgement could not be sent; the next one counts
  // them.
  std::atomic<uint32_t> owed_ = 0;
  std::unique_ptr<Stream> stream_;
  std::thread receiver_;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_GRPC_LINK_H_
