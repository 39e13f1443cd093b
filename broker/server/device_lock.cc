#include "broker/server/device_lock.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <fstream>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

absl::StatusOr<UniqueFd> OpenDirectory(const std::string& path) {
  const bool made = mkdir(path.c_str(), 0700) == 0;
  if (!made && errno != EEXIST) return ErrnoToStatus(errno, "mkdir of " + path);
  UniqueFd fd(
      open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd && (errno == ENOTDIR || errno == ELOOP)) {
    return absl::FailedPreconditionError("not a directory: " + path);
  }
  if (!fd) return ErrnoToStatus(errno, "open of " + path);
  if (made && fchmod(fd.get(), 01777) != 0) {
    return ErrnoToStatus(errno, "chmod of " + path);
  }
  struct stat info;
  if (fstat(fd.get(), &info) != 0)
    return ErrnoToStatus(errno, "stat of " + path);
  // Without the sticky bit anybody could put another file in the lock's place.
  if (info.st_mode & S_IWOTH && !(info.st_mode & S_ISVTX)) {
    return absl::FailedPreconditionError(
        absl::StrCat("anybody may replace files in ", path));
  }
  return fd;
}

// The lock file, made where there is none. Opening an existing one never says
// O_CREAT: the kernel may refuse that for another user's file in a sticky
// directory (fs.protected_regular).
absl::StatusOr<UniqueFd> OpenLockFile(int directory, const std::string& name,
                                      const std::string& path) {
  constexpr int kFlags = O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  for (int attempt = 0; attempt < 10; ++attempt) {
    UniqueFd fd(openat(directory, name.c_str(), O_RDONLY | kFlags));
    if (!fd && errno == ENOENT) {
      fd.Reset(openat(directory, name.c_str(),
                      O_RDWR | O_CREAT | O_EXCL | kFlags, 0600));
      if (!fd && errno == EEXIST) continue;
      // All users lock it, its owner writes to it.
      if (fd && fchmod(fd.get(), 0644) != 0) {
        return ErrnoToStatus(errno, "chmod of " + path);
      }
    }
    if (!fd && errno == ELOOP) {
      return absl::FailedPreconditionError("a link instead of a lock: " + path);
    }
    if (!fd) return ErrnoToStatus(errno, "open of " + path);
    struct stat info;
    if (fstat(fd.get(), &info) != 0) {
      return ErrnoToStatus(errno, "stat of " + path);
    }
    if (!S_ISREG(info.st_mode) || info.st_nlink != 1) {
      return absl::FailedPreconditionError("not a plain file with one name: " +
                                           path);
    }
    return fd;
  }
  return absl::UnavailableError("the lock file comes and goes: " + path);
}

// The process that holds the flock, by /proc/locks; empty where it is not to be
// seen from here.
std::optional<uint32_t> PidOfHolder(int fd) {
  struct stat info;
  if (fstat(fd, &info) != 0) return std::nullopt;
  // "1: FLOCK  ADVISORY  WRITE 1234 00:19:5678 0 EOF", device in hexadecimal.
  std::ifstream locks("/proc/locks");
  for (std::string line; std::getline(locks, line);) {
    std::vector<std::string> words =
        absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (words.size() < 6 || words[1] != "FLOCK") continue;
    std::vector<std::string> place = absl::StrSplit(words[5], ':');
    unsigned long long inode = 0;
    uint32_t pid = 0;
    if (place.size() == 3 && absl::SimpleAtoi(place[2], &inode) &&
        absl::SimpleHexAtoi(place[0], &pid) && pid == major(info.st_dev) &&
        absl::SimpleHexAtoi(place[1], &pid) && pid == minor(info.st_dev) &&
        inode == info.st_ino && absl::SimpleAtoi(words[4], &pid) && pid != 0) {
      return pid;
    }
  }
  return std::nullopt;
}

// What the holder wrote of itself; empty unless it names the process `pid`.
std::string SocketOfHolder(int fd, uint32_t pid) {
  std::string text(1024, '\0');
  ssize_t size = pread(fd, text.data(), text.size(), 0);
  if (size <= 0) return "";
  text.resize(size);
  std::vector<std::string> lines = absl::StrSplit(text, '\n');
  if (lines.size() < 2 || lines[0] != absl::StrCat(pid)) return "";
  for (char c : lines[1]) {
    if (!absl::ascii_isprint(c)) return "";
  }
  return lines[1];
}

absl::Status LockedOut(int fd, const std::string& path) {
  std::string who = "a process that is not to be seen from here";
  std::string where, socket;
  if (std::optional<uint32_t> pid = PidOfHolder(fd)) {
    struct stat info;
    who = absl::StrCat("pid ", *pid);
    if (stat(absl::StrCat("/proc/", *pid).c_str(), &info) == 0) {
      who = absl::StrCat("uid ", info.st_uid, ", ", who);
    }
    socket = SocketOfHolder(fd, *pid);
    if (!socket.empty()) where = absl::StrCat(" at ", socket);
  }
  absl::Status locked_out = absl::AlreadyExistsError(absl::StrCat(
      "another broker serves this device (", who, "): connect to it", where,
      ", for which its operator admits you with socket_group or allow_uids, or "
      "stop it; lock: ",
      path));
  if (!socket.empty()) locked_out.SetPayload(kHolderSocket, absl::Cord(socket));
  return locked_out;
}

absl::StatusOr<UniqueFd> LockIn(const std::string& directory,
                                const std::string& uuid,
                                const std::string& socket_path) {
  ASSIGN_OR_RETURN(UniqueFd folder, OpenDirectory(directory));
  const std::string name = uuid + ".lock";
  const std::string path = absl::StrCat(directory, "/", name);
  ASSIGN_OR_RETURN(UniqueFd file, OpenLockFile(folder.get(), name, path));
  if (flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return LockedOut(file.get(), path);
    return ErrnoToStatus(errno, "lock of " + path);
  }
  // For who is locked out; of another user's file the kernel's list must do.
  UniqueFd writable(openat(folder.get(), name.c_str(),
                           O_WRONLY | O_TRUNC | O_NOFOLLOW | O_CLOEXEC));
  struct stat locked, opened;
  if (writable && fstat(file.get(), &locked) == 0 &&
      fstat(writable.get(), &opened) == 0 && locked.st_ino == opened.st_ino) {
    const std::string text = absl::StrCat(getpid(), "\n", socket_path, "\n");
    [[maybe_unused]] ssize_t size =
        write(writable.get(), text.data(), text.size());
  }
  return file;
}

}  // namespace

std::vector<std::string> DefaultLockDirectories() {
  return {"/run/lock/kvbroker", "/tmp/kvbroker-locks"};
}

absl::StatusOr<DeviceLock> DeviceLock::Acquire(
    const std::vector<std::string>& directories, const std::string& uuid,
    const std::string& socket_path) {
  if (uuid.empty() || uuid[0] == '.' || absl::StrContains(uuid, '/')) {
    return absl::InvalidArgumentError(
        absl::StrCat("a device's uuid cannot name a lock: \"", uuid, "\""));
  }
  std::vector<UniqueFd> files;
  std::vector<std::string> failures;
  for (const std::string& directory : directories) {
    absl::StatusOr<UniqueFd> file = LockIn(directory, uuid, socket_path);
    if (file.ok()) {
      files.push_back(*std::move(file));
    } else if (absl::IsAlreadyExists(file.status())) {
      return file.status();
    } else {
      failures.emplace_back(file.status().message());
    }
  }
  if (files.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the device cannot be locked: ", absl::StrJoin(failures, "; ")));
  }
  return DeviceLock(std::move(files));
}

}  // namespace kvbroker
