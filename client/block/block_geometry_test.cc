#include "client/block/block_geometry.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

using ::testing::HasSubstr;

BlockGeometry Geometry(int64_t page, int64_t block, uint32_t pages) {
  return {.page_bytes = Bytes(page),
          .block_bytes = Bytes(block),
          .max_pages = pages};
}

std::string MessageOf(const BlockGeometry& geometry) {
  return std::string(geometry.Validate().message());
}

TEST(BlockGeometryTest, BlocksFillAPageThatIsAMultipleOfThem) {
  const BlockGeometry geometry = Geometry(64, 16, 3);
  ASSERT_TRUE(geometry.Validate().ok());
  EXPECT_EQ(geometry.block_ids(), 12);
  EXPECT_EQ(geometry.max_blocks_per_page(), 4);
  EXPECT_EQ(geometry.FirstBlock(PageIndex(1)), 4);
  EXPECT_EQ(geometry.EndBlock(PageIndex(1)), 8);
  EXPECT_EQ(geometry.PageOf(7), PageIndex(1));
  EXPECT_EQ(geometry.PageOf(8), PageIndex(2));
}

TEST(BlockGeometryTest, ABlockThatStraddlesTwoPagesIsOnNeither) {
  const BlockGeometry geometry = Geometry(40, 16, 4);  // 2.5 blocks a page
  EXPECT_EQ(geometry.block_ids(), 10);
  EXPECT_EQ(geometry.FirstBlock(PageIndex(0)), 0);
  EXPECT_EQ(geometry.EndBlock(PageIndex(0)), 2);
  EXPECT_EQ(geometry.FirstBlock(PageIndex(1)), 3);  // 2 straddles
  EXPECT_EQ(geometry.EndBlock(PageIndex(1)), 5);
  EXPECT_EQ(geometry.FirstBlock(PageIndex(2)), 5);
  EXPECT_EQ(geometry.PageOf(2), PageIndex(0));
}

TEST(BlockGeometryTest, APageShorterThanTwoBlocksMayHoldNone) {
  const BlockGeometry geometry = Geometry(18, 15, 6);
  EXPECT_EQ(geometry.BlocksOn(PageIndex(0)), 1);
  EXPECT_EQ(geometry.BlocksOn(PageIndex(1)), 0);
  EXPECT_EQ(geometry.BlocksOn(PageIndex(5)), 1);
}

TEST(BlockGeometryTest, IdsEndWhereTheCallerWantsThemTo) {
  BlockGeometry geometry = Geometry(64, 16, 3);
  geometry.max_blocks = 6;
  ASSERT_TRUE(geometry.Validate().ok());
  EXPECT_EQ(geometry.block_ids(), 6);
  EXPECT_EQ(geometry.BlocksOn(PageIndex(0)), 4);
  EXPECT_EQ(geometry.BlocksOn(PageIndex(1)), 2);
  EXPECT_EQ(geometry.BlocksOn(PageIndex(2)), 0);
  geometry.max_blocks = 13;
  EXPECT_THAT(MessageOf(geometry), HasSubstr("asked for: 13"));
}

TEST(BlockGeometryTest, PagesOfALargePoolDoNotOverflow) {
  const BlockGeometry geometry{
      .page_bytes = MiB(128), .block_bytes = KiB(8), .max_pages = 1u << 16};
  ASSERT_TRUE(geometry.Validate().ok());
  const PageIndex last((1u << 16) - 1);
  EXPECT_EQ(geometry.EndBlock(last), geometry.block_ids());
  EXPECT_EQ(geometry.PageOf(geometry.block_ids() - 1), last);
}

TEST(BlockGeometryTest,
     ABlockLargerThanAPageIsRefusedWithAPageSizeThatWouldDo) {
  const BlockGeometry geometry{
      .page_bytes = MiB(2), .block_bytes = MiB(5), .max_pages = 8};
  EXPECT_EQ(geometry.Validate().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(MessageOf(geometry),
              HasSubstr("a page size that would do: 6 MiB"));
}

TEST(BlockGeometryTest, FiguresThatMakeNoPoolAreRefusedByName) {
  EXPECT_THAT(MessageOf(Geometry(0, 16, 1)), HasSubstr("Page size"));
  EXPECT_THAT(MessageOf(Geometry(-64, 16, 1)), HasSubstr("Page size"));
  EXPECT_THAT(MessageOf(Geometry(64, 0, 1)), HasSubstr("Block size"));
  EXPECT_THAT(MessageOf(Geometry(64, 16, 0)), HasSubstr("page index"));
  EXPECT_THAT(
      MessageOf(
          {.page_bytes = kMaxBytes, .block_bytes = kMaxBytes, .max_pages = 2}),
      HasSubstr("larger than any device"));
  EXPECT_THAT(
      MessageOf(
          {.page_bytes = GiB(1), .block_bytes = Bytes(1), .max_pages = 3}),
      HasSubstr("more blocks than block ids"));
}

}  // namespace
}  // namespace kvbroker::client
