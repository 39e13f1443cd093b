#include "broker/transport/peer_identity.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

// Newer than the headers we are built with.
constexpr int kSoPeerPidfd = 77;                               // Linux 6.5
constexpr unsigned long kPidfdGetPidNamespace = _IO(0xFF, 5);  // Linux 6.11
constexpr long kPidFsMagic = 0x50494446;                       // Linux 6.9

absl::StatusOr<std::string> ReadProcFile(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoToStatus(errno, "open of " + path);
  std::string text(4096, '\0');
  ssize_t size = read(fd.get(), text.data(), text.size());
  if (size < 0) return ErrnoToStatus(errno, "read of " + path);
  text.resize(size);
  return text;
}

// When the process started; empty where there is none of that number.
std::optional<uint64_t> StartTime(uint32_t pid) {
  absl::StatusOr<std::string> stat =
      ReadProcFile(absl::StrCat("/proc/", pid, "/stat"));
  if (!stat.ok()) return std::nullopt;
  // The second field, a name in parentheses, may hold anything; the third
  // follows the last parenthesis, and the start time is the 22nd.
  size_t end = stat->rfind(')');
  if (end == std::string::npos) return std::nullopt;
  std::vector<absl::string_view> fields = absl::StrSplit(
      absl::string_view(*stat).substr(end + 1), ' ', absl::SkipEmpty());
  uint64_t time;
  if (fields.size() < 20 || !absl::SimpleAtoi(fields[19], &time)) {
    return std::nullopt;
  }
  return time;
}

// The pid that a pidfd names, as procfs sees it: 0 where it is in a namespace
// that we cannot see into, -1 where the process is gone.
std::optional<int64_t> PidOfPidfd(int pidfd) {
  absl::StatusOr<std::string> info =
      ReadProcFile(absl::StrCat("/proc/self/fdinfo/", pidfd));
  if (!info.ok()) return std::nullopt;
  for (absl::string_view line : absl::StrSplit(*info, '\n')) {
    int64_t pid;
    if (absl::StartsWith(line, "Pid:") &&
        absl::SimpleAtoi(line.substr(4), &pid)) {
      return pid;
    }
  }
  return std::nullopt;
}

uint64_t ProcessInode(int pidfd) {
  struct statfs filesystem;
  struct stat info;
  // Before pidfs all pidfds shared one inode.
  if (fstatfs(pidfd, &filesystem) != 0 || filesystem.f_type != kPidFsMagic ||
      fstat(pidfd, &info) != 0) {
    return 0;
  }
  return info.st_ino;
}

// The peer's PID namespace; 0 where it cannot be read.
uint64_t PidNamespace(const PeerIdentity& peer) {
  struct stat info;
  if (peer.pidfd) {
    UniqueFd space(ioctl(peer.pidfd.get(), kPidfdGetPidNamespace, 0));
    if (space && fstat(space.get(), &info) == 0) return info.st_ino;
  }
  if (peer.pid != 0 &&
      stat(absl::StrCat("/proc/", peer.pid, "/ns/pid").c_str(), &info) == 0) {
    return info.st_ino;
  }
  return 0;
}

std::string TenantOf(const PeerIdentity& peer, const IdentifyOptions& options) {
  switch (options.tenant_by) {
    case TenantBy::kSocket:
      return absl::StrCat("socket:", options.socket_name);
    case TenantBy::kUid:
      return absl::StrCat("uid:", peer.uid);
    case TenantBy::kUidAndPidNamespace:
      break;
  }
  uint64_t space = PidNamespace(peer);
  if (space == 0) return absl::StrCat("uid:", peer.uid, "/pidns:hidden");
  return absl::StrCat("uid:", peer.uid, "/pidns:", space);
}

std::vector<uint32_t> PeerGroups(int socket) {
  std::vector<uint32_t> groups(64);
  for (;;) {
    socklen_t size = groups.size() * sizeof(groups[0]);
    if (getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &size) ==
        0) {
      groups.resize(size / sizeof(groups[0]));
      return groups;
    }
    // The kernel has said how much it needs.
    if (errno != ERANGE || size / sizeof(groups[0]) <= groups.size()) return {};
    groups.resize(size / sizeof(groups[0]));
  }
}

// A pidfd of the visible process `peer.pid`, sure to be the one whose start
// time is returned too.
void OpenPidfd(PeerIdentity& peer) {
  std::optional<uint64_t> before = StartTime(peer.pid);
  UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0)));
  std::optional<uint64_t> after = StartTime(peer.pid);
  if (pidfd && before && before == after) peer.pidfd = std::move(pidfd);
}

}  // namespace

bool PeerIdentity::InGroup(uint32_t group) const {
  return gid == group ||
         std::find(groups.begin(), groups.end(), group) != groups.end();
}

absl::StatusOr<PeerIdentity> IdentifyPeer(int socket,
                                          const IdentifyOptions& options) {
  PeerIdentity peer;
  ucred credentials;
  socklen_t size = sizeof(credentials);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    return ErrnoToStatus(errno, "SO_PEERCRED");
  }
  peer.uid = credentials.uid;
  peer.gid = credentials.gid;
  peer.pid = credentials.pid;
  peer.groups = PeerGroups(socket);

  int pidfd;
  size = sizeof(pidfd);
  if (options.use_peer_pidfd &&
      getsockopt(socket, SOL_SOCKET, kSoPeerPidfd, &pidfd, &size) == 0) {
    peer.pidfd.Reset(pidfd);
  } else if (options.use_pidfd_open && peer.pid != 0) {
    OpenPidfd(peer);
  }
  if (peer.pid != 0) peer.start_time = StartTime(peer.pid).value_or(0);
  if (peer.pidfd) peer.process_inode = ProcessInode(peer.pidfd.get());
  peer.tenant = TenantOf(peer, options);
  // What was read by number was the peer's as long as it had not exited by now.
  if (peer.pidfd && ProcessHasExited(peer.pidfd.get())) {
    return absl::NotFoundError(
        absl::StrCat("the peer exited while it connected: pid ", peer.pid));
  }
  return peer;
}

absl::Status AdoptPidfd(UniqueFd pidfd, PeerIdentity& peer) {
  std::optional<int64_t> pid = PidOfPidfd(pidfd.get());
  if (!pid) {
    return absl::InvalidArgumentError("the descriptor in hello is no pidfd");
  }
  if (*pid != int64_t{peer.pid}) {
    return absl::InvalidArgumentError(
        absl::StrCat("the pidfd in hello names another process than its "
                     "sender: it names ",
                     *pid, ", the sender is ", peer.pid));
  }
  if (ProcessHasExited(pidfd.get())) {
    return absl::InvalidArgumentError(
        "the pidfd in hello names a dead process");
  }
  peer.process_inode = ProcessInode(pidfd.get());
  peer.pidfd = std::move(pidfd);
  return absl::OkStatus();
}

bool SameProcess(const PeerIdentity& a, const PeerIdentity& b) {
  if (a.uid != b.uid || a.pid != b.pid) return false;
  if (a.process_inode != 0 && b.process_inode != 0) {
    return a.process_inode == b.process_inode;
  }
  return a.start_time == b.start_time || a.start_time == 0 || b.start_time == 0;
}

UniqueFd OpenProcess(uint32_t pid, uint64_t start_time) {
  PeerIdentity peer;
  peer.pid = pid;
  OpenPidfd(peer);
  // Read again: the pidfd is of whoever has the number now.
  if (!peer.pidfd || ProcessHasExited(peer.pidfd.get()) ||
      StartTime(pid) != start_time) {
    return UniqueFd();
  }
  return std::move(peer.pidfd);
}

bool ProcessHasExited(int pidfd) {
  pollfd state = {.fd = pidfd, .events = POLLIN, .revents = 0};
  return poll(&state, 1, 0) == 1;
}

}  // namespace kvbroker
