#include "client/block/index_set.h"

#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

TEST(IndexSetTest, KnowsItsLeastAndItsGreatestAcrossWords) {
  IndexSet set(200);
  EXPECT_EQ(set.Lowest(), kNoIndex);
  EXPECT_EQ(set.Highest(), kNoIndex);
  for (uint32_t i : {64u, 63u, 199u, 128u}) set.Insert(i);
  EXPECT_EQ(set.size(), 4u);
  EXPECT_EQ(set.Lowest(), 63u);
  EXPECT_EQ(set.Highest(), 199u);
  set.Erase(63);
  set.Erase(199);
  EXPECT_EQ(set.Lowest(), 64u);
  EXPECT_EQ(set.Highest(), 128u);
  EXPECT_TRUE(set.Contains(64));
  EXPECT_FALSE(set.Contains(63));
}

}  // namespace
}  // namespace kvbroker::client
