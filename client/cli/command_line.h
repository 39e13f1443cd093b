// Reads kvctl's command line. Nothing here talks to a broker.
#ifndef KVBROKER_CLIENT_CLI_COMMAND_LINE_H_
#define KVBROKER_CLIENT_CLI_COMMAND_LINE_H_

#include <string>
#include <variant>

#include "absl/status/statusor.h"
#include "client/cli/commands.h"

namespace kvbroker::cli {

// A verb to run, and on which brokers.
struct Invocation {
  std::string address;  // --address; empty: not given
  std::string gpu;      // --gpu; empty: all
  Command command;
};

// --help, --version: a text to show. Also the help for who typed no verb, which
// is wrong usage.
struct Information {
  std::string text;
  bool asked_for = true;
};

// InvalidArgument: wrong usage. Its message is for the user and may have
// several lines.
absl::StatusOr<std::variant<Invocation, Information>> ParseCommandLine(
    int argc, const char* const* argv);

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_COMMAND_LINE_H_
