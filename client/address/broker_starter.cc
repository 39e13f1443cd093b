#include "client/address/broker_starter.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "broker/base/status_macros.h"

namespace kvbroker::client {
namespace {

// kvbrokerd's exit status where another broker serves the device.
constexpr int kDeviceTaken = 3;
constexpr char kIdleExit[] = "30s";
// Between two starts, where the first was of no use: the next is twice as long.
constexpr absl::Duration kShortestPause = absl::Milliseconds(250);
constexpr absl::Duration kLongestPause = absl::Seconds(5);
// The one that has the device may be about to leave, or to listen.
constexpr absl::Duration kTakenPause = absl::Milliseconds(100);
constexpr absl::Duration kLongestTakenPause = absl::Seconds(1);
// A broker that has lived for so long is worth a new one at once.
constexpr absl::Duration kHasLived = absl::Seconds(10);
// What is read of the words that a program leaves with.
constexpr size_t kMaxWords = 4096;

// Meant for the process that starts a broker, not for the broker: what is put
// into it, which GPUs it sees, and what it tells its supervisor.
constexpr absl::string_view kNotPassedOn[] = {
    "LD_PRELOAD",    "CUDA_VISIBLE_DEVICES", "NOTIFY_SOCKET", "WATCHDOG_PID",
    "WATCHDOG_USEC", "LISTEN_PID",           "LISTEN_FDS",    "LISTEN_FDNAMES"};

std::vector<std::string> EnvironmentToPassOn() {
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const absl::string_view text = *entry;
    if (!absl::c_linear_search(kNotPassedOn, text.substr(0, text.find('=')))) {
      environment.emplace_back(text);
    }
  }
  return environment;
}

bool Has(const std::vector<std::string>& environment, absl::string_view name) {
  return absl::c_any_of(environment, [&](absl::string_view entry) {
    return absl::ConsumePrefix(&entry, name) && absl::StartsWith(entry, "=");
  });
}

// Memory for what a program says, above the standard streams.
absl::StatusOr<UniqueFd> Words(const char* name) {
  UniqueFd fd(memfd_create(name, MFD_CLOEXEC));
  if (fd && fd.get() <= STDERR_FILENO) {
    fd.Reset(fcntl(fd.get(), F_DUPFD_CLOEXEC, STDERR_FILENO + 1));
  }
  if (!fd) return ErrnoToStatus(errno, "memfd_create");
  return fd;
}

std::string Read(const UniqueFd& words) {
  std::string text(kMaxWords, '\0');
  const ssize_t size = pread(words.get(), text.data(), text.size(), 0);
  text.resize(size > 0 ? static_cast<size_t>(size) : 0);
  return std::string(absl::StripAsciiWhitespace(text));
}

// As execve wants them.
std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& string : strings) pointers.push_back(string.data());
  pointers.push_back(nullptr);
  return pointers;
}

// Frees what posix_spawn is told.
struct SpawnSettings {
  SpawnSettings() {
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
  }
  ~SpawnSettings() {
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
  }
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
};

// In /tmp anybody can make a directory, or a link, of the name.
absl::Status MakeDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return ErrnoToStatus(
        errno, absl::StrCat("no broker can be started: mkdir of the per-user "
                            "socket directory ",
                            path));
  }
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) {
    return ErrnoToStatus(errno, "stat of " + path);
  }
  if (S_ISDIR(info.st_mode) && info.st_uid == geteuid()) {
    return absl::OkStatus();
  }
  return absl::PermissionDeniedError(
      absl::StrCat("no broker can be started: the per-user socket directory is "
                   "no directory of this user's, remove it or set "
                   "XDG_RUNTIME_DIR: ",
                   path));
}

// Found from wherever this process will be.
BrokerStarter::Options WithAbsolutePaths(BrokerStarter::Options options) {
  for (std::string* path : {&options.program, &options.directory}) {
    std::error_code error;  // stays as it is where nobody knows where we are
    const std::filesystem::path absolute =
        std::filesystem::absolute(*path, error);
    if (!error) *path = absolute;
  }
  return options;
}

}  // namespace

BrokerStarter::BrokerStarter(Options options, Clock& clock)
    : options_(WithAbsolutePaths(std::move(options))),
      clock_(clock),
      environment_(EnvironmentToPassOn()) {}

absl::Status BrokerStarter::Step() {
  MutexLock lock(&mu_);
  return StepLocked();
}

absl::Status BrokerStarter::StepLocked() {
  if (starting_ == 0) {
    if (clock_.Now() < next_) return last_;
    last_ = Begin();
    if (!last_.ok()) return last_;
  }
  int status;
  const pid_t ended = waitpid(starting_, &status, WNOHANG);
  if (ended == 0 || (ended < 0 && errno == EINTR)) {
    return absl::UnavailableError(absl::StrCat(
        "a broker is being started: ", options_.program, ", pid ", starting_));
  }
  // Where this process has others reap its children, or nobody, what was said
  // has to do.
  if (ended < 0) status = Read(error_).empty() ? 0 : 1 << 8;
  starting_ = 0;
  last_ = Ended(status);
  out_.Reset();
  error_.Reset();
  const absl::Status now = last_;
  // Until it is time for the next start.
  if (last_.ok()) {
    last_ = absl::UnavailableError(absl::StrCat(
        "the broker that was started has ended at once, and is started again "
        "in a while: ",
        options_.program));
  }
  return now;
}

void BrokerStarter::Forget() {
  MutexLock lock(&mu_);
  if (starting_ == 0) return;
  last_ = absl::UnavailableError("a broker has been started just now");
  const pid_t first = std::exchange(starting_, 0);
  try {
    // Nobody else would take its first process off this one's hands.
    std::thread([first] {
      while (waitpid(first, nullptr, 0) < 0 && errno == EINTR) {
      }
    }).detach();
  } catch (const std::system_error&) {
    // No thread can be had: it is left for whoever waits for children.
  }
}

absl::Status BrokerStarter::Begin() {
  const absl::Time now = clock_.Now();
  pause_ = now - began_ > kHasLived
               ? absl::ZeroDuration()
               : std::clamp(2 * pause_, kShortestPause, kLongestPause);
  began_ = now;
  next_ = now + pause_;
  holder_socket_.clear();
  RETURN_IF_ERROR(MakeDirectory(options_.directory));
  ASSIGN_OR_RETURN(out_, Words("kvbrokerd stdout"));
  ASSIGN_OR_RETURN(error_, Words("kvbrokerd stderr"));

  std::vector<std::string> arguments = {options_.program, "--detach",
                                        "--socket-dir", options_.directory};
  const auto add = [&](const char* flag, std::string value,
                       absl::string_view unless) {
    if (!unless.empty() && Has(environment_, unless)) return;
    arguments.push_back(flag);
    arguments.push_back(std::move(value));
  };
  // The same for all who find it there.
  add("--state-dir", options_.directory + "/state", "KVBROKERD_STATE_DIR");
  add("--idle-exit", kIdleExit, "KVBROKERD_IDLE_EXIT");
  add("--log-level", "warn", "KVBROKERD_LOG_LEVEL");
  if (!options_.backend.empty()) add("--backend", options_.backend, "");
  if (!options_.gpu.empty()) add("--gpu", options_.gpu, "");

  SpawnSettings settings;
  auto* const actions = &settings.actions;
  posix_spawn_file_actions_addopen(actions, STDIN_FILENO, "/dev/null", O_RDONLY,
                                   0);
  posix_spawn_file_actions_adddup2(actions, out_.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(actions, error_.get(), STDERR_FILENO);
  posix_spawn_file_actions_addclosefrom_np(actions, STDERR_FILENO + 1);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&settings.attributes, &none);
  posix_spawnattr_setsigdefault(&settings.attributes, &all);
  // Who ends this process's group while the broker starts does not reach it.
  posix_spawnattr_setflags(&settings.attributes, POSIX_SPAWN_SETSID |
                                                     POSIX_SPAWN_SETSIGMASK |
                                                     POSIX_SPAWN_SETSIGDEF);
  // posix_spawn copies no memory, however much this process has, and runs no
  // handlers of fork.
  const int error =
      posix_spawn(&starting_, options_.program.c_str(), actions,
                  &settings.attributes, Pointers(arguments).data(),
                  Pointers(environment_).data());
  if (error == 0) return absl::OkStatus();
  starting_ = 0;
  return ErrnoToStatus(
      error, absl::StrCat("no broker can be started: ", options_.program));
}

absl::Status BrokerStarter::Ended(int status) {
  const bool exited = WIFEXITED(status);
  if (exited && WEXITSTATUS(status) == 0) return absl::OkStatus();
  std::string said = Read(error_);
  absl::string_view words = said;
  absl::ConsumePrefix(&words, "kvbrokerd: ");
  if (exited && WEXITSTATUS(status) == kDeviceTaken) {
    std::string out = Read(out_);
    absl::string_view socket = out;
    if (absl::ConsumePrefix(&socket, "served-at ")) {
      holder_socket_ = std::string(socket);
    }
    next_ = clock_.Now() + std::clamp(pause_, kTakenPause, kLongestTakenPause);
    return absl::AlreadyExistsError(words);
  }
  // Whatever it was, the start is what failed, and may succeed another time.
  return absl::FailedPreconditionError(absl::StrCat(
      "no broker could be started (", options_.program, ", ",
      exited ? "exit status " : "signal ",
      exited ? WEXITSTATUS(status) : WTERMSIG(status), "): ", words));
}

absl::StatusOr<bool> AutostartAllowed(EnvironmentLookup environment) {
  const char* value = environment("KVBROKER_AUTOSTART");
  if (value == nullptr) return true;
  const std::string word = absl::AsciiStrToLower(value);
  for (absl::string_view yes : {"", "1", "true", "yes", "on"}) {
    if (word == yes) return true;
  }
  for (absl::string_view no : {"0", "false", "no", "off"}) {
    if (word == no) return false;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("KVBROKER_AUTOSTART must be 1, true, yes, on, 0, false, no "
                   "or off; got \"",
                   value, "\""));
}

}  // namespace kvbroker::client
