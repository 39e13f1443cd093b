// OpenSession: a Session with a real broker, on this machine.
#ifndef KVBROKER_CLIENT_SESSION_OPEN_SESSION_H_
#define KVBROKER_CLIENT_SESSION_OPEN_SESSION_H_

#include <memory>
#include <string>

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

// The same, with the broker that `where` means. Where there is none, or it has
// died, and no address is given, kvbrokerd is started in the per-user directory:
// on the host if that is `options.backend`, else on the GPU that `where` names by
// its uuid. So it is again whenever it dies while the session lives.
//
// `kvbrokerd`: the program; empty: never. Where none is started, the error says
// why; where another user's broker has the device, whose, and how to be admitted.
struct FoundSession {
  std::unique_ptr<Session> session;
  BrokerAddress broker;
};
absl::StatusOr<FoundSession> FindAndOpenSession(
    AddressOptions where, SessionOptions options, const std::string& kvbrokerd);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_OPEN_SESSION_H_
