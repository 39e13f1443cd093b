#include "broker/transport/accept_loop.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/clock.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

// Connections taken before others have their turn.
constexpr int kConnectionsPerTurn = 16;
// Out of descriptors: others give some back meanwhile.
constexpr absl::Duration kPause = absl::Milliseconds(100);
constexpr int kRefusalsLoggedPerSecond = 10;

}  // namespace

absl::StatusOr<std::unique_ptr<AcceptLoop>> AcceptLoop::Start(
    Options options, UnixListener rpc, UnixListener descriptors) {
  std::unique_ptr<AcceptLoop> self(new AcceptLoop(
      std::move(options), std::move(rpc), std::move(descriptors)));
  EventLoop* loop = self->options_.loop;
  ASSIGN_OR_RETURN(
      self->rpc_watch_,
      loop->Watch(self->rpc_.fd(), EPOLLIN,
                  [accept = self.get()](uint32_t) { accept->AcceptRpc(); }));
  ASSIGN_OR_RETURN(self->descriptors_watch_,
                   loop->Watch(self->descriptors_.fd(), EPOLLIN,
                               [accept = self.get()](uint32_t) {
                                 accept->AcceptDescriptors();
                               }));
  return self;
}

AcceptLoop::AcceptLoop(Options options, UnixListener rpc,
                       UnixListener descriptors)
    : options_(std::move(options)),
      rpc_(std::move(rpc)),
      descriptors_(std::move(descriptors)) {}

AcceptLoop::~AcceptLoop() {
  options_.loop->Unwatch(rpc_watch_);
  options_.loop->Unwatch(descriptors_watch_);
}

void AcceptLoop::AcceptRpc() {
  Accept(rpc_, rpc_watch_, [this](UniqueFd socket, PeerIdentity peer) {
    return TakeRpc(std::move(socket), std::move(peer));
  });
}

void AcceptLoop::AcceptDescriptors() {
  Accept(descriptors_, descriptors_watch_,
         [this](UniqueFd socket, PeerIdentity peer) {
           return TakeDescriptors(std::move(socket), std::move(peer));
         });
}

void AcceptLoop::Accept(
    const UnixListener& listener, EventLoop::WatchId watch,
    const std::function<absl::Status(UniqueFd, PeerIdentity)>& take) {
  for (int i = 0; i < kConnectionsPerTurn; ++i) {
    UniqueFd socket(
        accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!socket) {
      const int error = errno;
      if (error == EAGAIN) return;
      if (error == ECONNABORTED || error == EINTR) continue;
      // The connection that waits would wake us for ever.
      options_.log(
          absl::StrCat("accept-paused socket=", listener.path(), " reason=\"",
                       ErrnoToStatus(error, "accept").message(), "\""));
      EventLoop* loop = options_.loop;
      loop->Rewatch(watch, 0);
      loop->RunAt(Clock::Steady().Now() + kPause,
                  [loop, watch] { loop->Rewatch(watch, EPOLLIN); });
      return;
    }
    absl::StatusOr<PeerIdentity> peer =
        IdentifyPeer(socket.get(), options_.identify);
    if (!peer.ok()) {
      LogRefused(listener, PeerIdentity(), peer.status());
      continue;
    }
    if (!options_.admission.Admits(*peer)) {
      LogRefused(listener, *peer,
                 absl::PermissionDeniedError(
                     "neither the broker's user nor root nor allowed by "
                     "socket_group or allow_uids"));
      continue;
    }
    PeerIdentity who;  // for the log, once `peer` is given away
    who.uid = peer->uid;
    who.gid = peer->gid;
    who.pid = peer->pid;
    if (absl::Status taken = take(std::move(socket), *std::move(peer));
        !taken.ok()) {
      LogRefused(listener, who, taken);
    }
  }
}

absl::Status AcceptLoop::TakeRpc(UniqueFd socket, PeerIdentity peer) {
  absl::StatusOr<UniqueFd> second = socket.Duplicate();
  if (!second.ok()) return second.status();
  auto witness = std::make_shared<UniqueFd>(*std::move(second));
  ASSIGN_OR_RETURN(int number,
                   options_.connections->Enter(
                       std::move(socket),
                       std::make_shared<const PeerIdentity>(std::move(peer))));
  const auto leave = [connections = options_.connections,
                      ended = options_.rpc_ended, number] {
    connections->Leave(number);
    ended();
  };
  absl::StatusOr<EventLoop::WatchId> watch = options_.loop->WatchOnce(
      witness->get(), EPOLLRDHUP, [leave, witness](uint32_t) { leave(); });
  if (!watch.ok()) {
    UniqueFd(number).Reset();
    leave();
    return watch.status();
  }
  absl::Status served = options_.serve_rpc(number);
  if (!served.ok()) {
    options_.loop->Unwatch(*watch);
    leave();
  }
  return served;
}

absl::Status AcceptLoop::TakeDescriptors(UniqueFd socket, PeerIdentity peer) {
  ASSIGN_OR_RETURN(Rendezvous::Place place,
                   options_.rendezvous->Enter(peer.uid));
  return DescriptorConnection::Start(std::move(socket), std::move(peer),
                                     std::move(place),
                                     {.loop = options_.loop,
                                      .rendezvous = options_.rendezvous,
                                      .incarnation = options_.incarnation,
                                      .join_within = options_.join_within,
                                      .log = options_.log});
}

void AcceptLoop::LogRefused(const UnixListener& listener,
                            const PeerIdentity& peer, const absl::Status& why) {
  Refusals& refusals =
      &listener == &rpc_ ? rpc_refusals_ : descriptor_refusals_;
  const absl::Time now = Clock::Steady().Now();
  if (now - refusals.second >= absl::Seconds(1)) {
    refusals.second = now;
    refusals.logged = 0;
  }
  if (++refusals.logged > kRefusalsLoggedPerSecond) {
    ++refusals.left_out;
    return;
  }
  std::string line = absl::StrCat(
      "peer-refused uid=", peer.uid, " gid=", peer.gid, " pid=", peer.pid,
      " socket=", listener.path(), " reason=\"", why.message(), "\"");
  if (refusals.left_out != 0) {
    absl::StrAppend(&line, " left_out=", std::exchange(refusals.left_out, 0));
  }
  options_.log(line);
}

}  // namespace kvbroker
