#include "client/shm_view/view_keeper.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "broker/base/check.h"
#include "broker/base/mutex.h"
#include "broker/base/temp_folder.h"
#include "broker/base/unique_fd.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

// For giving up only.
constexpr absl::Duration kPatience = absl::Seconds(20);

bool Eventually(const std::function<bool()>& holds) {
  const absl::Time give_up = absl::Now() + kPatience;
  while (!holds()) {
    if (absl::Now() > give_up) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

int ThreadsOfThisProcess() {
  int threads = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator("/proc/self/task")) {
    ++threads;
  }
  return threads;
}

// What a session and its broker would be.
class Engine {
 public:
  explicit Engine(ViewFigures figures) : figures_(figures) {}

  ViewOwner AsOwner(const std::string& device = "GPU-1") {
    return {.device = device,
            .figures =
                [this] {
                  MutexLock lock(&mu_);
                  return figures_;
                },
            .set_limit = [this](Bytes limit) { return SetLimit(limit); },
            .remark =
                [this](const std::string& text) {
                  MutexLock lock(&mu_);
                  remarks_.push_back(text);
                }};
  }
  void Use(int64_t used) {
    MutexLock lock(&mu_);
    figures_.used = used;
  }
  void Refuse(absl::Status why) {
    MutexLock lock(&mu_);
    refusal_ = std::move(why);
  }
  absl::Status SetLimit(Bytes limit) {
    MutexLock lock(&mu_);
    ++asked_;
    if (!refusal_.ok()) return refusal_;
    figures_.limit = limit.count();
    return absl::OkStatus();
  }
  int64_t limit() {
    MutexLock lock(&mu_);
    return figures_.limit;
  }
  int asked() {
    MutexLock lock(&mu_);
    return asked_;
  }
  std::vector<std::string> remarks() {
    MutexLock lock(&mu_);
    return remarks_;
  }

 private:
  Mutex mu_;
  ViewFigures figures_ ABSL_GUARDED_BY(mu_);
  int asked_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status refusal_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> remarks_ ABSL_GUARDED_BY(mu_);
};

class ViewKeeperTest : public testing::Test {
 protected:
  std::unique_ptr<KeptView> Keep(Engine& engine,
                                 const std::string& name = "llama",
                                 const std::string& device = "GPU-1") {
    auto kept = KeepView(folder_.path(), name, engine.AsOwner(device));
    KVB_CHECK(kept.ok());
    return *std::move(kept);
  }
  std::string path(const std::string& name = "llama") const {
    return folder_ / name;
  }
  ViewFigures File(const std::string& name = "llama") const {
    UniqueFd file(open(path(name).c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
    ViewFigures figures = {-1, -1, -1};
    if (read(file.get(), &figures, sizeof(figures)) != sizeof(figures)) {
      return {-1, -1, -1};
    }
    return figures;
  }
  bool Shows(ViewFigures figures, const std::string& name = "llama") {
    return Eventually([&] { return File(name) == figures; });
  }
  void WriteLimit(int64_t limit, const std::string& name = "llama") const {
    UniqueFd file(open(path(name).c_str(), O_WRONLY));
    ASSERT_EQ(flock(file.get(), LOCK_EX), 0);
    ASSERT_EQ(pwrite(file.get(), &limit, sizeof(limit), 0), 8);
  }

  TempFolder folder_;
};

TEST_F(ViewKeeperTest, TheViewIsThereWhileItIsKept) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  EXPECT_EQ(File(), (ViewFigures{100, 20, 0}));
  engine.Use(30);
  EXPECT_TRUE(Shows({100, 30, 0}));
  kept.reset();
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
}

TEST_F(ViewKeeperTest, ALimitOfTheBrokersShows) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  ASSERT_TRUE(engine.SetLimit(Bytes(70)).ok());
  EXPECT_TRUE(Shows({70, 20, 0}));
}

TEST_F(ViewKeeperTest, AForeignLimitIsSet) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  for (int64_t limit : {50, 0, 1000, 100}) {
    WriteLimit(limit);
    EXPECT_TRUE(Eventually([&] { return engine.limit() == limit; }));
    EXPECT_TRUE(Shows({limit, 20, 0}));
  }
  EXPECT_EQ(engine.remarks(), std::vector<std::string>());
}

TEST_F(ViewKeeperTest, ALimitWrittenThroughAMappingIsSet) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  UniqueFd file(open(path().c_str(), O_RDWR));
  auto* limit = static_cast<volatile int64_t*>(
      mmap(nullptr, 24, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0));
  ASSERT_NE(limit, MAP_FAILED);
  *limit = 60;
  EXPECT_TRUE(Eventually([&] { return engine.limit() == 60; }));
  EXPECT_EQ(*limit, 60);
  munmap(const_cast<int64_t*>(limit), 24);
}

TEST_F(ViewKeeperTest, ARefusedLimitIsWrittenBackAndSaid) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  engine.Refuse(absl::PermissionDeniedError("not yours"));
  WriteLimit(50);
  EXPECT_TRUE(Eventually([&] { return !engine.remarks().empty(); }));
  EXPECT_TRUE(Shows({100, 20, 0}));
  EXPECT_EQ(
      engine.remarks(),
      std::vector<std::string>{absl::StrCat(
          path(), ": the limit written to it is not set, 50: not yours")});
}

TEST_F(ViewKeeperTest, ABrokerThatIsRestartedIsAskedAgain) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  engine.Refuse(absl::UnavailableError("nobody listens"));
  WriteLimit(50);
  engine.Use(30);  // is shown meanwhile
  EXPECT_TRUE(Shows({50, 30, 0}));
  EXPECT_TRUE(Eventually([&] { return engine.asked() >= 2; }));
  engine.Refuse(absl::OkStatus());
  EXPECT_TRUE(Eventually([&] { return engine.limit() == 50; }));
  EXPECT_TRUE(Shows({50, 30, 0}));
  EXPECT_EQ(engine.remarks(), std::vector<std::string>());
}

TEST_F(ViewKeeperTest, ABrokerThatStaysAwayIsNotWaitedForForEver) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  engine.Refuse(absl::UnavailableError("nobody listens"));
  WriteLimit(50);
  EXPECT_TRUE(Eventually([&] { return !engine.remarks().empty(); }));
  EXPECT_TRUE(Shows({100, 20, 0}));
}

TEST_F(ViewKeeperTest, AnAbsurdLimitIsWrittenBackAndSaid) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  WriteLimit(-5);
  EXPECT_TRUE(Eventually([&] { return !engine.remarks().empty(); }));
  EXPECT_NE(engine.remarks()[0].find("-5"), std::string::npos);
  EXPECT_TRUE(Shows({100, 20, 0}));
  EXPECT_EQ(engine.limit(), 100);
}

TEST_F(ViewKeeperTest, ALockThatIsNeverLetGoHoldsUpNobody) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  UniqueFd hog(open(path().c_str(), O_RDWR));
  ASSERT_EQ(flock(hog.get(), LOCK_EX), 0);
  engine.Use(30);
  Engine second({100, 5, 0}), other({10, 1, 0});
  std::unique_ptr<KeptView> kept_second = Keep(second);
  std::unique_ptr<KeptView> kept_other = Keep(other, "mistral");
  EXPECT_EQ(File("mistral"), (ViewFigures{10, 1, 0}));
  EXPECT_EQ(File(), (ViewFigures{100, 20, 0}));
  hog.Reset();
  EXPECT_TRUE(Shows({100, 35, 0}));
  hog.Reset(open(path().c_str(), O_RDWR));
  ASSERT_EQ(flock(hog.get(), LOCK_EX), 0);
  kept_second.reset();
  kept.reset();
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(ViewKeeperTest, WhatIsInTheWayIsSaidAndWaitedFor) {
  ASSERT_EQ(mkdir(path().c_str(), 0777), 0);
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  ASSERT_EQ(engine.remarks().size(), 1u);
  EXPECT_NE(engine.remarks()[0].find("a directory"), std::string::npos);
  rmdir(path().c_str());
  EXPECT_TRUE(Shows({100, 20, 0}));
  EXPECT_EQ(engine.remarks().size(), 1u);
}

TEST_F(ViewKeeperTest, SessionsOfOneProcessShareAView) {
  Engine first({100, 20, 0}), second({100, 30, 0});
  std::unique_ptr<KeptView> kept_first = Keep(first);
  std::unique_ptr<KeptView> kept_second = Keep(second);
  EXPECT_EQ(File(), (ViewFigures{100, 50, 0}));
  kept_first.reset();
  EXPECT_TRUE(Shows({100, 30, 0}));
}

TEST_F(ViewKeeperTest, ALimitIsSetOnEachDevice) {
  Engine first({100, 20, 0}), second({100, 30, 0});
  std::unique_ptr<KeptView> kept_first = Keep(first, "llama", "GPU-1");
  std::unique_ptr<KeptView> kept_second = Keep(second, "llama", "GPU-2");
  WriteLimit(60);
  EXPECT_TRUE(
      Eventually([&] { return first.limit() == 60 && second.limit() == 60; }));
}

TEST_F(ViewKeeperTest, OneThreadThatIsGoneWithTheLastView) {
  const int before = ThreadsOfThisProcess();
  Engine first({100, 20, 0}), second({10, 2, 0});
  std::unique_ptr<KeptView> kept_first = Keep(first);
  std::unique_ptr<KeptView> kept_second = Keep(second, "mistral");
  EXPECT_EQ(ThreadsOfThisProcess(), before + 1);
  kept_first.reset();
  EXPECT_EQ(ThreadsOfThisProcess(), before + 1);
  kept_second.reset();
  // The kernel may list a thread for a moment after it was joined.
  EXPECT_TRUE(Eventually([&] { return ThreadsOfThisProcess() == before; }));
  kept_first = Keep(first);
  EXPECT_EQ(ThreadsOfThisProcess(), before + 1);
}

TEST_F(ViewKeeperTest, AForkedChildTakesNothingAway) {
  Engine engine({100, 20, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    kept.reset();
    _exit(0);
  }
  int status = 1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(File(), (ViewFigures{100, 20, 0}));
  engine.Use(30);
  EXPECT_TRUE(Shows({100, 30, 0}));
}

TEST_F(ViewKeeperTest, AChildThatLivesOnKeepsNoViewAlive) {
  int hold[2], ready[2];
  ASSERT_EQ(pipe(hold), 0);
  ASSERT_EQ(pipe(ready), 0);
  const pid_t owner = fork();
  ASSERT_GE(owner, 0);
  if (owner == 0) {
    Engine engine({100, 20, 0});
    std::unique_ptr<KeptView> kept = Keep(engine);
    if (fork() == 0) {  // inherits every descriptor
      close(hold[1]);
      char end;
      _exit(read(hold[0], &end, 1) == 0 ? 0 : 1);
    }
    char go = 'r';
    if (write(ready[1], &go, 1) != 1) _exit(1);
    kill(getpid(), SIGKILL);
  }
  char go;
  ASSERT_EQ(read(ready[0], &go, 1), 1);
  int status;
  ASSERT_EQ(waitpid(owner, &status, 0), owner);
  EXPECT_EQ(File(), (ViewFigures{100, 20, 0}));
  Engine engine({70, 1, 0});
  std::unique_ptr<KeptView> kept = Keep(engine);
  EXPECT_EQ(File(), (ViewFigures{70, 1, 0}));
  EXPECT_EQ(engine.limit(), 70);
  kept.reset();
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
  close(hold[1]);
}

TEST_F(ViewKeeperTest, ComesAndGoesFromManyThreads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Engine engine({100, 1, 0});
      for (int i = 0; i < 25; ++i) {
        Keep(engine, absl::StrCat("view", (t + i) % 2));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
}

TEST_F(ViewKeeperTest, WrongNamesAndDirectoriesAreErrors) {
  const int before = ThreadsOfThisProcess();
  Engine engine({1, 1, 0});
  EXPECT_TRUE(absl::IsInvalidArgument(
      KeepView(folder_.path(), "..", engine.AsOwner()).status()));
  EXPECT_FALSE(KeepView(folder_ / "nowhere", "a", engine.AsOwner()).ok());
  EXPECT_TRUE(Eventually([&] { return ThreadsOfThisProcess() == before; }));
}

}  // namespace
}  // namespace kvbroker::client
