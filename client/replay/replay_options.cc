#include "client/replay/replay_options.h"

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker::replay {
namespace {

constexpr char kDescription[] =
    "An LLM engine without the GPU: replays a request trace against a KV "
    "pool,\n"
    "either a fixed share of memory or pages borrowed from kvbrokerd.";

constexpr char kFooter[] =
    "\nTraces are CSV files with the header "
    "TIMESTAMP,ContextTokens,GeneratedTokens.\n"
    "Sizes: 1024 (bytes), 512M, 2GB; suffixes count in 1024s.\n"
    "Exit status: 0 done, 1 failed or a block was overwritten, 2 wrong usage.";

constexpr std::string_view kBuiltinPrefix = "builtin:";
constexpr size_t kMaxNameLength = 128;
constexpr double kMaxSpeed = 1e9;  // tokens per second
constexpr double kMaxSpeedup = 1e6;
constexpr double kMaxWeight = 1e6;

// Options that CLI11 reads as text or as plain numbers and that are checked
// afterwards, with messages of our own.
struct Fields {
  std::string model = "llama-3.1-8b";
  std::optional<std::string> origin, static_share, activations, min, max;
  std::optional<std::string> check_fresh;
  int64_t seed = kDefaultTraceSeed;
  std::optional<double> start_at;
};

absl::Status CheckName(const std::string& name) {
  const bool fits =
      !name.empty() && name.size() <= kMaxNameLength &&
      std::all_of(name.begin(), name.end(), [](unsigned char c) {
        return absl::ascii_isalnum(c) || c == '_' || c == '.' || c == '-';
      });
  if (fits) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "--name must be 1 to ", kMaxNameLength, " of [A-Za-z0-9_.-]: ", name));
}

// Not a number fails, too.
absl::Status CheckAboveZero(absl::string_view flag, double value, double most) {
  if (value > 0 && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(flag, " must be above 0 and at most ", most, ": ", value));
}

absl::StatusOr<std::optional<Bytes>> ParseSize(
    absl::string_view flag, const std::optional<std::string>& text) {
  if (!text.has_value()) return std::optional<Bytes>();
  const absl::StatusOr<Bytes> bytes = ParseBytes(*text);
  if (!bytes.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(flag, ": ", bytes.status().message()));
  }
  return std::optional<Bytes>(*bytes);
}

bool IsBuiltin(const ReplayOptions& options) {
  return std::string_view(options.trace).substr(0, kBuiltinPrefix.size()) ==
         kBuiltinPrefix;
}

absl::Status CheckCombinations(const ReplayOptions& options) {
  if (IsBuiltin(options) && options.origin.has_value()) {
    return absl::InvalidArgumentError(
        "--origin is for trace files with dates, not for built-in traces");
  }
  if (options.static_share.has_value() &&
      (!options.address.empty() || !options.gpu.empty() ||
       !options.backend.empty() || options.activations.has_value() ||
       options.guard || options.check_fresh.has_value() ||
       options.min.has_value() ||
       options.max.has_value() || options.weight.has_value() ||
       !options.history_file.empty())) {
    return absl::InvalidArgumentError(
        "--static-share needs no broker: --address, --gpu, --backend, "
        "--activations, --guard, --check-fresh, --min, --max, --weight and --history do not go with it");
  }
  if (options.min.has_value() && options.max.has_value() &&
      *options.min > *options.max) {
    return absl::InvalidArgumentError(
        absl::StrCat("--min is above --max: ", options.min->count(), " > ",
                     options.max->count()));
  }
  return absl::OkStatus();
}

absl::Status Complete(const Fields& fields, ReplayOptions& options) {
  RETURN_IF_ERROR(CheckName(options.name));
  if (fields.seed < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--seed must not be negative: ", fields.seed));
  }
  options.seed = static_cast<uint64_t>(fields.seed);
  if (fields.origin.has_value()) {
    ASSIGN_OR_RETURN(options.origin, ParseTimestamp(*fields.origin));
  }
  if (!std::isfinite(options.shift_s) ||
      std::abs(options.shift_s) > kMaxTraceSeconds) {
    return absl::InvalidArgumentError(absl::StrCat("--shift must be within +-",
                                                   kMaxTraceSeconds,
                                                   " s: ", options.shift_s));
  }
  for (const auto& [flag, seconds] : {std::pair("--length", options.length_s),
                                      std::pair("--window", options.window_s),
                                      std::pair("--until", options.until_s)}) {
    if (seconds.has_value()) {
      RETURN_IF_ERROR(CheckAboveZero(flag, *seconds, kMaxTraceSeconds));
    }
  }
  RETURN_IF_ERROR(
      CheckAboveZero("--rate-scale", options.rate_scale, kMaxRateScale));
  RETURN_IF_ERROR(CheckAboveZero(
      "--prefill", options.speed.prefill_tokens_per_s, kMaxSpeed));
  RETURN_IF_ERROR(
      CheckAboveZero("--decode", options.speed.decode_tokens_per_s, kMaxSpeed));
  RETURN_IF_ERROR(CheckAboveZero("--speedup", options.speedup, kMaxSpeedup));
  if (fields.start_at.has_value()) {
    if (!(*fields.start_at >= 0 && *fields.start_at <= 1e11)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--start-at must be seconds since 1970: ", *fields.start_at));
    }
    options.start_at = absl::UnixEpoch() + absl::Seconds(*fields.start_at);
  }

  ASSIGN_OR_RETURN(options.model, FindModelPreset(fields.model));
  ASSIGN_OR_RETURN(options.geometry,
                   ScaledGeometry(options.model, options.scale));
  ASSIGN_OR_RETURN(options.static_share,
                   ParseSize("--static-share", fields.static_share));
  ASSIGN_OR_RETURN(options.activations,
                   ParseSize("--activations", fields.activations));
  if (fields.check_fresh) {
    options.check_fresh = *fields.check_fresh == "zero" ? FreshRule::kZero
                                                        : FreshRule::kTenant;
  }
  ASSIGN_OR_RETURN(options.min, ParseSize("--min", fields.min));
  ASSIGN_OR_RETURN(options.max, ParseSize("--max", fields.max));
  if (options.weight.has_value()) {
    RETURN_IF_ERROR(CheckAboveZero("--weight", *options.weight, kMaxWeight));
  }
  if (options.status_fd.has_value() && *options.status_fd < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--status-fd must be an open descriptor: ", *options.status_fd));
  }
  return CheckCombinations(options);
}

void AddOptions(CLI::App& app, ReplayOptions& options, Fields& fields) {
  app.description(kDescription);
  app.footer(kFooter);

  app.add_option("--name", options.name, "The instance's name [replay]")
      ->type_name("NAME");

  const std::string trace = "Trace";
  app.add_option("--trace", options.trace,
                 "A CSV file, builtin:conv or builtin:code [builtin:conv]")
      ->type_name("FILE")
      ->group(trace);
  app.add_option("--seed", fields.seed,
                 "Of built-in traces and of --rate-scale's chance")
      ->type_name("N")
      ->group(trace);
  app.add_option("--origin", fields.origin,
                 "Time zero of a file with dates [its earliest row]; give "
                 "traces recorded side by side the same one")
      ->type_name("TIMESTAMP")
      ->group(trace);
  app.add_option("--length", options.length_s,
                 "What the trace stands for and --shift wraps around [1200 for "
                 "built-in traces, else up to the last row's full minute]")
      ->type_name("SECONDS")
      ->group(trace);
  app.add_option("--shift", options.shift_s,
                 "Every request that much later, wrapping around")
      ->type_name("SECONDS")
      ->group(trace);
  app.add_option("--rate-scale", options.rate_scale,
                 "That many times the requests, at about the same times [1]")
      ->type_name("X")
      ->group(trace);
  app.add_option("--window", options.window_s,
                 "Only requests that arrive before that")
      ->type_name("SECONDS")
      ->group(trace);

  const std::string engine = "Engine";
  app.add_option("--prefill", options.speed.prefill_tokens_per_s,
                 "Prompt tokens a second [20000]")
      ->type_name("N")
      ->group(engine);
  app.add_option("--decode", options.speed.decode_tokens_per_s,
                 "Tokens a second and request [30]")
      ->type_name("N")
      ->group(engine);
  app.add_option("--speedup", options.speedup,
                 "Trace seconds a real second [1]")
      ->type_name("X")
      ->group(engine);
  app.add_option("--start-at", fields.start_at,
                 "When trace time begins; lets engines start together [now]")
      ->type_name("UNIX_SECONDS")
      ->group(engine);
  app.add_option("--until", options.until_s,
                 "End at that trace time, done or not")
      ->type_name("SECONDS")
      ->group(engine);

  const std::string memory = "Memory";
  app.add_option(
         "--model", fields.model,
         absl::StrCat("Whose KV cache [llama-3.1-8b]: ", ModelPresetNames()))
      ->type_name("PRESET")
      ->group(memory);
  app.add_option("--scale", options.scale,
                 "Divides the model's bytes so that it fits a small machine "
                 "[512]")
      ->type_name("N")
      ->group(memory);
  app.add_option("--static-share", fields.static_share,
                 "The plain engine's way: this much memory, fixed, no broker")
      ->type_name("SIZE")
      ->group(memory);
  app.add_option("--address", options.address,
                 "The broker's socket, or a directory of sockets")
      ->type_name("PATH")
      ->group(memory);
  app.add_option("--gpu", options.gpu,
                 "Of several brokers: a device's uuid, a prefix of it, or its "
                 "index")
      ->type_name("GPU")
      ->group(memory);
  app.add_option("--backend", options.backend,
                 "The kind of memory that the broker shall lend: host, cuda or "
                 "cuda_ipc [whichever it lends]")
      ->type_name("NAME")
      ->check(CLI::IsMember({"host", "cuda", "cuda_ipc"}))
      ->group(memory);
  app.add_option("--activations", fields.activations,
                 "With cuda: memory besides the KV cache that is taken and given "
                 "back every 100 ms, and declared to the broker")
      ->type_name("SIZE")
      ->group(memory);
  app.add_flag("--guard", options.guard,
               "Memory of its own behind the addresses of pages that it does "
               "not hold, as for kernels that touch those")
      ->group(memory);
  app.add_option("--check-fresh", fields.check_fresh,
                 "Read each page that comes before it is used: it must be all "
                 "zero, or may have data of the same tenant (this uid)")
      ->type_name("zero|tenant")
      ->check(CLI::IsMember({"zero", "tenant"}))
      ->group(memory);
  app.add_option("--min", fields.min, "Guaranteed by the broker")
      ->type_name("SIZE")
      ->group(memory);
  app.add_option("--max", fields.max, "At most from the broker")
      ->type_name("SIZE")
      ->group(memory);
  app.add_option("--weight", options.weight, "Share of what is contended")
      ->type_name("X")
      ->group(memory);

  const std::string output = "Output";
  app.add_option("--requests", options.requests_file,
                 "Write a CSV line a request, in trace milliseconds")
      ->type_name("FILE")
      ->group(output);
  app.add_option("--history", options.history_file,
                 "Append a JSON line for each page mapped and unmapped, to be "
                 "checked afterwards")
      ->type_name("FILE")
      ->group(output);
  app.add_flag("--json", options.json, "Print the summary as one JSON object")
      ->group(output);
  app.add_option("--status-fd", options.status_fd,
                 "Write a JSON line to this descriptor every 100 ms")
      ->type_name("N")
      ->group(output);
  app.add_flag("--print-capacity", options.print_capacity,
               "Print what the trace asks for as JSON, and exit")
      ->group(output);
}

}  // namespace

absl::StatusOr<std::variant<ReplayOptions, HelpText>> ParseReplayOptions(
    int argc, const char* const* argv) {
  ReplayOptions options;
  Fields fields;
  CLI::App app("", "kvbroker-replay");
  AddOptions(app, options, fields);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    return HelpText{app.help()};
  } catch (const CLI::ParseError& error) {
    return absl::InvalidArgumentError(error.what());
  }
  RETURN_IF_ERROR(Complete(fields, options));
  return options;
}

absl::StatusOr<Trace> MakeTrace(const ReplayOptions& options) {
  Trace trace;
  if (IsBuiltin(options)) {
    const std::string name = options.trace.substr(kBuiltinPrefix.size());
    ASSIGN_OR_RETURN(
        trace,
        MakeBuiltinTrace(name, options.seed,
                         options.length_s.value_or(kDefaultTraceSeconds)));
  } else {
    ASSIGN_OR_RETURN(trace, ReadTraceFile(options.trace, options.origin));
    if (options.length_s.has_value()) {
      ASSIGN_OR_RETURN(trace, WithLength(std::move(trace), *options.length_s));
    }
  }
  trace = Shifted(std::move(trace), options.shift_s);
  if (options.rate_scale != 1) {
    ASSIGN_OR_RETURN(trace,
                     RateScaled(trace, options.rate_scale, options.seed));
  }
  if (options.window_s.has_value()) {
    trace = Windowed(std::move(trace), *options.window_s);
  }
  return trace;
}

}  // namespace kvbroker::replay
