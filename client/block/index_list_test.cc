#include "client/block/index_list.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

struct Element {
  IndexLink link;
};
using List = IndexList<Element, &Element::link>;

std::vector<uint32_t> Walk(const List& list, const List::Array& array) {
  EXPECT_TRUE(list.IsConsistent(array));
  std::vector<uint32_t> found;
  for (uint32_t i = list.front(); i != kNoIndex; i = List::Next(array, i)) {
    found.push_back(i);
  }
  EXPECT_EQ(found.size(), list.size());
  return found;
}

TEST(IndexListTest, KeepsTheOrderOfBothEnds) {
  List::Array array(8);
  List list;
  EXPECT_EQ(list.front(), kNoIndex);
  list.PushBack(array, 3);
  list.PushBack(array, 5);
  list.PushFront(array, 7);
  EXPECT_THAT(Walk(list, array), ElementsAre(7, 3, 5));
  EXPECT_EQ(list.back(), 5u);
}

TEST(IndexListTest, RemovesFromTheMiddleAndTheEnds) {
  List::Array array(8);
  List list;
  for (uint32_t i : {0, 1, 2, 3}) list.PushBack(array, i);
  list.Remove(array, 1);
  EXPECT_THAT(Walk(list, array), ElementsAre(0, 2, 3));
  list.Remove(array, 3);
  EXPECT_THAT(Walk(list, array), ElementsAre(0, 2));
  EXPECT_EQ(list.PopFront(array), 0u);
  EXPECT_EQ(list.PopFront(array), 2u);
  EXPECT_THAT(Walk(list, array), IsEmpty());
  EXPECT_TRUE(list.empty());
}

TEST(IndexListTest, NoticesTornLinks) {
  List::Array array(8);
  List list;
  for (uint32_t i : {0, 1, 2}) list.PushBack(array, i);
  array[1].link.next = 1;
  EXPECT_FALSE(list.IsConsistent(array));
}

}  // namespace
}  // namespace kvbroker::client
