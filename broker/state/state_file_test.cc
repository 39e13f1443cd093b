#include "broker/state/state_file.h"

#include <errno.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/temp_folder.h"
#include "broker/state/state_envelope.h"

namespace kvbroker {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

BrokerState Numbered(uint64_t incarnation) {
  BrokerState state;
  state.incarnation = incarnation;
  state.limits = {{.name = "chat", .min = MiB(1), .max = MiB(2)}};
  state.sessions = {{.tenant = "uid:0", .instance = "chat", .pid = 1}};
  return state;
}

// Fails the calls that it is told to; writes and reads a few bytes at a time.
class FaultySystem : public FileSystem {
 public:
  // `error` for the calls numbered `first` to `last`, from 0.
  void Fail(int error, int first, int last) {
    error_ = error;
    first_ = first;
    last_ = last;
    calls_.clear();
  }
  void Heal() { Fail(0, -1, -1); }
  void set_piece(size_t piece) { piece_ = piece; }
  // Since the last Fail or Heal.
  const std::vector<std::string>& calls() const { return calls_; }
  bool failed() const { return static_cast<int>(calls_.size()) > first_; }

  int Mkdir(const std::string& path, mode_t mode) override {
    return Refuse("mkdir") ? -1 : FileSystem::Mkdir(path, mode);
  }
  int Openat(int at, const std::string& name, int flags, mode_t mode) override {
    return Refuse("openat") ? -1 : FileSystem::Openat(at, name, flags, mode);
  }
  int Fstat(int fd, struct stat* info) override {
    return Refuse("fstat") ? -1 : FileSystem::Fstat(fd, info);
  }
  ssize_t Read(int fd, char* bytes, size_t size) override {
    return Refuse("read") ? -1
                          : FileSystem::Read(fd, bytes, std::min(size, piece_));
  }
  ssize_t Write(int fd, const char* bytes, size_t size) override {
    return Refuse("write")
               ? -1
               : FileSystem::Write(fd, bytes, std::min(size, piece_));
  }
  int Fsync(int fd) override {
    return Refuse("fsync") ? -1 : FileSystem::Fsync(fd);
  }
  int Renameat(int at, const std::string& from,
               const std::string& to) override {
    return Refuse("renameat") ? -1 : FileSystem::Renameat(at, from, to);
  }
  int Unlinkat(int at, const std::string& name) override {
    return Refuse("unlinkat") ? -1 : FileSystem::Unlinkat(at, name);
  }

 private:
  bool Refuse(const char* call) {
    const int number = static_cast<int>(calls_.size());
    calls_.push_back(call);
    if (number < first_ || number > last_) return false;
    errno = error_;
    return true;
  }

  int error_ = 0, first_ = -1, last_ = -1;
  size_t piece_ = 1 << 20;
  std::vector<std::string> calls_;
};

class StateFileTest : public testing::Test {
 protected:
  StateFileTest() { Make(); }

  void Make() {
    absl::StatusOr<StateFile> file = StateFile::Create(path_, system_);
    ASSERT_TRUE(file.ok()) << file.status();
    file_.emplace(*std::move(file));
  }
  // As the next process would, whose system calls work.
  absl::StatusOr<BrokerState> LoadAnew() {
    absl::StatusOr<StateFile> file = StateFile::Create(path_);
    return file.ok() ? file->Load() : file.status();
  }
  void Write(const std::string& text) {
    std::ofstream(path_, std::ios::binary) << text;
  }
  std::string Read(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  std::set<std::string> Names() {
    std::set<std::string> names;
    for (const auto& entry :
         std::filesystem::directory_iterator(folder_ / "state")) {
      names.insert(entry.path().filename());
    }
    return names;
  }

  TempFolder folder_;
  const std::string path_ = folder_ / "state/GPU-1.state";
  FaultySystem system_;
  std::optional<StateFile> file_;
};

TEST_F(StateFileTest, WhatWasSavedIsLoaded) {
  EXPECT_TRUE(absl::IsNotFound(file_->Load().status()));
  for (uint64_t i = 1; i <= 3; ++i) {
    ASSERT_TRUE(file_->Save(Numbered(i)).ok());
    EXPECT_EQ(*file_->Load(), Numbered(i));
    EXPECT_EQ(*LoadAnew(), Numbered(i));
  }
  EXPECT_THAT(Names(), ElementsAre("GPU-1.state"));
}

TEST_F(StateFileTest, DirectoryAndFileAreTheUsersAlone) {
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  struct stat info;
  ASSERT_EQ(stat((folder_ / "state").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700);
  ASSERT_EQ(stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600);
}

TEST_F(StateFileTest, ShortReadsAndWritesAreGoneOnWith) {
  system_.set_piece(7);
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  EXPECT_EQ(*file_->Load(), Numbered(1));
}

TEST_F(StateFileTest, SyncsTheFileBeforeTheRenameAndTheDirectoryAfter) {
  system_.Heal();
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  EXPECT_THAT(system_.calls(),
              ElementsAre("openat", "fstat", "unlinkat", "openat", "write",
                          "fsync", "renameat", "fsync"));
}

TEST_F(StateFileTest, WhatAPredecessorLeftHalfWrittenIsRemoved) {
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  std::ofstream(path_ + ".tmp") << "kvbroker-sta";
  Make();
  EXPECT_THAT(Names(), ElementsAre("GPU-1.state"));
  EXPECT_EQ(*file_->Load(), Numbered(1));
}

TEST_F(StateFileTest, AStateThatCouldNotBeLoadedIsNotSaved) {
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  BrokerState wrong = Numbered(2);
  wrong.limits[0].name = "a/b";
  EXPECT_TRUE(absl::IsInvalidArgument(file_->Save(wrong)));
  EXPECT_EQ(*file_->Load(), Numbered(1));
}

// ---- system calls that fail ----

class SystemErrorTest : public StateFileTest,
                        public testing::WithParamInterface<int> {};

TEST_P(SystemErrorTest, OnceAtAnyCallOfSaveLeavesTheOldStateOrTheNew) {
  system_.set_piece(64);
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  for (int call = 0;; ++call) {
    system_.Fail(GetParam(), call, call);
    absl::Status saved = file_->Save(Numbered(2));
    if (!system_.failed()) break;
    const std::string failed = system_.calls()[call];
    if (saved.ok()) {
      EXPECT_EQ(GetParam(), EINTR) << call << " " << failed;
    } else {
      EXPECT_THAT(saved.message(), HasSubstr(folder_.path())) << failed;
      EXPECT_THAT(std::string(saved.message()), EndsWith(strerror(GetParam())));
    }
    // The last call syncs the directory: the new state is in its place already.
    const bool last = system_.calls().back() == "fsync" &&
                      system_.calls()[system_.calls().size() - 2] == "renameat";
    EXPECT_EQ(*LoadAnew(), Numbered(saved.ok() || last ? 2 : 1)) << failed;
    EXPECT_THAT(Names(), ElementsAre("GPU-1.state")) << call << " " << failed;
    system_.Heal();
    ASSERT_TRUE(file_->Save(Numbered(1)).ok()) << failed;
  }
  EXPECT_EQ(*LoadAnew(), Numbered(2));
}

TEST_P(SystemErrorTest, FromAnyCallOfSaveOnLeavesTheOldStateOrTheNew) {
  if (GetParam() == EINTR) GTEST_SKIP() << "nobody is interrupted for ever";
  system_.set_piece(64);
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  for (int call = 0;; ++call) {
    system_.Fail(GetParam(), call, INT_MAX);
    absl::Status saved = file_->Save(Numbered(2));
    if (!system_.failed()) break;
    EXPECT_FALSE(saved.ok()) << call;
    const bool renamed = system_.calls().back() == "fsync";
    system_.Heal();
    EXPECT_EQ(*LoadAnew(), Numbered(renamed ? 2 : 1)) << call;
    EXPECT_THAT(Names(), ElementsAre("GPU-1.state")) << call;
    ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  }
}

TEST_P(SystemErrorTest, AtAnyCallOfLoadLosesNothing) {
  system_.set_piece(64);
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  for (int call = 0;; ++call) {
    system_.Fail(GetParam(), call, call);
    absl::StatusOr<BrokerState> loaded = file_->Load();
    if (!system_.failed()) break;
    if (loaded.ok()) {
      EXPECT_EQ(GetParam(), EINTR) << call;
      EXPECT_EQ(*loaded, Numbered(1));
    }
    EXPECT_EQ(*LoadAnew(), Numbered(1)) << call;
  }
}

TEST_P(SystemErrorTest, AtAnyCallOfCreateLosesNothing) {
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  for (int call = 0;; ++call) {
    std::ofstream(path_ + ".tmp") << "kvbroker-sta";
    system_.Fail(GetParam(), call, call);
    absl::StatusOr<StateFile> file = StateFile::Create(path_, system_);
    if (!system_.failed()) break;
    if (file.ok()) {
      // Where the old file cannot be removed, Save says so.
      EXPECT_TRUE(GetParam() == EINTR || system_.calls()[call] == "unlinkat");
    }
    EXPECT_EQ(*LoadAnew(), Numbered(1)) << call;
  }
}

TEST_P(SystemErrorTest, WhileSettingAsideLosesNothing) {
  const std::string torn = FormatState(Numbered(1)).substr(0, 80);
  for (int call = 0;; ++call) {
    Write(torn);
    std::filesystem::remove(path_ + ".bad");
    system_.Fail(GetParam(), call, call);
    absl::Status status = file_->Load().status();
    EXPECT_FALSE(status.ok());
    if (!system_.failed()) break;
    const bool aside = Names().contains("GPU-1.state.bad");
    EXPECT_EQ(Read(aside ? path_ + ".bad" : path_), torn) << call;
    if (absl::IsDataLoss(status)) {
      EXPECT_THAT(status.message(), HasSubstr(aside ? "kept as"
                                                    : "cannot be "
                                                      "set aside"));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Errors, SystemErrorTest,
                         testing::Values(ENOSPC, EROFS, EIO, EINTR, EACCES,
                                         EMFILE),
                         [](const auto& error) {
                           return std::string(strerrorname_np(error.param));
                         });

// ---- files that cannot be used ----

TEST_F(StateFileTest, TornAtAnyByteIsSetAside) {
  const std::string text = FormatState(Numbered(1));
  for (size_t size = 0; size < text.size(); ++size) {
    Write(text.substr(0, size));
    absl::Status status = file_->Load().status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << size << ": " << status;
    EXPECT_THAT(status.message(),
                HasSubstr(absl::StrCat("kept as ", path_, ".bad)")));
    EXPECT_EQ(Read(path_ + ".bad"), text.substr(0, size));
    EXPECT_TRUE(absl::IsNotFound(file_->Load().status()));
  }
}

TEST_F(StateFileTest, OfAnUnreadableVersionIsSetAside) {
  const std::string text =
      Seal({.version = 99, .readable_by = 99, .body = "{}"});
  Write(text);
  EXPECT_TRUE(absl::IsFailedPrecondition(file_->Load().status()));
  EXPECT_EQ(Read(path_ + ".bad"), text);
}

TEST_F(StateFileTest, TheFourLatestSetAsideAreKept) {
  for (int i = 1; i <= 6; ++i) {
    Write(absl::StrCat("bad ", i));
    EXPECT_TRUE(absl::IsDataLoss(file_->Load().status()));
  }
  EXPECT_THAT(Names(),
              UnorderedElementsAre("GPU-1.state.bad", "GPU-1.state.bad.1",
                                   "GPU-1.state.bad.2", "GPU-1.state.bad.3"));
  EXPECT_EQ(Read(path_ + ".bad"), "bad 6");
  EXPECT_EQ(Read(path_ + ".bad.3"), "bad 3");
}

TEST_F(StateFileTest, TooLongAFileIsSetAsideUnread) {
  Write("");
  ASSERT_EQ(truncate(path_.c_str(), int64_t{1} << 40), 0);
  EXPECT_TRUE(absl::IsDataLoss(file_->Load().status()));
  EXPECT_TRUE(Names().contains("GPU-1.state.bad"));
}

TEST_F(StateFileTest, ALinkIsNotFollowed) {
  const std::string other = folder_ / "other";
  std::ofstream(other) << FormatState(Numbered(1));
  ASSERT_EQ(symlink(other.c_str(), path_.c_str()), 0);
  absl::Status status = file_->Load().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(status.message(), HasSubstr("is a link"));
  // A new state takes the link's place, and the other file stays as it is.
  ASSERT_TRUE(file_->Save(Numbered(2)).ok());
  EXPECT_EQ(*file_->Load(), Numbered(2));
  EXPECT_EQ(Read(other), FormatState(Numbered(1)));
}

TEST_F(StateFileTest, ALinkInTheTemporaryFilesPlaceIsNotFollowed) {
  const std::string other = folder_ / "other";
  std::ofstream(other) << "mine";
  ASSERT_EQ(symlink(other.c_str(), (path_ + ".tmp").c_str()), 0);
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  EXPECT_EQ(Read(other), "mine");
}

TEST_F(StateFileTest, WhatIsNoPlainFileIsRefused) {
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(file_->Load().status()));
  ASSERT_EQ(unlink(path_.c_str()), 0);
  ASSERT_EQ(mkdir(path_.c_str(), 0700), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(file_->Load().status()));
}

TEST_F(StateFileTest, AnotherUsersFileIsRefused) {
  Write(FormatState(Numbered(1)));
  if (chown(path_.c_str(), 65534, 65534) != 0) {
    GTEST_SKIP() << "only root can give files away";
  }
  absl::Status status = file_->Load().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(status.message(), HasSubstr("uid 65534"));
}

TEST_F(StateFileTest, ADirectoryThatOthersCanWriteToIsRefused) {
  ASSERT_EQ(chmod((folder_ / "state").c_str(), 0770), 0);
  for (const absl::Status& status :
       {StateFile::Create(path_).status(), file_->Load().status(),
        file_->Save(Numbered(1))}) {
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(status.message(), HasSubstr("mode 0700"));
  }
}

TEST_F(StateFileTest, APathWithoutAFileIsRefused) {
  for (const char* path : {"", "/", "/tmp/", "/tmp/..", "."}) {
    EXPECT_TRUE(absl::IsInvalidArgument(StateFile::Create(path).status()))
        << path;
  }
  EXPECT_TRUE(absl::IsNotFound(
      StateFile::Create(folder_ / "no/such/directory").status()));
}

// ---- real disks; mounted where only this process sees them ----

class MountedTest : public StateFileTest {
 protected:
  void SetUp() override {
    if (unshare(CLONE_NEWNS) != 0 ||
        mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) {
      GTEST_SKIP() << "needs root, to mount";
    }
    ASSERT_EQ(mount("none", Folder().c_str(), "tmpfs", 0, "size=32k,mode=0700"),
              0)
        << strerror(errno);
    mounted_ = true;
  }
  ~MountedTest() override {
    if (mounted_) umount(Folder().c_str());
  }
  std::string Folder() { return folder_ / "state"; }

  bool mounted_ = false;
};

TEST_F(MountedTest, AFullDiskKeepsTheOldStateAndSaysSo) {
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  BrokerState large = Numbered(2);
  large.sessions.assign(1000, {.instance = "chat"});
  absl::Status saved = file_->Save(large);
  EXPECT_TRUE(absl::IsResourceExhausted(saved)) << saved;
  EXPECT_THAT(saved.message(), HasSubstr("No space left on device"));
  EXPECT_EQ(*file_->Load(), Numbered(1));
  EXPECT_THAT(Names(), ElementsAre("GPU-1.state"));
  EXPECT_TRUE(file_->Save(Numbered(3)).ok());
}

TEST_F(MountedTest, AReadOnlyDiskKeepsTheOldStateAndSaysSo) {
  ASSERT_TRUE(file_->Save(Numbered(1)).ok());
  ASSERT_EQ(
      mount("none", Folder().c_str(), "tmpfs", MS_REMOUNT | MS_RDONLY, nullptr),
      0);
  absl::Status saved = file_->Save(Numbered(2));
  EXPECT_THAT(saved.message(), HasSubstr("Read-only file system"));
  EXPECT_EQ(*file_->Load(), Numbered(1));
  EXPECT_EQ(*LoadAnew(), Numbered(1));
}

}  // namespace
}  // namespace kvbroker
