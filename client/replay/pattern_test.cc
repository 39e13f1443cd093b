#include "client/replay/pattern.h"

#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

constexpr BlockOwner kOwner = {.engine = 7, .request = 42, .ordinal = 3};

std::vector<std::byte> WrittenBlock(const BlockOwner& owner,
                                    size_t bytes = 4096) {
  std::vector<std::byte> block(bytes);
  WritePattern(owner, block);
  return block;
}

TEST(PatternTest, WhatWasWrittenIsRight) {
  EXPECT_EQ(CountWrongLines(kOwner, WrittenBlock(kOwner)), 0);
  EXPECT_EQ(DescribeFirstWrongLine(kOwner, WrittenBlock(kOwner)), "");
}

TEST(PatternTest, EveryByteCounts) {
  std::vector<std::byte> block = WrittenBlock(kOwner, 256);
  for (std::byte& byte : block) {
    byte ^= std::byte{1};
    EXPECT_EQ(CountWrongLines(kOwner, block), 1);
    byte ^= std::byte{1};
  }
}

TEST(PatternTest, EveryLineOfAnotherOwnerIsWrong) {
  for (const BlockOwner& other :
       {BlockOwner{8, 42, 3}, BlockOwner{7, 43, 3}, BlockOwner{7, 42, 4}}) {
    EXPECT_EQ(CountWrongLines(kOwner, WrittenBlock(other)), 64);
  }
}

TEST(PatternTest, LinesThatMovedAreWrong) {
  std::vector<std::byte> block = WrittenBlock(kOwner);
  std::swap_ranges(block.begin(), block.begin() + 64, block.begin() + 64);
  EXPECT_EQ(CountWrongLines(kOwner, block), 2);
}

TEST(PatternTest, TellsWhoseLineItIs) {
  std::vector<std::byte> block = WrittenBlock(kOwner);
  WritePattern({.engine = 9, .request = 5, .ordinal = 0},
               std::span(block).subspan(128, 64));
  EXPECT_EQ(DescribeFirstWrongLine(kOwner, block),
            "line 2 of engine 7 request 42 block 3 reads as line 0 of engine 9 "
            "request 5 block 0");
  std::fill(block.begin(), block.begin() + 64, std::byte{0});
  EXPECT_TRUE(
      absl::EndsWith(DescribeFirstWrongLine(kOwner, block), "all zero"));
  block[5] = std::byte{1};
  EXPECT_TRUE(absl::EndsWith(DescribeFirstWrongLine(kOwner, block), "garbage"));
}

TEST(PatternTest, ProcessesUnderOneNameDiffer) {
  EXPECT_NE(MakeEngineId("conv", 1), MakeEngineId("conv", 2));
  EXPECT_NE(MakeEngineId("conv", 1), MakeEngineId("code", 1));
  EXPECT_EQ(MakeEngineId("conv", 1), MakeEngineId("conv", 1));
}

TEST(BlockPatternTest, CountsBlocksAndWrongLines) {
  BlockPattern pattern(7);
  std::vector<std::byte> block(4096);
  pattern.Write(1, 0, block);
  pattern.Check(1, 0, block);
  EXPECT_EQ(pattern.blocks_written(), 1);
  EXPECT_EQ(pattern.blocks_checked(), 1);
  EXPECT_EQ(pattern.errors(), 0);
  block[70] = std::byte{0xff};
  block[700] = std::byte{0xff};
  pattern.Check(1, 0, block);
  EXPECT_EQ(pattern.errors(), 2);
  EXPECT_TRUE(absl::StartsWith(pattern.first_error(), "line 1 of engine 7 "));
  pattern.Check(2, 0, block);
  EXPECT_EQ(pattern.errors(), 66);
  EXPECT_TRUE(absl::StartsWith(pattern.first_error(), "line 1 of engine 7 "));
}

}  // namespace
}  // namespace kvbroker::replay
