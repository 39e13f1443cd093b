#include "broker/transport/unix_listener.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

constexpr int kBacklog = 128;

constexpr mode_t kGroupMayEnter = S_IXGRP;
constexpr mode_t kAnybodyMayEnter = S_IXOTH;

absl::Status CheckDirectory(const std::string& directory,
                            const struct stat& info,
                            const SocketAccess& access) {
  if (info.st_uid != geteuid() && info.st_uid != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the socket directory belongs to another user: ", directory, " (uid ",
        info.st_uid, ")"));
  }
  if (info.st_mode & S_IWOTH && !(info.st_mode & S_ISVTX)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "anybody may replace files in the socket directory: ", directory));
  }
  if (access.anybody && !(info.st_mode & kAnybodyMayEnter)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the socket directory keeps out users who are allowed to connect "
        "(chmod o+x it, or remove it): ",
        directory));
  }
  const bool group_enters =
      info.st_mode & kAnybodyMayEnter ||
      (access.group == info.st_gid && info.st_mode & kGroupMayEnter);
  if (access.group && !group_enters) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the socket directory keeps out the group that is allowed to connect "
        "(chgrp it, or remove it): ",
        directory, " belongs to group ", info.st_gid, ", wanted is ",
        *access.group));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status PrepareSocketDirectory(const std::string& directory,
                                    const SocketAccess& access) {
  // Closed to others until group and mode are right.
  const bool made = mkdir(directory.c_str(), 0700) == 0;
  if (!made && errno != EEXIST) {
    return ErrnoToStatus(errno, "mkdir of socket directory " + directory);
  }
  UniqueFd fd(
      open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd && (errno == ENOTDIR || errno == ELOOP)) {
    return absl::FailedPreconditionError(
        absl::StrCat("the socket directory is not a directory: ", directory));
  }
  if (!fd) return ErrnoToStatus(errno, "open of socket directory " + directory);
  if (made) {
    if (access.group && fchown(fd.get(), -1, *access.group) != 0) {
      return ErrnoToStatus(errno, absl::StrCat("giving ", directory,
                                               " to group ", *access.group));
    }
    if (fchmod(fd.get(), access.anybody ? 0755 : 0750) != 0) {
      return ErrnoToStatus(errno, "chmod of " + directory);
    }
  }
  struct stat info;
  if (fstat(fd.get(), &info) != 0) {
    return ErrnoToStatus(errno, "stat of " + directory);
  }
  return CheckDirectory(directory, info, access);
}

absl::StatusOr<UnixListener> UnixListener::Bind(const std::string& path,
                                                int type,
                                                const SocketAccess& access) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a socket's path has 1 to ", sizeof(address.sun_path) - 1,
                     " bytes, this has ", path.size(), ": ", path));
  }
  // Made under another name and then given its own, so that there is one at the
  // path all the time where the last broker has left one. The name is this
  // path's alone, as the path is the caller's, and no longer.
  std::string made = path;
  made.back() = made.back() == '~' ? '-' : '~';
  made.copy(address.sun_path, made.size());

  struct stat info;
  if (lstat(path.c_str(), &info) == 0) {
    if (!S_ISSOCK(info.st_mode)) {
      return absl::FailedPreconditionError(
          absl::StrCat("the socket's path is taken by something else: ", path));
    }
  }
  if (unlink(made.c_str()) != 0 && errno != ENOENT) {
    return ErrnoToStatus(errno, "removing the stale socket " + made);
  }
  UniqueFd fd(socket(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return ErrnoToStatus(errno, "socket");
  if (bind(fd.get(), reinterpret_cast<const sockaddr*>(&address),
           sizeof(address)) != 0) {
    return ErrnoToStatus(errno, "bind to " + made);
  }
  // Until listen() nobody gets in, so that the mode is right for the first one.
  if (access.group && lchown(made.c_str(), -1, *access.group) != 0) {
    absl::Status status = ErrnoToStatus(
        errno, absl::StrCat("giving ", path, " to group ", *access.group));
    unlink(made.c_str());
    return status;
  }
  if (chmod(made.c_str(), access.anybody ? 0666 : 0660) != 0 ||
      lstat(made.c_str(), &info) != 0 || listen(fd.get(), kBacklog) != 0 ||
      rename(made.c_str(), path.c_str()) != 0) {
    absl::Status status = ErrnoToStatus(errno, "listening at " + path);
    unlink(made.c_str());
    return status;
  }
  return UnixListener(std::move(fd), path, info.st_dev, info.st_ino);
}

UnixListener::~UnixListener() {
  struct stat info;
  if (fd_ && lstat(path_.c_str(), &info) == 0 && info.st_dev == device_ &&
      info.st_ino == inode_) {
    unlink(path_.c_str());
  }
}

}  // namespace kvbroker
