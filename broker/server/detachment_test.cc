#include "broker/server/detachment.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "broker/base/temp_folder.h"
#include "broker/base/unique_fd.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using ::testing::HasSubstr;

std::string ReadAll(int fd) {
  std::string text;
  char buffer[256];
  for (ssize_t size; (size = read(fd, buffer, sizeof(buffer))) > 0;) {
    text.append(buffer, static_cast<size_t>(size));
  }
  return text;
}

// What a program that detaches leaves its starter with.
struct Left {
  int status = -1;
  std::string out, error;
};

class DetachmentTest : public testing::Test {
 protected:
  // Runs `serve` in a process that has detached itself.
  Left Run(const std::string& log,
           const std::function<void(Detachment&)>& serve) {
    int out[2], error[2];
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(error, O_CLOEXEC), 0);
    const pid_t child = fork();
    if (child == 0) {
      dup2(out[1], STDOUT_FILENO);
      dup2(error[1], STDERR_FILENO);
      absl::StatusOr<Detachment> detachment = Detachment::Begin(log);
      if (!detachment.ok()) _exit(99);
      serve(*detachment);
      _exit(0);
    }
    close(out[1]);
    close(error[1]);
    Left left;
    left.out = ReadAll(out[0]);
    left.error = ReadAll(error[0]);
    close(out[0]);
    close(error[0]);
    int status;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) left.status = WEXITSTATUS(status);
    return left;
  }

  TempFolder root_;
};

TEST_F(DetachmentTest, TheFirstProcessLeavesWithWhatIsSaid) {
  const Left left = Run("", [](Detachment& detachment) {
    detachment.End(3, "some words\n", "others\n");
  });
  EXPECT_EQ(left.status, 3);
  EXPECT_EQ(left.out, "some words\n");
  EXPECT_EQ(left.error, "others\n");
}

TEST_F(DetachmentTest, WhoDiesBeforeItIsReadyHasFailed) {
  const Left left = Run("", [](Detachment&) { _exit(0); });
  EXPECT_EQ(left.status, 1);
  EXPECT_THAT(left.error, HasSubstr("ended before it was ready"));
}

TEST_F(DetachmentTest, NothingOfTheStarterIsLeft) {
  const pid_t starter = getpid();
  // Ignored signals, and descriptors that survive an exec.
  signal(SIGTERM, SIG_IGN);
  const UniqueFd kept(open("/dev/zero", O_RDONLY));
  const Left left = Run("", [=](Detachment& detachment) {
    std::string wrong;
    const auto expect = [&](bool holds, const char* what) {
      if (!holds) absl::StrAppend(&wrong, what, ";");
    };
    expect(getsid(0) != getsid(starter), "session");
    expect(getpgrp() != getpgid(starter), "group");
    expect(getsid(0) != getpid(), "leads its session");
    expect(std::filesystem::current_path() == "/", "directory");
    expect(signal(SIGTERM, SIG_DFL) == SIG_DFL, "signals");
    for (const auto& entry :
         std::filesystem::directory_iterator("/proc/self/fd")) {
      const std::string target =
          std::filesystem::read_symlink(entry.path()).string();
      expect(target != "/dev/zero", "descriptors");
    }
    // The middle one may be about to leave.
    while (getppid() != 1) {
      const pid_t parent = getppid();
      expect(parent != starter, "parent");
      if (!wrong.empty() || getpgid(parent) != getpgrp()) break;
    }
    detachment.End(0, wrong, "");
  });
  signal(SIGTERM, SIG_DFL);
  EXPECT_EQ(left.status, 0);
  EXPECT_EQ(left.out, "");
}

TEST_F(DetachmentTest, WhatIsWrittenLaterIsInTheLog) {
  const std::string log = root_ / "log";
  const auto write_one = [](Detachment& detachment) {
    fprintf(stderr, "a line\n");
    fflush(stderr);
    detachment.End(0, "", "");
  };
  EXPECT_EQ(Run(log, write_one).error, "");
  EXPECT_EQ(Run(log, write_one).error, "");
  std::stringstream text;
  text << std::ifstream(log).rdbuf();
  EXPECT_EQ(text.str(), "a line\na line\n");
  // A large one makes way.
  std::filesystem::resize_file(log, 2 << 20);
  Run(log, write_one);
  EXPECT_EQ(std::filesystem::file_size(log), 7u);
  EXPECT_EQ(std::filesystem::file_size(log + ".old"), 2u << 20);
}

TEST_F(DetachmentTest, ALogThatCannotBeWrittenIsNoObstacle) {
  const Left left = Run("/no/such/folder/log", [](Detachment& detachment) {
    detachment.End(0, "ready", "");
  });
  EXPECT_EQ(left.out, "ready");
}

}  // namespace
}  // namespace kvbroker
