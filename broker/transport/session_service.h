// SessionService: kvbroker.v1.Broker on gRPC, that is the stream half of every
// session.
//
// A stream begins with Open, which names the descriptor connection that the
// process made before (rendezvous.h); from then on both halves are one session
// of the core, and the stream's object is its listener. Messages are handled on
// gRPC's own threads, as they come.
//
//   stream ends or descriptor connection ends  -> Core::HungUp, and the other
//                                                 half is ended too
//   the process exits (its pidfd says so)      -> Core::ProcessGone
//   garbage, or Core::Handle fails             -> the stream ends with that
//                                                 status
//   the peer does not read                     -> cancelled at max_waiting
//                                                 messages or
//                                                 max_waiting_bytes
//
// Thread-safe. What Options points at outlives the server that serves this.
#ifndef KVBROKER_BROKER_TRANSPORT_SESSION_SERVICE_H_
#define KVBROKER_BROKER_TRANSPORT_SESSION_SERVICE_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string_view>

#include "broker/core/core.h"
#include "broker/transport/connection_table.h"
#include "broker/transport/event_loop.h"
#include "broker/transport/rendezvous.h"

namespace grpc {
class Service;
}  // namespace grpc

namespace kvbroker {

struct SessionServiceOptions {
  Core* core = nullptr;
  EventLoop* loop = nullptr;
  ConnectionTable* connections = nullptr;
  Rendezvous* rendezvous = nullptr;
  // Messages that may wait for one peer to read.
  size_t max_waiting = 4096;
  size_t max_waiting_bytes = 8 << 20;
  // A session began (+1), or the core has forgotten it (-1). From any thread,
  // not always in order.
  std::function<void(int change)> count_session;
  // Around the opening of each; +1 before the descriptor connection has given up
  // its place, -1 after the session counts, or is refused.
  std::function<void(int change)> count_opening;
  std::function<void(std::string_view line)> log;
};

std::shared_ptr<grpc::Service> MakeSessionService(
    SessionServiceOptions options);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_SESSION_SERVICE_H_
