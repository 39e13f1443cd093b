#include "client/replay/status_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <string>

#include "broker/base/unique_fd.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

class StatusWriterTest : public testing::Test {
 protected:
  StatusWriterTest() {
    int ends[2];
    EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
    reader_.Reset(ends[0]);
    writer_.Reset(ends[1]);
  }

  std::string ReadAll() {
    writer_.Reset();
    std::string text;
    char buffer[4096];
    ssize_t got;
    while ((got = read(reader_.get(), buffer, sizeof(buffer))) > 0) {
      text.append(buffer, static_cast<size_t>(got));
    }
    return text;
  }

  UniqueFd reader_, writer_;
};

TEST_F(StatusWriterTest, WritesLines) {
  StatusWriter status = *StatusWriter::Create(writer_.get());
  status.Write("one\n");
  status.Write("two\n");
  EXPECT_EQ(ReadAll(), "one\ntwo\n");
}

TEST_F(StatusWriterTest, DropsWholeLinesWhereNobodyReads) {
  StatusWriter status = *StatusWriter::Create(writer_.get());
  const std::string line = std::string(999, 'x') + "\n";
  for (int i = 0; i < 1000; ++i) status.Write(line);
  const std::string text = ReadAll();
  EXPECT_LT(text.size(), 1000u * 1000);
  EXPECT_GE(text.size(), line.size());
  EXPECT_EQ(text.size() % line.size(), 0u);
}

TEST_F(StatusWriterTest, SurvivesAReaderThatLeaves) {
  StatusWriter status = *StatusWriter::Create(writer_.get());
  reader_.Reset();
  status.Write("one\n");
  status.Write("two\n");
}

TEST(StatusWriterErrorTest, DescriptorMustBeOpen) {
  EXPECT_FALSE(StatusWriter::Create(1'000'000).ok());
}

}  // namespace
}  // namespace kvbroker::replay
