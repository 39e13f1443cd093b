#include "client/session/open_session.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "broker/base/status_macros.h"
#include "client/address/broker_starter.h"
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

// How long a socket of the system's broker without anybody behind it is a
// restart, and its starter's business.
constexpr absl::Duration kSystemRestart = absl::Seconds(3);

// Whether another broker, or this one in a moment, may say otherwise.
// ABORTED: the descriptor connection ended before the nonce was used.
bool MayBeRestarting(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsNotFound(status) ||
         absl::IsAborted(status);
}

// Connects, with a new broker where nobody is there and it has become ready.
absl::StatusOr<Session::Connection> Connect(const BrokerAddress& address,
                                            Session& session,
                                            absl::Duration within,
                                            BrokerStarter* starter) {
  absl::StatusOr<std::unique_ptr<GrpcLink>> link =
      GrpcLink::Connect(address, session, within);
  if (starter != nullptr && (absl::IsUnavailable(link.status()) ||
                             absl::IsNotFound(link.status()))) {
    RETURN_IF_ERROR(starter->Step());
    link = GrpcLink::Connect(address, session, within);
  }
  RETURN_IF_ERROR(link.status());
  if (starter != nullptr) starter->Forget();
  const Nonce nonce = (*link)->nonce();
  return Session::Connection{*std::move(link), nonce};
}

// `restarter`: what starts the broker again when it dies; may be null.
absl::StatusOr<std::unique_ptr<Session>> TryOpenSession(
    const BrokerAddress& address, SessionOptions options,
    absl::Duration timeout, std::shared_ptr<BrokerStarter> restarter) {
  if (options.backend.empty() && !IsGpu(address.device_uuid)) {
    options.backend = "host";
  }
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
  ASSIGN_OR_RETURN(Session::Connection connection,
                   Connect(address, *raw, timeout, nullptr));
  session->ReconnectWith([address, raw, timeout, restarter] {
    // The session's worker waits for it.
    return Connect(address, *raw, std::min(timeout, kReconnectWithin),
                   restarter.get());
  });
  session->Attach(std::move(connection.link), connection.nonce);
  session->Start();
  RETURN_IF_ERROR(session->WaitUntilOpen());
  return session;
}

std::string DirectoryOf(const std::string& path) {
  return path.substr(0, path.rfind('/'));
}

// Opens a session in several attempts.
class Opening {
 public:
  Opening(AddressOptions where, SessionOptions options,
          const std::string& kvbrokerd)
      : where_(std::move(where)),
        options_(std::move(options)),
        start_(absl::Now()),
        give_up_(start_ + options_.open_timeout),
        starter_(std::make_shared<BrokerStarter>(BrokerStarter::Options{
            .program = kvbrokerd,
            .directory = where_.user_directory,
            .backend = options_.backend,
            .gpu = where_.gpu})) {}

  absl::StatusOr<FoundSession> Run() {
    while (true) {
      absl::StatusOr<std::unique_ptr<Session>> session = Attempt();
      if (session.ok()) {
        starter_->Forget();
        return FoundSession{*std::move(session), broker_};
      }
      if (!again_ || absl::Now() + kTryAgain >= give_up_) {
        return session.status();
      }
      absl::SleepFor(kTryAgain);
    }
  }

 private:
  // One look, one attempt. Another is worth it where again_.
  absl::StatusOr<std::unique_ptr<Session>> Attempt() {
    again_ = false;
    absl::StatusOr<BrokerAddress> found =
        FindBroker(where_, absl::ZeroDuration());
    if (!found.ok() && !absl::IsNotFound(found.status())) {
      return found.status();
    }
    if (found.ok() && SomebodyListens(*found)) return Open(*found);
    if (found.ok() &&
        DirectoryOf(found->rpc_path) == where_.system_directory &&
        absl::Now() < start_ + kSystemRestart) {
      again_ = true;
      return absl::UnavailableError(absl::StrCat(
          "nobody listens at the system's broker's socket ", found->rpc_path));
    }
    absl::Status started = starter_->Step();
    again_ = started.ok() || absl::IsUnavailable(started) ||
             absl::IsAlreadyExists(started);
    if (started.ok()) return Attempt();  // at once: it may be in a hurry to leave
    if (absl::IsAlreadyExists(started)) {
      return OpenWithHolder(std::move(started));
    }
    return started;
  }

  absl::StatusOr<std::unique_ptr<Session>> Open(const BrokerAddress& broker) {
    broker_ = broker;
    absl::StatusOr<std::unique_ptr<Session>> session = TryOpenSession(
        broker, options_, give_up_ - absl::Now(), RestarterOf(broker));
    // One that is leaving closes connections as one does that does not admit
    // this user.
    if (!absl::IsPermissionDenied(session.status())) {
      refused_since_ = absl::InfiniteFuture();
      again_ = MayBeRestarting(session.status());
    } else {
      refused_since_ = std::min(refused_since_, absl::Now());
      again_ = absl::Now() < refused_since_ + kBelieveRefusal;
    }
    return session;
  }

  // The device is another broker's, that is not where brokers are looked for: of
  // this user's other directory, or one of root's.
  absl::StatusOr<std::unique_ptr<Session>> OpenWithHolder(absl::Status taken) {
    // No code of its own: who asked for a session did not ask for a broker.
    taken = absl::FailedPreconditionError(
        absl::StrCat("no broker can be started: ", taken.message()));
    const std::string socket = starter_->holder_socket();
    if (socket.empty()) return taken;
    struct stat info;
    if (lstat(socket.c_str(), &info) != 0) {
      again_ = errno != EACCES;  // else it may be about to listen
      return taken;
    }
    if (info.st_uid != geteuid() && info.st_uid != 0) {
      // One of the system's is found there.
      again_ = DirectoryOf(socket) == where_.system_directory;
      return taken;
    }
    // Anybody can hold the lock and say that it listens there.
    if (!CheckPrivateDirectory(DirectoryOf(socket)).ok()) return taken;
    absl::StatusOr<BrokerAddress> broker =
        FindBroker({.address = socket}, absl::ZeroDuration());
    if (!broker.ok() || !SomebodyListens(*broker)) return taken;
    absl::StatusOr<std::unique_ptr<Session>> session = Open(*broker);
    if (absl::IsPermissionDenied(session.status())) return taken;
    return session;
  }

  // A broker of this user's own, where clients start them, is theirs to start
  // again; another one is its starter's.
  std::shared_ptr<BrokerStarter> RestarterOf(const BrokerAddress& broker) {
    return DirectoryOf(broker.rpc_path) == where_.user_directory ? starter_
                                                                : nullptr;
  }

  const AddressOptions where_;
  const SessionOptions options_;
  const absl::Time start_, give_up_;
  const std::shared_ptr<BrokerStarter> starter_;
  absl::Time refused_since_ = absl::InfiniteFuture();
  BrokerAddress broker_;  // of the last attempt
  bool again_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Session>> OpenSession(
    const BrokerAddress& address, SessionOptions options) {
  const absl::Time start = absl::Now();
  const absl::Time give_up = start + options.open_timeout;
  while (true) {
    absl::StatusOr<std::unique_ptr<Session>> session =
        TryOpenSession(address, options, give_up - absl::Now(), nullptr);
    const bool may_pass = absl::IsPermissionDenied(session.status()) &&
                          absl::Now() < start + kBelieveRefusal;
    if ((!MayBeRestarting(session.status()) && !may_pass) ||
        absl::Now() + kTryAgain >= give_up) {
      return session;
    }
    absl::SleepFor(kTryAgain);
  }
}

absl::StatusOr<FoundSession> FindAndOpenSession(
    AddressOptions where, SessionOptions options,
    const std::string& kvbrokerd) {
  if (where.backend.empty()) where.backend = options.backend;
  const bool knows_device =
      options.backend == "host" ? where.gpu.empty() : IsGpu(where.gpu);
  if (kvbrokerd.empty() || !where.address.empty() || !knows_device) {
    absl::StatusOr<BrokerAddress> broker = FindBroker(where);
    if (absl::IsNotFound(broker.status()) && !kvbrokerd.empty() &&
        where.address.empty()) {
      return absl::NotFoundError(absl::StrCat(
          broker.status().message(),
          "; none is started, since it is not known for which device: name a "
          "GPU by its uuid, or the backend host"));
    }
    RETURN_IF_ERROR(broker.status());
    ASSIGN_OR_RETURN(std::unique_ptr<Session> session,
                     OpenSession(*broker, std::move(options)));
    return FoundSession{std::move(session), *std::move(broker)};
  }
  return Opening(std::move(where), std::move(options), kvbrokerd).Run();
}

}  // namespace kvbroker::client
