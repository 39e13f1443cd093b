// What can be typed after `kvctl`, understood: one plain struct a verb.
#ifndef KVBROKER_CLIENT_CLI_COMMANDS_H_
#define KVBROKER_CLIENT_CLI_COMMANDS_H_

#include <string>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "client/cli/fleet.h"

namespace kvbroker::cli {

// list
struct ListCommand {
  std::vector<std::string> names;  // empty: all
  bool json = false;
};

// watch
struct WatchCommand {
  std::vector<std::string> names;  // empty: all
  absl::Duration interval = absl::Seconds(1);
  bool json = false;
};

// limit, limit-percent, policy
struct PolicyCommand {
  PolicyChange change;
  // Return only once the instance holds no more than its limit.
  bool wait = false;
  absl::Duration timeout = absl::InfiniteDuration();
};

// delete
struct DeleteCommand {
  std::string name;
  std::string tenant;
  bool force = false;
};

// explain
struct ExplainCommand {
  std::string name;
  std::string tenant;
  bool json = false;
};

using Command = std::variant<ListCommand, WatchCommand, PolicyCommand,
                             DeleteCommand, ExplainCommand>;

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_COMMANDS_H_
