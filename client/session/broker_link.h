// BrokerLink: the client's two ways to the broker, as one object.
//
// Two implementations: GrpcLink (unix sockets) and the tests' in-process one.
#ifndef KVBROKER_CLIENT_SESSION_BROKER_LINK_H_
#define KVBROKER_CLIENT_SESSION_BROKER_LINK_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "broker/base/ids.h"
#include "broker/base/unique_fd.h"
#include "proto/messages.h"

namespace kvbroker::client {

// What the link tells, from its own threads: never from within one of its calls,
// and with nothing of its own locked. What is told may be acted upon at once, but
// the link must not be destroyed from there.
class LinkListener {
 public:
  virtual ~LinkListener() = default;
  virtual void OnMessage(BrokerMessage message) = 0;
  // Handles [first_handle, ...) of a grant.
  virtual void OnDescriptors(GrantId grant, uint32_t first_handle,
                             std::vector<UniqueFd> descriptors) = 0;
  // Last call: the broker ended the session, or is gone.
  virtual void OnDisconnected(absl::Status why) = 0;
};

// Thread-safe. Nothing blocks; after a disconnect calls are dropped.
class BrokerLink {
 public:
  virtual ~BrokerLink() = default;
  virtual void Send(ClientMessage message) = 0;
  virtual void AcknowledgeDescriptors(GrantId grant, uint32_t count) = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_BROKER_LINK_H_
