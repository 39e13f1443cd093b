// What an engine pays for blocks while mapped pages last: no RPC, no
// allocation.
//
//   bazel run -c opt //tests/bench:pool_benchmark
#include <algorithm>
#include <memory>
#include <vector>

#include "benchmark/benchmark.h"
#include "broker/base/check.h"
#include "client/session/pool.h"
#include "tests/harness/null_mapper.h"

namespace kvbroker::client {
namespace {

constexpr PageCount kPages = 256;

// Counts what the pool says to the broker.
class CountingSession : public PoolSession {
 public:
  Sequence NextSequence() override { return Sequence(++last_); }
  void Send(ClientMessage message) override {
    ++sent_;
    if (auto* acquire = std::get_if<Acquire>(&message)) asked_ = *acquire;
  }
  void Wake() override { ++wakes_; }

  const Acquire& asked() const { return asked_; }
  int64_t sent() const { return sent_; }

 private:
  uint64_t last_ = 0;
  int64_t sent_ = 0, wakes_ = 0;
  Acquire asked_;
};

// A pool with kPages mapped, as after a grant.
std::unique_ptr<Pool> WarmPool(CountingSession& session) {
  PoolOptions options;
  options.geometry = {.handle_bytes = MiB(128), .max_pages = 1024};
  options.block_bytes = MiB(2);  // 16 tokens of Llama-3.1-8B
  options.map_ahead = false;
  auto pool = Pool::Create(options, std::make_unique<testing::NullMapper>(),
                           session, Clock::Steady());
  KVB_CHECK(pool.ok());
  (*pool)->OnOpened(PoolId(1), GiB(128), GiB(128));
  std::vector<BlockId> blocks(kPages * 64);
  KVB_CHECK(!(*pool)->Alloc(absl::MakeSpan(blocks), Urgency::kWaiting));
  (*pool)->Work();
  Granted granted;
  granted.sequence = session.asked().sequence;
  granted.pool = PoolId(1);
  for (PageIndex page : session.asked().indexes) {
    granted.pages.push_back({page, Generation(1)});
  }
  (*pool)->OnGranted(granted, std::vector<UniqueFd>(granted.pages.size()));
  return *std::move(pool);
}

void BM_AllocFree(benchmark::State& state) {
  CountingSession session;
  std::unique_ptr<Pool> pool = WarmPool(session);
  // Half of the pool is in use by others, as in a running engine.
  std::vector<BlockId> others(kPages * 32);
  KVB_CHECK(pool->Alloc(absl::MakeSpan(others), Urgency::kRunning));
  std::vector<BlockId> blocks(static_cast<size_t>(state.range(0)));
  const int64_t sent = session.sent();
  for (auto _ : state) {
    KVB_CHECK(pool->Alloc(absl::MakeSpan(blocks), Urgency::kRunning));
    KVB_CHECK(pool->Free(blocks).ok());
  }
  state.counters["rpcs"] = static_cast<double>(session.sent() - sent);
}
BENCHMARK(BM_AllocFree)->Arg(1)->Arg(16)->Arg(256);

// What a million of them say to the broker.
void BM_MillionAllocs(benchmark::State& state) {
  CountingSession session;
  std::unique_ptr<Pool> pool = WarmPool(session);
  std::vector<BlockId> blocks(16);
  const int64_t sent = session.sent();
  for (auto _ : state) {
    KVB_CHECK(pool->Alloc(absl::MakeSpan(blocks), Urgency::kRunning));
    KVB_CHECK(pool->Free(blocks).ok());
  }
  state.counters["rpcs_per_alloc"] =
      static_cast<double>(session.sent() - sent) /
      static_cast<double>(state.iterations());
}
BENCHMARK(BM_MillionAllocs)->Iterations(1'000'000);

void BM_Available(benchmark::State& state) {
  CountingSession session;
  std::unique_ptr<Pool> pool = WarmPool(session);
  for (auto _ : state) benchmark::DoNotOptimize(pool->available_blocks());
}
BENCHMARK(BM_Available);

}  // namespace
}  // namespace kvbroker::client

BENCHMARK_MAIN();
