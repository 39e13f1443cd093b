#include "client/replay/status_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"

namespace kvbroker::replay {

absl::StatusOr<StatusWriter> StatusWriter::Create(int fd) {
  if (fcntl(fd, F_GETFD) < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("status descriptor is not open: ", fd));
  }
  signal(SIGPIPE, SIG_IGN);  // A reader that leaves does not end the run.
  return StatusWriter(fd);
}

void StatusWriter::Write(std::string_view line) {
  if (fd_ < 0) return;
  // O_NONBLOCK would change the descriptor for its other owners, too. A pipe
  // that polls as writable takes PIPE_BUF bytes at once.
  pollfd room = {.fd = fd_, .events = POLLOUT, .revents = 0};
  if (poll(&room, 1, 0) <= 0) return;
  ssize_t written;
  do {
    written = write(fd_, line.data(), line.size());
  } while (written < 0 && errno == EINTR);
  if (written < 0) fd_ = -1;
}

}  // namespace kvbroker::replay
