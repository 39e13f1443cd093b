// What brokers answer, as text for people.
#ifndef KVBROKER_CLIENT_CLI_LISTING_TEXT_H_
#define KVBROKER_CLIENT_CLI_LISTING_TEXT_H_

#include <string>

#include "client/cli/fleet.h"
#include "proto/kvbroker/v1/admin.pb.h"

namespace kvbroker::cli {

// A line a device (capacity, lent, free), then a table of all instances.
// `color` paints how full each is: below half of the limit green, below 80 %
// yellow, else red.
std::string ListingToText(const Listing& listing, bool color);

// The reasons first, then a table of the claims that wait.
std::string ExplanationToText(const v1::ExplainResponse& explanation);

// "512 MiB (536870912 bytes)".
std::string BytesInWords(uint64_t bytes);

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_LISTING_TEXT_H_
