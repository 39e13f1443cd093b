// The conformance suite on the backend `cuda`.
//
// With the fake driver by default. On a machine with a GPU that nobody else
// uses meanwhile, the same program runs on the real one:
//
//   KVBROKER_TEST_REAL_GPU=1 bazel-bin/broker/device/cuda/cuda_conformance_test
//
// It then fills the whole GPU several times. KVBROKER_TEST_GPU (an index or
// uuid) says which one where there are several.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "broker/device/backend_conformance.h"
#include "broker/device/cuda/cuda_backend.h"
#include "broker/device/cuda/cuda_import.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker {
namespace {

bool OnRealGpu() {
  const char* wish = std::getenv("KVBROKER_TEST_REAL_GPU");
  return wish != nullptr && std::string(wish) == "1";
}

std::unique_ptr<CudaBackend> MustMake(const DriverPaths& paths,
                                      const std::string& gpu) {
  auto driver = CudaDriver::Load(paths);
  EXPECT_TRUE(driver.ok()) << driver.status();
  auto backend = CudaBackend::Create(*std::move(driver), {.gpu = gpu});
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

// Whether this process can look into the device's memory.
enum class Memory { kVisible, kOnDevice };

class MappedImport : public ImportedHandle {
 public:
  MappedImport(std::unique_ptr<CudaImport> import, Bytes size, Memory memory)
      : import_(std::move(import)), size_(size), memory_(memory) {}

  absl::Span<uint8_t> memory() override {
    if (memory_ == Memory::kOnDevice) return {};
    return absl::MakeSpan(
        reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(import_->address())),
        static_cast<size_t>(size_.count()));
  }

 private:
  const std::unique_ptr<CudaImport> import_;
  const Bytes size_;
  const Memory memory_;
};

class CudaHarness : public BackendHarness {
 public:
  CudaHarness(std::unique_ptr<CudaBackend> backend, Bytes handle_size,
              Memory memory)
      : backend_(std::move(backend)),
        handle_size_(handle_size),
        memory_(memory) {
    // The importer's context takes memory of its own: before anything counts.
    KVB_CHECK(cuda().cuDevicePrimaryCtxRetain(&context_, device()) == 0);
    absl::StatusOr<Handle> handle =
        backend_->Create(backend_->info().granularity);
    KVB_CHECK(handle.ok());
    absl::StatusOr<UniqueFd> fd = backend_->Export(*handle);
    KVB_CHECK(fd.ok());
    KVB_CHECK(ImportDevice(fd->get(), handle->size()).ok());
  }
  ~CudaHarness() override { cuda().cuDevicePrimaryCtxRelease(device()); }

  Backend& backend() override { return *backend_; }
  Bytes handle_size() const override { return handle_size_; }
  absl::StatusOr<std::unique_ptr<ImportedHandle>> Import(int fd,
                                                         Bytes size) override {
    ASSIGN_OR_RETURN(std::unique_ptr<CudaImport> import,
                     ImportDevice(fd, size));
    return std::make_unique<MappedImport>(std::move(import), size, memory_);
  }

  absl::StatusOr<std::unique_ptr<CudaImport>> ImportDevice(int fd, Bytes size) {
    return CudaImport::Create(cuda(), context_, device(), fd, size);
  }

 private:
  const CudaFunctions& cuda() const { return backend_->driver().cuda(); }
  cuda::CUdevice device() const { return backend_->device().device; }

  const std::unique_ptr<CudaBackend> backend_;
  const Bytes handle_size_;
  const Memory memory_;
  cuda::CUcontext context_ = nullptr;
};

std::unique_ptr<CudaHarness> NewFakeHarness(Bytes handle_size) {
  setenv("KVBROKER_FAKE_CUDA_TOTAL", std::to_string(MiB(50).count()).c_str(),
         1);
  FakeCuda fake = FakeCuda::Open();
  fake.Reset();
  return std::make_unique<CudaHarness>(MustMake(fake.paths(), ""), handle_size,
                                       Memory::kVisible);
}

std::unique_ptr<CudaHarness> NewRealHarness() {
  const char* gpu = std::getenv("KVBROKER_TEST_GPU");
  auto backend = MustMake(DriverPaths::Default(), gpu != nullptr ? gpu : "");
  const Bytes granule = backend->info().granularity;
  const Bytes eighth = granule * (backend->info().total / (granule * 8));
  return std::make_unique<CudaHarness>(std::move(backend), eighth,
                                       Memory::kOnDevice);
}

std::vector<ConformanceParam> Params() {
  if (OnRealGpu()) return {{"gpu", [] { return NewRealHarness(); }}};
  return {
      {"granule", [] { return NewFakeHarness(MiB(2)); }},
      {"large", [] { return NewFakeHarness(MiB(6)); }},
  };
}

INSTANTIATE_TEST_SUITE_P(Cuda, BackendConformanceTest,
                         testing::ValuesIn(Params()), ConformanceParamName);

// What the suite cannot see of a GPU's memory from the host: by copies.
TEST(CudaMemoryTest, IsSharedByImportsAndFreshAfterADirtyPredecessor) {
  std::unique_ptr<CudaHarness> harness =
      OnRealGpu() ? NewRealHarness() : NewFakeHarness(MiB(2));
  Backend& backend = harness->backend();
  const Bytes size = MiB(2);
  std::vector<uint8_t> zero(size.count()), pattern(size.count()), seen;
  for (size_t i = 0; i < pattern.size(); ++i) {
    pattern[i] = static_cast<uint8_t>(i * 31 + 7);
  }
  for (int round = 0; round < 8; ++round) {
    std::vector<Handle> handles;
    std::vector<std::unique_ptr<CudaImport>> imports;
    for (int i = 0; i < 4; ++i) {
      auto handle = backend.Create(size);
      ASSERT_TRUE(handle.ok()) << handle.status();
      auto fd = backend.Export(*handle);
      ASSERT_TRUE(fd.ok()) << fd.status();
      auto one = harness->ImportDevice(fd->get(), size);
      auto two = harness->ImportDevice(fd->get(), size);
      ASSERT_TRUE(one.ok() && two.ok()) << one.status() << two.status();
      seen.assign(pattern.size(), 1);
      ASSERT_TRUE((*one)->Read(seen.data(), seen.size()).ok());
      EXPECT_TRUE(seen == zero) << "round " << round;
      ASSERT_TRUE((*one)->Write(pattern.data(), pattern.size()).ok());
      ASSERT_TRUE((*two)->Read(seen.data(), seen.size()).ok());
      EXPECT_TRUE(seen == pattern);
      handles.push_back(*std::move(handle));
      imports.push_back(*std::move(one));
    }
  }
}

}  // namespace
}  // namespace kvbroker
