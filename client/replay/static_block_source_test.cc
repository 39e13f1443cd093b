#include "client/replay/static_block_source.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

std::unique_ptr<StaticBlockSource> Source(int64_t share, int64_t block = 64) {
  return *StaticBlockSource::Create(Bytes(share), Bytes(block));
}

TEST(StaticBlockSourceTest, HoldsAsManyWholeBlocksAsFit) {
  EXPECT_EQ(Source(64 * 10 + 63)->CapacityBlocks(), 10);
}

TEST(StaticBlockSourceTest, HandsOutEachBlockOnce) {
  const auto source = Source(64 * 10);
  std::vector<BlockId> blocks;
  EXPECT_TRUE(source->Alloc(4, Urgency::kWaiting, &blocks));
  EXPECT_TRUE(source->Alloc(6, Urgency::kRunning, &blocks));
  std::sort(blocks.begin(), blocks.end());
  EXPECT_EQ(blocks, (std::vector<BlockId>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
}

TEST(StaticBlockSourceTest, MissChangesNothing) {
  const auto source = Source(64 * 10);
  std::vector<BlockId> blocks;
  EXPECT_FALSE(source->Alloc(11, Urgency::kRunning, &blocks));
  EXPECT_TRUE(blocks.empty());
  EXPECT_TRUE(source->Alloc(10, Urgency::kRunning, &blocks));
  EXPECT_FALSE(source->Alloc(1, Urgency::kRunning, &blocks));
  source->Free(std::span(blocks).first(1));
  EXPECT_TRUE(source->Alloc(1, Urgency::kRunning, &blocks));
}

TEST(StaticBlockSourceTest, BlocksDoNotOverlap) {
  const auto source = Source(128 * 3, 128);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(source->Alloc(3, Urgency::kRunning, &blocks));
  for (BlockId block : blocks) {
    std::memset(source->BlockData(block), 'a' + block, 128);
  }
  for (BlockId block : blocks) {
    EXPECT_EQ(source->BlockData(block)[0], std::byte('a' + block));
    EXPECT_EQ(source->BlockData(block)[127], std::byte('a' + block));
  }
}

TEST(StaticBlockSourceTest, TellsUsage) {
  const auto source = Source(64 * 10);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(source->Alloc(3, Urgency::kRunning, &blocks));
  EXPECT_EQ(source->Usage().in_use, Bytes(192));
  EXPECT_EQ(source->Usage().idle, Bytes(448));
  EXPECT_EQ(source->Usage().held, Bytes(640));
  EXPECT_TRUE(source->BlocksToVacate().empty());
}

TEST(StaticBlockSourceTest, RefusesSharesItCannotServe) {
  EXPECT_FALSE(StaticBlockSource::Create(Bytes(63), Bytes(64)).ok());
  EXPECT_FALSE(StaticBlockSource::Create(Bytes(-64), Bytes(64)).ok());
  EXPECT_FALSE(StaticBlockSource::Create(Bytes(64), Bytes(0)).ok());
  EXPECT_FALSE(StaticBlockSource::Create(kMaxBytes, Bytes(64)).ok());
  // Few enough blocks, but more than there are addresses.
  EXPECT_EQ(StaticBlockSource::Create(kMaxBytes, GiB(1)).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace kvbroker::replay
