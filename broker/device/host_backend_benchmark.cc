// What a handle costs: creation, export and release, nobody importing it.
#include <vector>

#include "benchmark/benchmark.h"
#include "broker/device/host_backend.h"

namespace kvbroker {
namespace {

HostBackend& Device() {
  static HostBackend& device =
      *HostBackend::Create(HostBackendOptions{.total = GiB(1)})->release();
  return device;
}

void BM_CreateExportRelease(benchmark::State& state) {
  for (auto _ : state) {
    absl::StatusOr<Handle> handle = Device().Create(Bytes(state.range(0)));
    benchmark::DoNotOptimize(Device().Export(*handle));
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(BM_CreateExportRelease)
    ->Arg(4 << 10)
    ->Arg(2 << 20)
    ->ThreadRange(1, 2)
    ->UseRealTime();

void BM_Export(benchmark::State& state) {
  absl::StatusOr<Handle> handle = Device().Create(KiB(4));
  for (auto _ : state) benchmark::DoNotOptimize(Device().Export(*handle));
}
BENCHMARK(BM_Export);

// With so many handles whose importers are still there.
void BM_UsedBytes(benchmark::State& state) {
  std::vector<UniqueFd> importers;
  for (int i = 0; i < state.range(0); ++i) {
    absl::StatusOr<Handle> handle = Device().Create(KiB(4));
    importers.push_back(*Device().Export(*handle));
  }
  for (auto _ : state) benchmark::DoNotOptimize(Device().UsedBytes());
}
BENCHMARK(BM_UsedBytes)->Arg(0)->Arg(1000);

}  // namespace
}  // namespace kvbroker

BENCHMARK_MAIN();
