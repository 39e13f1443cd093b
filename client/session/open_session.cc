#include "client/session/open_session.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "broker/base/status_macros.h"
#include "client/arena/make_mapper.h"
#include "client/session/grpc_link.h"

namespace kvbroker::client {
namespace {

constexpr absl::Duration kReconnectWithin = absl::Seconds(1);
// Between attempts while the broker is being restarted.
constexpr absl::Duration kTryAgain = absl::Milliseconds(20);
// A broker that is short of descriptors or memory closes a connection just as
// one that does not admit this user. Whoever is still refused then is not
// admitted.
constexpr absl::Duration kBelieveRefusal = absl::Milliseconds(500);

absl::StatusOr<std::unique_ptr<Session>> TryOpenSession(
    const BrokerAddress& address, SessionOptions options,
    absl::Duration timeout) {
  const std::string backend = options.backend;
  ASSIGN_OR_RETURN(std::unique_ptr<Session> session,
                   Session::Create(
                       std::move(options),
                       [&](const PoolGeometry& geometry) {
                         return MakeMapper(backend, address.device_uuid,
                                           geometry);
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

}  // namespace

absl::StatusOr<std::unique_ptr<Session>> OpenSession(
    const BrokerAddress& address, SessionOptions options) {
  if (options.backend.empty() && !IsGpu(address.device_uuid)) {
    options.backend = "host";
  }
  const absl::Time start = absl::Now();
  const absl::Time give_up = start + options.open_timeout;
  while (true) {
    absl::StatusOr<std::unique_ptr<Session>> session =
        TryOpenSession(address, options, give_up - absl::Now());
    // ABORTED: the descriptor connection ended before the nonce was used.
    const bool restarting = absl::IsUnavailable(session.status()) ||
                            absl::IsNotFound(session.status()) ||
                            absl::IsAborted(session.status());
    const bool may_pass = absl::IsPermissionDenied(session.status()) &&
                          absl::Now() < start + kBelieveRefusal;
    if ((!restarting && !may_pass) || absl::Now() + kTryAgain >= give_up) {
      return session;
    }
    absl::SleepFor(kTryAgain);
  }
}

}  // namespace kvbroker::client
