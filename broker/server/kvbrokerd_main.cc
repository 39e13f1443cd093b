// kvbrokerd: the broker as a program.
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/config/command_line.h"
#include "broker/server/composition.h"
#include "broker/server/detachment.h"
#include "broker/server/device_lock.h"
#include "proto/version.h"

namespace kvbroker {
namespace {

// To itself: no engine has been there for long enough.
constexpr int kIdle = SIGALRM;

enum ExitStatus { kStopped = 0, kFailed = 1, kUsage = 2, kDeviceTaken = 3 };

// Tells systemd, where it asked to be told.
void Notify(std::string_view state) {
  const char* path = std::getenv("NOTIFY_SOCKET");
  if (path == nullptr || (path[0] != '/' && path[0] != '@')) return;
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  const size_t length = strlen(path);
  if (length >= sizeof(address.sun_path)) return;
  memcpy(address.sun_path, path, length);
  // An abstract name begins with a zero byte.
  if (path[0] == '@') address.sun_path[0] = '\0';
  UniqueFd fd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL,
         reinterpret_cast<const sockaddr*>(&address),
         offsetof(sockaddr_un, sun_path) + length);
}

int Fail(const absl::Status& status, ExitStatus exit_status) {
  fprintf(stderr, "kvbrokerd: %s\n", std::string(status.message()).c_str());
  return exit_status;
}

// Where a detached broker's streams go; empty: nowhere.
std::string DetachedLog(const BrokerConfig& config) {
  const std::string directory = StateDirectory(config);
  if (directory.empty()) return "";
  std::error_code ignored;  // the state file's maker says what is wrong
  std::filesystem::create_directories(
      std::filesystem::path(directory).parent_path(), ignored);
  mkdir(directory.c_str(), 0700);
  return directory + "/kvbrokerd.log";
}

// What the first process of a detached broker that failed leaves with.
int Fail(Detachment& detachment, const absl::Status& status,
         ExitStatus exit_status) {
  std::string served;
  if (absl::optional<absl::Cord> socket = status.GetPayload(kHolderSocket)) {
    served = absl::StrCat("served-at ", std::string(*socket), "\n");
  }
  Fail(status, exit_status);
  detachment.End(exit_status, served,
                 absl::StrCat("kvbrokerd: ", status.message(), "\n"));
  return exit_status;
}

int Run(int argc, char** argv) {
  absl::StatusOr<CommandLine> line = ReadCommandLine(
      argc, argv, [](const char* name) { return std::getenv(name); }, kVersion);
  if (!line.ok()) return Fail(line.status(), kUsage);
  if (line->print) {
    fputs(line->print->c_str(), stdout);
    return kStopped;
  }
  std::optional<Detachment> detachment;
  if (line->detach) {
    absl::StatusOr<Detachment> begun =
        Detachment::Begin(DetachedLog(line->config));
    if (!begun.ok()) return Fail(begun.status(), kFailed);
    detachment = *std::move(begun);
  }

  // Waited for below; blocked before there are threads, so that every one
  // inherits it.
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  for (int signal : {SIGTERM, SIGINT, kIdle}) sigaddset(&stop_signals, signal);
  if (!detachment) sigaddset(&stop_signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &stop_signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  // On by default where Abseil was built with assertions, as Debian's is: every
  // lock, gRPC's included, then takes a global one and walks a graph.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);

  BrokerOptions options;
  options.idle = [] { kill(getpid(), kIdle); };
  absl::StatusOr<std::unique_ptr<RunningBroker>> broker =
      RunningBroker::Start(line->config, std::move(options));
  if (!broker.ok()) {
    const ExitStatus status =
        absl::IsAlreadyExists(broker.status()) ? kDeviceTaken : kFailed;
    return detachment ? Fail(*detachment, broker.status(), status)
                      : Fail(broker.status(), status);
  }
  const std::string text =
      "kvbrokerd ready: " + (*broker)->description() + "\n";
  if (line->ready_fd >= 0) {
    UniqueFd ready(line->ready_fd);
    if (write(ready.get(), text.data(), text.size()) < 0) {
      return Fail(ErrnoToStatus(errno, "write to --ready-fd"), kFailed);
    }
  }
  if (detachment) detachment->End(kStopped, text, "");
  Notify("READY=1");

  int received;
  do {
    sigwait(&stop_signals, &received);
    // Somebody may have come since.
  } while (received == kIdle && !(*broker)->LeaveIfIdle());
  Notify("STOPPING=1");
  (*broker)->Stop();
  return kStopped;
}

}  // namespace
}  // namespace kvbroker

int main(int argc, char** argv) { return kvbroker::Run(argc, argv); }
