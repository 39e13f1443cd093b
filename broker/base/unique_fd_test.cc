#include "broker/base/unique_fd.h"

#include <sys/resource.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "gtest/gtest.h"

namespace kvbroker {
namespace {

// Room in this process's table, as the kernel says.
int TableSize() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int size;
    if (word == "FDSize:" && status >> size) return size;
  }
  return -1;
}

int OpenDescriptors() {
  return static_cast<int>(
      std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                    std::filesystem::directory_iterator()));
}

TEST(GrowDescriptorTableTest, MakesRoomAndOpensNothing) {
  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  if (limit.rlim_cur < 1024) GTEST_SKIP() << "the limit is " << limit.rlim_cur;
  ASSERT_LT(TableSize(), 1000);
  const int before = OpenDescriptors();
  GrowDescriptorTable(1000);
  EXPECT_GE(TableSize(), 1000);
  EXPECT_EQ(OpenDescriptors(), before);
}

TEST(GrowDescriptorTableTest, GoesNoFurtherThanTheLimit) {
  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit few = {.rlim_cur = 300, .rlim_max = limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  const int before = OpenDescriptors();
  GrowDescriptorTable(1 << 20);
  EXPECT_GE(TableSize(), 300);
  EXPECT_EQ(OpenDescriptors(), before);
  setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace
}  // namespace kvbroker
