// OpenSession: a Session with a real broker, on this machine.
#ifndef KVBROKER_CLIENT_SESSION_OPEN_SESSION_H_
#define KVBROKER_CLIENT_SESSION_OPEN_SESSION_H_

#include <memory>

#include "absl/status/statusor.h"
#include "client/address/broker_address.h"
#include "client/session/session.h"

namespace kvbroker::client {

// Connects, opens and starts. Fails with what the broker said, or UNAVAILABLE
// where there is none: a broker that is being restarted, whose socket is there
// and does not answer, is waited for until `options.open_timeout` is over.
//
// An empty `options.backend` means the kind of memory that goes with the
// address: where its device is called GPU-..., what the broker lends of it
// (cuda or cuda_ipc), else "host".
absl::StatusOr<std::unique_ptr<Session>> OpenSession(
    const BrokerAddress& address, SessionOptions options);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_OPEN_SESSION_H_
