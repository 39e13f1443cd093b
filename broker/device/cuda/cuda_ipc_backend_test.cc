// CudaIpcBackend on a fake driver: the conformance suite, and what is its own.
//
// A process cannot open its own memory. So the broker has one fake driver, with
// the symbols of CUDA 11.4, and the importer another, on the same fake machine.
#include "broker/device/cuda/cuda_ipc_backend.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "broker/base/check.h"
#include "broker/base/status_macros.h"
#include "broker/base/temp_folder.h"
#include "broker/device/backend_conformance.h"
#include "broker/device/cuda/current_context.h"
#include "gtest/gtest.h"
#include "proto/slab_frame.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker {
namespace {

constexpr char kGpu[] = "GPU-fa6e0000-0000-4000-8000-000000000000";

SlabSize Exactly(Bytes bytes) {
  return [bytes](Bytes, Bytes) { return bytes; };
}

// One machine for both fakes.
class FakeMachine {
 public:
  FakeMachine() {
    setenv("KVBROKER_FAKE_CUDA_DIR", folder_.path().c_str(), 1);
    setenv("KVBROKER_FAKE_CUDA_TOTAL", std::to_string(MiB(64).count()).c_str(),
           1);
    Reset();
  }
  ~FakeMachine() {
    unsetenv("KVBROKER_FAKE_CUDA_DIR");
    unsetenv("KVBROKER_FAKE_CUDA_TOTAL");
    Reset();
  }
  void Reset() const {
    broker.Reset();
    importer.Reset();
  }

  const FakeCuda broker = FakeCuda::Open("libfake_cuda_11_4.so");
  const FakeCuda importer = FakeCuda::Open();

 private:
  const TempFolder folder_;
};

// A part of the slab, which the importer has open as a whole.
class SlabPart : public ImportedHandle {
 public:
  explicit SlabPart(absl::Span<uint8_t> memory) : memory_(memory) {}
  absl::Span<uint8_t> memory() override { return memory_; }

 private:
  const absl::Span<uint8_t> memory_;
};

class CudaIpcHarness : public BackendHarness {
 public:
  explicit CudaIpcHarness(Bytes handle_size) : handle_size_(handle_size) {
    auto driver = CudaDriver::Load(machine_.broker.paths());
    KVB_CHECK(driver.ok());
    auto backend =
        CudaIpcBackend::Create(*std::move(driver), {.bytes = Exactly(MiB(49))});
    KVB_CHECK(backend.ok());
    backend_ = *std::move(backend);
    auto importer = CudaDriver::Load(machine_.importer.paths());
    KVB_CHECK(importer.ok());
    importer_ = *std::move(importer);
    cuda::CUcontext context;
    KVB_CHECK(cuda().cuDevicePrimaryCtxRetain(&context, 0) == 0);
    CurrentCudaContext current(cuda(), context);
    slab_ = *ParseSlabFrame(backend_->info().slab);
    cuda::CUipcMemHandle handle;
    std::memcpy(&handle, slab_.ipc_handle, sizeof(handle));
    KVB_CHECK(cuda().cuIpcOpenMemHandle(&base_, handle,
                                        cuda::kIpcLazyPeerAccess) == 0);
  }

  Backend& backend() override { return *backend_; }
  Bytes handle_size() const override { return handle_size_; }
  Traits traits() const override { return {.importers_keep_bytes = false}; }

  absl::StatusOr<std::unique_ptr<ImportedHandle>> Import(int fd,
                                                         Bytes size) override {
    ASSIGN_OR_RETURN(SlabFrame lease, ReadSlabFrame(fd));
    if (lease.size != static_cast<uint64_t>(size.count()) ||
        std::memcmp(lease.ipc_handle, slab_.ipc_handle, 64) != 0) {
      return absl::InvalidArgumentError("a lease of something else");
    }
    return std::make_unique<SlabPart>(
        absl::MakeSpan(reinterpret_cast<uint8_t*>(
                           static_cast<uintptr_t>(base_ + lease.offset)),
                       lease.size));
  }

 private:
  const CudaFunctions& cuda() const { return importer_->cuda(); }

  const FakeMachine machine_;
  const Bytes handle_size_;
  std::unique_ptr<CudaDriver> importer_;
  std::unique_ptr<CudaIpcBackend> backend_;
  SlabFrame slab_;
  cuda::CUdeviceptr base_ = 0;
};

ConformanceParam Param(const char* name, Bytes size) {
  return {name, [size] { return std::make_unique<CudaIpcHarness>(size); }};
}

INSTANTIATE_TEST_SUITE_P(CudaIpc, BackendConformanceTest,
                         testing::Values(Param("granule", MiB(2)),
                                         Param("large", MiB(6))),
                         ConformanceParamName);

class CudaIpcBackendTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<CudaIpcBackend>> Make(
      CudaIpcBackendOptions options) {
    auto driver = CudaDriver::Load(fake_.paths());
    EXPECT_TRUE(driver.ok()) << driver.status();
    return CudaIpcBackend::Create(*std::move(driver), options);
  }
  absl::StatusOr<std::unique_ptr<CudaIpcBackend>> Make(Bytes slab) {
    return Make({.bytes = Exactly(slab)});
  }

  const FakeMachine machine_;
  const FakeCuda& fake_ = machine_.broker;
};

TEST_F(CudaIpcBackendTest, HasOneSlabInWholeGranules) {
  auto backend = Make(MiB(33));
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_EQ((*backend)->info().name, "cuda_ipc");
  EXPECT_EQ((*backend)->info().device_uuid, kGpu);
  EXPECT_EQ((*backend)->info().total, MiB(32));
  EXPECT_EQ((*backend)->info().granularity, MiB(2));
  absl::StatusOr<SlabFrame> slab = ParseSlabFrame((*backend)->info().slab);
  ASSERT_TRUE(slab.ok()) << slab.status();
  EXPECT_EQ(slab->slab_bytes, static_cast<uint64_t>(MiB(32).count()));
  EXPECT_EQ(slab->size, slab->slab_bytes);
  EXPECT_EQ(fake_.Books().allocations, 1);
  EXPECT_EQ(fake_.Books().contexts, 1);
}

TEST_F(CudaIpcBackendTest, TheSizeIsChosenByWhatTheDeviceHas) {
  fake_.SetForeign(0, MiB(10).count());
  auto backend = Make(
      {.bytes = [](Bytes total, Bytes used) { return total - used - MiB(4); }});
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_EQ((*backend)->info().total, MiB(50));
}

TEST_F(CudaIpcBackendTest, GivesAllBackAtItsEnd) {
  { ASSERT_TRUE(Make(MiB(32)).ok()); }
  EXPECT_EQ(fake_.Books(), FakeCudaBooks{});
}

TEST_F(CudaIpcBackendTest, ASlabThatDoesNotFitIsRefusedWithTheFigures) {
  fake_.SetForeign(0, MiB(40).count());
  absl::Status status = Make(MiB(32)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("32 MiB"), absl::string_view::npos) << status;
  EXPECT_EQ(Make(MiB(1)).status().code(), absl::StatusCode::kInvalidArgument);
  status = Make({.bytes = [](Bytes, Bytes) -> absl::StatusOr<Bytes> {
             return absl::InvalidArgumentError("headroom");
           }}).status();
  EXPECT_EQ(status, absl::InvalidArgumentError("headroom"));
  EXPECT_EQ(fake_.Books(), FakeCudaBooks{});
}

TEST_F(CudaIpcBackendTest, TakesNothingOfADeviceThatIsAnothers) {
  absl::Status status =
      Make({.bytes = Exactly(MiB(32)),
            .claim =
                [](const std::string& uuid) {
                  EXPECT_EQ(uuid, kGpu);
                  return absl::AlreadyExistsError("another's");
                }})
          .status();
  EXPECT_EQ(status, absl::AlreadyExistsError("another's"));
  EXPECT_EQ(fake_.Calls("cuDevicePrimaryCtxRetain"), 0);
}

TEST_F(CudaIpcBackendTest, WhatFailsAtTheStartIsUndone) {
  for (const char* call :
       {"cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuStreamCreate",
        "nvmlDeviceGetMemoryInfo", "cuMemAlloc_v2", "cuIpcGetMemHandle"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_EQ(Make(MiB(32)).status().code(), absl::StatusCode::kInternal)
        << call;
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{}) << call;
  }
  EXPECT_TRUE(Make(MiB(32)).ok());
}

TEST_F(CudaIpcBackendTest, APartThatCannotBeScrubbedIsNotLent) {
  auto backend = Make(MiB(32));
  ASSERT_TRUE(backend.ok()) << backend.status();
  for (const char* call :
       {"cuCtxPushCurrent_v2", "cuMemsetD8Async", "cuStreamSynchronize"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_EQ((*backend)->CreateAt(MiB(2), MiB(2)).status().code(),
              absl::StatusCode::kInternal)
        << call;
    EXPECT_EQ(*(*backend)->UsedBytes(), Bytes(0)) << call;
    EXPECT_TRUE((*backend)->CreateAt(MiB(2), MiB(2)).ok()) << call;
  }
}

TEST_F(CudaIpcBackendTest, NeedsNeitherVmmNorNewFiguresOfTheDriver) {
  auto backend = Make(MiB(32));
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_EQ((*backend)->driver().cuda_version(), 11040);
  EXPECT_EQ((*backend)->driver().nvml().nvmlDeviceGetMemoryInfo_v2, nullptr);
  EXPECT_FALSE((*backend)->device().usable.ok());
  EXPECT_EQ(fake_.Calls("cuMemCreate"), 0);
}

TEST_F(CudaIpcBackendTest, ADriverWithoutTheCallsIsTooOld) {
  const FakeCuda old = FakeCuda::Open("libfake_cuda_10_1.so");
  old.Reset();
  auto driver = CudaDriver::Load(old.paths());
  ASSERT_TRUE(driver.ok()) << driver.status();
  absl::Status status =
      CudaIpcBackend::Create(*std::move(driver), {.bytes = Exactly(MiB(32))})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("it has no cuIpc"), absl::string_view::npos)
      << status;
}

}  // namespace
}  // namespace kvbroker
