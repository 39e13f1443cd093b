// AdminClient: one broker, as an operator sees it.
//
// Each call is one exchange and blocks for its answer. Failures are the
// broker's own (NotFound, InvalidArgument, FailedPrecondition,
// PermissionDenied: see admin.proto) or of the way there:
//   Unavailable       nobody listens at the address
//   DeadlineExceeded  somebody does, and does not answer
//
// Implemented over gRPC (grpc_admin_client.h) and in memory for tests
// (fake_admin_client.h). Not thread-safe.
#ifndef KVBROKER_CLIENT_CLI_ADMIN_CLIENT_H_
#define KVBROKER_CLIENT_CLI_ADMIN_CLIENT_H_

#include <string>

#include "absl/status/statusor.h"
#include "proto/kvbroker/v1/admin.pb.h"

namespace kvbroker::cli {

class AdminClient {
 public:
  virtual ~AdminClient() = default;

  // The device this broker lends the memory of.
  virtual const std::string& device_uuid() const = 0;

  virtual absl::StatusOr<v1::ListResponse> List(
      const v1::ListRequest& request) = 0;
  virtual absl::StatusOr<v1::SetPolicyResponse> SetPolicy(
      const v1::SetPolicyRequest& request) = 0;
  virtual absl::StatusOr<v1::DeleteResponse> Delete(
      const v1::DeleteRequest& request) = 0;
  virtual absl::StatusOr<v1::ExplainResponse> Explain(
      const v1::ExplainRequest& request) = 0;
};

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_ADMIN_CLIENT_H_
