// What the C ABI asks brokers as an operator does, without a session of its
// own.
//
// Each call connects anew and waits for its answers. Thread-safe: free
// functions without state.
#ifndef KVBROKER_CLIENT_CAPI_ADMIN_H_
#define KVBROKER_CLIENT_CAPI_ADMIN_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "client/address/broker_address.h"
#include "client/cli/fleet.h"
#include "client/session/session.h"

namespace kvbroker::client {

// NULLs and empty texts are what they are on kvctl's command line:
// KVBROKER_ADDRESS, then the default directories; all GPUs.
AddressOptions WhereBrokersAre(const char* address, const char* gpu);

// JSON (client/cli/listing_json.h), and why a broker is missing from it.
struct AdminAnswer {
  std::string json;
  absl::Status missing;
};

// NOT_FOUND: there is no broker; says where was looked. UNAVAILABLE: nobody
// listens where one was.
absl::StatusOr<AdminAnswer> ListInstances(const AddressOptions& where,
                                          absl::Duration timeout);
absl::StatusOr<AdminAnswer> ListBrokers(const AddressOptions& where,
                                        absl::Duration timeout);

// On each broker that knows the name, or, as a preset, on each.
absl::Status ChangePolicy(const AddressOptions& where,
                          const cli::PolicyChange& change,
                          absl::Duration timeout);

// The session's own instance, on its own broker, which is at `broker`. The
// session knows of it when this returns.
absl::Status SetOwnMax(Session& session, const BrokerAddress& broker, Bytes max,
                       absl::Duration timeout);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_CAPI_ADMIN_H_
