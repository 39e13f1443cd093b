#include "proto/slab_frame.h"

#include <fcntl.h>
#include <unistd.h>

#include <string>

#include "gtest/gtest.h"

namespace kvbroker {
namespace {

SlabFrame Lease() {
  SlabFrame frame;
  for (size_t i = 0; i < sizeof(frame.ipc_handle); ++i) {
    frame.ipc_handle[i] = static_cast<uint8_t>(i);
  }
  frame.slab_bytes = 1 << 20;
  frame.offset = 4096;
  frame.size = 8192;
  return frame;
}

TEST(SlabFrameTest, IsReadFromItsFileAsItWasWritten) {
  absl::StatusOr<UniqueFd> fd = SealSlabFrame(Lease());
  ASSERT_TRUE(fd.ok()) << fd.status();
  EXPECT_EQ(fcntl(fd->get(), F_GETFD), FD_CLOEXEC);
  for (int twice = 0; twice < 2; ++twice) {
    absl::StatusOr<SlabFrame> frame = ReadSlabFrame(fd->get());
    ASSERT_TRUE(frame.ok()) << frame.status();
    EXPECT_EQ(SlabFrameText(*frame), SlabFrameText(Lease()));
  }
}

TEST(SlabFrameTest, ItsFileCannotBeChanged) {
  absl::StatusOr<UniqueFd> fd = SealSlabFrame(Lease());
  ASSERT_TRUE(fd.ok()) << fd.status();
  EXPECT_LT(pwrite(fd->get(), "x", 1, 0), 0);
  EXPECT_NE(ftruncate(fd->get(), 0), 0);
  EXPECT_NE(ftruncate(fd->get(), 4096), 0);
}

TEST(SlabFrameTest, WhatIsNoFrameIsRefused) {
  const std::string good = SlabFrameText(Lease());
  EXPECT_TRUE(ParseSlabFrame(good).ok());
  std::string other_magic = good, other_version = good;
  ++other_magic[0];
  ++other_version[4];
  SlabFrame beyond = Lease(), far_beyond = Lease(), wrapping = Lease();
  beyond.size = beyond.slab_bytes - beyond.offset + 1;
  far_beyond.offset = beyond.slab_bytes + 1;
  wrapping.size = ~uint64_t{0};
  for (const std::string& bad :
       {std::string(), good.substr(1), good + "x", other_magic, other_version,
        SlabFrameText(beyond), SlabFrameText(far_beyond),
        SlabFrameText(wrapping)}) {
    EXPECT_EQ(ParseSlabFrame(bad).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(SlabFrameTest, AFileThatHoldsNoneIsRefused) {
  UniqueFd empty(open("/dev/null", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(ReadSlabFrame(empty.get()).status().code(),
            absl::StatusCode::kInvalidArgument);
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  UniqueFd out(ends[0]), in(ends[1]);
  EXPECT_EQ(ReadSlabFrame(out.get()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvbroker
