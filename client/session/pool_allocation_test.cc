// While mapped pages last, the engine's calls allocate nothing and send nothing:
// this program counts every call of operator new.
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "client/session/pool.h"
#include "gtest/gtest.h"
#include "tests/harness/null_mapper.h"

namespace {
std::atomic<size_t> allocations = 0;
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

class CountingSession : public PoolSession {
 public:
  Sequence NextSequence() override { return Sequence(++sequences_); }
  void Send(ClientMessage message) override {
    ++sends;
    if (auto* acquire = std::get_if<Acquire>(&message)) asked = *acquire;
  }
  void Wake() override {}

  int sends = 0;
  Acquire asked;

 private:
  uint64_t sequences_ = 0;
};

TEST(PoolAllocationTest, WarmCallsNeitherAllocateNorSend) {
  constexpr size_t kBlocks = 16;
  constexpr int kPairs = 1'000'000;
  PoolOptions options;
  options.geometry.handle_bytes = MiB(2);
  options.geometry.max_pages = 8;
  options.block_bytes = KiB(32);
  CountingSession session;
  FakeClock clock;
  auto pool = *Pool::Create(options, std::make_unique<testing::NullMapper>(),
                            session, clock);
  pool->OnOpened(PoolId(1), GiB(1), GiB(1));
  std::vector<BlockId> blocks(8 * 64);
  ASSERT_FALSE(pool->Alloc(absl::MakeSpan(blocks), Urgency::kWaiting));
  pool->Work();
  Granted granted;
  granted.sequence = session.asked.sequence;
  for (PageIndex index : session.asked.indexes) {
    granted.pages.push_back({index, Generation(1)});
  }
  pool->OnGranted(granted, std::vector<UniqueFd>(granted.pages.size()));
  ASSERT_EQ(pool->available_blocks(), blocks.size());
  pool->Work();

  const absl::Span<BlockId> some = absl::MakeSpan(blocks).first(kBlocks);
  std::vector<BlockGeneration> generations(kBlocks);
  std::vector<BlockRemoval> removals(kBlocks);
  const size_t allocations_before = allocations;
  const int sends_before = session.sends;
  bool ok = true;
  for (int i = 1; i <= kPairs; ++i) {
    pool->StepBegin();
    ok &= pool->Alloc(some, i % 2 == 0 ? Urgency::kRunning : Urgency::kWaiting);
    if (i % 8 == 0) {
      for (size_t b = 0; b < kBlocks; ++b) {
        generations[b] = pool->generation(some[b]);
      }
      ok &= pool->Cache(some).ok();
      ok &= pool->Touch(some, generations);
      ok &= pool->DrainRemovals(absl::MakeSpan(removals)) == 0;
    }
    ok &= pool->available_blocks() == blocks.size() - kBlocks;
    ok &= pool->BlocksToVacate(some) == 0;
    pool->StepEnd(i);
    ok &= pool->Free(some).ok();
    pool->StepDone(i);
  }
  EXPECT_EQ(allocations - allocations_before, 0u);
  EXPECT_EQ(session.sends - sends_before, 0);
  EXPECT_TRUE(ok);
}

}  // namespace
}  // namespace kvbroker::client
