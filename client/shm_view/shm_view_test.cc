// Several processes are several ShmViews in forked children: record locks are a
// process's.
#include "client/shm_view/shm_view.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <string>

#include "absl/time/clock.h"
#include "broker/base/check.h"
#include "broker/base/temp_folder.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

constexpr char kGpu[] = "GPU-1";

class ShmViewTest : public testing::Test {
 protected:
  ShmView OpenView(const std::string& name = "llama") {
    auto view = ShmView::Open(folder_.path(), name);
    KVB_CHECK(view.ok());
    return *std::move(view);
  }
  std::string path() const { return folder_ / "llama"; }

  ViewFigures File() const {
    UniqueFd file(open(path().c_str(), O_RDONLY));
    ViewFigures figures = {-1, -1, -1};
    EXPECT_EQ(read(file.get(), &figures, sizeof(figures)), 24);
    return figures;
  }
  void WriteLimit(int64_t limit) const {
    UniqueFd file(open(path().c_str(), O_WRONLY));
    ASSERT_EQ(flock(file.get(), LOCK_EX), 0);
    ASSERT_EQ(pwrite(file.get(), &limit, sizeof(limit), 0), 8);
  }
  bool FolderIsEmpty() const {
    return std::filesystem::is_empty(folder_.path());
  }

  // A process with a view of its own, which has `figures` until it is ended.
  class OtherProcess {
   public:
    OtherProcess(const std::string& directory, const std::string& device,
                 ViewFigures figures) {
      int up[2], down[2];
      KVB_CHECK(pipe(up) == 0 && pipe(down) == 0);
      pid_ = fork();
      KVB_CHECK(pid_ >= 0);
      if (pid_ == 0) {
        close(up[0]);
        close(down[1]);
        _exit(Serve(directory, device, figures, up[1], down[0]));
      }
      close(up[1]);
      close(down[0]);
      up_.Reset(up[0]);
      down_.Reset(down[1]);
      char ready;
      KVB_CHECK(read(up_.get(), &ready, 1) == 1);
    }
    // By `signal`, or in order.
    void End(int signal = 0) {
      if (signal != 0) kill(pid_, signal);
      down_.Reset();
      int status;
      waitpid(pid_, &status, 0);
      EXPECT_EQ(signal == 0 ? WEXITSTATUS(status) : WTERMSIG(status), signal);
      pid_ = 0;
    }
    // Makes one more Pass; the limit that it was to ask for, or -1.
    int64_t Pass() {
      char go = 'p';
      KVB_CHECK(write(down_.get(), &go, 1) == 1);
      int64_t asked;
      KVB_CHECK(read(up_.get(), &asked, sizeof(asked)) == sizeof(asked));
      return asked;
    }
    ~OtherProcess() {
      if (pid_ != 0) End(SIGKILL);
    }

   private:
    static int Serve(const std::string& directory, const std::string& device,
                     ViewFigures figures, int up, int down) {
      auto view = ShmView::Open(directory, "llama");
      if (!view.ok()) return 1;
      const ShmView::Owner owner = view->AddOwner(device);
      if (!view->Pass({{owner, figures}}).done) return 2;
      char go = 'r';
      if (write(up, &go, 1) != 1) return 3;
      while (read(down, &go, 1) == 1) {
        ShmView::Outcome outcome = view->Pass({{owner, figures}});
        const int64_t asked = outcome.asked ? outcome.asked->count() : -1;
        if (write(up, &asked, sizeof(asked)) != sizeof(asked)) return 4;
      }
      view->RemoveOwner(owner);
      return 0;
    }

    pid_t pid_;
    UniqueFd up_, down_;
  };

  TempFolder folder_;
};

TEST_F(ShmViewTest, ShowsTheFiguresFromTheFirstPassAndIsGoneWithTheLastOwner) {
  ShmView view = OpenView();
  EXPECT_TRUE(FolderIsEmpty());
  const ShmView::Owner owner = view.AddOwner(kGpu);
  EXPECT_TRUE(view.Pass({{owner, {100, 20, 3}}}).done);
  EXPECT_EQ(File(), (ViewFigures{100, 20, 3}));
  EXPECT_TRUE(view.Pass({{owner, {90, 30, 0}}}).done);
  EXPECT_EQ(File(), (ViewFigures{90, 30, 0}));
  view.RemoveOwner(owner);
  EXPECT_TRUE(FolderIsEmpty());
}

TEST_F(ShmViewTest, OwnersOfOneProcessAreAddedUp) {
  ShmView view = OpenView();
  const ShmView::Owner first = view.AddOwner(kGpu);
  const ShmView::Owner second = view.AddOwner(kGpu);
  view.Pass({{first, {100, 20, 1}}, {second, {100, 30, 2}}});
  EXPECT_EQ(File(), (ViewFigures{100, 50, 3}));
  view.RemoveOwner(first);
  view.Pass({{second, {100, 30, 2}}});
  EXPECT_EQ(File(), (ViewFigures{100, 30, 2}));
}

TEST_F(ShmViewTest, OfSeveralDevicesItShowsTheFullest) {
  ShmView view = OpenView();
  const ShmView::Owner first = view.AddOwner("GPU-1");
  const ShmView::Owner second = view.AddOwner("GPU-2");
  view.Pass({{first, {100, 40, 0}}, {second, {100, 60, 0}}});
  EXPECT_EQ(File(), (ViewFigures{100, 60, 0}));
}

TEST_F(ShmViewTest, ProcessesAreAddedUpWhoeverWrites) {
  OtherProcess other(folder_.path(), kGpu, {100, 20, 1});
  EXPECT_EQ(File(), (ViewFigures{100, 20, 1}));
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 30, 2}}});
  EXPECT_EQ(File(), (ViewFigures{100, 50, 3}));
  other.Pass();
  EXPECT_EQ(File(), (ViewFigures{100, 50, 3}));
  other.End();
  view.Pass({{owner, {100, 30, 2}}});
  EXPECT_EQ(File(), (ViewFigures{100, 30, 2}));
}

TEST_F(ShmViewTest, WhoLeavesLeavesTheFileToTheOthers) {
  OtherProcess other(folder_.path(), kGpu, {100, 20, 0});
  {
    ShmView view = OpenView();
    const ShmView::Owner owner = view.AddOwner(kGpu);
    view.Pass({{owner, {100, 30, 0}}});
    view.RemoveOwner(owner);
  }
  other.Pass();
  EXPECT_EQ(File(), (ViewFigures{100, 20, 0}));
  other.End();
  EXPECT_TRUE(FolderIsEmpty());
}

TEST_F(ShmViewTest, WhatAKilledOwnerHadCountsForNothing) {
  OtherProcess other(folder_.path(), kGpu, {100, 20, 1});
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 30, 2}}});
  other.End(SIGKILL);
  view.Pass({{owner, {100, 30, 2}}});
  EXPECT_EQ(File(), (ViewFigures{100, 30, 2}));
  view.RemoveOwner(owner);
  EXPECT_TRUE(FolderIsEmpty());
}

TEST_F(ShmViewTest, AStaleViewIsTakenOver) {
  {
    OtherProcess other(folder_.path(), kGpu, {100, 20, 1});
    other.End(SIGKILL);
  }
  // Nobody heard this, and it is nobody's wish any more.
  WriteLimit(55);
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  ShmView::Outcome outcome = view.Pass({{owner, {70, 0, 0}}});
  EXPECT_TRUE(outcome.done);
  EXPECT_FALSE(outcome.asked);
  EXPECT_EQ(File(), (ViewFigures{70, 0, 0}));
}

TEST_F(ShmViewTest, AStaleViewThatIsLockedIsTakenOverLater) {
  {
    OtherProcess other(folder_.path(), kGpu, {100, 20, 1});
    other.End(SIGKILL);
  }
  WriteLimit(55);
  UniqueFd reader(open(path().c_str(), O_RDONLY));
  ASSERT_EQ(flock(reader.get(), LOCK_SH), 0);
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  EXPECT_FALSE(view.Pass({{owner, {70, 0, 0}}}).done);
  reader.Reset();
  ShmView::Outcome outcome = view.Pass({{owner, {70, 0, 0}}});
  EXPECT_TRUE(outcome.done);
  EXPECT_FALSE(outcome.asked);
  EXPECT_EQ(File(), (ViewFigures{70, 0, 0}));
}

TEST_F(ShmViewTest, AForeignLimitIsAskedForOnceAndStaysUntilItIsAnswered) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 0}}});
  WriteLimit(60);
  ShmView::Outcome outcome = view.Pass({{owner, {100, 25, 0}}});
  ASSERT_TRUE(outcome.asked);
  EXPECT_EQ(*outcome.asked, Bytes(60));
  EXPECT_EQ(File(), (ViewFigures{60, 25, 0}));
  EXPECT_FALSE(view.Pass({{owner, {100, 25, 0}}}).asked);
  EXPECT_EQ(File().limit, 60);
  view.Answered();
  EXPECT_FALSE(view.Pass({{owner, {60, 25, 0}}}).asked);
  EXPECT_EQ(File(), (ViewFigures{60, 25, 0}));
}

TEST_F(ShmViewTest, ALimitThatIsRefusedIsWrittenBack) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 0}}});
  WriteLimit(60);
  ASSERT_TRUE(view.Pass({{owner, {100, 20, 0}}}).asked);
  view.Answered();
  EXPECT_FALSE(view.Pass({{owner, {100, 20, 0}}}).asked);
  EXPECT_EQ(File().limit, 100);
}

TEST_F(ShmViewTest, ASecondLimitIsAskedForAfterTheFirst) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 0}}});
  WriteLimit(60);
  ASSERT_TRUE(view.Pass({{owner, {100, 20, 0}}}).asked);
  WriteLimit(50);
  EXPECT_FALSE(view.Pass({{owner, {100, 20, 0}}}).asked);
  view.Answered();
  ShmView::Outcome outcome = view.Pass({{owner, {60, 20, 0}}});
  ASSERT_TRUE(outcome.asked);
  EXPECT_EQ(*outcome.asked, Bytes(50));
}

TEST_F(ShmViewTest, WhatMakesNoSenseIsIgnoredAndWrittenBack) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 0}}});
  for (int64_t wrong :
       {int64_t{-1}, INT64_MIN, INT64_MAX, kMaxBytes.count() + 1}) {
    WriteLimit(wrong);
    ShmView::Outcome outcome = view.Pass({{owner, {100, 20, 0}}});
    EXPECT_FALSE(outcome.asked);
    ASSERT_TRUE(outcome.ignored);
    EXPECT_EQ(*outcome.ignored, wrong);
    EXPECT_EQ(File().limit, 100);
  }
  WriteLimit(0);  // is a limit
  EXPECT_EQ(view.Pass({{owner, {100, 20, 0}}}).asked, Bytes(0));
}

TEST_F(ShmViewTest, OtherFiguresOfOthersAreWrittenOver) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 3}}});
  UniqueFd file(open(path().c_str(), O_WRONLY));
  const int64_t wrong[] = {7, 7};
  ASSERT_EQ(pwrite(file.get(), wrong, sizeof(wrong), 8), 16);
  EXPECT_FALSE(view.Pass({{owner, {100, 20, 3}}}).asked);
  EXPECT_EQ(File(), (ViewFigures{100, 20, 3}));
}

TEST_F(ShmViewTest, OneOfSeveralProcessesAsks) {
  OtherProcess other(folder_.path(), kGpu, {100, 20, 0});
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 30, 0}}});
  WriteLimit(60);
  EXPECT_EQ(other.Pass(), 60);
  EXPECT_FALSE(view.Pass({{owner, {100, 35, 0}}}).asked);
  EXPECT_EQ(File(), (ViewFigures{60, 55, 0}));  // not written back meanwhile
  // It dies over it: the limit that is in force is shown again.
  other.End(SIGKILL);
  EXPECT_FALSE(view.Pass({{owner, {100, 35, 0}}}).asked);
  EXPECT_EQ(File(), (ViewFigures{100, 35, 0}));
}

TEST_F(ShmViewTest, WhoHeardOfALimitLastIsBelieved) {
  OtherProcess other(folder_.path(), kGpu, {100, 20, 0});
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 30, 0}}});
  // The other one does not know yet, and must not write the old one, nor ask
  // for what we wrote.
  view.Pass({{owner, {80, 30, 0}}});
  EXPECT_EQ(other.Pass(), -1);
  EXPECT_EQ(File(), (ViewFigures{80, 50, 0}));
}

TEST_F(ShmViewTest, ALockedFileIsSkipped) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 0}}});
  UniqueFd reader(open(path().c_str(), O_RDONLY));
  ASSERT_EQ(flock(reader.get(), LOCK_SH), 0);
  EXPECT_FALSE(view.Pass({{owner, {100, 30, 0}}}).done);
  EXPECT_EQ(File().used, 20);
  EXPECT_TRUE(view.Pass({{owner, {100, 20, 0}}}).done);  // is as it should be
  reader.Reset();
  EXPECT_TRUE(view.Pass({{owner, {100, 30, 0}}}).done);
  EXPECT_EQ(File().used, 30);
}

TEST_F(ShmViewTest, WhatReplacesTheFileIsReplacedOrSaid) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  const std::string target = folder_ / "target";
  const auto pass = [&] { return view.Pass({{owner, {100, 20, 3}}}); };
  const auto expect_view = [&] {
    EXPECT_TRUE(pass().done);
    EXPECT_EQ(File(), (ViewFigures{100, 20, 3}));
    struct stat status;
    ASSERT_EQ(lstat(path().c_str(), &status), 0);
    EXPECT_TRUE(S_ISREG(status.st_mode));
  };
  expect_view();
  unlink(path().c_str());
  expect_view();
  unlink(path().c_str());
  ASSERT_EQ(symlink(target.c_str(), path().c_str()), 0);
  expect_view();
  EXPECT_FALSE(std::filesystem::exists(target));
  unlink(path().c_str());
  ASSERT_EQ(mkfifo(path().c_str(), 0666), 0);
  expect_view();
  ASSERT_EQ(truncate(path().c_str(), 7), 0);
  expect_view();
  ASSERT_EQ(truncate(path().c_str(), 4096), 0);
  expect_view();
  EXPECT_EQ(std::filesystem::file_size(path()), 24u);

  unlink(path().c_str());
  ASSERT_EQ(mkdir(path().c_str(), 0777), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(pass().problem));
  rmdir(path().c_str());
  expect_view();

  // Another program's data in its place are that program's.
  unlink(path().c_str());
  UniqueFd file(open(path().c_str(), O_RDWR | O_CREAT, 0666));
  ASSERT_EQ(ftruncate(file.get(), 100), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(pass().problem));
  EXPECT_EQ(std::filesystem::file_size(path()), 100u);
  view.RemoveOwner(owner);
  EXPECT_TRUE(std::filesystem::exists(path()));
}

TEST_F(ShmViewTest, AViewThatIsRenamedOverOursIsAWayToWrite) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 0}}});
  // As editors write: a new file in the old one's place.
  const ViewFigures theirs = {60, 0, 0};
  const std::string unfinished = folder_ / "unfinished";
  UniqueFd file(open(unfinished.c_str(), O_RDWR | O_CREAT, 0666));
  ASSERT_EQ(write(file.get(), &theirs, sizeof(theirs)), 24);
  ASSERT_EQ(rename(unfinished.c_str(), path().c_str()), 0);
  EXPECT_EQ(view.Pass({{owner, {100, 20, 0}}}).asked, Bytes(60));
  view.Answered();
  view.Pass({{owner, {60, 20, 0}}});
  EXPECT_EQ(File(), (ViewFigures{60, 20, 0}));
}

TEST_F(ShmViewTest, ATableThatIsGoneOrReplacedIsMadeAnew) {
  OtherProcess other(folder_.path(), kGpu, {100, 20, 0});
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 30, 0}}});
  const std::string table = folder_ / ".llama.kvbroker";
  ASSERT_EQ(unlink(table.c_str()), 0);
  EXPECT_FALSE(view.Pass({{owner, {100, 30, 0}}}).asked);
  EXPECT_EQ(other.Pass(), -1);
  EXPECT_EQ(File(), (ViewFigures{100, 50, 0}));
  ASSERT_EQ(unlink(table.c_str()), 0);
  ASSERT_EQ(symlink("/dev/null", table.c_str()), 0);
  view.Pass({{owner, {100, 30, 0}}});
  EXPECT_EQ(other.Pass(), -1);
  EXPECT_EQ(File(), (ViewFigures{100, 50, 0}));
  // Torn, it says less, but nothing wrong for long.
  ASSERT_EQ(truncate(table.c_str(), 0), 0);
  view.Pass({{owner, {100, 31, 0}}});
  EXPECT_EQ(File().limit, 100);
}

TEST_F(ShmViewTest, KnowsItselfByAnyPath) {
  ShmView view = OpenView();
  EXPECT_TRUE(view.Is(folder_.path() + "/.", "llama"));
  EXPECT_FALSE(view.Is(folder_.path(), "other"));
  EXPECT_FALSE(view.Is("/tmp", "llama"));
}

TEST_F(ShmViewTest, ADirectoryThatIsNotThereIsAnError) {
  EXPECT_FALSE(ShmView::Open(folder_ / "nowhere", "llama").ok());
  EXPECT_TRUE(
      absl::IsInvalidArgument(ShmView::Open(folder_.path(), "..").status()));
}

// Not a test of time: the figure is printed for who wants it.
TEST_F(ShmViewTest, APassWithNothingToDoIsCheap) {
  ShmView view = OpenView();
  const ShmView::Owner owner = view.AddOwner(kGpu);
  view.Pass({{owner, {100, 20, 0}}});
  constexpr int kPasses = 10000;
  timespec start, end;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &start);
  for (int i = 0; i < kPasses; ++i) {
    ASSERT_TRUE(view.Pass({{owner, {100, 20, 0}}}).done);
  }
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
  RecordProperty("cpu_ns_per_pass",
                 static_cast<int>(((end.tv_sec - start.tv_sec) * 1'000'000'000 +
                                   (end.tv_nsec - start.tv_nsec)) /
                                  kPasses));
}

}  // namespace
}  // namespace kvbroker::client
