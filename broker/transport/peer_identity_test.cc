#include "broker/transport/peer_identity.h"

#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>

#include "broker/base/temp_folder.h"

namespace kvbroker {
namespace {

UniqueFd OpenPidfdOf(pid_t pid) {
  return UniqueFd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
}

// A child process that has connected to us and stays until told to go.
class Child {
 public:
  // `before` runs in the child before it connects. In a new PID namespace it
  // is a grandchild that connects.
  explicit Child(std::function<void()> before = nullptr,
                 bool new_pid_namespace = false) {
    const TempFolder folder;
    const std::string path = folder / "peer.sock";
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof(address.sun_path) - 1);
    UniqueFd listener(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0));
    EXPECT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address),
                   sizeof(address)),
              0);
    EXPECT_EQ(chmod(path.c_str(), 0666), 0);
    EXPECT_EQ(listen(listener.get(), 1), 0);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (new_pid_namespace) {
        if (unshare(CLONE_NEWPID) != 0) _exit(3);
        if (pid_t inner = fork(); inner != 0) {
          waitpid(inner, nullptr, 0);
          _exit(0);
        }
      }
      if (before) before();
      int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
      if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) !=
          0) {
        _exit(2);
      }
      // Whoever is asked for a pidfd of its own sends it.
      char byte;
      while (read(fd, &byte, 1) == 1) {
        int own = syscall(SYS_pidfd_open, getpid(), 0);
        char control[CMSG_SPACE(sizeof(int))] = {};
        iovec data = {.iov_base = &byte, .iov_len = 1};
        msghdr message = {};
        message.msg_iov = &data;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof(control);
        cmsghdr* header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        *reinterpret_cast<int*>(CMSG_DATA(header)) = own;
        sendmsg(fd, &message, 0);
      }
      _exit(0);
    }
    pollfd waiting = {.fd = listener.get(), .events = POLLIN, .revents = 0};
    poll(&waiting, 1, 10000);
    socket_ = UniqueFd(accept(listener.get(), nullptr, nullptr));
  }

  ~Child() { End(); }

  void End() {
    // Not only closed: later children have inherited it.
    shutdown(socket_.get(), SHUT_RDWR);
    socket_.Reset();
    if (pid_ > 0) waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

  UniqueFd AskForPidfd() {
    char byte = 'p';
    EXPECT_EQ(write(socket_.get(), &byte, 1), 1);
    char control[CMSG_SPACE(sizeof(int))] = {};
    iovec data = {.iov_base = &byte, .iov_len = 1};
    msghdr message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    EXPECT_EQ(recvmsg(socket_.get(), &message, 0), 1);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    return UniqueFd(
        header == nullptr ? -1 : *reinterpret_cast<int*>(CMSG_DATA(header)));
  }

  pid_t pid() const { return pid_; }
  int socket_fd() const { return socket_.get(); }

 private:
  pid_t pid_ = -1;
  UniqueFd socket_;
};
IdentifyOptions Without(bool peer_pidfd, bool pidfd_open) {
  IdentifyOptions options;
  options.use_peer_pidfd = !peer_pidfd;
  options.use_pidfd_open = !pidfd_open;
  return options;
}

TEST(PeerIdentityTest, TheKernelNamesTheProcessThatConnected) {
  Child child;
  for (bool old_kernel : {false, true}) {
    absl::StatusOr<PeerIdentity> peer =
        IdentifyPeer(child.socket_fd(), Without(old_kernel, false));
    ASSERT_TRUE(peer.ok()) << peer.status();
    EXPECT_EQ(peer->uid, getuid());
    EXPECT_EQ(peer->gid, getgid());
    EXPECT_EQ(peer->pid, static_cast<uint32_t>(child.pid()));
    EXPECT_NE(peer->start_time, 0);
    ASSERT_TRUE(peer->pidfd);
    EXPECT_FALSE(ProcessHasExited(peer->pidfd.get()));
    EXPECT_EQ(
        peer->tenant.rfind("uid:" + std::to_string(getuid()) + "/pidns:", 0), 0)
        << peer->tenant;
  }
}

TEST(PeerIdentityTest, ThePidfdTellsOfTheEnd) {
  Child child;
  absl::StatusOr<PeerIdentity> direct =
      IdentifyPeer(child.socket_fd(), IdentifyOptions());
  absl::StatusOr<PeerIdentity> opened =
      IdentifyPeer(child.socket_fd(), Without(true, false));
  ASSERT_TRUE(direct.ok() && opened.ok());
  child.End();
  EXPECT_TRUE(ProcessHasExited(direct->pidfd.get()));
  EXPECT_TRUE(ProcessHasExited(opened->pidfd.get()));
}

TEST(PeerIdentityTest, TenantFollowsTheOption) {
  Child child;
  IdentifyOptions options;
  options.tenant_by = TenantBy::kUid;
  EXPECT_EQ(IdentifyPeer(child.socket_fd(), options)->tenant,
            "uid:" + std::to_string(getuid()));
  options.tenant_by = TenantBy::kSocket;
  options.socket_name = "gpu0";
  EXPECT_EQ(IdentifyPeer(child.socket_fd(), options)->tenant, "socket:gpu0");
}

TEST(PeerIdentityTest, OneProcessIsTheSameHoweverItIsIdentified) {
  Child one, other;
  PeerIdentity direct = *IdentifyPeer(one.socket_fd(), IdentifyOptions());
  PeerIdentity opened = *IdentifyPeer(one.socket_fd(), Without(true, false));
  PeerIdentity bare = *IdentifyPeer(one.socket_fd(), Without(true, true));
  PeerIdentity stranger = *IdentifyPeer(other.socket_fd(), IdentifyOptions());
  EXPECT_FALSE(bare.pidfd);
  EXPECT_TRUE(SameProcess(direct, opened));
  EXPECT_TRUE(SameProcess(direct, bare));
  EXPECT_FALSE(SameProcess(direct, stranger));
  // A pid used again has another start time.
  bare.start_time += 1;
  EXPECT_FALSE(SameProcess(direct, bare));
  bare.start_time = direct.start_time;
  bare.uid += 1;
  EXPECT_FALSE(SameProcess(direct, bare));
}

TEST(PeerIdentityTest, APidfdFromThePeerStandsIn) {
  Child child;
  PeerIdentity peer = *IdentifyPeer(child.socket_fd(), Without(true, true));
  ASSERT_FALSE(peer.pidfd);
  absl::Status adopted = AdoptPidfd(child.AskForPidfd(), peer);
  EXPECT_TRUE(adopted.ok()) << adopted;
  ASSERT_TRUE(peer.pidfd);
  child.End();
  EXPECT_TRUE(ProcessHasExited(peer.pidfd.get()));
}

TEST(PeerIdentityTest, AForeignOrDeadOrFalsePidfdIsRefused) {
  Child child, other;
  PeerIdentity peer = *IdentifyPeer(child.socket_fd(), Without(true, true));
  EXPECT_TRUE(
      absl::IsInvalidArgument(AdoptPidfd(OpenPidfdOf(other.pid()), peer)));
  EXPECT_TRUE(absl::IsInvalidArgument(
      AdoptPidfd(UniqueFd(open("/dev/null", O_RDONLY)), peer)));
  UniqueFd late = OpenPidfdOf(child.pid());
  child.End();
  EXPECT_TRUE(absl::IsInvalidArgument(AdoptPidfd(std::move(late), peer)));
  EXPECT_FALSE(peer.pidfd);
}

TEST(PeerIdentityTest, APeerThatIsGoneIsAnError) {
  auto child = std::make_unique<Child>();
  UniqueFd copy(dup(child->socket_fd()));
  kill(child->pid(), SIGKILL);
  child->End();
  absl::StatusOr<PeerIdentity> peer =
      IdentifyPeer(copy.get(), IdentifyOptions());
  EXPECT_TRUE(!peer.ok() || !peer->pidfd);
}

TEST(PeerIdentityTest, GroupsAreThePeersOwn) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to change groups";
  Child child([] {
    gid_t groups[] = {4711, 4712};
    if (setgroups(2, groups) != 0 || setresgid(4000, 4000, 4000) != 0 ||
        setresuid(4001, 4001, 4001) != 0) {
      _exit(4);
    }
  });
  absl::StatusOr<PeerIdentity> peer =
      IdentifyPeer(child.socket_fd(), IdentifyOptions());
  if (!peer.ok()) GTEST_SKIP() << "the test's folder is closed to others";
  EXPECT_EQ(peer->uid, 4001);
  EXPECT_TRUE(peer->InGroup(4000) && peer->InGroup(4711) &&
              peer->InGroup(4712));
  EXPECT_FALSE(peer->InGroup(0));
}

// Parent and child PID namespace: a child namespace's processes are visible to
// us under our own numbers, and are another tenant.
TEST(PeerIdentityTest, AnotherPidNamespaceIsAnotherTenant) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to make a PID namespace";
  Child here;
  Child inside(nullptr, /*new_pid_namespace=*/true);
  if (inside.socket_fd() < 0) GTEST_SKIP() << "no PID namespaces here";
  PeerIdentity ours = *IdentifyPeer(here.socket_fd(), IdentifyOptions());
  PeerIdentity theirs = *IdentifyPeer(inside.socket_fd(), IdentifyOptions());
  EXPECT_NE(ours.tenant, theirs.tenant);
  EXPECT_EQ(ours.uid, theirs.uid);
}

TEST(PeerIdentityTest, NoSocketIsAnError) {
  UniqueFd file(open("/dev/null", O_RDONLY));
  EXPECT_FALSE(IdentifyPeer(file.get(), IdentifyOptions()).ok());
}

}  // namespace
}  // namespace kvbroker
