// AcceptLoop: takes in connections on the broker's two sockets, and asks of
// each who it is before a byte of it is read.
//
//   rpc socket         -> identify -> admit -> ConnectionTable -> gRPC
//   descriptor socket  -> identify -> admit -> DescriptorConnection
//
// gRPC alone could not: it knows neither peer credentials nor inherited
// sockets. A peer without permission has its connection closed and gets a line
// in the log; of a flood of them only some lines.
//
// Of a gRPC connection it keeps a second descriptor, which tells it when the
// connection has ended; gRPC itself would not.
//
// Threads: everything happens on the event loop's thread; Start and destruction
// are the owner's. Ownership: what Options points at outlives the accept loop
// and, once started, the event loop's run.
#ifndef KVBROKER_BROKER_TRANSPORT_ACCEPT_LOOP_H_
#define KVBROKER_BROKER_TRANSPORT_ACCEPT_LOOP_H_

#include <functional>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/transport/admission.h"
#include "broker/transport/connection_table.h"
#include "broker/transport/descriptor_connection.h"
#include "broker/transport/event_loop.h"
#include "broker/transport/peer_identity.h"
#include "broker/transport/rendezvous.h"
#include "broker/transport/unix_listener.h"

namespace kvbroker {

class AcceptLoop {
 public:
  struct Options {
    EventLoop* loop = nullptr;
    ConnectionTable* connections = nullptr;
    Rendezvous* rendezvous = nullptr;
    Admission admission;
    IdentifyOptions identify;
    // Serves the gRPC connection with this number, which it owns from then on.
    std::function<absl::Status(int number)> serve_rpc;
    // A gRPC connection has ended and left the table.
    std::function<void()> rpc_ended;
    uint64_t incarnation = 0;
    absl::Duration join_within = absl::Seconds(10);
    std::function<void(std::string_view line)> log;
  };

  // Accepts from now on (once the loop runs). `rpc` is a SOCK_STREAM,
  // `descriptors` a SOCK_SEQPACKET listener; both are removed on destruction.
  static absl::StatusOr<std::unique_ptr<AcceptLoop>> Start(
      Options options, UnixListener rpc, UnixListener descriptors);
  // Accepts no more. Connections stay. Not while the loop's thread is in a
  // handler of ours: on that thread, or after EventLoop::Stop.
  ~AcceptLoop();

 private:
  AcceptLoop(Options options, UnixListener rpc, UnixListener descriptors);

  void AcceptRpc();
  void AcceptDescriptors();
  // Calls `take` with each connection that waits and may come in.
  void Accept(const UnixListener& listener, EventLoop::WatchId watch,
              const std::function<absl::Status(UniqueFd, PeerIdentity)>& take);
  absl::Status TakeRpc(UniqueFd socket, PeerIdentity peer);
  absl::Status TakeDescriptors(UniqueFd socket, PeerIdentity peer);
  void LogRefused(const UnixListener& listener, const PeerIdentity& peer,
                  const absl::Status& why);

  const Options options_;
  const UnixListener rpc_;
  const UnixListener descriptors_;
  EventLoop::WatchId rpc_watch_;
  EventLoop::WatchId descriptors_watch_;
  // Refusals of one socket logged in the second that began then, and those left
  // out.
  struct Refusals {
    absl::Time second = absl::InfinitePast();
    int logged = 0;
    int left_out = 0;
  };
  Refusals rpc_refusals_;
  Refusals descriptor_refusals_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_ACCEPT_LOOP_H_
