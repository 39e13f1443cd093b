#include "client/session/open_session.h"

#include <algorithm>
#include <utility>

#include "broker/base/status_macros.h"
#include "client/arena/host_mapper.h"
#include "client/session/grpc_link.h"

namespace kvbroker::client {
namespace {

constexpr absl::Duration kReconnectWithin = absl::Seconds(1);

}  // namespace

absl::StatusOr<std::unique_ptr<Session>> OpenSession(
    const BrokerAddress& address, SessionOptions options) {
  const absl::Duration timeout = options.open_timeout;
  ASSIGN_OR_RETURN(std::unique_ptr<Session> session,
                   Session::Create(
                       std::move(options),
                       [](const PoolGeometry& geometry) {
                         return HostMapper::Create(geometry);
                       },
                       Clock::Steady()));
  Session* const raw = session.get();
  auto connect =
      [address,
       raw](absl::Duration within) -> absl::StatusOr<Session::Connection> {
    ASSIGN_OR_RETURN(std::unique_ptr<GrpcLink> link,
                     GrpcLink::Connect(address, *raw, within));
    const Nonce nonce = link->nonce();
    return Session::Connection{std::move(link), nonce};
  };
  ASSIGN_OR_RETURN(Session::Connection connection, connect(timeout));
  session->ReconnectWith([connect, timeout] {
    // The session's worker waits for it.
    return connect(std::min(timeout, kReconnectWithin));
  });
  session->Attach(std::move(connection.link), connection.nonce);
  session->Start();
  RETURN_IF_ERROR(session->WaitUntilOpen());
  return session;
}

}  // namespace kvbroker::client
