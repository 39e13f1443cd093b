// kvctl: shows and sets how engines share a GPU's KV memory.
//
// This file reads the environment and the terminal, wires the parts and ends
// the process; everything else is beside it.
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/clock.h"
#include "broker/base/clock.h"
#include "broker/base/status_macros.h"
#include "client/address/broker_address.h"
#include "client/cli/command_line.h"
#include "client/cli/fleet.h"
#include "client/cli/grpc_admin_client.h"
#include "client/cli/operands.h"
#include "client/cli/verbs.h"

namespace kvbroker::cli {
namespace {

std::string Environment(const char* name) {
  const char* value = getenv(name);
  return value == nullptr ? "" : value;
}

// Ends at once, in the middle of a call too; nothing needs undoing.
void EndQuietly(int) { _exit(kExitDone); }

absl::StatusOr<Fleet> ConnectFleet(const Invocation& invocation) {
  std::string timeout_text = Environment("KVCACHED_IPC_TIMEOUT");
  ASSIGN_OR_RETURN(
      absl::Duration timeout,
      ParseExchangeTimeout(timeout_text.empty() ? "60" : timeout_text));
  client::AddressOptions options;
  options.address = invocation.address.empty() ? Environment("KVBROKER_ADDRESS")
                                               : invocation.address;
  options.gpu = invocation.gpu;
  ASSIGN_OR_RETURN(std::vector<client::BrokerAddress> addresses,
                   client::FindBrokers(options));
  std::vector<std::unique_ptr<AdminClient>> brokers;
  for (const client::BrokerAddress& address : addresses) {
    brokers.push_back(MakeGrpcAdminClient(address, timeout));
  }
  return Fleet(std::move(brokers));
}

int Run(int argc, char** argv) {
  const bool terminal = isatty(STDOUT_FILENO);
  Console console = {.out = std::cout,
                     .err = std::cerr,
                     .color = terminal && Environment("NO_COLOR").empty(),
                     .redraw = terminal};

  auto parsed = ParseCommandLine(argc, argv);
  if (!parsed.ok()) return ReportFailure(parsed.status(), console);
  if (const auto* information = std::get_if<Information>(&*parsed)) {
    (information->asked_for ? console.out : console.err) << information->text;
    return information->asked_for ? kExitDone : kExitUsage;
  }
  const Invocation& invocation = std::get<Invocation>(*parsed);

  // Before gRPC starts: its own remarks would mix with ours.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  absl::StatusOr<Fleet> fleet = ConnectFleet(invocation);
  if (!fleet.ok()) {
    int exit = ReportFailure(fleet.status(), console);
    if (absl::IsNotFound(fleet.status())) SuggestBroker(console);
    return exit;
  }
  if (std::holds_alternative<WatchCommand>(invocation.command)) {
    signal(SIGINT, EndQuietly);
    signal(SIGTERM, EndQuietly);
  }
  Pacing pacing = {.clock = Clock::Steady(),
                   .sleep = [](absl::Duration duration) {
                     absl::SleepFor(duration);
                     return true;
                   }};
  return RunCommand(invocation.command, *fleet, console, pacing);
}

}  // namespace
}  // namespace kvbroker::cli

int main(int argc, char** argv) {
  int exit = kvbroker::cli::Run(argc, argv);
  std::cout.flush();
  if (!std::cout) {
    std::cerr << "kvctl: cannot write the output\n";
    exit = kvbroker::cli::kExitFailed;
  }
  // Taking gRPC down in order costs more time than everything before it.
  _exit(exit);
}
