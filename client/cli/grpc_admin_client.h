// The AdminClient that speaks gRPC; gRPC's types and errors end in this file.
#ifndef KVBROKER_CLIENT_CLI_GRPC_ADMIN_CLIENT_H_
#define KVBROKER_CLIENT_CLI_GRPC_ADMIN_CLIENT_H_

#include <memory>

#include "absl/time/time.h"
#include "client/address/broker_address.h"
#include "client/cli/admin_client.h"

namespace kvbroker::cli {

// Connects with the first call, which therefore is what fails where no broker
// listens. A call that takes longer than `timeout` fails; InfiniteDuration
// waits for ever.
std::unique_ptr<AdminClient> MakeGrpcAdminClient(
    const client::BrokerAddress& address, absl::Duration timeout);

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_GRPC_ADMIN_CLIENT_H_
