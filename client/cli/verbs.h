// What kvctl's verbs do: ask a fleet of brokers, write to a console, and end
// with the exit status that scripts rely on.
#ifndef KVBROKER_CLIENT_CLI_VERBS_H_
#define KVBROKER_CLIENT_CLI_VERBS_H_

#include <functional>
#include <ostream>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/clock.h"
#include "client/cli/commands.h"
#include "client/cli/fleet.h"

namespace kvbroker::cli {

inline constexpr int kExitDone = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;

// Where output goes. Errors are lines that begin with "kvctl: ".
struct Console {
  std::ostream& out;
  std::ostream& err;
  bool color = false;
  // `watch` draws over what it drew before.
  bool redraw = false;
};

// How verbs that take long pass the time; tests pass a fake clock and move it.
struct Pacing {
  const Clock& clock;
  // Sleeps; false: stop now.
  std::function<bool(absl::Duration)> sleep;
};

// Runs one verb and returns kvctl's exit status. On every failure something has
// been written to `console.err`.
int RunCommand(const Command& command, Fleet& fleet, Console& console,
               const Pacing& pacing);

// Writes the error and returns its exit status: 2 for an invalid argument,
// else 1.
int ReportFailure(const absl::Status& status, Console& console);

// Says how to come by a broker, after an error that there is none.
void SuggestBroker(Console& console);

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_VERBS_H_
