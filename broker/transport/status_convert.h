// What the core shows of itself, as the admin service sends it, and what
// operators ask, as the core takes it. Requests are hostile input, as in
// proto/convert.h.
#ifndef KVBROKER_BROKER_TRANSPORT_STATUS_CONVERT_H_
#define KVBROKER_BROKER_TRANSPORT_STATUS_CONVERT_H_

#include "absl/status/statusor.h"
#include "broker/core/status.h"

namespace kvbroker {

namespace v1 {
class BrokerStatus;
class ClaimStatus;
class ExplainResponse;
class InstanceStatus;
class SetPolicyRequest;
}  // namespace v1

void ToWire(const InstanceStatus& status, v1::InstanceStatus* wire);
// All but version, pid and backend_reason, which the core does not know.
void ToWire(const BrokerStatus& status, v1::BrokerStatus* wire);
void ToWire(const ClaimStatus& status, v1::ClaimStatus* wire);
void ToWire(const Explanation& explanation, v1::ExplainResponse* wire);

// InvalidArgument names the field.
absl::StatusOr<PolicyChange> FromWire(const v1::SetPolicyRequest& wire);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_STATUS_CONVERT_H_
