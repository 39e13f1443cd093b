#include "client/shm_view/view_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "absl/status/status.h"
#include "broker/base/temp_folder.h"
#include "broker/base/unique_fd.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

constexpr ViewFigures kFigures = {.limit = 100, .used = 20, .preallocated = 3};

class ViewFileTest : public testing::Test {
 protected:
  absl::StatusOr<ViewFile> Open(const std::string& name = "llama") {
    return ViewFile::Open(directory_.get(), name, kFigures);
  }
  std::string path() const { return folder_ / "llama"; }

  std::string Content(const std::string& path) const {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void Put(const std::string& path, const std::string& content) const {
    std::ofstream(path, std::ios::binary) << content;
  }
  ViewFigures Figures() const {
    const std::string content = Content(path());
    ViewFigures figures;
    EXPECT_EQ(content.size(), sizeof(figures));
    if (content.size() == sizeof(figures)) {
      std::memcpy(&figures, content.data(), sizeof(figures));
    }
    return figures;
  }
  // Made anew, and nothing else is in the folder but `others`.
  void ExpectMade(const absl::StatusOr<ViewFile>& file, int others = 0) {
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_TRUE(file->made());
    EXPECT_TRUE(file->Current());
    EXPECT_EQ(Figures(), kFigures);
    struct stat status;
    ASSERT_EQ(lstat(path().c_str(), &status), 0);
    EXPECT_TRUE(S_ISREG(status.st_mode));
    EXPECT_EQ(status.st_nlink, 1u);
    int files = 0;
    for ([[maybe_unused]] const auto& entry :
         std::filesystem::directory_iterator(folder_.path())) {
      ++files;
    }
    EXPECT_EQ(files, 1 + others);
  }

  TempFolder folder_;
  UniqueFd directory_{open(folder_.path().c_str(), O_RDONLY | O_DIRECTORY)};
};

TEST_F(ViewFileTest, IsMadeWithItsFiguresAndTheUmasksMode) {
  const mode_t before = umask(0027);
  ExpectMade(Open());
  umask(before);
  struct stat status;
  ASSERT_EQ(stat(path().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0640u);
}

TEST_F(ViewFileTest, AViewOfThisUserIsUsedAsItIs) {
  ASSERT_TRUE(Open().ok());
  struct stat before, after;
  ASSERT_EQ(stat(path().c_str(), &before), 0);
  auto file = Open();
  ASSERT_TRUE(file.ok());
  EXPECT_FALSE(file->made());
  ASSERT_EQ(stat(path().c_str(), &after), 0);
  EXPECT_EQ(before.st_ino, after.st_ino);
  EXPECT_EQ(*file->Read(), kFigures);
}

TEST_F(ViewFileTest, ASymbolicLinkIsReplacedAndNotFollowed) {
  const std::string target = folder_ / "target";
  Put(target, std::string(24, 'x'));
  ASSERT_EQ(symlink(target.c_str(), path().c_str()), 0);
  ExpectMade(Open(), /*others=*/1);
  EXPECT_EQ(Content(target), std::string(24, 'x'));
}

TEST_F(ViewFileTest, ADanglingLinkMakesNothingWhereItPoints) {
  ASSERT_EQ(symlink((folder_ / "nowhere").c_str(), path().c_str()), 0);
  ExpectMade(Open());
}

TEST_F(ViewFileTest, AHardLinkIsReplacedAndNotWrittenTo) {
  const std::string target = folder_ / "target";
  Put(target, std::string(24, 'x'));
  ASSERT_EQ(link(target.c_str(), path().c_str()), 0);
  ExpectMade(Open(), /*others=*/1);
  EXPECT_EQ(Content(target), std::string(24, 'x'));
}

TEST_F(ViewFileTest, AFifoIsReplacedWithoutWaiting) {
  ASSERT_EQ(mkfifo(path().c_str(), 0666), 0);
  ExpectMade(Open());
}

TEST_F(ViewFileTest, ASocketIsReplaced) {
  UniqueFd listener(socket(AF_UNIX, SOCK_STREAM, 0));
  sockaddr_un address = {.sun_family = AF_UNIX};
  path().copy(address.sun_path, sizeof(address.sun_path) - 1);
  ASSERT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address),
                 sizeof(address)),
            0);
  ExpectMade(Open());
}

TEST_F(ViewFileTest, AnEmptyFileIsReplaced) {
  Put(path(), "");
  ExpectMade(Open());
}

TEST_F(ViewFileTest, ADirectoryIsLeftAlone) {
  ASSERT_EQ(mkdir(path().c_str(), 0777), 0);
  auto file = Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(file.status())) << file.status();
  EXPECT_TRUE(std::filesystem::is_directory(path()));
}

TEST_F(ViewFileTest, AFileOfAnotherSizeIsLeftAlone) {
  for (size_t size : {1, 23, 25, 4096}) {
    const std::string content(size, 'x');
    Put(path(), content);
    auto file = Open();
    EXPECT_TRUE(absl::IsFailedPrecondition(file.status())) << file.status();
    EXPECT_EQ(Content(path()), content);
  }
}

TEST_F(ViewFileTest, AFileOfAnotherUserIsLeftAlone) {
  if (geteuid() != 0) GTEST_SKIP() << "takes root";
  Put(path(), std::string(24, 'x'));
  ASSERT_EQ(chown(path().c_str(), 12345, 12345), 0);
  ASSERT_EQ(chmod(path().c_str(), 0666), 0);
  auto file = Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(file.status())) << file.status();
  EXPECT_EQ(Content(path()), std::string(24, 'x'));
}

TEST_F(ViewFileTest, WhatAnUnfinishedOneLeftGoes) {
  Put(folder_ / ".llama.new", "torn");
  ExpectMade(Open());
}

TEST_F(ViewFileTest, KnowsWhetherItsNameIsStillItsOwn) {
  auto file = Open();
  ASSERT_TRUE(file.ok());
  ASSERT_EQ(rename(path().c_str(), (folder_ / "elsewhere").c_str()), 0);
  EXPECT_FALSE(file->Current());
  auto other = Open();
  ASSERT_TRUE(other.ok());
  EXPECT_FALSE(file->Current());
  file->Unlink();  // not what another file has
  EXPECT_TRUE(std::filesystem::exists(path()));
  other->Unlink();
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(ViewFileTest, TheLockIsTriedOnly) {
  auto file = Open();
  ASSERT_TRUE(file.ok());
  UniqueFd other(open(path().c_str(), O_RDWR));
  ASSERT_EQ(flock(other.get(), LOCK_SH), 0);
  EXPECT_FALSE(file->TryLock());
  ASSERT_EQ(flock(other.get(), LOCK_UN), 0);
  EXPECT_TRUE(file->TryLock());
  EXPECT_NE(flock(other.get(), LOCK_SH | LOCK_NB), 0);
  file->Unlock();
  EXPECT_EQ(flock(other.get(), LOCK_SH | LOCK_NB), 0);
}

TEST_F(ViewFileTest, LimitAndUseAreWrittenApart) {
  auto file = Open();
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->WriteUse(7, 8).ok());
  EXPECT_EQ(Figures(), (ViewFigures{100, 7, 8}));
  ASSERT_TRUE(file->WriteLimit(9).ok());
  EXPECT_EQ(Figures(), (ViewFigures{9, 7, 8}));
}

TEST_F(ViewFileTest, AnotherSizeIsSeenAndSetRight) {
  auto file = Open();
  ASSERT_TRUE(file.ok());
  for (off_t size : {0, 8, 25, 4096}) {
    ASSERT_EQ(truncate(path().c_str(), size), 0);
    EXPECT_TRUE(absl::IsOutOfRange(file->Read().status()));
    ASSERT_TRUE(file->Restore(kFigures).ok());
    EXPECT_EQ(Figures(), kFigures);
  }
}

TEST_F(ViewFileTest, OnlyNamesOfInstancesAreViews) {
  EXPECT_TRUE(CheckViewName("Llama-3.1_8B").ok());
  EXPECT_TRUE(CheckViewName(std::string(128, 'x')).ok());
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".."), std::string("a/b"),
        std::string("a b"), std::string("a\0b", 3), std::string("\xc3\xa4"),
        std::string(129, 'x'), std::string(256, 'x')}) {
    EXPECT_TRUE(absl::IsInvalidArgument(CheckViewName(name))) << name;
    EXPECT_TRUE(absl::IsInvalidArgument(Open(name).status())) << name;
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
}

}  // namespace
}  // namespace kvbroker::client
