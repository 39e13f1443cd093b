// SessionListener: what a session is told. The core declares it, the transport
// (or a test) implements it.
#ifndef KVBROKER_BROKER_CORE_LISTENER_H_
#define KVBROKER_BROKER_CORE_LISTENER_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "broker/base/ids.h"
#include "broker/base/unique_fd.h"
#include "proto/messages.h"

namespace kvbroker {

// Called without the core's lock, from any thread, several at once. No call may
// block or call back into the core from within: queue and return. After Close,
// or once the peer is gone, calls are accepted and dropped.
class SessionListener {
 public:
  virtual ~SessionListener() = default;

  virtual void Tell(BrokerMessage message) = 0;

  // Handles [first_handle, first_handle + descriptors.size()) of `grant`, at
  // most KVB_FD_MAX_PER_FRAME. The core keeps within the session's window: what
  // it hands over here is acknowledged by Core::DescriptorsReceived.
  virtual void SendDescriptors(GrantId grant, uint32_t first_handle,
                               std::vector<UniqueFd> descriptors) = 0;

  // Ends the session from the broker's side; the peer is shown `reason`.
  virtual void Close(const absl::Status& reason) = 0;

  // The last call: the core knows nothing of the session any more, since it
  // left without holding anything, its process has exited, or another session
  // goes on for it.
  virtual void Forgotten() {}
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_LISTENER_H_
