#include "client/address/broker_starter.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "broker/base/temp_folder.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class SetClock : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::UnixEpoch();
};

// A shell script in kvbrokerd's place.
class BrokerStarterTest : public testing::Test {
 protected:
  BrokerStarter::Options Script(const std::string& text) {
    const std::string path = root_ / "kvbrokerd";
    std::ofstream(path) << "#!/bin/sh\n" << text << "\n";
    EXPECT_EQ(chmod(path.c_str(), 0700), 0);
    return {.program = path, .directory = root_ / "sockets"};
  }

  // Until the start that is under way has ended.
  absl::Status Finish(BrokerStarter& starter) {
    while (true) {
      absl::Status status = starter.Step();
      if (!absl::IsUnavailable(status) ||
          status.message().find("being started") == std::string::npos) {
        return status;
      }
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

  std::string Text(const std::string& file) {
    std::stringstream text;
    text << std::ifstream(root_ / file).rdbuf();
    return text.str();
  }

  // How often the script has run, where it says so.
  size_t Runs() { return Text("runs").size(); }

  TempFolder root_;
  SetClock clock_;
};

TEST_F(BrokerStarterTest, SaysWhichDeviceAndWhere) {
  BrokerStarter::Options options =
      Script(absl::StrCat("echo \"$@\" > ", root_ / "arguments"));
  options.backend = "cuda";
  options.gpu = "GPU-1";
  BrokerStarter starter(options);
  ASSERT_TRUE(Finish(starter).ok());
  EXPECT_EQ(Text("arguments"),
            absl::StrCat("--detach --socket-dir ", options.directory,
                         " --state-dir ", options.directory,
                         "/state --idle-exit 30s --log-level warn --backend "
                         "cuda --gpu GPU-1\n"));
  struct stat info;
  ASSERT_EQ(stat(options.directory.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700);
}

TEST_F(BrokerStarterTest, PassesOnTheEnvironmentButForWhatIsTheProcesssOwn) {
  setenv("CUDA_VISIBLE_DEVICES", "1", 1);
  setenv("NOTIFY_SOCKET", "/no/such", 1);
  setenv("KVBROKERD_IDLE_EXIT", "never", 1);
  setenv("STARTER_TEST", "kept", 1);
  BrokerStarter starter(
      Script(absl::StrCat("env > ", root_ / "environment; echo \"$@\" > ",
                          root_ / "arguments")));
  ASSERT_TRUE(Finish(starter).ok());
  EXPECT_THAT(Text("environment"),
              AllOf(HasSubstr("STARTER_TEST=kept"),
                    HasSubstr("KVBROKERD_IDLE_EXIT=never"),
                    Not(HasSubstr("CUDA_VISIBLE_DEVICES")),
                    Not(HasSubstr("NOTIFY_SOCKET"))));
  EXPECT_THAT(Text("arguments"), Not(HasSubstr("--idle-exit")));
  for (const char* name : {"CUDA_VISIBLE_DEVICES", "NOTIFY_SOCKET",
                           "KVBROKERD_IDLE_EXIT", "STARTER_TEST"}) {
    unsetenv(name);
  }
}

TEST_F(BrokerStarterTest, WhatIsStartedHasASessionOfItsOwnAndNoDescriptor) {
  const int kept = open("/dev/zero", O_RDONLY);  // survives an exec
  BrokerStarter starter(Script(
      absl::StrCat("ls -l /proc/$$/fd > ", root_ / "descriptors",
                   "; cut -d' ' -f6 /proc/$$/stat > ", root_ / "session")));
  ASSERT_TRUE(Finish(starter).ok());
  close(kept);
  EXPECT_THAT(Text("descriptors"), Not(HasSubstr("/dev/zero")));
  EXPECT_NE(atoi(Text("session").c_str()), getsid(0));
}

TEST_F(BrokerStarterTest, WhatFailedSaysWhy) {
  BrokerStarter starter(Script("echo 'kvbrokerd: no such GPU' >&2; exit 1"));
  const absl::Status status = Finish(starter);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("exit status 1"), HasSubstr("): no such GPU")));

  BrokerStarter::Options missing = Script("");
  missing.program = root_ / "no-such-program";
  EXPECT_EQ(BrokerStarter(missing).Step().code(), absl::StatusCode::kNotFound);
  missing.directory = root_ / "no/such/folder";
  EXPECT_THAT(std::string(BrokerStarter(missing).Step().message()),
              HasSubstr("no/such/folder"));
}

TEST_F(BrokerStarterTest, AnythingButADirectoryOfOnesOwnIsRefused) {
  const BrokerStarter::Options options = Script("exit 0");
  std::filesystem::create_directory_symlink(root_ / "elsewhere",
                                            options.directory);
  EXPECT_TRUE(absl::IsPermissionDenied(BrokerStarter(options).Step()));
  std::filesystem::remove(options.directory);
  std::filesystem::create_directory(options.directory);
  if (geteuid() != 0) return;
  ASSERT_EQ(chown(options.directory.c_str(), 4001, 4001), 0);
  EXPECT_TRUE(absl::IsPermissionDenied(BrokerStarter(options).Step()));
}

TEST_F(BrokerStarterTest, WhoHasTheDeviceIsNamed) {
  BrokerStarter starter(
      Script("echo 'served-at /run/x/GPU-1.sock'; "
             "echo 'kvbrokerd: another broker (pid 7)' >&2; exit 3"));
  const absl::Status status = Finish(starter);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(status.message(), "another broker (pid 7)");
  EXPECT_EQ(starter.holder_socket(), "/run/x/GPU-1.sock");
}

TEST_F(BrokerStarterTest, ABrokerThatEndsAgainIsStartedLessAndLessOften) {
  BrokerStarter starter(Script(absl::StrCat("printf x >> ", root_ / "runs")),
                        clock_);
  std::vector<absl::Time> starts;
  const absl::Time begin = clock_.now;
  while (clock_.now < begin + absl::Seconds(60)) {
    const size_t before = Runs();
    const absl::Status status = Finish(starter);
    if (Runs() > before) {
      EXPECT_TRUE(status.ok()) << status;
      starts.push_back(clock_.now);
    } else {
      EXPECT_TRUE(absl::IsUnavailable(status));
      EXPECT_THAT(std::string(status.message()), HasSubstr("ended at once"));
    }
    clock_.now += absl::Milliseconds(50);
  }
  ASSERT_GE(starts.size(), 4u);
  EXPECT_EQ(starts[1] - starts[0], absl::Milliseconds(50));  // the next Step
  for (size_t i = 2; i < starts.size(); ++i) {
    EXPECT_GE(starts[i] - starts[i - 1], starts[i - 1] - starts[i - 2]);
    EXPECT_LE(starts[i] - starts[i - 1], absl::Seconds(5.05));
  }
  EXPECT_GE(starts.back() - starts[starts.size() - 2], absl::Seconds(5));
  // One that has lived is worth another at once, twice.
  clock_.now += absl::Minutes(1);
  EXPECT_TRUE(Finish(starter).ok());
  EXPECT_TRUE(Finish(starter).ok());
  EXPECT_FALSE(Finish(starter).ok());
}

TEST_F(BrokerStarterTest, WhoIsForgottenIsStillReaped) {
  const std::string gate = root_ / "gate";
  ASSERT_EQ(mkfifo(gate.c_str(), 0600), 0);
  BrokerStarter starter(Script(absl::StrCat("cat ", gate)));
  EXPECT_TRUE(absl::IsUnavailable(starter.Step()));
  starter.Forget();
  std::ofstream(gate).close();
  siginfo_t info;
  while (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_EQ(errno, ECHILD);
}

TEST_F(BrokerStarterTest, TheStatusCanBeGoneBeforeItIsRead) {
  // As where the process ignores SIGCHLD.
  signal(SIGCHLD, SIG_IGN);
  BrokerStarter good(Script("exit 0"));
  EXPECT_TRUE(Finish(good).ok());
  BrokerStarter bad(Script("echo 'kvbrokerd: broken' >&2; exit 1"));
  EXPECT_THAT(std::string(Finish(bad).message()), HasSubstr("broken"));
  signal(SIGCHLD, SIG_DFL);
}

TEST(AutostartAllowedTest, TakesWordsForYesAndNo) {
  const auto allowed = [](const char* value) {
    return AutostartAllowed([&](const char*) { return value; });
  };
  for (const char* yes : {(const char*)nullptr, "1", "true", "Yes", "on"}) {
    EXPECT_TRUE(*allowed(yes));
  }
  for (const char* no : {"0", "false", "NO", "off"}) EXPECT_FALSE(*allowed(no));
  EXPECT_THAT(std::string(allowed("maybe").status().message()),
              AllOf(HasSubstr("KVBROKER_AUTOSTART"), HasSubstr("\"maybe\"")));
}

}  // namespace
}  // namespace kvbroker::client
