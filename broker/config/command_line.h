// ReadCommandLine: flags, environment and config file of kvbrokerd, put
// together.
#ifndef KVBROKER_BROKER_CONFIG_COMMAND_LINE_H_
#define KVBROKER_BROKER_CONFIG_COMMAND_LINE_H_

#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "broker/config/broker_config.h"

namespace kvbroker {

struct CommandLine {
  BrokerConfig config;
  // --help, --version or --print-config: print this and exit with 0.
  std::optional<std::string> print;
  // Where to write a line when ready; -1: nowhere.
  int ready_fd = -1;
  // Go on in a process of its own, with / as its directory: the paths in
  // `config` are absolute.
  bool detach = false;
};

// InvalidArgument names flag (or variable, or file and line), value and what is
// allowed.
absl::StatusOr<CommandLine> ReadCommandLine(
    int argc, const char* const* argv,
    const std::function<const char*(const char*)>& environment,
    const std::string& version);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CONFIG_COMMAND_LINE_H_
