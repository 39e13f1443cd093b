#include "broker/config/command_line.h"

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <filesystem>
#include <map>
#include <system_error>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "broker/base/status_macros.h"
#include "broker/config/config_file.h"

namespace kvbroker {
namespace {

constexpr char kDescription[] =
    "kvbrokerd lends the memory of one GPU (or, without one, of this machine) "
    "to LLM engines,\nas pages of KV cache that go where the load is. One "
    "broker serves one device.";

constexpr char kFooter[] =
    R"(Every setting is also a key of the YAML file (policy-hold-off is hold_off below
policy:) and an environment variable (KVBROKERD_POLICY_HOLD_OFF). Flags win over
the environment, that over the file.

Signals: SIGTERM and SIGINT stop it; engines run on with what they hold.
Exit status: 0 stopped as asked, 1 failed, 2 usage, 3 another broker serves the
device.

Examples:
  kvbrokerd                              what this machine has, for this user
  kvbrokerd --backend host --capacity 4G --socket-dir /tmp/kv
  kvbrokerd --config /etc/kvbroker/kvbrokerd.yaml --print-config)";

std::string FlagName(const Setting& setting) {
  return absl::StrCat(
      "--", absl::StrReplaceAll(setting.key, {{".", "-"}, {"_", "-"}}));
}

// CLI11 says of an unknown flag only that it was not expected.
absl::Status UnknownFlag(const std::string& flag) {
  std::vector<std::string> known = {"--config", "--print-config", "--ready-fd",
                                    "--detach", "--help", "--version"};
  for (const Setting& setting : Settings()) known.push_back(FlagName(setting));
  return absl::InvalidArgumentError(
      absl::StrCat("unknown argument ", flag, SuggestKey(flag, known)));
}

void MakeAbsolute(std::string& path) {
  if (path.empty()) return;
  std::error_code error;  // stays as it is where nobody knows where we are
  const std::filesystem::path absolute = std::filesystem::absolute(path, error);
  if (!error) path = absolute;
}

}  // namespace

absl::StatusOr<CommandLine> ReadCommandLine(
    int argc, const char* const* argv,
    const std::function<const char*(const char*)>& environment,
    const std::string& version) {
  CLI::App app(kDescription, "kvbrokerd");
  app.set_help_flag("-h,--help", "Print this and exit.");
  app.set_version_flag("--version", "kvbrokerd " + version,
                       "Print the version and exit.");
  app.footer(kFooter);
  app.allow_extras();

  std::string config_file;
  app.add_option("--config", config_file, "YAML file with settings.")
      ->type_name("FILE");
  bool print_config = false;
  app.add_flag("--print-config", print_config,
               "Print the settings in force as YAML and exit.");
  CommandLine line;
  app.add_option("--ready-fd", line.ready_fd,
                 "Write a line to this descriptor when ready.")
      ->type_name("FD")
      ->check(CLI::NonNegativeNumber);

  app.add_flag("--detach", line.detach,
               "Go on in the background, in a session of its own; returns when "
               "ready, or with\nwhat failed. Logs to kvbrokerd.log in the state "
               "directory.");

  std::map<std::string, std::string> values;
  std::map<std::string, CLI::Option*> options;
  for (const Setting& setting : Settings()) {
    // One line for the meaning, one for what is allowed and the default.
    std::string standard = setting.write(BrokerConfig());
    if (setting.key == absl::string_view("headroom")) {
      standard = FormatBytes(BrokerConfig().headroom);
    }
    options[setting.key] =
        app.add_option(FlagName(setting), values[setting.key],
                       absl::StrCat(setting.meaning, "\n(", setting.allowed,
                                    standard.empty() ? "" : "; default ",
                                    standard, ")"))
            ->type_name("");
  }

  // CLI11 reports by exception; here is where they end.
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    line.print = app.help();
    return line;
  } catch (const CLI::CallForVersion&) {
    line.print = absl::StrCat("kvbrokerd ", version, "\n");
    return line;
  } catch (const CLI::ParseError& error) {
    return absl::InvalidArgumentError(error.what());
  }
  if (!app.remaining().empty()) return UnknownFlag(app.remaining().front());

  if (config_file.empty()) {
    const char* named = environment("KVBROKERD_CONFIG");
    if (named != nullptr) config_file = named;
  }
  if (!config_file.empty()) {
    RETURN_IF_ERROR(ReadConfigFile(config_file, line.config));
  }
  RETURN_IF_ERROR(ReadEnvironment(environment, line.config));
  for (const Setting& setting : Settings()) {
    if (options[setting.key]->count() == 0) continue;
    RETURN_IF_ERROR(ReadSetting(setting, values[setting.key],
                                absl::StrCat(FlagName(setting), ": "),
                                line.config));
  }
  if (line.detach && line.ready_fd >= 0) {
    return absl::InvalidArgumentError(
        "--ready-fd and --detach do not go together: that the program returns "
        "says that the broker is ready");
  }
  if (line.detach) {
    for (std::string* path :
         {&line.config.socket_dir, &line.config.lock_dir, &line.config.log_file,
          &line.config.history_file}) {
      MakeAbsolute(*path);
    }
    if (line.config.state_dir != "none") MakeAbsolute(line.config.state_dir);
  }
  if (print_config) line.print = PrintConfig(line.config);
  return line;
}

}  // namespace kvbroker
