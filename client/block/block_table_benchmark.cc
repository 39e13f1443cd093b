// What block operations cost while mapped pages last: 128 MiB pages of 64
// blocks (Llama-3.1-8B, 16 tokens a block), 1,000 of them.
#include <array>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "benchmark/benchmark.h"
#include "broker/base/check.h"
#include "client/block/block_table.h"

namespace kvbroker::client {
namespace {

constexpr uint32_t kPages = 1000;
constexpr BlockGeometry kGeometry{
    .page_bytes = MiB(128), .block_bytes = MiB(2), .max_pages = kPages};

BlockTable FullyBacked() {
  absl::StatusOr<BlockTable> table = BlockTable::Create(kGeometry);
  KVB_CHECK(table.ok());
  std::vector<PageIndex> pages(kPages);
  KVB_CHECK(table->TakeAbsent(absl::MakeSpan(pages)) == kPages);
  for (PageIndex page : pages) {
    KVB_CHECK(table->Back(page, Generation(1)).ok());
  }
  return *std::move(table);
}

// Half of the blocks in use, strewn over all pages.
BlockTable HalfUsed() {
  BlockTable table = FullyBacked();
  std::vector<BlockId> all(table.free_blocks());
  KVB_CHECK(table.Alloc(absl::MakeSpan(all)));
  uint32_t random = 1;
  for (BlockId block : all) {
    random = random * 1664525 + 1013904223;
    if (random >> 31) KVB_CHECK(table.Free({block}, 0).ok());
  }
  return table;
}

void AllocAndFree(benchmark::State& state, BlockTable table) {
  std::vector<BlockId> blocks(state.range(0));
  StepId step = 0;
  for (auto _ : state) {
    KVB_CHECK(table.Alloc(absl::MakeSpan(blocks)));
    benchmark::DoNotOptimize(blocks.data());
    KVB_CHECK(table.Free(blocks, ++step).ok());
  }
}

void BM_AllocAndFree(benchmark::State& state) {
  AllocAndFree(state, FullyBacked());
}
BENCHMARK(BM_AllocAndFree)->Arg(1)->Arg(16)->Arg(256);

void BM_AllocAndFreeStrewn(benchmark::State& state) {
  AllocAndFree(state, HalfUsed());
}
BENCHMARK(BM_AllocAndFreeStrewn)->Arg(1)->Arg(16)->Arg(256);

// 64 requests of 16 blocks alive, the oldest ends as the next one starts.
void BM_AllocAndFreeInTurn(benchmark::State& state) {
  BlockTable table = HalfUsed();
  std::array<std::array<BlockId, 16>, 64> requests;
  for (auto& blocks : requests) KVB_CHECK(table.Alloc(absl::MakeSpan(blocks)));
  StepId step = 0;
  for (auto _ : state) {
    auto& blocks = requests[++step % requests.size()];
    KVB_CHECK(table.Free(blocks, step).ok());
    KVB_CHECK(table.Alloc(absl::MakeSpan(blocks)));
  }
}
BENCHMARK(BM_AllocAndFreeInTurn);

// All memory is prefix cache: each block handed out is evicted first.
void BM_EvictAndCache(benchmark::State& state) {
  BlockTable table = FullyBacked();
  std::vector<BlockId> all(table.free_blocks());
  KVB_CHECK(table.Alloc(absl::MakeSpan(all)));
  KVB_CHECK(table.Cache(all, 0).ok());
  std::array<BlockId, 16> blocks;
  std::array<BlockRemoval, 16> removals;
  StepId step = 0;
  for (auto _ : state) {
    KVB_CHECK(table.Alloc(absl::MakeSpan(blocks)));
    KVB_CHECK(table.DrainRemovals(absl::MakeSpan(removals)) == 16);
    KVB_CHECK(table.Cache(blocks, ++step).ok());
  }
}
BENCHMARK(BM_EvictAndCache);

void BM_TouchAndCache(benchmark::State& state) {
  BlockTable table = HalfUsed();
  std::array<BlockId, 16> blocks;
  KVB_CHECK(table.Alloc(absl::MakeSpan(blocks)));
  KVB_CHECK(table.Cache(blocks, 0).ok());
  std::array<BlockGeneration, 16> generations;
  for (size_t i = 0; i < blocks.size(); ++i) {
    generations[i] = table.generation(blocks[i]);
  }
  StepId step = 0;
  for (auto _ : state) {
    KVB_CHECK(table.Touch(blocks, generations));
    KVB_CHECK(table.Cache(blocks, ++step).ok());
  }
}
BENCHMARK(BM_TouchAndCache);

// What a reclaim holds the lock for: all pages in use, a quarter to be closed.
void BM_CloseAndReopen(benchmark::State& state) {
  BlockTable table = HalfUsed();
  for (auto _ : state) {
    KVB_CHECK(table.Close(kPages / 4) == kPages / 4);
    KVB_CHECK(table.Reopen(kPages) == kPages / 4);
  }
}
BENCHMARK(BM_CloseAndReopen);

void BM_TakeAndKeepIdlePage(benchmark::State& state) {
  BlockTable table = FullyBacked();
  PageIndex page;
  for (auto _ : state) {
    KVB_CHECK(table.TakeIdle(absl::MakeSpan(&page, 1)) == 1);
    KVB_CHECK(table.KeepBacked(page).ok());
  }
}
BENCHMARK(BM_TakeAndKeepIdlePage);

void BM_Create(benchmark::State& state) {
  for (auto _ : state) {
    benchmark::DoNotOptimize(BlockTable::Create(kGeometry));
  }
}
BENCHMARK(BM_Create)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace kvbroker::client

BENCHMARK_MAIN();
