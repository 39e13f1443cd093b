// On two fake drivers of one machine: the broker's, with the symbols of CUDA
// 11.4, and the engine's.
#include "client/arena/cuda_ipc_mapper.h"

#include <fcntl.h>

#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "broker/base/temp_folder.h"
#include "broker/device/cuda/cuda_ipc_backend.h"
#include "client/arena/gpu_mapper.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker::client {
namespace {

constexpr Bytes kPage = MiB(4);

PoolGeometry Contiguous(Bytes page = kPage) {
  return {.handle_bytes = page, .handles_per_page = 1, .max_pages = 16};
}

class CudaIpcMapperTest : public testing::Test {
 protected:
  CudaIpcMapperTest() {
    setenv("KVBROKER_FAKE_CUDA_DIR", folder_.path().c_str(), 1);
    broker_.Reset();
    fake_.Reset();
    backend_ = MakeBackend();
    auto driver = CudaDriver::Load(fake_.paths());
    EXPECT_TRUE(driver.ok()) << driver.status();
    driver_ = *std::move(driver);
  }
  ~CudaIpcMapperTest() override {
    backend_.reset();
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{});
    unsetenv("KVBROKER_FAKE_CUDA_DIR");
    broker_.Reset();
    fake_.Reset();
  }

  std::unique_ptr<CudaIpcBackend> MakeBackend() {
    auto driver = CudaDriver::Load(broker_.paths());
    EXPECT_TRUE(driver.ok()) << driver.status();
    auto backend = CudaIpcBackend::Create(
        *std::move(driver), {.bytes = [](Bytes, Bytes) { return MiB(32); }});
    EXPECT_TRUE(backend.ok()) << backend.status();
    return *std::move(backend);
  }
  absl::StatusOr<std::unique_ptr<CudaIpcMapper>> Make(
      const PoolGeometry& geometry) {
    return CudaIpcMapper::Create(geometry, *driver_, "0",
                                 backend_->info().slab);
  }
  std::unique_ptr<CudaIpcMapper> MustMake(const PoolGeometry& geometry) {
    auto mapper = Make(geometry);
    EXPECT_TRUE(mapper.ok()) << mapper.status();
    return *std::move(mapper);
  }

  // The lease of a part, as the broker sends it; it stays lent.
  std::vector<UniqueFd> Lease(Bytes offset, Bytes size,
                              CudaIpcBackend* of = nullptr) {
    if (of == nullptr) of = backend_.get();
    auto handle = of->CreateAt(offset, size);
    EXPECT_TRUE(handle.ok()) << handle.status();
    auto fd = of->Export(*handle);
    EXPECT_TRUE(fd.ok()) << fd.status();
    std::vector<UniqueFd> descriptors;
    descriptors.push_back(*std::move(fd));
    return descriptors;
  }

  const TempFolder folder_;
  const FakeCuda broker_ = FakeCuda::Open("libfake_cuda_11_4.so");
  const FakeCuda fake_ = FakeCuda::Open();
  std::unique_ptr<CudaIpcBackend> backend_;
  std::unique_ptr<CudaDriver> driver_;
};

TEST_F(CudaIpcMapperTest, PagesLieInTheSlabAtTheirIndexes) {
  auto small = MustMake(Contiguous());
  auto large = MustMake(Contiguous(MiB(6)));
  ASSERT_TRUE(small->Map(PageIndex(2), Lease(MiB(8), kPage)).ok());
  ASSERT_TRUE(large->Map(PageIndex(3), Lease(MiB(18), MiB(6))).ok());
  EXPECT_EQ(small->region(0), large->region(0)) << "one slab for both";
  small->region(0)[MiB(8).count()] = std::byte{7};
  large->region(0)[MiB(24).count() - 1] = std::byte{9};
  EXPECT_TRUE(small->Unmap(PageIndex(2)).ok());
  EXPECT_TRUE(large->Unmap(PageIndex(3)).ok());
  // A part that is lent again reads as zero.
  ASSERT_TRUE(small->Map(PageIndex(2), Lease(MiB(8), kPage)).ok());
  EXPECT_EQ(small->region(0)[MiB(8).count()], std::byte{0});
  EXPECT_EQ(small->region(0)[MiB(24).count() - 1], std::byte{9});
}

TEST_F(CudaIpcMapperTest, TheSlabIsOpenOnceAndAsLongAsItIsUsed) {
  auto first = MustMake(Contiguous());
  auto second = MustMake(Contiguous());
  EXPECT_EQ(fake_.Calls("cuIpcOpenMemHandle_v2"), 1);
  EXPECT_EQ(fake_.Books().contexts, 2);
  first.reset();
  EXPECT_EQ(fake_.Books().opened, 1);
  second->region(0)[0] = std::byte{1};
  second.reset();
  EXPECT_EQ(fake_.Books().opened, 0);
  MustMake(Contiguous());
  EXPECT_EQ(fake_.Calls("cuIpcOpenMemHandle_v2"), 2);
  EXPECT_EQ(fake_.Calls("cuIpcCloseMemHandle"), 2);
}

TEST_F(CudaIpcMapperTest, ADescriptorMustLeaseThePageItIsSentFor) {
  auto mapper = MustMake(Contiguous());
  auto others = MakeBackend();
  UniqueFd none(open("/dev/null", O_RDONLY | O_CLOEXEC));
  std::vector<std::vector<UniqueFd>> wrong;
  wrong.push_back(Lease(MiB(4), kPage));                // another page
  wrong.push_back(Lease(MiB(8), MiB(8)));               // of another size
  wrong.push_back(Lease(MiB(8), MiB(2)));               // a part of it
  wrong.push_back(Lease(MiB(8), kPage, others.get()));  // of another slab
  wrong.emplace_back().push_back(std::move(none));      // nothing at all
  wrong.emplace_back();
  wrong.push_back(Lease(MiB(8), kPage));
  wrong.back().push_back(std::move(Lease(MiB(8), kPage)[0]));  // two
  for (std::vector<UniqueFd>& descriptors : wrong) {
    EXPECT_EQ(mapper->Map(PageIndex(2), std::move(descriptors)).code(),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_TRUE(mapper->Map(PageIndex(2), Lease(MiB(8), kPage)).ok());
}

TEST_F(CudaIpcMapperTest, OnlyPagesOfOnePieceFitASlab) {
  PoolGeometry per_layer = {.handle_bytes = MiB(2),
                            .handles_per_page = 3,
                            .layout = Layout::kPerLayer,
                            .max_pages = 4};
  absl::Status status = Make(per_layer).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("KVCACHED_CONTIGUOUS_LAYOUT=true"),
            absl::string_view::npos)
      << status;
  EXPECT_EQ(CudaIpcMapper::Create(Contiguous(), *driver_, "0", "no slab")
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaIpcMapperTest, WhatFailsAtTheOpenIsUndone) {
  for (const char* call : {"cuDeviceGetCount", "cuDevicePrimaryCtxRetain",
                           "cuCtxPushCurrent_v2", "cuIpcOpenMemHandle_v2"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_EQ(Make(Contiguous()).status().code(), absl::StatusCode::kInternal)
        << call;
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{}) << call;
    EXPECT_TRUE(Make(Contiguous()).ok()) << call;
  }
}

TEST_F(CudaIpcMapperTest, ABrokersSlabIsGoneWithIt) {
  const std::string slab = backend_->info().slab;
  backend_.reset();
  backend_ = MakeBackend();
  absl::Status status =
      CudaIpcMapper::Create(Contiguous(), *driver_, "0", slab).status();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find("the broker's memory cannot be opened"),
            absl::string_view::npos)
      << status;
}

TEST_F(CudaIpcMapperTest, UnmapWaitsForTheStreamsThatTouchThePool) {
  auto mapper = MustMake(Contiguous());
  char stream;
  mapper->AddStream(&stream);
  ASSERT_TRUE(mapper->Map(PageIndex(1), Lease(MiB(4), kPage)).ok());
  fake_.BeginWork(&stream);
  auto unmapped = std::async(std::launch::async,
                             [&] { return mapper->Unmap(PageIndex(1)); });
  fake_.AwaitWaiter();
  fake_.EndWork(&stream);
  EXPECT_TRUE(unmapped.get().ok());
  mapper->RemoveStream(&stream);
  fake_.BeginWork(&stream);
  ASSERT_TRUE(mapper->Map(PageIndex(1), Lease(MiB(4), kPage)).ok());
  EXPECT_TRUE(mapper->Unmap(PageIndex(1)).ok());
  fake_.EndWork(&stream);
}

TEST_F(CudaIpcMapperTest, AnUnmapThatFailsLeavesThePage) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(nullptr);
  ASSERT_TRUE(mapper->Map(PageIndex(1), Lease(MiB(4), kPage)).ok());
  for (const char* call : {"cuCtxPushCurrent_v2", "cuEventCreate",
                           "cuEventRecord", "cuEventSynchronize"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_EQ(mapper->Unmap(PageIndex(1)).code(), absl::StatusCode::kInternal)
        << call;
  }
  EXPECT_TRUE(mapper->Unmap(PageIndex(1)).ok());
}

TEST_F(CudaIpcMapperTest, OnAGpuTheBrokersWordSaysWhichMapperItIs) {
  auto mapper = GpuMapper::Create(Contiguous(), *driver_, "0");
  ASSERT_TRUE(mapper.ok()) << mapper.status();
  Opened opened;
  opened.backend = "host";
  EXPECT_EQ((*mapper)->Begin(opened).code(),
            absl::StatusCode::kFailedPrecondition);
  opened.backend = "cuda_ipc";
  EXPECT_EQ((*mapper)->Begin(opened).code(), absl::StatusCode::kInvalidArgument)
      << "without a slab";
  opened.slab = backend_->info().slab;
  ASSERT_TRUE((*mapper)->Begin(opened).ok());
  ASSERT_TRUE((*mapper)->Map(PageIndex(1), Lease(MiB(4), kPage)).ok());
  (*mapper)->region(0)[MiB(4).count()] = std::byte{1};
  EXPECT_TRUE((*mapper)->Unmap(PageIndex(1)).ok());

  opened.backend = "cuda";
  auto vmm = GpuMapper::Create(Contiguous(), *driver_, "0");
  ASSERT_TRUE((*vmm)->Begin(opened).ok());
  EXPECT_EQ(fake_.Books().reservations, 1);
}

}  // namespace
}  // namespace kvbroker::client
