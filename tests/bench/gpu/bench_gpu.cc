// bench_gpu: the processes that bench_gpu.py measures with: an engine with the
// client library's session and pool, and the same work with nothing but the
// driver.
//
//   bench_gpu facts            the GPU and its driver
//   bench_gpu used             bytes of the GPU in use, as NVML sees them
//   bench_gpu floor ROUNDS     a page, and 128 GiB of addresses, by the driver
//   bench_gpu reserve ROUNDS   the same addresses by CudaMapper
//   bench_gpu alone            a process that maps for itself; takes the order
//     churn SECONDS PAGES      in bursts of PAGES: creates and maps each, then
//                              unmaps and releases each
//   bench_gpu engine ADDRESS NAME [KEY=VALUE...]
//     page_mib=128 handles=1 max_pages=1024   the pool; 64 blocks a page
//     ahead=0    1: maps ahead, as an engine does by default
//     keep=1     0: a page that is empty is unmapped and returned at once
//     and takes the orders
//     warm PAIRS             Alloc and Free of 16 blocks on pages that are
//                            mapped: nanoseconds a pair, of 20 batches
//     grow PAGES             a page by one Alloc, one after the other; it keeps
//                            them
//     claim PAGES            all of them by one Alloc; it keeps them
//     free                   everything; with keep=0 waits until it is unmapped
//     shrink                 page by page, until each is unmapped; needs keep=0
//     churn SECONDS PAGES    as above, through the broker; needs keep=0
//     take                   a page, which is idle again at once
//     takes SECONDS          the same over and over, with pauses of 8 to 16 ms
//     bursts START SECONDS PHASE PAGES STEP_US
//                            from START (CLOCK_MONOTONIC, seconds) on, 10 times
//                            a second, for half of the time: steps of STEP_US,
//                            each of which takes a page, the last PAGES of
//                            which are in use; then all are idle. PHASE 0 or 1:
//                            which half
//
// One line on stdin is one order, one line on stdout the answer, JSON. Times
// are microseconds unless they say otherwise. An engine and `alone` say "ready"
// first. The end of stdin ends them.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <csignal>
#include <deque>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "broker/base/mutex.h"
#include "broker/base/status_macros.h"
#include "broker/base/unique_fd.h"
#include "broker/device/cuda/cuda_backend.h"
#include "client/address/broker_address.h"
#include "client/arena/cuda_mapper.h"
#include "client/session/open_session.h"

namespace kvbroker::client {
namespace {

constexpr int kBlocksPerPage = 64;
constexpr int kBatches = 20;
// Between two takes, microseconds; bench_gpu.py's _SETTLE_SECONDS.
constexpr double kSettle = 6000;
// Who gets nothing for so long has found a fault, not a figure.
constexpr absl::Duration kPatience = absl::Seconds(20);
constexpr Bytes kAddresses = GiB(128);
constexpr PoolGeometry ContiguousGeometry() {
  return {.handle_bytes = MiB(128), .max_pages = 1024};
}
constexpr PoolGeometry PerLayerGeometry() {
  return {.handle_bytes = MiB(2),
          .handles_per_page = 64,
          .layout = Layout::kPerLayer,
          .max_pages = 1024};
}

[[noreturn]] void Fail(const std::string& what) {
  fprintf(stderr, "bench_gpu: %s\n", what.c_str());
  _exit(1);
}

void Must(const absl::Status& status) {
  if (!status.ok()) Fail(status.ToString());
}

void Say(const std::string& line) {
  printf("%s\n", line.c_str());
  fflush(stdout);
}

// CLOCK_MONOTONIC, which all processes of a machine share.
double Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e6 +
         static_cast<double>(now.tv_nsec) / 1e3;
}

void SleepUntil(double microseconds) {
  timespec until;
  until.tv_sec = static_cast<time_t>(microseconds / 1e6);
  until.tv_nsec = static_cast<long>(
      (microseconds - static_cast<double>(until.tv_sec) * 1e6) * 1e3);
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) ==
         EINTR) {
  }
}

// Values by the name of what was measured, in JSON.
class Samples {
 public:
  void Add(const std::string& name, double value) {
    values_[name].push_back(value);
  }
  template <typename Call>
  void Time(const std::string& name, const Call& call) {
    const double start = Now();
    call();
    Add(name, Now() - start);
  }
  std::string Json() const {
    return absl::StrCat(
        "{",
        absl::StrJoin(values_, ", ",
                      [](std::string* out, const auto& entry) {
                        absl::StrAppend(
                            out, "\"", entry.first, "\": [",
                            absl::StrJoin(entry.second, ", ",
                                          [](std::string* to, double value) {
                                            absl::StrAppendFormat(to, "%.3f",
                                                                  value);
                                          }),
                            "]");
                      }),
        "}");
  }

 private:
  std::map<std::string, std::vector<double>> values_;
};

// ---- the driver alone -------------------------------------------------------

std::unique_ptr<CudaBackend> OpenGpu() {
  absl::StatusOr<std::unique_ptr<CudaDriver>> driver =
      CudaDriver::Load(DriverPaths::Default());
  Must(driver.status());
  absl::StatusOr<std::unique_ptr<CudaBackend>> backend =
      CudaBackend::Create(*std::move(driver), {});
  Must(backend.status());
  return *std::move(backend);
}

// A GPU with a context that is current, as in a process that computes, and with a
// descriptor beside those that are measured, as in a broker.
class Driver {
 public:
  Driver()
      : gpu_(OpenGpu()),
        cuda_(gpu_->driver().cuda()),
        prop_(AllocationProp(gpu_->device())),
        access_({.location = prop_.location, .flags = cuda::kAccessReadWrite}) {
    gpu_->SetInUse(true);
    Call("cuDevicePrimaryCtxRetain",
         cuda_.cuDevicePrimaryCtxRetain(&context_, gpu_->device().device));
    Call("cuCtxPushCurrent", cuda_.cuCtxPushCurrent(context_));
  }

  cuda::CUdeviceptr Reserve(Bytes size) {
    cuda::CUdeviceptr base = 0;
    Call("cuMemAddressReserve",
         cuda_.cuMemAddressReserve(&base, Size(size), 0, 0, 0));
    return base;
  }
  void Free(cuda::CUdeviceptr base, Bytes size) {
    Call("cuMemAddressFree", cuda_.cuMemAddressFree(base, Size(size)));
  }

  cuda::CUmemGenericAllocationHandle Create(Bytes size) {
    cuda::CUmemGenericAllocationHandle handle = 0;
    Call("cuMemCreate", cuda_.cuMemCreate(&handle, Size(size), &prop_, 0));
    return handle;
  }
  // As one process gets it from another: exported and imported.
  cuda::CUmemGenericAllocationHandle Pass(
      cuda::CUmemGenericAllocationHandle made) {
    int fd = -1;
    Call("cuMemExportToShareableHandle",
         cuda_.cuMemExportToShareableHandle(&fd, made,
                                            cuda::kHandlePosixDescriptor, 0));
    const UniqueFd owned(fd);
    cuda::CUmemGenericAllocationHandle handle = 0;
    Call("cuMemImportFromShareableHandle",
         cuda_.cuMemImportFromShareableHandle(
             &handle, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
             cuda::kHandlePosixDescriptor));
    return handle;
  }
  void Map(cuda::CUdeviceptr at, Bytes size,
           cuda::CUmemGenericAllocationHandle handle) {
    Call("cuMemMap", cuda_.cuMemMap(at, Size(size), 0, handle, 0));
    Call("cuMemSetAccess", cuda_.cuMemSetAccess(at, Size(size), &access_, 1));
  }
  void Unmap(cuda::CUdeviceptr at, Bytes size) {
    Call("cuMemUnmap", cuda_.cuMemUnmap(at, Size(size)));
  }
  void Release(cuda::CUmemGenericAllocationHandle handle) {
    Call("cuMemRelease", cuda_.cuMemRelease(handle));
  }

  CudaBackend& gpu() { return *gpu_; }

 private:
  static size_t Size(Bytes size) { return static_cast<size_t>(size.count()); }
  static void Call(const char* name, cuda::CUresult result) {
    Must(CudaStatus(result, name));
  }

  const std::unique_ptr<CudaBackend> gpu_;
  const CudaFunctions& cuda_;
  const cuda::CUmemAllocationProp prop_;
  const cuda::CUmemAccessDesc access_;
  cuda::CUcontext context_ = nullptr;
};

// A page of some handles, made by one and mapped by another.
struct DriverPage {
  std::vector<cuda::CUmemGenericAllocationHandle> made, imported;
};

DriverPage GrowByDriver(Driver& driver, const PoolGeometry& geometry,
                        cuda::CUdeviceptr at) {
  DriverPage page;
  for (uint32_t i = 0; i < geometry.handles_per_page; ++i) {
    page.made.push_back(driver.Create(geometry.handle_bytes));
    page.imported.push_back(driver.Pass(page.made.back()));
    driver.Map(at + i * static_cast<uint64_t>(geometry.handle_bytes.count()),
               geometry.handle_bytes, page.imported.back());
  }
  return page;
}

void ShrinkByDriver(Driver& driver, const PoolGeometry& geometry,
                    cuda::CUdeviceptr at, const DriverPage& page) {
  for (uint32_t i = 0; i < geometry.handles_per_page; ++i) {
    driver.Unmap(at + i * static_cast<uint64_t>(geometry.handle_bytes.count()),
                 geometry.handle_bytes);
    driver.Release(page.imported[i]);
    driver.Release(page.made[i]);
  }
}

int Floor(int rounds) {
  Driver driver;
  Samples samples;
  for (const auto& [name, geometry] :
       {std::pair("contiguous", ContiguousGeometry()),
        std::pair("per_layer", PerLayerGeometry())}) {
    for (int i = 0; i < rounds; ++i) {
      const double start = Now();
      const cuda::CUdeviceptr base = driver.Reserve(kAddresses);
      const double reserved = Now();
      const DriverPage page = GrowByDriver(driver, geometry, base);
      const double grown = Now();
      ShrinkByDriver(driver, geometry, base, page);
      const double shrunk = Now();
      driver.Free(base, kAddresses);
      samples.Add(absl::StrCat(name, "_reserve"), reserved - start);
      samples.Add(absl::StrCat(name, "_reserve_and_page"), grown - start);
      samples.Add(absl::StrCat(name, "_grow"), grown - reserved);
      samples.Add(absl::StrCat(name, "_shrink"), shrunk - grown);
      // A page that changes hands: unmapped here, passed on, mapped there.
      if (geometry.handles_per_page != 1) continue;
      const Bytes bytes = geometry.handle_bytes;
      const cuda::CUdeviceptr ours = driver.Reserve(bytes);
      const cuda::CUdeviceptr theirs = driver.Reserve(bytes);
      const auto made = driver.Create(bytes);
      const auto before = driver.Pass(made);
      driver.Map(theirs, bytes, before);
      auto after = before;
      for (const bool hot : {true, false}) {
        // As between two of ours: caches and clocks are cold then.
        if (!hot) SleepUntil(Now() + kSettle);
        const double taking = Now();
        driver.Unmap(hot ? theirs : ours, bytes);
        driver.Release(after);
        after = driver.Pass(made);
        driver.Map(hot ? ours : theirs, bytes, after);
        samples.Add(hot ? "take_hot" : "take", Now() - taking);
      }
      // And one that is of no use to the other: made anew.
      SleepUntil(Now() + kSettle);
      const double remaking = Now();
      driver.Unmap(theirs, bytes);
      driver.Release(after);
      driver.Release(made);
      const auto again = driver.Create(bytes);
      const auto passed = driver.Pass(again);
      driver.Map(ours, bytes, passed);
      samples.Add("take_made_anew", Now() - remaking);
      driver.Unmap(ours, bytes);
      driver.Release(passed);
      driver.Release(again);
      driver.Free(ours, bytes);
      driver.Free(theirs, bytes);
    }
  }
  Say(samples.Json());
  return 0;
}

int ReserveByMapper(int rounds) {
  Driver driver;
  Samples samples;
  for (const auto& [name, geometry] :
       {std::pair("contiguous", ContiguousGeometry()),
        std::pair("per_layer", PerLayerGeometry())}) {
    for (int i = 0; i < rounds; ++i) {
      const double start = Now();
      absl::StatusOr<std::unique_ptr<CudaMapper>> mapper = CudaMapper::Create(
          geometry, driver.gpu().driver(), driver.gpu().info().device_uuid);
      samples.Add(name, Now() - start);
      Must(mapper.status());
    }
  }
  Say(samples.Json());
  return 0;
}

std::string ChurnByDriver(Driver& driver, cuda::CUdeviceptr base,
                          double seconds, int pages) {
  const Bytes bytes = ContiguousGeometry().handle_bytes;
  const auto at = [&](int i) {
    return base +
           static_cast<uint64_t>(i) * static_cast<uint64_t>(bytes.count());
  };
  Samples samples;
  std::vector<cuda::CUmemGenericAllocationHandle> handles(
      static_cast<size_t>(pages));
  for (const double end = Now() + seconds * 1e6; Now() < end;) {
    for (int i = 0; i < pages; ++i) {
      samples.Time("map", [&] {
        handles[static_cast<size_t>(i)] = driver.Create(bytes);
        driver.Map(at(i), bytes, handles[static_cast<size_t>(i)]);
      });
    }
    for (int i = 0; i < pages; ++i) {
      samples.Time("unmap", [&] {
        driver.Unmap(at(i), bytes);
        driver.Release(handles[static_cast<size_t>(i)]);
      });
    }
  }
  return samples.Json();
}

using Words = std::vector<std::string>;

double Number(const Words& words, size_t i) {
  double number;
  if (i >= words.size() || !absl::SimpleAtod(words[i], &number)) {
    Fail(absl::StrCat("no number: ", absl::StrJoin(words, " ")));
  }
  return number;
}

// Answers each line of stdin until its end.
void Obey(const std::function<std::string(const Words&)>& answer) {
  Say("ready");
  for (std::string line; std::getline(std::cin, line);) {
    Say(answer(absl::StrSplit(line, ' ')));
  }
}

int Alone() {
  Driver driver;
  const cuda::CUdeviceptr base = driver.Reserve(kAddresses);
  Obey([&](const Words& words) {
    if (words[0] != "churn") Fail("unknown order: " + words[0]);
    return ChurnByDriver(driver, base, Number(words, 1),
                         static_cast<int>(Number(words, 2)));
  });
  return 0;
}

// ---- an engine --------------------------------------------------------------

// What the mapper did, and how long it took.
class MapperTimes {
 public:
  struct Call {
    double start, end;
  };

  void AddMap(Call call) {
    MutexLock lock(&mu_);
    maps_.push_back(call);
  }
  void AddUnmap(Call call) {
    MutexLock lock(&mu_);
    unmaps_.push_back(call);
    changed_.SignalAll();
  }
  std::vector<Call> TakeMaps() {
    MutexLock lock(&mu_);
    return std::exchange(maps_, {});
  }
  // Waits until there are so many since the last time.
  std::vector<Call> TakeUnmaps(size_t count) {
    const absl::Time give_up = absl::Now() + kPatience;
    MutexLock lock(&mu_);
    while (unmaps_.size() < count) {
      if (changed_.WaitWithDeadline(&mu_, give_up)) Fail("pages stay mapped");
    }
    return std::exchange(unmaps_, {});
  }

 private:
  Mutex mu_;
  CondVar changed_;
  std::vector<Call> maps_ ABSL_GUARDED_BY(mu_);
  std::vector<Call> unmaps_ ABSL_GUARDED_BY(mu_);
};

class TimedMapper : public Mapper {
 public:
  TimedMapper(std::unique_ptr<Mapper> mapper, MapperTimes& times)
      : mapper_(std::move(mapper)), times_(times) {}

  absl::Status Begin(const Opened& opened) override {
    return mapper_->Begin(opened);
  }
  absl::Status Map(PageIndex page, std::vector<UniqueFd> fds) override {
    const double start = Now();
    absl::Status mapped = mapper_->Map(page, std::move(fds));
    times_.AddMap({start, Now()});
    if (!mapped.ok()) Fail(absl::StrCat("map: ", mapped.ToString()));
    return mapped;
  }
  absl::Status Unmap(PageIndex page) override {
    const double start = Now();
    absl::Status unmapped = mapper_->Unmap(page);
    if (unmapped.ok()) times_.AddUnmap({start, Now()});
    return unmapped;
  }
  std::byte* region(size_t handle) const override {
    return mapper_->region(handle);
  }
  void AddStream(void* stream) override { mapper_->AddStream(stream); }
  void RemoveStream(void* stream) override { mapper_->RemoveStream(stream); }

 private:
  const std::unique_ptr<Mapper> mapper_;
  MapperTimes& times_;
};

struct EngineOptions {
  std::string address, name;
  PoolGeometry geometry = ContiguousGeometry();
  bool ahead = false;
  bool keep = true;
};

class Engine {
 public:
  explicit Engine(const EngineOptions& options) : options_(options) {
    absl::StatusOr<std::vector<BrokerAddress>> brokers =
        FindBrokers({.address = options.address});
    Must(brokers.status());
    SessionOptions session;
    session.instance = options.name;
    PoolOptions& of_pool = session.pools.emplace_back();
    of_pool.geometry = options.geometry;
    of_pool.block_bytes =
        Bytes(options.geometry.page_bytes().count() / kBlocksPerPage);
    of_pool.map_ahead = options.ahead;
    of_pool.idle_decay = absl::InfiniteDuration();
    // What is measured is how long it takes, not what is given up.
    of_pool.running_miss_wait = kPatience;
    of_pool.claim_deadline = kPatience;
    if (!options.ahead) of_pool.min_reserved_pages = 0;
    if (!options.keep) of_pool.max_reserved_pages = 0;
    session.wrap_mapper = [this](std::unique_ptr<Mapper> mapper) {
      return std::make_unique<TimedMapper>(std::move(mapper), times_);
    };
    absl::StatusOr<std::unique_ptr<Session>> opened =
        OpenSession(brokers->front(), std::move(session));
    Must(opened.status());
    session_ = *std::move(opened);
    pool().mapper().AddStream(nullptr);
  }

  std::string Answer(const Words& words) {
    const std::string& order = words[0];
    if (order == "warm") return Warm(static_cast<int>(Number(words, 1)));
    if (order == "grow") return Grow(static_cast<int>(Number(words, 1)));
    if (order == "claim") return Claim(static_cast<int>(Number(words, 1)));
    if (order == "free") return FreeAll();
    if (order == "shrink") return Shrink();
    if (order == "churn") {
      return Churn(Number(words, 1), static_cast<int>(Number(words, 2)));
    }
    if (order == "take") return Take();
    if (order == "takes") return Takes(Number(words, 1));
    if (order == "bursts") {
      return Bursts(Number(words, 1) * 1e6, Number(words, 2) * 1e6,
                    Number(words, 3) != 0, static_cast<int>(Number(words, 4)),
                    Number(words, 5));
    }
    Fail("unknown order: " + order);
  }

 private:
  using Blocks = std::vector<BlockId>;

  Pool& pool() { return session_->pool(0); }

  // How long it took.
  double Get(Blocks& blocks) {
    const double start = Now();
    const double give_up = start + absl::ToDoubleMicroseconds(kPatience);
    while (!pool().Alloc(absl::MakeSpan(blocks), Urgency::kRunning)) {
      if (Now() > give_up) Fail("no memory");
    }
    return Now() - start;
  }
  double GetPage() {
    pages_.emplace_back(kBlocksPerPage);
    return Get(pages_.back());
  }
  void FreeOldest() {
    Must(pool().Free(pages_.front()));
    pages_.pop_front();
  }

  std::string Warm(int pairs) {
    Samples samples;
    Blocks blocks(16);
    for (int batch = 0; batch < kBatches; ++batch) {
      const double start = Now();
      for (int i = 0; i < pairs; ++i) {
        if (!pool().Alloc(absl::MakeSpan(blocks), Urgency::kRunning)) {
          Fail("nothing is mapped");
        }
        Must(pool().Free(blocks));
      }
      samples.Add("pair_ns", (Now() - start) * 1e3 / pairs);
    }
    return samples.Json();
  }

  std::string Grow(int pages) {
    times_.TakeMaps();
    Samples samples;
    const double start = Now();
    for (int i = 0; i < pages; ++i) samples.Add("page", GetPage());
    samples.Add("all", Now() - start);
    AddMaps(samples);
    return samples.Json();
  }

  std::string Claim(int pages) {
    times_.TakeMaps();
    Samples samples;
    Blocks all(static_cast<size_t>(pages) * kBlocksPerPage);
    samples.Add("all", Get(all));
    AddMaps(samples);
    pages_.push_back(std::move(all));
    return samples.Json();
  }

  std::string FreeAll() {
    size_t pages = 0;
    while (!pages_.empty()) {
      pages += pages_.front().size() / kBlocksPerPage;
      FreeOldest();
    }
    if (!options_.keep) times_.TakeUnmaps(pages);
    return "{}";
  }

  std::string Shrink() {
    Samples samples;
    while (!pages_.empty()) {
      const double start = Now();
      FreeOldest();
      const MapperTimes::Call call = times_.TakeUnmaps(1).front();
      samples.Add("until_unmapped", call.end - start);
      samples.Add("mapper_unmap", call.end - call.start);
    }
    return samples.Json();
  }

  std::string Churn(double seconds, int pages) {
    times_.TakeMaps();
    Samples samples;
    for (const double end = Now() + seconds * 1e6; Now() < end;) {
      for (int i = 0; i < pages; ++i) samples.Add("map", GetPage());
      AddMaps(samples);
      const double start = Now();
      while (!pages_.empty()) FreeOldest();
      double last = start;
      for (const auto& call : times_.TakeUnmaps(static_cast<size_t>(pages))) {
        samples.Add("unmap", call.end - last);
        last = call.end;
      }
    }
    return samples.Json();
  }

  std::string Take() {
    times_.TakeMaps();
    const double took = GetPage();
    FreeOldest();
    return absl::StrFormat("{\"took\": %.3f, \"mapped\": %d}", took,
                           times_.TakeMaps().size());
  }

  std::string Takes(double seconds) {
    times_.TakeMaps();
    Samples samples;
    std::mt19937 random(static_cast<unsigned>(getpid()));
    std::uniform_real_distribution<double> pause(8e3, 16e3);
    for (const double end = Now() + seconds * 1e6; Now() < end;) {
      const double took = GetPage();
      FreeOldest();
      // Nothing was taken where its own page was still there.
      if (!times_.TakeMaps().empty()) samples.Add("took", took);
      SleepUntil(Now() + pause(random));
    }
    return samples.Json();
  }

  std::string Bursts(double start, double microseconds, bool second_half,
                     int pages, double step) {
    constexpr double kPeriod = 1e5;
    times_.TakeMaps();
    int steps = 0;
    double waited = 0;
    int bursts = 0;
    for (double from = start + (second_half ? kPeriod / 2 : 0);
         from < start + microseconds; from += kPeriod, ++bursts) {
      SleepUntil(from);
      while (Now() < from + kPeriod / 2) {
        if (pages_.size() == static_cast<size_t>(pages)) FreeOldest();
        waited += GetPage();
        SleepUntil(Now() + step);
        // One that ends too late is no step of this burst.
        if (Now() < from + kPeriod / 2) ++steps;
      }
      while (!pages_.empty()) FreeOldest();
    }
    return absl::StrFormat(
        "{\"bursts\": %d, \"steps\": %d, \"waited_us\": %.1f, \"mapped\": %d}",
        bursts, steps, waited, times_.TakeMaps().size());
  }

  void AddMaps(Samples& samples) {
    for (const MapperTimes::Call& call : times_.TakeMaps()) {
      samples.Add("mapper_map", call.end - call.start);
    }
  }

  const EngineOptions options_;
  MapperTimes times_;
  std::unique_ptr<Session> session_;
  std::deque<Blocks> pages_;  // in use, oldest first
};

int RunEngine(const Words& words) {
  EngineOptions options{.address = words[2], .name = words[3]};
  for (size_t i = 4; i < words.size(); ++i) {
    const std::pair<std::string, std::string> setting =
        absl::StrSplit(words[i], absl::MaxSplits('=', 1));
    int value;
    if (!absl::SimpleAtoi(setting.second, &value) || value < 0) return 2;
    if (setting.first == "page_mib") {
      options.geometry.handle_bytes = MiB(value);
    } else if (setting.first == "handles") {
      options.geometry.handles_per_page = static_cast<uint32_t>(value);
    } else if (setting.first == "max_pages") {
      options.geometry.max_pages = static_cast<uint32_t>(value);
    } else if (setting.first == "ahead") {
      options.ahead = value != 0;
    } else if (setting.first == "keep") {
      options.keep = value != 0;
    } else {
      return 2;
    }
  }
  PoolGeometry& geometry = options.geometry;
  if (geometry.handles_per_page == 0) return 2;
  if (geometry.handles_per_page > 1) {
    geometry.layout = Layout::kPerLayer;
    geometry.handle_bytes =
        Bytes(geometry.handle_bytes.count() / geometry.handles_per_page);
  }
  Engine engine(options);
  Obey([&](const Words& order) { return engine.Answer(order); });
  return 0;
}

int Facts() {
  const std::unique_ptr<CudaBackend> gpu = OpenGpu();
  Say(absl::StrFormat(
      "{\"gpu\": \"%s\", \"uuid\": \"%s\", \"driver\": \"%s\", \"cuda\": "
      "\"%s\", \"gpu_bytes\": %d}",
      gpu->device().name, gpu->device().uuid, gpu->driver().nvidia_version(),
      CudaVersionText(gpu->driver().cuda_version()),
      gpu->device().total.count()));
  return 0;
}

int Used() {
  absl::StatusOr<Bytes> used = OpenGpu()->UsedBytes();
  Must(used.status());
  Say(absl::StrCat("{\"used_bytes\": ", used->count(), "}"));
  return 0;
}

int Run(const Words& words) {
  // Whoever started it may be killed.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // As in kvbrokerd: Debian's Abseil checks every lock's order, gRPC's
  // included.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  const std::string command = words.size() > 1 ? words[1] : "";
  int rounds = 0;
  if (words.size() == 2 && command == "facts") return Facts();
  if (words.size() == 2 && command == "used") return Used();
  if (words.size() == 2 && command == "alone") return Alone();
  if (words.size() >= 4 && command == "engine") return RunEngine(words);
  if (words.size() == 3 && absl::SimpleAtoi(words[2], &rounds) && rounds > 0) {
    if (command == "floor") return Floor(rounds);
    if (command == "reserve") return ReserveByMapper(rounds);
  }
  return 2;
}

}  // namespace
}  // namespace kvbroker::client

int main(int argc, char** argv) {
  const int status =
      kvbroker::client::Run(std::vector<std::string>(argv, argv + argc));
  if (status == 2) {
    fprintf(stderr, "usage: see the head of tests/bench/gpu/bench_gpu.cc\n");
  }
  return status;
}
