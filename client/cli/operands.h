// What operators type after a verb, read from text: percents, amounts, weights,
// durations. (Plain sizes: ParseBytes in broker/base/bytes.h.)
//
// All fail with InvalidArgument that quotes the text and says what is allowed.
#ifndef KVBROKER_CLIENT_CLI_OPERANDS_H_
#define KVBROKER_CLIENT_CLI_OPERANDS_H_

#include <string>
#include <variant>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"

namespace kvbroker::cli {

// Of the memory of the instance's own GPU; 0 to 100.
struct Percent {
  double value = 0;
  friend bool operator==(Percent, Percent) = default;
};

using Amount = std::variant<Bytes, Percent>;

// `50`, `12.5`, `50%`.
absl::StatusOr<Percent> ParsePercent(const std::string& text);

// A size as ParseBytes reads it, or a percent with its sign: `2G`, `25%`.
absl::StatusOr<Amount> ParseAmount(const std::string& text);

// A number above 0.
absl::StatusOr<double> ParseWeight(const std::string& text);

// A number of seconds of at least `least`: `2`, `0.5`.
absl::StatusOr<absl::Duration> ParseSeconds(const std::string& text,
                                            absl::Duration least);

// The value of KVCACHED_IPC_TIMEOUT: seconds, 0 and below for no limit.
absl::StatusOr<absl::Duration> ParseExchangeTimeout(const std::string& text);

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_OPERANDS_H_
