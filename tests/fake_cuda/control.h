// The fake CUDA driver's other side: what a test sets and asks.
//
// libfake_cuda.so stands in for libcuda.so.1 and libnvidia-ml.so.1 at once. Its
// device memory is files in a tmpfs folder: descriptors cross processes,
// mappings are real, an unmapped page faults, and memory is free when the last
// handle, descriptor, import and mapping in any process is gone (fake_cuda.cc
// says how that is known).
//
// Each of the variants is a library, with a state of its own: two of them in
// one test are as two processes, on one machine where KVBROKER_FAKE_CUDA_DIR is
// set.
//
//   FakeCuda fake = FakeCuda::Open();            // one state a process
//   fake.Reset();                                // reads the environment anew
//   fake.Fail("cuMemMap", 2, CUDA_ERROR_OUT_OF_MEMORY);
//   ... CudaDriver::Load(fake.paths()) ...
//
// Environment, read at cuInit and by Reset():
//   KVBROKER_FAKE_CUDA_DIR      a folder that several processes share: one
//                               machine. Default: one of the process's own
//   KVBROKER_FAKE_CUDA_DEVICES  how many GPUs, default 1, at most 8
//   KVBROKER_FAKE_CUDA_TOTAL    bytes of each, default 16 GiB
//   KVBROKER_FAKE_CUDA_VMM, _POSIX, _RDMA, _MIG   0 or 1
//   KVBROKER_FAKE_CUDA_FAIL     "cuMemMap:2:2,cuInit:1:100": call, which one
//                               from now on, result
//   KVBROKER_FAKE_CUDA_LATENCY  "cuMemMap:30": call, microseconds
//   CUDA_VISIBLE_DEVICES        as the real one: indexes or uuids
#ifndef KVBROKER_TESTS_FAKE_CUDA_CONTROL_H_
#define KVBROKER_TESTS_FAKE_CUDA_CONTROL_H_

#include <dlfcn.h>
#include <stdlib.h>

#include <cstdint>
#include <string>

#include "broker/base/check.h"
#include "broker/device/cuda/driver.h"

namespace kvbroker {

// What this process holds of the fake. All zero: nothing is leaked.
struct FakeCudaBooks {
  int64_t created;       // live handles made here
  int64_t imported;      // live handles imported
  int64_t reservations;  // address ranges
  int64_t mappings;
  int64_t contexts;  // primary contexts retained
  int64_t pushed;    // contexts current in the calling thread
  int64_t events;
  int64_t streams;
  int64_t host_allocations;
  int64_t allocations;  // cuMemAlloc
  int64_t opened;       // inter-process handles

  friend bool operator==(const FakeCudaBooks&, const FakeCudaBooks&) = default;
};

class FakeCuda {
 public:
  // "libfake_cuda.so": CUDA 13. "libfake_cuda_11_4.so": the symbols that CUDA
  // 11.4 and its NVML had, no VMM by default. "libfake_cuda_no_vmm.so": the
  // same without the symbols of VMM. "libfake_cuda_10_1.so": before they were
  // added.
  static FakeCuda Open(const std::string& variant = "libfake_cuda.so") {
    return FakeCuda("tests/fake_cuda/" + variant);
  }

  DriverPaths paths() const { return {.cuda = path_, .nvml = path_}; }

  void Reset() const { Call<void()>("fakeCudaReset")(); }
  // The `nth` call from now on, 1 is the next, fails so; once.
  void Fail(const char* call, int nth, int result) const {
    Call<void(const char*, int, int)>("fakeCudaFail")(call, nth, result);
  }
  void Latency(const char* call, int microseconds) const {
    Call<void(const char*, int)>("fakeCudaLatency")(call, microseconds);
  }
  // From now on whatever needs a context fails so.
  void Poison(int result) const { Call<void(int)>("fakeCudaPoison")(result); }
  // From now on nothing works on the device, in any process of the machine:
  // calls of CUDA that have to do with memory answer so, NVML's that the GPU is
  // lost. 0: it is back. Handles can be released all the time.
  void Lose(int result) const { Call<void(int)>("fakeCudaLose")(result); }
  // Memory of the device that somebody else has.
  void SetForeign(int device, int64_t bytes) const {
    Call<void(int, int64_t)>("fakeCudaSetForeign")(device, bytes);
  }
  // What NVML says that a process uses, in this process; -1: it does not know.
  void SetProcess(uint32_t pid, int64_t bytes) const {
    Call<void(unsigned int, int64_t)>("fakeCudaSetProcess")(pid, bytes);
  }
  // A kernel that runs in `stream` until its end is called.
  void BeginWork(void* stream) const {
    Call<void(void*)>("fakeCudaBeginWork")(stream);
  }
  void EndWork(void* stream) const {
    Call<void(void*)>("fakeCudaEndWork")(stream);
  }
  // Blocks until somebody waits in cuEventSynchronize.
  void AwaitWaiter() const { Call<void()>("fakeCudaAwaitWaiter")(); }
  // How often `call` was made since Reset().
  int64_t Calls(const char* call) const {
    return Call<int64_t(const char*)>("fakeCudaCalls")(call);
  }
  FakeCudaBooks Books() const {
    FakeCudaBooks books;
    Call<void(FakeCudaBooks*)>("fakeCudaBooks")(&books);
    return books;
  }

 private:
  explicit FakeCuda(const std::string& relative) {
    char* path = realpath(relative.c_str(), nullptr);
    KVB_CHECK(path != nullptr);
    path_ = path;
    free(path);
    library_ = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
    KVB_CHECK(library_ != nullptr);
  }

  template <typename Function>
  Function* Call(const char* symbol) const {
    auto* function = reinterpret_cast<Function*>(dlsym(library_, symbol));
    KVB_CHECK(function != nullptr);
    return function;
  }

  std::string path_;
  void* library_ = nullptr;
};

}  // namespace kvbroker

#endif  // KVBROKER_TESTS_FAKE_CUDA_CONTROL_H_
