#include "broker/device/range_map.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using Places = std::vector<Bytes>;

TEST(RangeMapTest, ARangeLiesAtAMultipleOfItsSize) {
  RangeMap map(Bytes(100));
  EXPECT_EQ(map.Find(Bytes(30), 10, map.size()),
            (Places{Bytes(0), Bytes(30), Bytes(60)}));
  ASSERT_TRUE(map.Take(Bytes(0), Bytes(7)));
  EXPECT_EQ(map.Find(Bytes(7), 2, map.size()), (Places{Bytes(7), Bytes(14)}));
  EXPECT_EQ(map.taken(), Bytes(7));
}

TEST(RangeMapTest, WhatIsTakenIsNotFoundUntilItIsGivenBack) {
  RangeMap map(Bytes(64));
  ASSERT_TRUE(map.Take(Bytes(16), Bytes(16)));
  for (Bytes at : {Bytes(0), Bytes(8), Bytes(16), Bytes(24)}) {
    EXPECT_FALSE(map.Take(at, Bytes(24))) << at.count();
  }
  EXPECT_EQ(map.Find(Bytes(16), 4, map.size()),
            (Places{Bytes(0), Bytes(32), Bytes(48)}));
  map.GiveBack(Bytes(16), Bytes(16));
  EXPECT_TRUE(map.Take(Bytes(0), Bytes(64)));
  EXPECT_TRUE(map.Find(Bytes(1), 1, map.size()).empty());
}

TEST(RangeMapTest, BeyondTheEndThereIsNothing) {
  RangeMap map(Bytes(64));
  EXPECT_TRUE(map.Find(Bytes(65), 1, map.size()).empty());
  EXPECT_FALSE(map.Take(Bytes(64), Bytes(1)));
  EXPECT_FALSE(map.Take(Bytes(63), Bytes(2)));
  EXPECT_FALSE(map.Take(Bytes(-1), Bytes(1)));
  EXPECT_FALSE(map.Take(Bytes(0), Bytes(0)));
  EXPECT_FALSE(map.Take(Bytes(INT64_MAX), Bytes(INT64_MAX)));
  EXPECT_EQ(map.Find(Bytes(16), 9, Bytes(40)), (Places{Bytes(0), Bytes(16)}));
  EXPECT_EQ(map.CheckInvariants(), absl::OkStatus());
}

TEST(RangeMapTest, TwoSizesGrowFromOppositeEnds) {
  RangeMap map(Bytes(128));
  ASSERT_TRUE(map.Take(Bytes(0), Bytes(16)));
  EXPECT_EQ(map.Find(Bytes(24), 2, map.size()), (Places{Bytes(96), Bytes(72)}));
  ASSERT_TRUE(map.Take(Bytes(96), Bytes(24)));
  EXPECT_EQ(map.Find(Bytes(16), 1, map.size()), (Places{Bytes(16)}));
  // Once there is none of a size, it may come from the other end.
  map.GiveBack(Bytes(0), Bytes(16));
  ASSERT_TRUE(map.Take(Bytes(0), Bytes(32)));
  EXPECT_EQ(map.Find(Bytes(24), 1, map.size()), (Places{Bytes(72)}));
}

// Two engines that grow and shrink in turns: while there is room for a page,
// there is a place for it, which would not be so for pages put anywhere.
TEST(RangeMapTest, TwoSizesThatShareDoNotCutUpTheSlab) {
  constexpr Bytes kSmall = Bytes(16), kLarge = Bytes(40);
  RangeMap map(Bytes(4000));
  std::mt19937_64 random(7);
  std::map<Bytes, Places> held;
  int without_place = 0, tries = 0;
  for (int round = 0; round < 400; ++round) {
    const bool small_grows = round % 2 == 0;
    Places& shrinks = held[small_grows ? kLarge : kSmall];
    const Bytes shrinks_by = small_grows ? kLarge : kSmall;
    const Bytes grows_by = small_grows ? kSmall : kLarge;
    for (size_t n = shrinks.size() * (random() % 3 + 1) / 3; n > 0; --n) {
      map.GiveBack(shrinks.back(), shrinks_by);  // the last that came
      shrinks.pop_back();
    }
    while (map.size() - map.taken() >= grows_by * 2) {
      ++tries;
      const Places found = map.Find(grows_by, 1, map.size());
      if (found.empty()) {
        ++without_place;
        break;
      }
      ASSERT_TRUE(map.Take(found[0], grows_by));
      held[grows_by].push_back(found[0]);
    }
    ASSERT_EQ(map.CheckInvariants(), absl::OkStatus());
  }
  EXPECT_GT(tries, 1000);
  EXPECT_EQ(without_place, 0);
}

class RangeMapModelTest : public testing::TestWithParam<uint64_t> {};

TEST_P(RangeMapModelTest, AgreesWithAByteForEachByte) {
  std::mt19937_64 random(GetParam());
  auto draw = [&](int64_t below) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(below));
  };
  constexpr int64_t kSize = 200;
  RangeMap map((Bytes(kSize)));
  std::vector<bool> taken(kSize);
  std::map<Bytes, Bytes> ranges;
  auto is_free = [&](Bytes at, Bytes bytes) {
    return at >= Bytes(0) && at.count() + bytes.count() <= kSize &&
           std::none_of(taken.begin() + at.count(),
                        taken.begin() + at.count() + bytes.count(),
                        [](bool byte) { return byte; });
  };
  auto mark = [&](Bytes at, Bytes bytes, bool as) {
    std::fill(taken.begin() + at.count(),
              taken.begin() + at.count() + bytes.count(), as);
  };
  for (int i = 0; i < 5000; ++i) {
    const Bytes bytes(1 + draw(4) * 5 + draw(2));
    switch (draw(4)) {
      case 0: {
        const Bytes at(draw(kSize + 10) - 5);
        const bool fits = is_free(at, bytes);
        ASSERT_EQ(map.Take(at, bytes), fits);
        if (!fits) break;
        mark(at, bytes, true);
        ranges[at] = bytes;
        break;
      }
      case 1: {
        const Bytes limit(draw(kSize + 20));
        const size_t count = static_cast<size_t>(draw(20));
        size_t all = 0;
        for (Bytes at; at + bytes <= std::min(limit, Bytes(kSize));
             at += bytes) {
          all += is_free(at, bytes);
        }
        const Places found = map.Find(bytes, count, limit);
        ASSERT_EQ(found.size(), std::min(all, count));
        for (Bytes at : found) {
          ASSERT_EQ(at.count() % bytes.count(), 0);
          ASSERT_LE(at + bytes, limit);
          ASSERT_TRUE(map.Take(at, bytes));
          ASSERT_TRUE(is_free(at, bytes));
          mark(at, bytes, true);
          ranges[at] = bytes;
        }
        break;
      }
      default: {
        if (ranges.empty()) break;
        auto range = std::next(ranges.begin(),
                               draw(static_cast<int64_t>(ranges.size())));
        map.GiveBack(range->first, range->second);
        mark(range->first, range->second, false);
        ranges.erase(range);
      }
    }
    ASSERT_EQ(map.taken().count(),
              std::count(taken.begin(), taken.end(), true));
    ASSERT_EQ(map.CheckInvariants(), absl::OkStatus());
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RangeMapModelTest,
                         testing::Range<uint64_t>(0, 8));

}  // namespace
}  // namespace kvbroker
