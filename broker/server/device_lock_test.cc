#include "broker/server/device_lock.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>
#include <string>

#include "broker/base/temp_folder.h"

namespace kvbroker {
namespace {

class DeviceLockTest : public testing::Test {
 protected:
  std::string Path(const std::string& name) { return folder_ / name; }

  absl::StatusOr<DeviceLock> Lock(const std::string& directory) {
    return DeviceLock::Acquire({directory}, "GPU-1", "/run/kv/GPU-1.sock");
  }

  TempFolder folder_;
};

TEST_F(DeviceLockTest, TheDirectoryIsOpenToAll) {
  ASSERT_TRUE(Lock(Path("locks")).ok());
  struct stat info;
  ASSERT_EQ(stat(Path("locks").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 01777);
  ASSERT_EQ(stat(Path("locks/GPU-1.lock").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0644);
}

TEST_F(DeviceLockTest, WhoIsLockedOutIsToldTheHolderAndItsSocket) {
  std::optional<DeviceLock> first(*Lock(Path("locks")));
  absl::Status status = Lock(Path("locks")).status();
  EXPECT_TRUE(absl::IsAlreadyExists(status)) << status;
  std::string text(status.message());
  for (const std::string& part :
       {"uid " + std::to_string(getuid()), "pid " + std::to_string(getpid()),
        std::string("/run/kv/GPU-1.sock"), std::string("socket_group")}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
  ASSERT_TRUE(status.GetPayload(kHolderSocket));
  EXPECT_EQ(*status.GetPayload(kHolderSocket), "/run/kv/GPU-1.sock");
  EXPECT_TRUE(DeviceLock::Acquire({Path("locks")}, "GPU-2", "").ok());
  first.reset();
  EXPECT_TRUE(Lock(Path("locks")).ok());
}

TEST_F(DeviceLockTest, ADeadHoldersLockIsFree) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  pid_t child = fork();
  if (child == 0) {
    absl::StatusOr<DeviceLock> lock = Lock(Path("locks"));
    char byte = lock.ok() ? 'y' : 'n';
    [[maybe_unused]] ssize_t size = write(ready[1], &byte, 1);
    pause();
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  EXPECT_EQ(byte, 'y');
  absl::Status status = Lock(Path("locks")).status();
  EXPECT_NE(
      std::string(status.message()).find("pid " + std::to_string(child) + ")"),
      std::string::npos)
      << status;
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(Lock(Path("locks")).ok());
}

TEST_F(DeviceLockTest, EveryUsableDirectoryIsLockedAndOneIsEnough) {
  auto both =
      DeviceLock::Acquire({Path("no/such"), Path("a"), Path("b")}, "GPU-1", "");
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_TRUE(absl::IsAlreadyExists(Lock(Path("a")).status()));
  EXPECT_TRUE(absl::IsAlreadyExists(Lock(Path("b")).status()));
  absl::Status none =
      DeviceLock::Acquire({Path("no/such"), "/proc/x"}, "GPU-1", "").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(none)) << none;
}

TEST_F(DeviceLockTest, LinksAndOtherFilesAreNotLocked) {
  ASSERT_EQ(mkdir(Path("locks").c_str(), 0755), 0);
  const std::string lock = Path("locks/GPU-1.lock");
  UniqueFd victim(open(Path("victim").c_str(), O_CREAT | O_RDWR, 0600));
  ASSERT_EQ(write(victim.get(), "data", 4), 4);

  ASSERT_EQ(symlink(Path("victim").c_str(), lock.c_str()), 0);
  EXPECT_FALSE(Lock(Path("locks")).ok());
  unlink(lock.c_str());
  ASSERT_EQ(link(Path("victim").c_str(), lock.c_str()), 0);
  EXPECT_FALSE(Lock(Path("locks")).ok());
  unlink(lock.c_str());
  ASSERT_EQ(mkfifo(lock.c_str(), 0666), 0);
  EXPECT_FALSE(Lock(Path("locks")).ok());
  unlink(lock.c_str());
  ASSERT_EQ(symlink(Path("locks").c_str(), Path("folder_link").c_str()), 0);
  EXPECT_FALSE(Lock(Path("folder_link")).ok());

  struct stat info;
  ASSERT_EQ(fstat(victim.get(), &info), 0);
  EXPECT_EQ(info.st_size, 4) << "written through a link";
  EXPECT_TRUE(Lock(Path("locks")).ok());
}

TEST_F(DeviceLockTest, ADirectoryWhereFilesCanBeReplacedIsRefused) {
  ASSERT_EQ(mkdir(Path("locks").c_str(), 0700), 0);
  ASSERT_EQ(chmod(Path("locks").c_str(), 0777), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(Lock(Path("locks")).status()));
}

// The kernel refuses to open another's file in a sticky directory with O_CREAT.
TEST_F(DeviceLockTest, AnothersStaleLockFileIsNoObstacle) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to change users";
  { ASSERT_TRUE(Lock(Path("locks")).ok()); }
  ASSERT_EQ(chown(Path("locks/GPU-1.lock").c_str(), 4001, 4001), 0);
  EXPECT_TRUE(Lock(Path("locks")).ok());
  pid_t child = fork();
  if (child == 0) {
    if (setresgid(4002, 4002, 4002) != 0 || setresuid(4002, 4002, 4002) != 0) {
      _exit(2);
    }
    _exit(Lock(Path("locks")).ok() ? 0 : 1);
  }
  int status;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST_F(DeviceLockTest, AUuidThatIsNoFileNameIsRefused) {
  for (const char* uuid : {"", "../x", "a/b", ".hidden"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(
        DeviceLock::Acquire({Path("locks")}, uuid, "").status()))
        << uuid;
  }
}

}  // namespace
}  // namespace kvbroker
