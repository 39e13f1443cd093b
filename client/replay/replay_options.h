// ReplayOptions: kvbroker-replay's command line, checked.
#ifndef KVBROKER_CLIENT_REPLAY_REPLAY_OPTIONS_H_
#define KVBROKER_CLIENT_REPLAY_REPLAY_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "client/replay/fresh_counts.h"
#include "client/replay/model_presets.h"
#include "client/replay/tokens_in_flight.h"
#include "client/replay/trace.h"
#include "client/replay/trace_generator.h"

namespace kvbroker::replay {

struct ReplayOptions {
  std::string name = "replay";  // the instance's; 1 to 128 of [A-Za-z0-9_.-]

  // Which requests.
  std::string trace = "builtin:conv";  // or builtin:code, or a file
  uint64_t seed = kDefaultTraceSeed;
  std::optional<absl::Time> origin;  // time zero of a file with dates
  std::optional<double> length_s;    // of a file; what a shift wraps around
  double shift_s = 0;
  std::optional<double> window_s;
  double rate_scale = 1;

  // How they are served.
  EngineSpeed speed;
  double speedup = 1;  // trace seconds a second
  std::optional<double>
      until_s;  // trace time at which the run ends in any case
  std::optional<absl::Time> start_at;

  // From which memory.
  ModelPreset model;
  int64_t scale = kDefaultScale;
  KvGeometry geometry;                // of `model` and `scale`
  std::optional<Bytes> static_share;  // unset: elastic, from the broker
  std::string address;                // the broker's; empty: found by itself
  std::string gpu;      // of several brokers; empty: there is one
  std::string backend;  // "host", "cuda", "cuda_ipc"; empty: the broker's
  // GPU memory that is taken and given back all the time, and declared.
  std::optional<Bytes> activations;
  bool guard = false;  // memory of its own behind slots without a page
  std::optional<FreshRule> check_fresh;  // what may be in a page that comes
  std::optional<Bytes> min;
  std::optional<Bytes> max;
  std::optional<double> weight;

  // What comes out.
  std::string requests_file;  // empty: none
  std::string history_file;   // empty: none
  bool json = false;
  std::optional<int> status_fd;
  bool print_capacity = false;
};

// What --help asked for.
struct HelpText {
  std::string text;
};

// InvalidArgument: wrong usage; the message is for the user.
absl::StatusOr<std::variant<ReplayOptions, HelpText>> ParseReplayOptions(
    int argc, const char* const* argv);

// The trace that the options describe: read or generated, then shifted, scaled
// and cut, in this order.
absl::StatusOr<Trace> MakeTrace(const ReplayOptions& options);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_REPLAY_OPTIONS_H_
