// kvbrokerd: the broker as a program.
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/config/command_line.h"
#include "broker/server/composition.h"
#include "proto/version.h"

namespace kvbroker {
namespace {

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

int Run(int argc, char** argv) {
  // Waited for below; blocked first, so that every thread inherits it.
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  for (int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&stop_signals, signal);
  pthread_sigmask(SIG_BLOCK, &stop_signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  // On by default where Abseil was built with assertions, as Debian's is: every
  // lock, gRPC's included, then takes a global one and walks a graph.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);

  absl::StatusOr<CommandLine> line = ReadCommandLine(
      argc, argv, [](const char* name) { return std::getenv(name); }, kVersion);
  if (!line.ok()) return Fail(line.status(), kUsage);
  if (line->print) {
    fputs(line->print->c_str(), stdout);
    return kStopped;
  }

  BrokerOptions options;
  options.idle = [] { kill(getpid(), SIGTERM); };
  absl::StatusOr<std::unique_ptr<RunningBroker>> broker =
      RunningBroker::Start(line->config, std::move(options));
  if (!broker.ok()) {
    return Fail(broker.status(), absl::IsAlreadyExists(broker.status())
                                     ? kDeviceTaken
                                     : kFailed);
  }
  if (line->ready_fd >= 0) {
    const std::string text =
        "kvbrokerd ready: " + (*broker)->description() + "\n";
    UniqueFd ready(line->ready_fd);
    if (write(ready.get(), text.data(), text.size()) < 0) {
      return Fail(ErrnoToStatus(errno, "write to --ready-fd"), kFailed);
    }
  }
  Notify("READY=1");

  int received;
  sigwait(&stop_signals, &received);
  Notify("STOPPING=1");
  (*broker)->Stop();
  return kStopped;
}

}  // namespace
}  // namespace kvbroker

int main(int argc, char** argv) { return kvbroker::Run(argc, argv); }
