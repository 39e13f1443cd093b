#include "broker/server/detachment.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace kvbroker {
namespace {

// A log that was left with more than this makes way for a new one.
constexpr off_t kLargeLog = 1 << 20;
// The report: exit status, what goes to stdout, what goes to stderr.
constexpr char kSeparator = '\0';

void WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(fd, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    text.remove_prefix(static_cast<size_t>(written));
  }
}

std::string ReadAll(int fd) {
  std::string text;
  char buffer[4096];
  while (true) {
    const ssize_t size = read(fd, buffer, sizeof(buffer));
    if (size < 0 && errno == EINTR) continue;
    if (size <= 0) return text;
    text.append(buffer, static_cast<size_t>(size));
  }
}

// The first process from here on.
[[noreturn]] void LeaveWith(const std::string& report) {
  const size_t first = report.find(kSeparator);
  const size_t second =
      first == std::string::npos ? first : report.find(kSeparator, first + 1);
  int status;
  if (second == std::string::npos ||
      !absl::SimpleAtoi(report.substr(0, first), &status)) {
    WriteAll(STDERR_FILENO, "kvbrokerd: ended before it was ready\n");
    _exit(1);
  }
  WriteAll(STDOUT_FILENO, report.substr(first + 1, second - first - 1));
  WriteAll(STDERR_FILENO, report.substr(second + 1));
  _exit(status);
}

// All above stderr but `kept`.
void CloseOthers(int kept) {
  const unsigned keep = static_cast<unsigned>(kept);
  if ((keep <= 3 || close_range(3, keep - 1, 0) == 0) &&
      close_range(keep + 1, ~0u, 0) == 0) {
    return;
  }
  // Kernels before 5.9.
  std::vector<int> open;
  if (DIR* folder = opendir("/proc/self/fd")) {
    while (const dirent* entry = readdir(folder)) {
      int fd;
      if (absl::SimpleAtoi(entry->d_name, &fd)) open.push_back(fd);
    }
    closedir(folder);
  }
  for (int fd : open) {
    if (fd > STDERR_FILENO && fd != kept) close(fd);
  }
}

void OpenStreams(const std::string& log_file) {
  UniqueFd nothing(open("/dev/null", O_RDWR));
  UniqueFd log;
  if (!log_file.empty()) {
    struct stat info;
    if (lstat(log_file.c_str(), &info) == 0 && info.st_size > kLargeLog) {
      rename(log_file.c_str(), absl::StrCat(log_file, ".old").c_str());
    }
    log.Reset(open(log_file.c_str(),
                   O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_NOCTTY |
                       O_NONBLOCK | O_CLOEXEC,
                   0600));
  }
  const int out = log ? log.get() : nothing.get();
  dup2(nothing.get(), STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  dup2(out, STDERR_FILENO);
}

}  // namespace

absl::StatusOr<Detachment> Detachment::Begin(const std::string& log_file) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return ErrnoToStatus(errno, "pipe");
  UniqueFd reader(ends[0]), report(ends[1]);
  const pid_t middle = fork();
  if (middle < 0) return ErrnoToStatus(errno, "fork");
  if (middle > 0) {
    report.Reset();
    while (waitpid(middle, nullptr, 0) < 0 && errno == EINTR) {
    }
    LeaveWith(ReadAll(reader.get()));
  }
  reader.Reset();
  setsid();
  const pid_t last = fork();
  if (last != 0) _exit(last < 0);
  // A session's leader could get a terminal; this one is none.
  for (int number = 1; number < NSIG; ++number) {
    if (number != SIGKILL && number != SIGSTOP) signal(number, SIG_DFL);
  }
  signal(SIGHUP, SIG_IGN);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  if (chdir("/") != 0) return ErrnoToStatus(errno, "chdir to /");
  // Out of the way of the standard streams.
  if (report.get() <= STDERR_FILENO) {
    report.Reset(fcntl(report.get(), F_DUPFD_CLOEXEC, STDERR_FILENO + 1));
  }
  CloseOthers(report.get());
  OpenStreams(log_file);
  return Detachment(std::move(report));
}

void Detachment::End(int exit_status, std::string_view out,
                     std::string_view error) {
  signal(SIGPIPE, SIG_IGN);  // the first process may have been killed
  const auto view = [](std::string_view text) {
    return absl::string_view(text.data(), text.size());
  };
  const absl::string_view separator(&kSeparator, 1);
  WriteAll(report_.get(), absl::StrCat(exit_status, separator, view(out),
                                       separator, view(error)));
  report_.Reset();
}

}  // namespace kvbroker
