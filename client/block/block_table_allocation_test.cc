// A BlockTable allocates nothing after Create: this program counts every call
// of operator new.
#include <array>
#include <cstdlib>
#include <new>
#include <vector>

#include "client/block/block_table.h"
#include "gtest/gtest.h"

namespace {
size_t allocations = 0;
}  // namespace

void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace kvbroker::client {
namespace {

TEST(BlockTableAllocationTest, NothingIsAllocatedAfterCreate) {
  absl::StatusOr<BlockTable> table = BlockTable::Create(
      {.page_bytes = MiB(128), .block_bytes = MiB(2), .max_pages = 32});
  ASSERT_TRUE(table.ok());
  std::vector<PageIndex> pages(32);
  std::vector<BlockId> blocks(32 * 64 - 1);
  std::vector<BlockGeneration> generations(16);
  std::vector<BlockRemoval> removals(blocks.size());
  const absl::Span<const BlockId> all = blocks;

  const size_t before = allocations;
  bool ok = true;
  for (StepId step = 1; step < 5; ++step) {
    const size_t asked = table->TakeAbsent(absl::MakeSpan(pages));
    for (PageIndex page : absl::MakeSpan(pages).first(asked)) {
      ok &= table->Back(page, Generation(1)).ok();
    }
    ok &= table->Alloc(absl::MakeSpan(blocks));
    ok &= table->Cache(all, step).ok();
    for (size_t i = 0; i < generations.size(); ++i) {
      generations[i] = table->generation(blocks[i]);
    }
    ok &= table->Touch(all.first(16), generations);
    ok &= table->Free(all.first(16), step).ok();
    ok &= table->Alloc(absl::MakeSpan(blocks).subspan(0, 100));
    ok &= table->Close(32) == 31;
    table->Vacate(2);
    table->BlocksToVacate(absl::MakeSpan(blocks).subspan(200));
    ok &= table->Reopen(32) == 31;
    ok &= table->Free(all.first(100), step).ok();
    table->CompleteStep(step);
    const size_t taken = table->TakeIdle(absl::MakeSpan(pages));
    for (PageIndex page : absl::MakeSpan(pages).first(taken)) {
      ok &= table->Returned(page).ok();
    }
    ok &= taken == 31;
    table->DrainRemovals(absl::MakeSpan(removals));
  }
  const size_t after = allocations;
  EXPECT_EQ(after, before);
  EXPECT_TRUE(ok);
}

}  // namespace
}  // namespace kvbroker::client
