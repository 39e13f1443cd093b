// What brokers answer, as JSON for programs. Fields are only ever added.
#ifndef KVBROKER_CLIENT_CLI_LISTING_JSON_H_
#define KVBROKER_CLIENT_CLI_LISTING_JSON_H_

#include <string>

#include "client/cli/fleet.h"

namespace kvbroker::cli {

enum class JsonLayout {
  kIndented,
  // One line, for a stream of documents.
  kLine,
};

// An array with one object an instance and GPU, in the order of the devices,
// tenants, names. Figures in bytes; `limit_bytes` as it was asked for, and
// `used_bytes` is that of pages with referenced blocks. Ends with a newline.
std::string ListingToJson(const Listing& listing, JsonLayout layout);

// An array with one object a broker, in the order of the devices: the fields of
// BrokerStatus (types.proto) by their names. Ends with a newline.
std::string BrokersToJson(const Listing& listing, JsonLayout layout);

// An array with one object a GPU: the instance as above, the reasons as
// `lines`, the claims that wait as `claims`. Ends with a newline.
std::string ExplanationsToJson(
    const std::vector<Replies<v1::ExplainResponse>::Answer>& explanations);

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_LISTING_JSON_H_
