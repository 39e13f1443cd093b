#include "broker/transport/unix_listener.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>

#include "broker/base/temp_folder.h"

namespace kvbroker {
namespace {

class UnixListenerTest : public testing::Test {
 protected:
  std::string Path(const std::string& name) { return folder_ / name; }

  static int Mode(const std::string& path) {
    struct stat info;
    return lstat(path.c_str(), &info) == 0 ? info.st_mode & 07777 : -1;
  }

  static bool CanConnect(const std::string& path, int type) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, path.size());
    UniqueFd fd(socket(AF_UNIX, type, 0));
    return connect(fd.get(), reinterpret_cast<sockaddr*>(&address),
                   sizeof(address)) == 0;
  }

  TempFolder folder_;
};

TEST_F(UnixListenerTest, ListensWithItsModeAndLeavesNothing) {
  const std::string path = Path("a.sock");
  for (int type : {SOCK_STREAM, SOCK_SEQPACKET}) {
    for (bool anybody : {false, true}) {
      absl::StatusOr<UnixListener> listener =
          UnixListener::Bind(path, type, {.anybody = anybody});
      ASSERT_TRUE(listener.ok()) << listener.status();
      EXPECT_EQ(Mode(path), anybody ? 0666 : 0660);
      EXPECT_TRUE(CanConnect(path, type));
    }
    EXPECT_EQ(Mode(path), -1);
  }
}

TEST_F(UnixListenerTest, AStaleSocketIsReplacedAndASuccessorsIsNotRemoved) {
  const std::string path = Path("a.sock");
  std::optional<UnixListener> old(*UnixListener::Bind(path, SOCK_STREAM, {}));
  absl::StatusOr<UnixListener> next = UnixListener::Bind(path, SOCK_STREAM, {});
  ASSERT_TRUE(next.ok()) << next.status();
  old.reset();
  EXPECT_TRUE(CanConnect(path, SOCK_STREAM));
}

// Who looks for a broker that is being restarted finds a socket.
TEST_F(UnixListenerTest, AStaleSocketIsReplacedWithoutAGap) {
  const std::string path = Path("a.sock");
  // The last one and the one in its place.
  std::optional<UnixListener> listeners[2];
  listeners[1].emplace(*UnixListener::Bind(path, SOCK_STREAM, {}));
  std::atomic<bool> done = false;
  std::atomic<int64_t> looks = 0;
  int64_t gaps = 0;
  std::thread looker([&] {
    while (!done) {
      ++looks;
      gaps += Mode(path) < 0;
    }
  });
  // On a busy machine it takes a while until somebody looks.
  for (int i = 0; i < 200 || looks < 200; ++i) {
    listeners[i % 2].emplace(*UnixListener::Bind(path, SOCK_STREAM, {}));
  }
  done = true;
  looker.join();
  EXPECT_EQ(gaps, 0);
}

TEST_F(UnixListenerTest, OtherFilesAreNotReplaced) {
  const std::string path = Path("a.sock");
  UniqueFd file(open(path.c_str(), O_CREAT | O_WRONLY, 0600));
  EXPECT_TRUE(absl::IsFailedPrecondition(
      UnixListener::Bind(path, SOCK_STREAM, {}).status()));
  EXPECT_EQ(Mode(path), 0600);
}

TEST_F(UnixListenerTest, APathTooLongIsRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(
      UnixListener::Bind("/" + std::string(107, 'x'), SOCK_STREAM, {})
          .status()));
}

TEST_F(UnixListenerTest, ADirectoryIsMadeClosedToOthers) {
  EXPECT_TRUE(PrepareSocketDirectory(Path("a"), {}).ok());
  EXPECT_EQ(Mode(Path("a")), 0750);
  EXPECT_TRUE(PrepareSocketDirectory(Path("b"), {.anybody = true}).ok());
  EXPECT_EQ(Mode(Path("b")), 0755);
  EXPECT_TRUE(PrepareSocketDirectory(Path("c"), {.group = getgid()}).ok());
  EXPECT_EQ(Mode(Path("c")), 0750);
  EXPECT_TRUE(absl::IsNotFound(PrepareSocketDirectory(Path("no/d"), {})));
}

TEST_F(UnixListenerTest, AnExistingDirectoryIsJudgedAndLeftAsItIs) {
  const std::string path = Path("sockets");
  ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
  EXPECT_TRUE(PrepareSocketDirectory(path, {}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(
      PrepareSocketDirectory(path, {.anybody = true})));
  EXPECT_TRUE(absl::IsFailedPrecondition(
      PrepareSocketDirectory(path, {.group = getgid()})));
  EXPECT_EQ(Mode(path), 0700);
  ASSERT_EQ(chmod(path.c_str(), 0777), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(PrepareSocketDirectory(path, {})));
  ASSERT_EQ(chmod(path.c_str(), 01777), 0);
  EXPECT_TRUE(PrepareSocketDirectory(path, {.anybody = true}).ok());
  EXPECT_EQ(Mode(path), 01777);
}

TEST_F(UnixListenerTest, ALinkOrFileIsNoSocketDirectory) {
  ASSERT_EQ(symlink("/tmp", Path("link").c_str()), 0);
  UniqueFd file(open(Path("file").c_str(), O_CREAT | O_WRONLY, 0600));
  for (const char* name : {"link", "file"}) {
    EXPECT_TRUE(
        absl::IsFailedPrecondition(PrepareSocketDirectory(Path(name), {})))
        << name;
  }
}

TEST_F(UnixListenerTest, AnothersDirectoryIsRefused) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to give a directory away";
  const std::string path = Path("theirs");
  ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
  ASSERT_EQ(chown(path.c_str(), 12345, 12345), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(PrepareSocketDirectory(path, {})));
}

}  // namespace
}  // namespace kvbroker
