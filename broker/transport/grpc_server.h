// GrpcServer: the gRPC server without a port. Connections come from outside
// (accept_loop.h), as descriptor numbers.
//
//   GrpcServer server({MakeSessionService(...), MakeAdminService(...)});
//   RETURN_IF_ERROR(server.Serve(number));
//   ...
//   server.Rest();   // nobody is connected
//
// Besides the services it is given it serves grpc.health.v1 and reflection. It
// is set up for a small local daemon: no service of ours blocks, so all run as
// callbacks on gRPC's own few threads.
//
// gRPC 1.51 has threads that wake up every second for nothing. So it is started
// with the first connection, which costs a millisecond or two, and given up by
// Rest: a broker that nobody uses has no gRPC in it and does not wake up at
// all.
//
// Thread-safe.
#ifndef KVBROKER_BROKER_TRANSPORT_GRPC_SERVER_H_
#define KVBROKER_BROKER_TRANSPORT_GRPC_SERVER_H_

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/mutex.h"

namespace grpc {
class HealthCheckServiceInterface;
class Server;
class Service;
}  // namespace grpc

namespace kvbroker {

class GrpcServer {
 public:
  explicit GrpcServer(std::vector<std::shared_ptr<grpc::Service>> services);
  // Stops without grace.
  ~GrpcServer();

  // Serves a connected, non-blocking socket, which gRPC owns from now on; on
  // failure it is closed.
  absl::Status Serve(int number);

  // What health says while this serves, from now on: SERVING, which it is at
  // first, or NOT_SERVING.
  void SetHealth(bool serving);

  // Gives gRPC up until the next Serve. Calls that are under way are cancelled.
  void Rest() { Stop(absl::ZeroDuration()); }

  // The same, with health saying NOT_SERVING and `grace` for such calls to end.
  // Returns when none is left.
  void Stop(absl::Duration grace);

 private:
  // Outlive the server.
  const std::vector<std::shared_ptr<grpc::Service>> services_;
  // Held over a stop, which waits for handlers: those never come here.
  Mutex mu_;
  std::unique_ptr<grpc::Server> server_ ABSL_GUARDED_BY(mu_);

  // After mu_. Never held for long: whoever sets health waits for no stop.
  Mutex health_mu_;
  bool healthy_ ABSL_GUARDED_BY(health_mu_) = true;
  // Of server_, while it serves.
  grpc::HealthCheckServiceInterface* health_ ABSL_GUARDED_BY(health_mu_) =
      nullptr;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_GRPC_SERVER_H_
