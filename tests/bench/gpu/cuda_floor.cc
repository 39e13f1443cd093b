// What the CUDA driver itself costs: the floor under everything that lends or
// maps GPU pages. Prints JSON.
//
//   bazel run -c opt //tests/bench/gpu:cuda_floor
//   cuda_floor --gpu 0 --calls 200 --processes 8 --gib 8
//
// It runs on whatever driver is loaded. Without a GPU: KVBROKER_CUDA_DRIVER and
// KVBROKER_NVML name tests/fake_cuda/libfake_cuda.so, and
// KVBROKER_FAKE_CUDA_TOTAL is room for all processes' ramps.
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "broker/base/status_macros.h"
#include "broker/base/unique_fd.h"
#include "broker/device/cuda/cuda_backend.h"
#include "client/arena/cuda_mapper.h"

namespace kvbroker {
namespace {

constexpr int kSteps = 64;
constexpr int kRounds = 5;

struct Options {
  std::string gpu;
  int calls = 200;
  int processes = 8;
  int gib = 8;
  bool child = false;
};

double Now() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Ends the program: a floor with holes is none.
void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "cuda_floor: %s\n",
               std::string(status.message()).c_str());
  std::exit(1);
}

// Microseconds, by the name of what took them.
class Samples {
 public:
  template <typename Call>
  void Time(const std::string& name, const Call& call) {
    const double start = Now();
    const absl::Status status = call();
    const double took = Now() - start;
    Must(status);
    Add(name, took);
  }
  void Add(const std::string& name, double microseconds) {
    if (!samples_.contains(name)) order_.push_back(name);
    samples_[name].push_back(microseconds);
  }

  std::string Json() const {
    std::vector<std::string> parts;
    for (const std::string& name : order_) {
      std::vector<double> sorted = samples_.at(name);
      std::sort(sorted.begin(), sorted.end());
      auto at = [&](double part) {
        return sorted[static_cast<size_t>(
            std::ceil(part * static_cast<double>(sorted.size())) - 1)];
      };
      double sum = 0;
      for (double value : sorted) sum += value;
      parts.push_back(absl::StrFormat(
          "\"%s\": {\"n\": %d, \"mean\": %.2f, \"p50\": %.2f, \"p99\": %.2f, "
          "\"max\": %.2f}",
          name, sorted.size(), sum / static_cast<double>(sorted.size()),
          at(0.5), at(0.99), sorted.back()));
    }
    return absl::StrCat("{", absl::StrJoin(parts, ", "), "}");
  }

  void Print(FILE* to) const {
    for (const std::string& name : order_) {
      for (double value : samples_.at(name)) {
        std::fprintf(to, "%s\t%.3f\n", name.c_str(), value);
      }
    }
  }

 private:
  std::vector<std::string> order_;
  std::map<std::string, std::vector<double>> samples_;
};

// A GPU, a context that is current, and the driver's own calls. As in a broker,
// there is a descriptor beside those that are measured.
class Gpu {
 public:
  explicit Gpu(const std::string& gpu) {
    auto driver = CudaDriver::Load(DriverPaths::Default());
    Must(driver.status());
    auto backend = CudaBackend::Create(*std::move(driver), {.gpu = gpu});
    Must(backend.status());
    backend_ = *std::move(backend);
    backend_->SetInUse(true);
    Must(CudaStatus(cuda().cuDevicePrimaryCtxRetain(&context_, device().device),
                    "cuDevicePrimaryCtxRetain"));
    Must(CudaStatus(cuda().cuCtxPushCurrent(context_), "cuCtxPushCurrent"));
  }

  const CudaFunctions& cuda() const { return backend_->driver().cuda(); }
  const CudaDevice& device() const { return backend_->device(); }
  CudaBackend& backend() { return *backend_; }

 private:
  std::unique_ptr<CudaBackend> backend_;
  cuda::CUcontext context_ = nullptr;
};

// One page made here and mapped here, as by two processes.
struct Page {
  cuda::CUmemGenericAllocationHandle made = 0, imported = 0;
  UniqueFd fd;
};

class Pages {
 public:
  // `samples` may be null: then nothing is in the way of the calls.
  Pages(Gpu& gpu, size_t page_bytes, int count, Samples* samples)
      : cuda_(gpu.cuda()),
        prop_(AllocationProp(gpu.device())),
        access_({.location = prop_.location, .flags = cuda::kAccessReadWrite}),
        bytes_(page_bytes),
        samples_(samples),
        pages_(count) {
    Do("reserve", [&] {
      return CudaStatus(
          cuda_.cuMemAddressReserve(&base_, bytes_ * count, 0, 0, 0),
          "cuMemAddressReserve");
    });
  }
  ~Pages() { cuda_.cuMemAddressFree(base_, bytes_ * pages_.size()); }

  void Create(int i) {
    Do("create", [&] {
      return CudaStatus(cuda_.cuMemCreate(&pages_[i].made, bytes_, &prop_, 0),
                        "cuMemCreate");
    });
  }
  void Export(int i) {
    int fd = -1;
    Do("export", [&] {
      return CudaStatus(
          cuda_.cuMemExportToShareableHandle(&fd, pages_[i].made,
                                             cuda::kHandlePosixDescriptor, 0),
          "cuMemExportToShareableHandle");
    });
    pages_[i].fd.Reset(fd);
  }
  void Import(int i) {
    Do("import", [&] {
      return CudaStatus(cuda_.cuMemImportFromShareableHandle(
                            &pages_[i].imported,
                            reinterpret_cast<void*>(
                                static_cast<intptr_t>(pages_[i].fd.get())),
                            cuda::kHandlePosixDescriptor),
                        "cuMemImportFromShareableHandle");
    });
    Close(i);
  }
  void Close(int i) {
    Do("close", [&] {
      pages_[i].fd.Reset();
      return absl::OkStatus();
    });
  }
  void Map(int i) {
    Do("map", [&] {
      return CudaStatus(
          cuda_.cuMemMap(AddressOf(i), bytes_, 0, pages_[i].imported, 0),
          "cuMemMap");
    });
    Do("set_access", [&] {
      return CudaStatus(cuda_.cuMemSetAccess(AddressOf(i), bytes_, &access_, 1),
                        "cuMemSetAccess");
    });
  }
  void Unmap(int i) {
    Do("unmap", [&] {
      return CudaStatus(cuda_.cuMemUnmap(AddressOf(i), bytes_), "cuMemUnmap");
    });
  }
  // The importer's reference, then the creator's, which frees the memory.
  void Release(int i) {
    Do("release_import", [&] {
      return CudaStatus(cuda_.cuMemRelease(pages_[i].imported), "cuMemRelease");
    });
    ReleaseMade(i);
  }
  void ReleaseMade(int i) {
    Do("release_last", [&] {
      return CudaStatus(cuda_.cuMemRelease(pages_[i].made), "cuMemRelease");
    });
  }

 private:
  template <typename Call>
  void Do(const char* name, const Call& call) {
    if (samples_ != nullptr) {
      samples_->Time(name, call);
    } else {
      Must(call());
    }
  }
  cuda::CUdeviceptr AddressOf(int i) const { return base_ + i * bytes_; }

  const CudaFunctions& cuda_;
  const cuda::CUmemAllocationProp prop_;
  const cuda::CUmemAccessDesc access_;
  const size_t bytes_;
  Samples* const samples_;
  cuda::CUdeviceptr base_ = 0;
  std::vector<Page> pages_;
};

std::string Calls(Gpu& gpu, Bytes size, int calls) {
  Samples samples;
  Pages pages(gpu, static_cast<size_t>(size.count()), 1, &samples);
  for (int i = 0; i < calls; ++i) {
    pages.Create(0);
    pages.Export(0);
    pages.Import(0);
    pages.Map(0);
    pages.Unmap(0);
    pages.Release(0);
  }
  return samples.Json();
}

// What exporting and closing cost a process that has no descriptor beside.
std::string FirstAndLast(Gpu& gpu, Bytes size, int calls) {
  Samples samples;
  gpu.backend().SetInUse(false);
  {
    Pages pages(gpu, static_cast<size_t>(size.count()), 1, &samples);
    for (int i = 0; i < calls; ++i) {
      pages.Create(0);
      pages.Export(0);
      pages.Close(0);
      pages.ReleaseMade(0);
    }
  }
  gpu.backend().SetInUse(true);
  return samples.Json();
}

// Grows to `total` in kSteps and shrinks again; whole ramps and single pages.
void Ramp(Gpu& gpu, Bytes total, Samples& samples) {
  const size_t bytes = static_cast<size_t>(total.count()) / kSteps;
  for (int round = 0; round < kRounds; ++round) {
    Pages pages(gpu, bytes, kSteps, nullptr);
    double created = 0;
    const double start = Now();
    for (int i = 0; i < kSteps; ++i) {
      const double step = Now();
      pages.Create(i);
      pages.Export(i);
      created += Now() - step;
      pages.Import(i);
      pages.Map(i);
      samples.Add("grow_page_cold", Now() - step);
    }
    const double grown = Now();
    samples.Add("ramp_cold", grown - start);
    samples.Add("ramp_sent_ahead", grown - start - created);
    for (int i = 0; i < kSteps; ++i) {
      const double step = Now();
      pages.Unmap(i);
      pages.Release(i);
      samples.Add("shrink_page", Now() - step);
    }
    samples.Add("shrink_all", Now() - grown);
  }
}

// A page through our own classes, one after the other.
void OurPages(Gpu& gpu, const PoolGeometry& geometry, int calls,
              const std::string& name, Samples& samples) {
  std::unique_ptr<client::CudaMapper> mapper;
  samples.Time(absl::StrCat(name, "_create_mapper"), [&]() -> absl::Status {
    ASSIGN_OR_RETURN(
        mapper, client::CudaMapper::Create(geometry, gpu.backend().driver(),
                                           gpu.backend().info().device_uuid));
    return absl::OkStatus();
  });
  mapper->AddStream(nullptr);
  for (int i = 0; i < calls; ++i) {
    std::vector<Handle> handles;
    std::vector<UniqueFd> fds;
    samples.Time(absl::StrCat(name, "_create_export"), [&]() -> absl::Status {
      for (uint32_t h = 0; h < geometry.handles_per_page; ++h) {
        ASSIGN_OR_RETURN(Handle handle,
                         gpu.backend().Create(geometry.handle_bytes));
        ASSIGN_OR_RETURN(UniqueFd fd, gpu.backend().Export(handle));
        handles.push_back(std::move(handle));
        fds.push_back(std::move(fd));
      }
      return absl::OkStatus();
    });
    samples.Time(absl::StrCat(name, "_map"), [&] {
      return mapper->Map(PageIndex(i % geometry.max_pages), std::move(fds));
    });
    samples.Time(absl::StrCat(name, "_unmap"), [&] {
      return mapper->Unmap(PageIndex(i % geometry.max_pages));
    });
    samples.Time(absl::StrCat(name, "_release"), [&] {
      handles.clear();
      return absl::OkStatus();
    });
  }
}

// One of several processes: says that it is ready, waits for the start, and
// prints its samples.
int Child(const Options& options) {
  Gpu gpu(options.gpu);
  Samples samples;
  std::puts("ready");
  std::fflush(stdout);
  if (std::getchar() == EOF) return 1;
  Ramp(gpu, GiB(options.gib), samples);
  samples.Print(stdout);
  return 0;
}

struct Process {
  pid_t pid = 0;
  FILE* from = nullptr;
  UniqueFd to;
};

Process Start(const Options& options) {
  int in[2], out[2];
  Must(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0
           ? absl::OkStatus()
           : ErrnoToStatus(errno, "pipe"));
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
  std::string gib = absl::StrCat(options.gib);
  std::string gpu = options.gpu;
  std::string words[] = {"cuda_floor", "--child", "--gib", gib, "--gpu", gpu};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  Process process;
  const int error = posix_spawn(&process.pid, "/proc/self/exe", &actions,
                                nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(in[0]);
  close(out[1]);
  process.to.Reset(in[1]);
  process.from = fdopen(out[0], "r");
  Must(error == 0 ? absl::OkStatus() : ErrnoToStatus(error, "spawn"));
  return process;
}

std::string Together(const Options& options) {
  std::vector<Process> processes;
  for (int i = 0; i < options.processes; ++i) {
    processes.push_back(Start(options));
  }
  char line[256];
  for (Process& process : processes) {
    if (fgets(line, sizeof(line), process.from) == nullptr) std::exit(1);
  }
  for (Process& process : processes) {
    Must(write(process.to.get(), "\n", 1) == 1 ? absl::OkStatus()
                                               : ErrnoToStatus(errno, "write"));
  }
  Samples all;
  for (Process& process : processes) {
    while (fgets(line, sizeof(line), process.from) != nullptr) {
      std::vector<std::string> words = absl::StrSplit(line, '\t');
      double value = 0;
      if (words.size() == 2 && absl::SimpleAtod(words[1], &value)) {
        all.Add(words[0], value);
      }
    }
    fclose(process.from);
    int status = 0;
    waitpid(process.pid, &status, 0);
    if (status != 0) {
      std::fprintf(stderr, "cuda_floor: one of the processes failed\n");
      std::exit(1);
    }
  }
  return all.Json();
}

int Main(const Options& options) {
  if (options.child) return Child(options);
  // Before this process loads the driver: it does not survive a fork.
  const std::string together = Together(options);
  Gpu gpu(options.gpu);
  const Bytes used_before = gpu.backend().UsedBytes().value_or(Bytes(-1));
  // The first calls of a process pay for what is done once.
  Calls(gpu, MiB(2), 5);
  const std::string small = Calls(gpu, MiB(2), options.calls);
  const std::string large = Calls(gpu, MiB(128), options.calls);
  const std::string alone = FirstAndLast(gpu, MiB(128), 20);
  Samples ramp;
  Ramp(gpu, GiB(options.gib), ramp);
  const CudaBackend::Counts before = gpu.backend().counts();
  Samples ours;
  OurPages(gpu, {.handle_bytes = MiB(128), .max_pages = 1024}, options.calls,
           "contiguous", ours);
  OurPages(gpu,
           {.handle_bytes = MiB(2),
            .handles_per_page = 64,
            .layout = Layout::kPerLayer,
            .max_pages = 1024},
           options.calls / 4, "per_layer", ours);
  Samples reading;
  for (int i = 0; i < options.calls; ++i) {
    reading.Time("used_bytes",
                 [&] { return gpu.backend().UsedBytes().status(); });
  }
  const CudaBackend::Counts after = gpu.backend().counts();
  const Bytes used_after = gpu.backend().UsedBytes().value_or(Bytes(-1));
  std::printf(
      "{\"gpu\": \"%s\", \"uuid\": \"%s\", \"driver\": \"%s\", \"cuda\": "
      "\"%s\", \"unit\": \"us\",\n"
      " \"calls_2MiB\": %s,\n \"calls_128MiB\": %s,\n"
      " \"calls_without_another_descriptor\": %s,\n"
      " \"ramp\": {\"gib\": %d, \"steps\": %d, \"figures\": %s},\n"
      " \"together\": {\"processes\": %d, \"gib_each\": %d, \"figures\": %s},\n"
      " \"ours\": %s,\n \"nvml\": %s,\n"
      " \"driver_calls_of_ours\": {\"create\": %d, \"export\": %d, "
      "\"release\": %d, \"failed_release\": %d, \"nvml\": %d},\n"
      " \"used_mib_before\": %d, \"used_mib_after\": %d}\n",
      gpu.device().name.c_str(), gpu.device().uuid.c_str(),
      gpu.backend().driver().nvidia_version().c_str(),
      CudaVersionText(gpu.backend().driver().cuda_version()).c_str(),
      small.c_str(), large.c_str(), alone.c_str(), options.gib, kSteps, ramp.Json().c_str(),
      options.processes, options.gib, together.c_str(), ours.Json().c_str(),
      reading.Json().c_str(), static_cast<int>(after.creates - before.creates),
      static_cast<int>(after.exports - before.exports),
      static_cast<int>(after.releases - before.releases),
      static_cast<int>(after.failed_releases - before.failed_releases),
      static_cast<int>(after.memory_readings - before.memory_readings),
      static_cast<int>(used_before / MiB(1)),
      static_cast<int>(used_after / MiB(1)));
  return 0;
}

}  // namespace
}  // namespace kvbroker

int main(int argc, char** argv) {
  kvbroker::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--child") {
      options.child = true;
      continue;
    }
    const char* value = i + 1 < argc ? argv[++i] : nullptr;
    int* number = flag == "--calls"       ? &options.calls
                  : flag == "--processes" ? &options.processes
                  : flag == "--gib"       ? &options.gib
                                          : nullptr;
    const bool understood =
        value != nullptr &&
        (flag == "--gpu" ? (options.gpu = value, true)
                         : number != nullptr &&
                               absl::SimpleAtoi(value, number) && *number > 0);
    if (!understood) {
      std::fprintf(stderr,
                   "usage: cuda_floor [--gpu INDEX|UUID] [--calls 200] "
                   "[--processes 8] [--gib 8]\n");
      return 2;
    }
  }
  return kvbroker::Main(options);
}
