#include "client/block/block_table.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

using Blocks = std::vector<BlockId>;
using Pages = std::vector<uint32_t>;

constexpr BlockRemoval Removal(BlockId block, BlockGeneration generation) {
  return {.block = block, .generation = generation};
}

absl::Time Second(int n) { return absl::UnixEpoch() + absl::Seconds(n); }

// Four blocks a page, eight pages, no null block: block b is on page b / 4.
constexpr BlockGeometry kPlain{.page_bytes = Bytes(64),
                               .block_bytes = Bytes(16),
                               .max_pages = 8,
                               .reserve_null_block = false};
constexpr BlockGeometry kWithNullBlock{
    .page_bytes = Bytes(64), .block_bytes = Bytes(16), .max_pages = 8};

// The table as calls that answer with vectors; a bad status fails the test.
class Table {
 public:
  explicit Table(const BlockGeometry& geometry = kPlain)
      : table_(*BlockTable::Create(geometry)) {}
  ~Table() { EXPECT_EQ(table_.CheckInvariants(), absl::OkStatus()); }

  BlockTable* operator->() { return &table_; }

  Pages TakeAbsent(size_t n) {
    return Take(n, [&](auto out) { return table_.TakeAbsent(out); });
  }
  Pages TakeIdle(size_t n = 8) {
    return Take(n, [&](auto out) { return table_.TakeIdle(out); });
  }
  Pages TakeClosed(size_t n = 8) {
    return Take(n, [&](auto out) { return table_.TakeClosed(out); });
  }
  Pages TakeCached(size_t n = 8) {
    return Take(n, [&](auto out) { return table_.TakeCached(out); });
  }
  Pages TakeIdleSince(absl::Time since, size_t keep, size_t n = 8) {
    return Take(
        n, [&](auto out) { return table_.TakeIdleSince(since, keep, out); });
  }

  // The lowest absent pages, from request to mapping.
  void Back(size_t pages) {
    for (uint32_t page : TakeAbsent(pages)) {
      EXPECT_EQ(table_.Back(PageIndex(page), Generation(1)), absl::OkStatus());
    }
  }
  std::optional<Blocks> Alloc(size_t n) {
    Blocks blocks(n);
    if (!table_.Alloc(absl::MakeSpan(blocks))) return std::nullopt;
    return blocks;
  }
  void Free(const Blocks& blocks, StepId step = 0) {
    EXPECT_EQ(table_.Free(blocks, step), absl::OkStatus());
  }
  void Cache(const Blocks& blocks, StepId step = 0) {
    EXPECT_EQ(table_.Cache(blocks, step), absl::OkStatus());
  }
  bool Touch(const Blocks& blocks) {
    return table_.Touch(blocks, Generations(blocks));
  }
  std::vector<BlockGeneration> Generations(const Blocks& blocks) {
    std::vector<BlockGeneration> generations;
    for (BlockId block : blocks) {
      generations.push_back(table_.generation(block));
    }
    return generations;
  }
  std::vector<BlockRemoval> DrainRemovals(size_t n = 64) {
    std::vector<BlockRemoval> removals(n);
    removals.resize(table_.DrainRemovals(absl::MakeSpan(removals)));
    return removals;
  }
  Blocks BlocksToVacate(size_t n = 64) {
    Blocks blocks(n);
    blocks.resize(table_.BlocksToVacate(absl::MakeSpan(blocks)));
    return blocks;
  }
  PageTier TierOf(uint32_t page) { return table_.page_tier(PageIndex(page)); }
  PageState StateOf(uint32_t page) {
    return table_.page_state(PageIndex(page));
  }

  // Backs pages and uses so many blocks of each.
  void BackAndUse(const std::vector<size_t>& used) {
    Back(used.size());
    *Alloc(used.size() * 4);
    for (size_t page = 0; page < used.size(); ++page) {
      for (size_t i = used[page]; i < 4; ++i) {
        Free({static_cast<BlockId>(page * 4 + i)});
      }
    }
  }

 private:
  template <typename Taker>
  Pages Take(size_t n, Taker taker) {
    std::vector<PageIndex> out(n);
    out.resize(taker(absl::MakeSpan(out)));
    Pages pages;
    for (PageIndex page : out) pages.push_back(page.value());
    return pages;
  }

  BlockTable table_;
};

// ---- Pages come -------------------------------------------------------------

TEST(BlockTableTest, AnInvalidGeometryIsRefused) {
  BlockGeometry geometry = kPlain;
  geometry.block_bytes = Bytes(65);
  EXPECT_EQ(BlockTable::Create(geometry).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(BlockTableTest, TheLowestAbsentPagesAreAskedForFirst) {
  Table table;
  EXPECT_THAT(table.TakeAbsent(3), ElementsAre(0, 1, 2));
  EXPECT_EQ(table->Abandon(PageIndex(1)), absl::OkStatus());
  EXPECT_THAT(table.TakeAbsent(2), ElementsAre(1, 3));
  EXPECT_EQ(table->pages(PageState::kRequested), 4u);
  EXPECT_EQ(table->pages(PageState::kAbsent), 4u);
  EXPECT_THAT(table.TakeAbsent(100), SizeIs(4));
}

TEST(BlockTableTest, APageThatHoldsNoWholeBlockIsNeverAskedFor) {
  Table table({.page_bytes = Bytes(18),
               .block_bytes = Bytes(15),
               .max_pages = 6,
               .reserve_null_block = false});
  EXPECT_EQ(table->pages(PageState::kAbsent), 3u);
  EXPECT_THAT(table.TakeAbsent(6), ElementsAre(0, 4, 5));
}

TEST(BlockTableTest, AnotherMayChooseThePage) {
  Table table;
  EXPECT_EQ(table->TakeAbsentAt(PageIndex(5)), absl::OkStatus());
  EXPECT_EQ(table->page_state(PageIndex(5)), PageState::kRequested);
  for (uint32_t page : {5u, 8u, ~0u}) {  // asked for already, or no such page
    EXPECT_EQ(table->TakeAbsentAt(PageIndex(page)).code(),
              absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_THAT(table.TakeAbsent(100), SizeIs(7));
  Table odd({.page_bytes = Bytes(18),
             .block_bytes = Bytes(15),
             .max_pages = 6,
             .reserve_null_block = false});
  EXPECT_EQ(odd->TakeAbsentAt(PageIndex(1)).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(odd->pages(PageState::kAbsent), 3u);
}

TEST(BlockTableTest, BlocksAreHandedOutOnlyOnceTheirPageIsBacked) {
  Table table;
  table.TakeAbsent(1);
  EXPECT_EQ(table.Alloc(1), std::nullopt);
  EXPECT_EQ(table->Back(PageIndex(0), Generation(7)), absl::OkStatus());
  EXPECT_EQ(table->page_generation(PageIndex(0)), Generation(7));
  EXPECT_EQ(table->free_blocks(), 4u);
  EXPECT_THAT(*table.Alloc(4), UnorderedElementsAre(0, 1, 2, 3));
}

TEST(BlockTableTest, ABlockThatStraddlesPagesIsNeverHandedOut) {
  Table table({.page_bytes = Bytes(40),
               .block_bytes = Bytes(16),
               .max_pages = 2,
               .reserve_null_block = false});
  table.Back(2);
  EXPECT_THAT(*table.Alloc(4), UnorderedElementsAre(0, 1, 3, 4));
  EXPECT_EQ(table.Alloc(1), std::nullopt);
  EXPECT_EQ(table->block_state(2), BlockState::kUnbacked);
}

TEST(BlockTableTest, PageCallsInTheWrongStateNamePageAndStates) {
  Table table;
  table.Back(1);
  const absl::Status twice = table->Back(PageIndex(0), Generation(2));
  EXPECT_EQ(twice.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(twice.message()),
              AllOf(HasSubstr("page: 0"), HasSubstr("state: backed"),
                    HasSubstr("needed: requested")));
  EXPECT_FALSE(table->Abandon(PageIndex(0)).ok());
  EXPECT_FALSE(table->Returned(PageIndex(0)).ok());
  EXPECT_FALSE(table->KeepBacked(PageIndex(1)).ok());
  EXPECT_FALSE(table->Back(PageIndex(8), Generation(1)).ok());
}

// ---- The null block ---------------------------------------------------------

TEST(BlockTableTest, TheNullBlockIsReservedFromTheFirstBackingOfItsPage) {
  Table table(kWithNullBlock);
  EXPECT_EQ(table->block_state(kNullBlock), BlockState::kUnbacked);
  table.Back(1);
  EXPECT_EQ(table->block_state(kNullBlock), BlockState::kReserved);
  EXPECT_THAT(*table.Alloc(3), UnorderedElementsAre(1, 2, 3));
  EXPECT_EQ(table->used_blocks(), 3u);
  const absl::Status freed = table->Free({kNullBlock}, 0);
  EXPECT_THAT(std::string(freed.message()),
              AllOf(HasSubstr("block: 0"), HasSubstr("reserved")));
}

TEST(BlockTableTest, TheNullBlocksPageNeverLeaves) {
  Table table(kWithNullBlock);
  table.Back(2);
  EXPECT_EQ(table.TierOf(0), PageTier::kInUse);
  EXPECT_EQ(table->Close(8), 1u);
  EXPECT_THAT(table.TakeIdle(), ElementsAre(1));
  EXPECT_THAT(table.TakeCached(), IsEmpty());
  EXPECT_EQ(table->free_blocks(), 3u);
}

// ---- Alloc and Free ---------------------------------------------------------

TEST(BlockTableTest, AllocTakesAllOrNothing) {
  Table table;
  table.Back(1);
  EXPECT_EQ(table.Alloc(5), std::nullopt);
  EXPECT_EQ(table->free_blocks(), 4u);
  EXPECT_THAT(*table.Alloc(0), IsEmpty());
  EXPECT_THAT(*table.Alloc(4), SizeIs(4));
  EXPECT_EQ(table.Alloc(1), std::nullopt);
}

TEST(BlockTableTest, TheFullestPageWithAFreeBlockIsFilledFirst) {
  Table table;
  table.BackAndUse({1, 4, 3, 2});
  EXPECT_THAT(*table.Alloc(1), ElementsAre(11));
  EXPECT_THAT(*table.Alloc(2), UnorderedElementsAre(14, 15));
}

TEST(BlockTableTest, IdlePagesAreUsedLastAndTheLatestIdleFirst) {
  Table table;
  table.BackAndUse({4, 0, 4, 4});
  table.Free({8, 9, 10, 11});
  table.Cache({4 * 3});
  EXPECT_EQ(table.TierOf(1), PageTier::kIdle);
  EXPECT_EQ(table.TierOf(2), PageTier::kIdle);
  table.Alloc(1);
  EXPECT_EQ(table.TierOf(2), PageTier::kInUse);
  EXPECT_EQ(table.TierOf(1), PageTier::kIdle);
}

TEST(BlockTableTest, PagesWithCachedBlocksAreFilledBeforeIdleOnes) {
  Table table;
  table.BackAndUse({1, 0});
  table.Cache({0});
  EXPECT_THAT(*table.Alloc(3), UnorderedElementsAre(1, 2, 3));
  EXPECT_EQ(table.TierOf(1), PageTier::kIdle);
}

TEST(BlockTableTest, AFreeThatNamesAWrongBlockChangesNothingAndNamesIt) {
  Table table;
  table.Back(2);
  *table.Alloc(4);  // page 1's, the latest to become idle
  const auto message = [&](const Blocks& blocks) {
    const absl::Status status = table->Free(blocks, 0);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(table->used_blocks(), 4u);
    EXPECT_EQ(table->CheckInvariants(), absl::OkStatus());
    return std::string(status.message());
  };
  EXPECT_THAT(message({4, 5, 0}),
              AllOf(HasSubstr("block: 0"), HasSubstr("state: free")));
  EXPECT_THAT(message({4, 31}),
              AllOf(HasSubstr("block: 31"), HasSubstr("state: unbacked")));
  EXPECT_THAT(message({4, 32}), HasSubstr("not of this pool; block: 32"));
  EXPECT_THAT(message({4, -1}), HasSubstr("not of this pool; block: -1"));
  EXPECT_THAT(message({4, 5, 4}),
              HasSubstr("named twice in one call; block: 4"));
  table.Free({4, 5, 6, 7});
  EXPECT_EQ(table->used_blocks(), 0u);
}

TEST(BlockTableTest, AGenerationEndsWhenItsContentIsGivenUp) {
  Table table;
  table.Back(1);
  table.Alloc(1);
  const BlockGeneration first = table->generation(0);
  table.Cache({0});
  EXPECT_EQ(table->generation(0), first);
  EXPECT_TRUE(table.Touch({0}));
  EXPECT_EQ(table->generation(0), first);
  table.Free({0});
  EXPECT_NE(table->generation(0), first);
}

TEST(BlockTableTest, GenerationsOutliveTheirPage) {
  Table table;
  table.Back(1);
  table.Alloc(1);
  const auto generations = table.Generations({0});
  table.Cache({0});
  EXPECT_THAT(table.TakeCached(), ElementsAre(0));
  EXPECT_FALSE(table->Touch({0}, generations));
  EXPECT_EQ(table->Returned(PageIndex(0)), absl::OkStatus());
  table.Back(1);
  table.Alloc(4);
  EXPECT_FALSE(table->Touch({0}, generations));
}

// ---- Cached blocks ----------------------------------------------------------

TEST(BlockTableTest, FreeBlocksAreTakenBeforeCachedOnesAreEvicted) {
  Table table;
  table.BackAndUse({4, 4});
  table.Cache({0, 1});
  table.Free({7});
  EXPECT_EQ(table->allocatable_blocks(), 3u);
  EXPECT_THAT(*table.Alloc(1), ElementsAre(7));
  EXPECT_THAT(table.DrainRemovals(), IsEmpty());
}

TEST(BlockTableTest, TheLeastRecentlyCachedBlockIsEvictedFirst) {
  Table table;
  table.BackAndUse({4, 4});
  table.Cache({5, 2});
  table.Cache({7});
  EXPECT_TRUE(table.Touch({5}));
  table.Cache({5});
  EXPECT_THAT(*table.Alloc(2), ElementsAre(2, 7));
  EXPECT_THAT(*table.Alloc(1), ElementsAre(5));
  EXPECT_EQ(table.Alloc(1), std::nullopt);
}

TEST(BlockTableTest, EvictionsAreReportedWithTheGenerationThatIsGone) {
  Table table;
  table.BackAndUse({4});
  const BlockGeneration generation = table->generation(2);
  table.Cache({2});
  table.Alloc(1);
  EXPECT_EQ(table->pending_removals(), 1u);
  EXPECT_THAT(table.DrainRemovals(), ElementsAre(Removal(2, generation)));
  EXPECT_THAT(table.DrainRemovals(), IsEmpty());
}

TEST(BlockTableTest, ABlockEvictedTwiceIsReportedOnceWithTheLaterGeneration) {
  Table table;
  table.BackAndUse({4});
  table.Cache({2});
  table.Alloc(1);
  table.Cache({0, 2});
  const BlockGeneration later = table->generation(2);
  table.Alloc(2);
  EXPECT_THAT(table.DrainRemovals(1), ElementsAre(Removal(2, later)));
  EXPECT_THAT(table.DrainRemovals(1), SizeIs(1));
  EXPECT_EQ(table->pending_removals(), 0u);
}

TEST(BlockTableTest, TouchFailsAsAWholeForOneBlockThatIsGone) {
  Table table;
  table.BackAndUse({4});
  const auto generations = table.Generations({1, 2});
  table.Cache({2, 1});
  table.Alloc(1);  // evicts 2
  EXPECT_FALSE(table->Touch({1, 2}, generations));
  EXPECT_EQ(table->block_state(1), BlockState::kCached);
  EXPECT_TRUE(table->Touch({1}, {generations[0]}));
  EXPECT_EQ(table->block_state(1), BlockState::kUsed);
}

TEST(BlockTableTest, TouchTakesUsedBlocksAndRepeatsAndRefusesStrangers) {
  Table table;
  table.BackAndUse({2});
  table.Cache({0});
  EXPECT_TRUE(table.Touch({1, 0, 0}));
  EXPECT_EQ(table->used_blocks(), 2u);
  EXPECT_FALSE(table->Touch({-1}, {0}));
  EXPECT_FALSE(table->Touch({32}, {0}));
  EXPECT_FALSE(table->Touch({31}, {0}));                       // unbacked
  EXPECT_FALSE(table->Touch({3}, {table->generation(3)}));     // free
  EXPECT_FALSE(table->Touch({0, 1}, {table->generation(0)}));  // one short
}

TEST(BlockTableTest, UncacheFreesWithoutReportingARemoval) {
  Table table;
  table.BackAndUse({2});
  const auto generations = table.Generations({0});
  table.Cache({0, 1});
  EXPECT_EQ(table->Uncache({0}), absl::OkStatus());
  EXPECT_EQ(table->block_state(0), BlockState::kFree);
  EXPECT_EQ(table->cached_blocks(), 1u);
  EXPECT_THAT(table.DrainRemovals(), IsEmpty());
  EXPECT_FALSE(table->Touch({0}, generations));
  EXPECT_FALSE(table->Uncache({0}).ok());
}

TEST(BlockTableTest, TrimmingKeepsTheMostRecentlyCached) {
  Table table;
  table.BackAndUse({4});
  table.Cache({3, 1, 2});
  EXPECT_EQ(table->TrimCached(1), 2u);
  EXPECT_EQ(table->block_state(2), BlockState::kCached);
  EXPECT_THAT(table.DrainRemovals(), SizeIs(2));
  EXPECT_EQ(table->TrimCached(1), 0u);
}

// ---- Reclaim: idle and cached pages -----------------------------------------

TEST(BlockTableTest, AnEmptyPageIsTakenAndItsBlocksAreGone) {
  Table table;
  table.BackAndUse({1, 0});
  EXPECT_THAT(table.TakeIdle(), ElementsAre(1));
  EXPECT_EQ(table.StateOf(1), PageState::kReturning);
  EXPECT_EQ(table->free_blocks(), 3u);
  EXPECT_EQ(table->block_state(4), BlockState::kUnbacked);
  EXPECT_EQ(table->Returned(PageIndex(1)), absl::OkStatus());
  EXPECT_THAT(table.TakeAbsent(1), ElementsAre(1));
}

TEST(BlockTableTest, APageThatCouldNotBeUnmappedIsIdleAgain) {
  Table table;
  table->SetNow(Second(1));
  table.Back(1);
  table.TakeIdle();
  table->SetNow(Second(5));
  EXPECT_EQ(table->KeepBacked(PageIndex(0)), absl::OkStatus());
  EXPECT_EQ(table->oldest_idle_since(), Second(5));
  EXPECT_EQ(table->page_generation(PageIndex(0)), Generation(1));
  EXPECT_THAT(*table.Alloc(4), SizeIs(4));
}

TEST(BlockTableTest, ThePageLongestIdleIsTakenFirst) {
  Table table;
  table.BackAndUse({4, 4, 4});
  table.Free({4, 5, 6, 7});
  table.Free({0, 1, 2, 3});
  EXPECT_THAT(table.TakeIdle(1), ElementsAre(1));
  EXPECT_THAT(table.TakeIdle(), ElementsAre(0));
}

TEST(BlockTableTest, OnlyPagesIdleForLongDecayAndSomeAreKept) {
  Table table;
  table->SetNow(Second(1));
  table.Back(2);
  table->SetNow(Second(2));
  table.Back(2);
  EXPECT_EQ(table->oldest_idle_since(), Second(1));
  EXPECT_THAT(table.TakeIdleSince(Second(0), 0), IsEmpty());
  EXPECT_THAT(table.TakeIdleSince(Second(1), 3), ElementsAre(0));
  EXPECT_THAT(table.TakeIdleSince(Second(1), 0), ElementsAre(1));
  EXPECT_EQ(table->oldest_idle_since(), Second(2));
  EXPECT_THAT(table.TakeIdleSince(Second(9), 2), IsEmpty());
  EXPECT_THAT(table.TakeIdleSince(Second(9), 0), ElementsAre(2, 3));
  EXPECT_EQ(table->oldest_idle_since(), std::nullopt);
}

TEST(BlockTableTest, TimeThatGoesBackIsIgnored) {
  Table table;
  table->SetNow(Second(9));
  table->SetNow(Second(3));
  table.Back(1);
  EXPECT_EQ(table->oldest_idle_since(), Second(9));
}

TEST(BlockTableTest, CachedPagesGoLongestUnusedFirstWithTheirBlocks) {
  Table table;
  table.BackAndUse({2, 2, 2});
  table.Cache({4, 5});
  table.Cache({0, 1});
  table.Cache({8});  // page 2 stays in use
  EXPECT_EQ(table->pages(PageTier::kCached), 2u);
  EXPECT_THAT(table.TakeIdle(), IsEmpty());
  EXPECT_THAT(table.TakeCached(1), ElementsAre(1));
  EXPECT_EQ(table->cached_blocks(), 3u);
  EXPECT_THAT(table.DrainRemovals(),
              UnorderedElementsAre(Removal(4, 0), Removal(5, 0)));
  EXPECT_THAT(table.TakeCached(), ElementsAre(0));
  EXPECT_EQ(table->block_state(8), BlockState::kCached);
}

// ---- The step fence ---------------------------------------------------------

TEST(BlockTableTest, AFencedPageIsNotTakenBeforeItsStepIsComplete) {
  Table table;
  table.BackAndUse({2, 2});
  table.Free({0}, 7);
  table.Free({1}, 6);  // the later step counts
  table.Cache({4, 5}, 8);
  table->CompleteStep(6);
  EXPECT_TRUE(table->is_fenced(PageIndex(0)));
  EXPECT_THAT(table.TakeIdle(), IsEmpty());
  table->CompleteStep(7);
  EXPECT_THAT(table.TakeIdle(), ElementsAre(0));
  EXPECT_THAT(table.TakeCached(), IsEmpty());
  table->CompleteStep(8);
  table->CompleteStep(3);  // late news changes nothing
  EXPECT_THAT(table.TakeCached(), ElementsAre(1));
}

TEST(BlockTableTest, AFencedPageIsSkippedForAYoungerOne) {
  Table table;
  table.BackAndUse({1, 1});
  table.Free({0}, 2);
  table.Free({4}, 1);
  table->CompleteStep(1);
  EXPECT_THAT(table.TakeIdle(1), ElementsAre(1));
}

TEST(BlockTableTest, BlocksOfAFencedPageAreHandedOutAgain) {
  Table table;
  table.BackAndUse({4});
  table.Free({0, 1, 2, 3}, 5);
  EXPECT_THAT(*table.Alloc(4), SizeIs(4));
}

TEST(BlockTableTest, AFreshlyBackedPageIsNotFenced) {
  Table table;
  table.BackAndUse({1});
  table.Free({0}, 5);
  table->CompleteStep(5);
  table.TakeIdle();
  EXPECT_EQ(table->Returned(PageIndex(0)), absl::OkStatus());
  table.Back(1);
  EXPECT_FALSE(table->is_fenced(PageIndex(0)));
}

// ---- Closing ----------------------------------------------------------------

TEST(BlockTableTest, PagesWithTheFewestUsedBlocksAreClosed) {
  Table table;
  table.BackAndUse({3, 1, 4, 2});
  EXPECT_EQ(table->Close(2), 2u);
  EXPECT_EQ(table.TierOf(1), PageTier::kClosing);
  EXPECT_EQ(table.TierOf(3), PageTier::kClosing);
  EXPECT_EQ(table->closing_pages(), 2u);
  EXPECT_EQ(table->pages(PageTier::kInUse), 2u);
  EXPECT_EQ(table->Close(9), 2u);
}

TEST(BlockTableTest, AClosingPageGetsNoNewBlocks) {
  Table table;
  table.BackAndUse({1, 4});
  EXPECT_EQ(table->Close(1), 1u);
  EXPECT_EQ(table->free_blocks(), 0u);
  EXPECT_EQ(table.Alloc(1), std::nullopt);
  table.Free({4});
  EXPECT_THAT(*table.Alloc(1), ElementsAre(4));
}

TEST(BlockTableTest, AClosingPageThatEmptiesIsTakenFirst) {
  Table table;
  table.BackAndUse({0, 2});
  EXPECT_EQ(table->Close(1, PageTier::kIdle), 1u);  // page 0
  EXPECT_EQ(table->Close(1), 1u);                   // page 1
  table.Back(1);                                    // page 2, idle
  table.Free({4, 5}, 3);
  EXPECT_EQ(table.TierOf(1), PageTier::kClosed);
  EXPECT_THAT(table.TakeClosed(), ElementsAre(0));
  table->CompleteStep(3);
  EXPECT_THAT(table.TakeIdle(), ElementsAre(1, 2));
}

TEST(BlockTableTest, ClosingAPageEvictsWhatItCaches) {
  Table table;
  table.BackAndUse({3});
  table.Cache({0});
  EXPECT_EQ(table->Close(1), 1u);
  EXPECT_THAT(table.DrainRemovals(), ElementsAre(Removal(0, 0)));
  table.Cache({1});  // no use to keep it either
  EXPECT_THAT(table.DrainRemovals(), ElementsAre(Removal(1, 0)));
  EXPECT_EQ(table->cached_blocks(), 0u);
  table.Cache({2});
  EXPECT_THAT(table.TakeClosed(), ElementsAre(0));
}

TEST(BlockTableTest, ClosingStopsAtTheDearestTierAllowed) {
  Table table;
  table.BackAndUse({0, 1, 1});
  table.Cache({4});
  EXPECT_EQ(table->Close(8, PageTier::kIdle), 1u);
  EXPECT_EQ(table->Close(8, PageTier::kCached), 1u);
  EXPECT_EQ(table->Close(8, PageTier::kCached), 0u);
  EXPECT_EQ(table.TierOf(2), PageTier::kInUse);
}

TEST(BlockTableTest, ReopeningBeginsWithTheMostUsed) {
  Table table;
  table.BackAndUse({1, 3, 0, 2});
  EXPECT_EQ(table->Close(8), 4u);
  EXPECT_EQ(table->Vacate(1), 1u);
  EXPECT_EQ(table->Reopen(2), 2u);
  EXPECT_EQ(table.TierOf(1), PageTier::kInUse);
  EXPECT_EQ(table.TierOf(3), PageTier::kInUse);
  EXPECT_EQ(table->free_blocks(), 3u);
  table->SetNow(Second(4));
  EXPECT_EQ(table->Reopen(8), 2u);
  EXPECT_EQ(table.TierOf(0), PageTier::kInUse);
  EXPECT_THAT(table.BlocksToVacate(), IsEmpty());
  EXPECT_EQ(table->oldest_idle_since(), Second(4));
}

TEST(BlockTableTest, OnlyVacatingPagesHaveBlocksToPreempt) {
  Table table;
  table.BackAndUse({3, 2});
  EXPECT_EQ(table->Vacate(2), 0u);  // nothing is closing
  EXPECT_EQ(table->Close(2), 2u);
  EXPECT_THAT(table.BlocksToVacate(), IsEmpty());
  EXPECT_EQ(table->Vacate(1), 1u);
  EXPECT_THAT(table.BlocksToVacate(), UnorderedElementsAre(4, 5));
  EXPECT_THAT(table.BlocksToVacate(1), SizeIs(1));
  table.Free({4});
  EXPECT_THAT(table.BlocksToVacate(), ElementsAre(5));
  table.Free({5});
  EXPECT_THAT(table.BlocksToVacate(), IsEmpty());
  EXPECT_EQ(table.TierOf(1), PageTier::kClosed);
}

TEST(BlockTableTest, CountsFollowAPageThroughItsLife) {
  Table table;
  table.Back(2);
  EXPECT_EQ(table->pages(PageState::kBacked), 2u);
  EXPECT_EQ(table->pages(PageTier::kIdle), 2u);
  table.Alloc(2);
  EXPECT_EQ(table->pages(PageTier::kInUse), 1u);
  EXPECT_EQ(table->used_blocks(), 2u);
  EXPECT_EQ(table->page_used_blocks(PageIndex(1)), 2u);
  EXPECT_EQ(table->page_of(7), PageIndex(1));
  table.Cache({4, 5});
  EXPECT_EQ(table->pages(PageTier::kCached), 1u);
  EXPECT_EQ(table->cached_blocks(), 2u);
  EXPECT_EQ(table->allocatable_blocks(), 8u);
  table.TakeCached();
  EXPECT_EQ(table->pages(PageState::kReturning), 1u);
  EXPECT_EQ(table->allocatable_blocks(), 4u);
}

}  // namespace
}  // namespace kvbroker::client
