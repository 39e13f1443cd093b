#include "broker/telemetry/event_log.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace kvbroker {
namespace {

class EventLogTest : public testing::Test {
 protected:
  EventLogTest()
      : file_(testing::TempDir() + "/" +
              testing::UnitTest::GetInstance()->current_test_info()->name() +
              ".log") {
    remove(file_.c_str());
  }

  std::unique_ptr<EventLog> Open(LogLevel level) {
    absl::StatusOr<std::unique_ptr<EventLog>> log =
        EventLog::Create({.level = level, .to_stderr = false, .file = file_});
    EXPECT_TRUE(log.ok()) << log.status();
    return *std::move(log);
  }

  std::vector<std::string> Lines() {
    std::ifstream file(file_);
    std::vector<std::string> lines;
    for (std::string line; std::getline(file, line);) lines.push_back(line);
    return lines;
  }

  const std::string file_;
};

TEST_F(EventLogTest, LinesAreWrittenInOrderBeforeTheEnd) {
  auto log = Open(LogLevel::kInfo);
  for (int i = 0; i < 1000; ++i) {
    log->Write(LogLevel::kInfo, "grant number=" + std::to_string(i));
  }
  log.reset();
  std::vector<std::string> lines = Lines();
  ASSERT_EQ(lines.size(), 1000);
  EXPECT_TRUE(lines[999].ends_with(" grant number=999")) << lines[999];
  EXPECT_NE(lines[0].find(" I ["), std::string::npos) << lines[0];
}

TEST_F(EventLogTest, LinesBelowTheLevelAreNot) {
  auto log = Open(LogLevel::kWarn);
  EXPECT_FALSE(log->Wants(LogLevel::kInfo));
  log->Write(LogLevel::kInfo, "no");
  log->Write(LogLevel::kWarn, "yes");
  log.reset();
  ASSERT_EQ(Lines().size(), 1);
  log = Open(LogLevel::kOff);
  log->Write(LogLevel::kError, "no");
  log.reset();
  EXPECT_EQ(Lines().size(), 1) << "appended to";
}

TEST_F(EventLogTest, APeerCannotForgeALine) {
  auto log = Open(LogLevel::kInfo);
  log->Write(LogLevel::kInfo, "name=\"a\nb\x1b[31m {} %v\"");
  log.reset();
  std::vector<std::string> lines = Lines();
  ASSERT_EQ(lines.size(), 1);
  EXPECT_TRUE(lines[0].ends_with("name=\"a?b?[31m {} %v\"")) << lines[0];
}

TEST_F(EventLogTest, AFloodIsCutAndCounted) {
  auto log = Open(LogLevel::kInfo);
  constexpr size_t kThreads = 4;
  constexpr size_t kLines = EventLog::kMaxQueued;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (size_t j = 0; j < kLines; ++j) log->Write(LogLevel::kInfo, "x");
    });
  }
  for (std::thread& thread : threads) thread.join();
  log.reset();
  size_t written = 0;
  size_t left_out = 0;
  for (const std::string& line : Lines()) {
    size_t at = line.find("count=");
    if (at == std::string::npos) {
      ++written;
    } else {
      left_out += std::stoul(line.substr(at + 6));
    }
  }
  EXPECT_EQ(written + left_out, kThreads * kLines);
}

TEST_F(EventLogTest, AFileThatCannotBeOpenedIsAnError) {
  EXPECT_TRUE(absl::IsNotFound(
      EventLog::Create({.to_stderr = false, .file = "/no/such/folder/log"})
          .status()));
}

TEST_F(EventLogTest, LevelsAreParsed) {
  EXPECT_EQ(*ParseLogLevel("warn"), LogLevel::kWarn);
  EXPECT_EQ(*ParseLogLevel("off"), LogLevel::kOff);
  EXPECT_TRUE(absl::IsInvalidArgument(ParseLogLevel("loud").status()));
}

}  // namespace
}  // namespace kvbroker
