#include "client/session/open_session.h"

#include <utility>

#include "broker/base/status_macros.h"
#include "client/arena/host_mapper.h"
#include "client/session/grpc_link.h"

namespace kvbroker::client {

absl::StatusOr<std::unique_ptr<Session>> OpenSession(
    const BrokerAddress& address, SessionOptions options) {
  const absl::Duration timeout = options.open_timeout;
  ASSIGN_OR_RETURN(
      std::unique_ptr<Session> session,
      Session::Create(
          std::move(options),
          [](const PoolGeometry& geometry) { return HostMapper::Create(geometry); },
          Clock::Steady()));
  ASSIGN_OR_RETURN(std::unique_ptr<GrpcLink> link,
                   GrpcLink::Connect(address, *session, timeout));
  const Nonce nonce = link->nonce();
  session->Attach(std::move(link), nonce);
  session->Start();
  RETURN_IF_ERROR(session->WaitUntilOpen());
  return session;
}

}  // namespace kvbroker::client
