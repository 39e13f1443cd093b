#include "client/capi/admin.h"

#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "broker/base/status_macros.h"
#include "client/cli/grpc_admin_client.h"
#include "client/cli/listing_json.h"

namespace kvbroker::client {
namespace {

// The broker tells the session before it answers who asked; the session's
// worker may be at something else.
constexpr absl::Duration kSessionKnows = absl::Seconds(1);

absl::StatusOr<cli::Fleet> FindFleet(const AddressOptions& where,
                                     absl::Duration timeout) {
  ASSIGN_OR_RETURN(std::vector<BrokerAddress> found, FindBrokers(where));
  std::vector<std::unique_ptr<cli::AdminClient>> brokers;
  for (const BrokerAddress& address : found) {
    brokers.push_back(cli::MakeGrpcAdminClient(address, timeout));
  }
  return cli::Fleet(std::move(brokers));
}

absl::StatusOr<AdminAnswer> List(const AddressOptions& where,
                                 absl::Duration timeout,
                                 std::string (*print)(const cli::Listing&,
                                                      cli::JsonLayout)) {
  ASSIGN_OR_RETURN(cli::Fleet fleet, FindFleet(where, timeout));
  ASSIGN_OR_RETURN(cli::Listing listing, fleet.List({}));
  AdminAnswer answer;
  answer.json = print(listing, cli::JsonLayout::kIndented);
  // A socket that its broker left behind is no broker.
  if (!listing.failures.empty()) answer.missing = listing.failures.front();
  return answer;
}

}  // namespace

AddressOptions WhereBrokersAre(const char* address, const char* gpu) {
  AddressOptions where;
  if (address == nullptr || *address == '\0') {
    address = std::getenv("KVBROKER_ADDRESS");
  }
  if (address != nullptr) where.address = address;
  if (gpu != nullptr) where.gpu = gpu;
  return where;
}

absl::StatusOr<AdminAnswer> ListInstances(const AddressOptions& where,
                                          absl::Duration timeout) {
  return List(where, timeout, cli::ListingToJson);
}

absl::StatusOr<AdminAnswer> ListBrokers(const AddressOptions& where,
                                        absl::Duration timeout) {
  return List(where, timeout, cli::BrokersToJson);
}

absl::Status ChangePolicy(const AddressOptions& where,
                          const cli::PolicyChange& change,
                          absl::Duration timeout) {
  ASSIGN_OR_RETURN(cli::Fleet fleet, FindFleet(where, timeout));
  ASSIGN_OR_RETURN(auto replies, fleet.SetPolicy(change));
  return replies.failures.empty() ? absl::OkStatus() : replies.failures.front();
}

absl::Status SetOwnMax(Session& session, const BrokerAddress& broker, Bytes max,
                       absl::Duration timeout) {
  if (max < Bytes(0)) return absl::InvalidArgumentError("a limit below 0");
  std::unique_ptr<cli::AdminClient> client =
      cli::MakeGrpcAdminClient(broker, timeout);
  v1::SetPolicyRequest request;
  request.set_name(session.opened().instance);
  request.set_max_bytes(static_cast<uint64_t>(max.count()));
  absl::StatusOr<v1::SetPolicyResponse> answer = client->SetPolicy(request);
  if (absl::IsFailedPrecondition(answer.status())) {
    // An administrator sees the names of all tenants, of which one is alive.
    ASSIGN_OR_RETURN(v1::ListResponse all, client->List({}));
    for (const v1::InstanceStatus& instance : all.instances()) {
      if (instance.name() == request.name() && instance.pids_size() > 0) {
        request.set_tenant(instance.tenant());
      }
    }
    answer = client->SetPolicy(request);
  }
  if (absl::IsNotFound(answer.status()) && !session.health().ok()) {
    return absl::UnavailableError(
        "the session has not come back to its broker yet");
  }
  RETURN_IF_ERROR(answer.status());
  // If it does not hear of it, somebody has set another one, or its broker
  // went.
  session.AwaitMax(max, kSessionKnows);
  return absl::OkStatus();
}

}  // namespace kvbroker::client
