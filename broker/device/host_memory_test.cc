#include "broker/device/host_memory.h"

#include "gtest/gtest.h"

namespace kvbroker {
namespace {

TEST(HostMemoryTest, ReadsTheFieldsWhereverTheyStand) {
  absl::StatusOr<HostMemory> memory = ParseMeminfo(
      "MemTotal:       24105000 kB\n"
      "MemFree:        1 kB\n"
      "MemAvailable:   12 kB\n"
      "ShmemHugePages: 5 kB\n"
      "Shmem:          7 kB\n");
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->total, KiB(24105000));
  EXPECT_EQ(memory->available, KiB(12));
  EXPECT_EQ(memory->shared, KiB(7));
}

TEST(HostMemoryTest, NamesTheFieldItMisses) {
  for (const char* text :
       {"", "MemTotal: 1 kB", "MemTotal: 1 kB\nMemAvailable: x kB\n",
        "MemTotal: 1 kB\nMemAvailable: -1 kB\n",
        "MemTotal: 1 kB\nMemAvailable: 3 MB\n", "MemTotal: 1 kB\nMemAvailable:",
        "MemTotal: 1 kB\nMemAvailable: 9999999999999999999999 kB\n",
        "MemTotal: 1 kB\n MemAvailable: 1 kB\n"}) {
    absl::StatusOr<HostMemory> memory = ParseMeminfo(text);
    EXPECT_EQ(memory.status().code(), absl::StatusCode::kInvalidArgument)
        << text;
    EXPECT_NE(memory.status().message().find("Mem"), absl::string_view::npos);
  }
}

TEST(HostMemoryTest, ReadsThisMachine) {
  absl::StatusOr<HostMemory> memory = ReadHostMemory();
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_GT(memory->total, Bytes(0));
  EXPECT_GT(memory->available, Bytes(0));
  EXPECT_LE(memory->available, memory->total);
}

}  // namespace
}  // namespace kvbroker
