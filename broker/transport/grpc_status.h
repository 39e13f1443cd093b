// Between gRPC's status and ours, whose codes are the same numbers.
#ifndef KVBROKER_BROKER_TRANSPORT_GRPC_STATUS_H_
#define KVBROKER_BROKER_TRANSPORT_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace kvbroker {

grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_GRPC_STATUS_H_
