#include "client/cli/command_line.h"

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/base/bytes.h"
#include "broker/base/status_macros.h"
#include "client/cli/operands.h"
#include "proto/version.h"

namespace kvbroker::cli {
namespace {

std::string Version() { return absl::StrCat("kvctl ", kVersion); }

constexpr char kFooter[] =
    "\nSizes: 1024 (bytes), 512M, 2GB, 1T, 100_000; suffixes count in 1024s; 0 "
    "allows no KV memory.\n"
    "Exit status: 0 done, 1 failed, 2 wrong usage.\n"
    "Environment: KVBROKER_ADDRESS (as --address), KVCACHED_IPC_TIMEOUT, "
    "NO_COLOR.";

// What the options of all verbs are parsed into, as text.
struct Fields {
  std::string address, gpu;
  std::vector<std::string> names;
  std::string name, tenant;
  std::string size, percent, min, max, weight;
  std::string interval = "1", timeout;
  bool json = false, preset = false, wait = false, force = false;
};

class Grammar {
 public:
  explicit Grammar(Fields& fields) : f_(fields) {
    app_.name("kvctl");
    app_.set_version_flag("--version", Version(), "Print the version and exit");
    app_.add_option("--address", f_.address,
                    "A broker's socket, or a directory of sockets")
        ->type_name("PATH");
    app_.add_option("--gpu", f_.gpu,
                    "Only this GPU: uuid, unique prefix of it, or index")
        ->type_name("GPU");
    app_.footer(kFooter);
    app_.get_formatter()->label("SUBCOMMAND", "VERB");
    app_.get_formatter()->label("Subcommands", "Verbs");
    app_.get_formatter()->label("REQUIRED", "");
    // What nobody expects is ours to name, not CLI11's. Verbs inherit both.
    app_.allow_extras();
    app_.fallthrough();  // --address and --gpu are fine after the verb, too.
    app_.require_subcommand(0, 1);  // So `list watch` names an instance.

    list_ = Verb("list", "Show instances and what they hold");
    AddNames(list_);
    AddJson(list_);

    limit_ = Verb("limit", "Set how much KV memory an instance may hold");
    AddName(limit_);
    limit_->add_option("SIZE", f_.size, "The limit: 512M, 2GB, 1024, 0")
        ->required()
        ->type_name("");
    AddLimitFlags(limit_);

    percent_ =
        Verb("limit-percent", "The same, in percent of the instance's own GPU");
    AddName(percent_);
    percent_->add_option("PERCENT", f_.percent, "The limit: 0 to 100")
        ->required()
        ->type_name("");
    AddLimitFlags(percent_);

    watch_ = Verb("watch", "Show the list again and again until Ctrl-C");
    watch_
        ->add_option("-n,--interval", f_.interval,
                     "Seconds from one list to the next (1)")
        ->type_name("SEC");
    AddNames(watch_);
    AddJson(watch_);

    policy_ = Verb("policy", "Set guarantee, limit and weight of an instance");
    AddName(policy_);
    policy_->add_option("--min", f_.min, "Guaranteed: SIZE or PERCENT%")
        ->type_name("AMOUNT");
    policy_->add_option("--max", f_.max, "Limit: SIZE or PERCENT%")
        ->type_name("AMOUNT");
    policy_
        ->add_option("--weight", f_.weight,
                     "Share of what is contended, relative to the others")
        ->type_name("W");
    AddLimitFlags(policy_);

    delete_ = Verb("delete", "Forget an instance that has no process left");
    AddName(delete_);
    AddTenant(delete_);
    delete_->add_flag("--force", f_.force,
                      "End its processes where it has some");

    explain_ =
        Verb("explain", "Say why an instance holds and waits as it does");
    AddName(explain_);
    AddTenant(explain_);
    AddJson(explain_);
  }

  absl::StatusOr<std::variant<Invocation, Information>> Parse(
      int argc, const char* const* argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::CallForVersion&) {
      return Information{Version() + "\n"};
    } catch (const CLI::CallForHelp&) {
      return Information{app_.help()};
    } catch (const CLI::ParseError& error) {
      return Usage(error.what());
    }
    if (app_.get_subcommands().empty()) {
      std::vector<std::string> extra = app_.remaining();
      if (extra.empty()) return Information{app_.help(), /*asked_for=*/false};
      return UnknownVerb(extra.front());
    }
    if (std::vector<std::string> extra = app_.remaining(/*recurse=*/true);
        !extra.empty()) {
      return Usage(absl::StrCat("not expected here: ", extra.front()));
    }
    ASSIGN_OR_RETURN(Command command, ToCommand());
    return Invocation{f_.address, f_.gpu, std::move(command)};
  }

 private:
  CLI::App* Verb(const std::string& name, const std::string& description) {
    CLI::App* verb = app_.add_subcommand(name, description);
    verb->footer("");
    return verb;
  }
  void AddName(CLI::App* verb) {
    verb->add_option("NAME", f_.name, "The instance")
        ->required()
        ->type_name("");
  }
  void AddNames(CLI::App* verb) {
    verb->add_option("NAME", f_.names, "Only these instances")->type_name("");
  }
  void AddTenant(CLI::App* verb) {
    verb->add_option("--tenant", f_.tenant,
                     "Whose instance, where several have this name")
        ->type_name("TENANT");
  }
  void AddJson(CLI::App* verb) {
    verb->add_flag("--json", f_.json, "For programs");
  }
  void AddLimitFlags(CLI::App* verb) {
    AddTenant(verb);
    verb->add_flag("--preset", f_.preset,
                   "Also for a name that does not exist yet");
    CLI::Option* wait = verb->add_flag(
        "--wait", f_.wait, "Return only when no more than the limit is held");
    verb->add_option("--timeout", f_.timeout,
                     "With --wait: fail after this long")
        ->type_name("SEC")
        ->needs(wait);
  }

  absl::Status Usage(const std::string& what) {
    std::vector<CLI::App*> verbs = app_.get_subcommands();
    return absl::InvalidArgumentError(absl::StrCat(
        what, "\nsee: kvctl ",
        verbs.empty() ? "" : verbs.front()->get_name() + " ", "--help"));
  }

  absl::Status UnknownVerb(const std::string& word) {
    std::vector<std::string> names;
    for (const CLI::App* verb :
         app_.get_subcommands([](const CLI::App*) { return true; })) {
      names.push_back(verb->get_name());
    }
    return absl::InvalidArgumentError(absl::StrCat(
        word.starts_with("-") ? "unknown option: \"" : "unknown verb: \"", word,
        "\"; verbs: ", absl::StrJoin(names, ", "), "\nsee: kvctl --help"));
  }

  absl::StatusOr<Command> ToCommand() {
    const CLI::App* verb = app_.get_subcommands().front();
    if (verb == list_) return ListCommand{f_.names, f_.json};
    if (verb == watch_) {
      ASSIGN_OR_RETURN(absl::Duration interval,
                       ParseSeconds(f_.interval, absl::Milliseconds(100)));
      return WatchCommand{f_.names, interval, f_.json};
    }
    if (verb == delete_) return DeleteCommand{f_.name, f_.tenant, f_.force};
    if (verb == explain_) return ExplainCommand{f_.name, f_.tenant, f_.json};

    PolicyCommand command = {
        .change = {.name = f_.name, .tenant = f_.tenant, .preset = f_.preset},
        .wait = f_.wait};
    if (verb == limit_) {
      ASSIGN_OR_RETURN(command.change.max, ParseBytes(f_.size));
    } else if (verb == percent_) {
      ASSIGN_OR_RETURN(command.change.max, ParsePercent(f_.percent));
    } else {
      RETURN_IF_ERROR(ReadPolicy(command.change));
    }
    if (!f_.timeout.empty()) {
      ASSIGN_OR_RETURN(command.timeout,
                       ParseSeconds(f_.timeout, absl::ZeroDuration()));
    }
    return command;
  }

  absl::Status ReadPolicy(PolicyChange& change) {
    if (policy_->count("--min") + policy_->count("--max") +
            policy_->count("--weight") ==
        0) {
      return Usage("nothing to set: give --min, --max or --weight");
    }
    if (policy_->count("--min") > 0) {
      ASSIGN_OR_RETURN(change.min, ParseAmount(f_.min));
    }
    if (policy_->count("--max") > 0) {
      ASSIGN_OR_RETURN(change.max, ParseAmount(f_.max));
    }
    if (policy_->count("--weight") > 0) {
      ASSIGN_OR_RETURN(change.weight, ParseWeight(f_.weight));
    }
    return absl::OkStatus();
  }

  Fields& f_;
  CLI::App app_{"Shows and sets how engines share the KV memory of GPUs."};
  CLI::App *list_, *limit_, *percent_, *watch_, *policy_, *delete_, *explain_;
};

}  // namespace

absl::StatusOr<std::variant<Invocation, Information>> ParseCommandLine(
    int argc, const char* const* argv) {
  Fields fields;
  return Grammar(fields).Parse(argc, argv);
}

}  // namespace kvbroker::cli
