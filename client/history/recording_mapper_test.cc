#include "client/history/recording_mapper.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/temp_folder.h"
#include "client/arena/host_mapper.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

const PoolGeometry kGeometry = {
    .handle_bytes = KiB(4), .handles_per_page = 2, .max_pages = 16};

std::vector<UniqueFd> MakePage(Bytes handle = kGeometry.handle_bytes) {
  std::vector<UniqueFd> handles;
  for (uint32_t i = 0; i < kGeometry.handles_per_page; ++i) {
    UniqueFd fd(memfd_create("test", MFD_CLOEXEC));
    EXPECT_EQ(ftruncate(fd.get(), handle.count()), 0);
    handles.push_back(std::move(fd));
  }
  return handles;
}

std::string IdentityOf(const UniqueFd& fd) {
  struct stat file;
  EXPECT_EQ(fstat(fd.get(), &file), 0);
  return absl::StrCat("\"", absl::Hex(file.st_dev), ":", absl::Hex(file.st_ino),
                      "\"");
}

class RecordingMapperTest : public testing::Test {
 protected:
  RecordingMapperTest()
      : path_(folder_ / "history"),
        recorder_(*MappingRecorder::Open(path_, "engine")) {}

  std::unique_ptr<Mapper> MakeMapper() {
    return recorder_->Wrap(*HostMapper::Create(kGeometry));
  }

  std::vector<std::string> Lines() const {
    std::ifstream file(path_);
    std::vector<std::string> lines;
    for (std::string line; std::getline(file, line);) lines.push_back(line);
    return lines;
  }

  TempFolder folder_;
  const std::string path_;
  std::unique_ptr<MappingRecorder> recorder_;
};

TEST_F(RecordingMapperTest, RecordsMapAndUnmapWithTheIdentityOfEachHandle) {
  auto mapper = MakeMapper();
  std::vector<UniqueFd> handles = MakePage();
  const std::string memory = absl::StrCat("[", IdentityOf(handles[0]), ",",
                                          IdentityOf(handles[1]), "]");
  ASSERT_TRUE(mapper->Map(PageIndex(5), std::move(handles)).ok());
  mapper->region(1)[5 * KiB(4).count()] = std::byte{7};
  ASSERT_TRUE(mapper->Unmap(PageIndex(5)).ok());
  mapper.reset();
  const std::vector<std::string> lines = Lines();
  ASSERT_THAT(lines, SizeIs(4));
  EXPECT_THAT(lines[0], HasSubstr(R"("event":"pool")"));
  EXPECT_THAT(lines[0], HasSubstr(R"("instance":"engine")"));
  EXPECT_THAT(lines[0], HasSubstr(absl::StrCat(R"("pid":)", getpid())));
  EXPECT_THAT(lines[1], HasSubstr(R"("event":"map")"));
  EXPECT_THAT(lines[1], HasSubstr(absl::StrCat(R"("pool":0,"page":5,"memory":)",
                                               memory)));
  EXPECT_THAT(lines[2], HasSubstr(R"("event":"unmap")"));
  EXPECT_THAT(lines[3], HasSubstr(R"("event":"closed")"));
}

TEST_F(RecordingMapperTest, PoolsAreCounted) {
  auto first = MakeMapper();
  auto second = MakeMapper();
  EXPECT_THAT(Lines(),
              ElementsAre(HasSubstr(R"("pool":0)"), HasSubstr(R"("pool":1)")));
}

TEST_F(RecordingMapperTest, AMappingThatFailsIsRecordedAsEnded) {
  auto mapper = MakeMapper();
  EXPECT_FALSE(mapper->Map(PageIndex(0), MakePage(KiB(8))).ok());
  EXPECT_THAT(Lines(), ElementsAre(HasSubstr("pool"), HasSubstr(R"("map")"),
                                   HasSubstr(R"("unmap")")));
}

TEST_F(RecordingMapperTest, APageThatIsNotUnmappedIsNotRecordedAsSuch) {
  auto inner = *HostMapper::Create(kGeometry);
  HostMapper& host = *inner;
  auto mapper = recorder_->Wrap(std::move(inner));
  ASSERT_TRUE(mapper->Map(PageIndex(1), MakePage()).ok());
  host.BeginWork(PageIndex(1));
  EXPECT_FALSE(mapper->Unmap(PageIndex(1)).ok());
  EXPECT_THAT(Lines(), SizeIs(2));
  host.EndWork(PageIndex(1));
}

TEST_F(RecordingMapperTest, ADescriptorOfADeviceTellsNoMemoryFromAnother) {
  auto mapper = MakeMapper();
  std::vector<UniqueFd> handles;
  for (int i = 0; i < 2; ++i) {
    handles.emplace_back(open("/dev/null", O_RDWR | O_CLOEXEC));
  }
  // The mapper wants a memfd; that it was tried is on file.
  EXPECT_FALSE(mapper->Map(PageIndex(0), std::move(handles)).ok());
  EXPECT_THAT(Lines(),
              ElementsAre(HasSubstr("pool"), HasSubstr(R"("memory":[])"),
                          HasSubstr(R"("unmap")")));
}

// What it has mapped when it is killed is on file.
TEST_F(RecordingMapperTest, AKilledProcessLeavesAllThatItMapped) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    auto recorder = *MappingRecorder::Open(path_, "child");
    auto mapper = recorder->Wrap(*HostMapper::Create(kGeometry));
    for (uint32_t page = 0; page < 3; ++page) {
      if (!mapper->Map(PageIndex(page), MakePage()).ok()) _exit(1);
    }
    if (write(ready[1], "x", 1) != 1) _exit(1);
    pause();
    _exit(1);
  }
  char byte;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  kill(child, SIGKILL);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  close(ready[0]);
  close(ready[1]);
  EXPECT_THAT(Lines(),
              ElementsAre(HasSubstr("child"), HasSubstr(R"("page":0)"),
                          HasSubstr(R"("page":1)"), HasSubstr(R"("page":2)")));
}

TEST(MappingRecorderTest, AFileThatCannotBeOpenedIsNamed) {
  const absl::Status status =
      MappingRecorder::Open("/nowhere/history", "engine").status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/history"));
}

}  // namespace
}  // namespace kvbroker::client
