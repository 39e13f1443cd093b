// AdminService: kvbroker.v1.Admin on gRPC, over what the core shows and takes.
//
// Whoever may connect may ask. Root and the broker's own user see and change
// every tenant's instances; others only their own tenant's, and learn of an
// instance of another tenant no more than that it is not theirs.
//
// Thread-safe. What Options points at outlives the server that serves this.
#ifndef KVBROKER_BROKER_TRANSPORT_ADMIN_SERVICE_H_
#define KVBROKER_BROKER_TRANSPORT_ADMIN_SERVICE_H_

#include <memory>
#include <string>

#include "broker/core/core.h"
#include "broker/transport/admission.h"
#include "broker/transport/connection_table.h"

namespace grpc {
class Service;
}  // namespace grpc

namespace kvbroker {

struct AdminServiceOptions {
  Core* core = nullptr;
  const ConnectionTable* connections = nullptr;
  Admission admission;
  // What the core does not know of the broker.
  std::string version;
  std::string backend_reason;
};

std::shared_ptr<grpc::Service> MakeAdminService(AdminServiceOptions options);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_ADMIN_SERVICE_H_
