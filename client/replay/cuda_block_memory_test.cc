// On the fake driver, whose device memory this process can read.
#include "client/replay/cuda_block_memory.h"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "broker/device/cuda/cuda_backend.h"
#include "client/arena/cuda_mapper.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker::replay {
namespace {

constexpr size_t kBlock = 4096;

class CudaBlockMemoryTest : public testing::Test {
 protected:
  CudaBlockMemoryTest() {
    fake_.Reset();
    driver_ = *CudaDriver::Load(fake_.paths());
  }
  ~CudaBlockMemoryTest() override {
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{}) << "something leaked";
    driver_.reset();
    fake_.Reset();
  }

  // A page of device memory, for as long as the mapper lives.
  std::unique_ptr<client::CudaMapper> MapPage() {
    const PoolGeometry geometry = {
        .handle_bytes = MiB(2), .handles_per_page = 1, .max_pages = 1};
    auto backend = *CudaBackend::Create(*CudaDriver::Load(fake_.paths()), {});
    auto mapper = *client::CudaMapper::Create(geometry, *driver_, "");
    Handle handle = *backend->Create(MiB(2));
    std::vector<UniqueFd> page;
    page.push_back(*backend->Export(handle));
    EXPECT_TRUE(mapper->Map(PageIndex(0), std::move(page)).ok());
    return mapper;
  }

  FakeCuda fake_ = FakeCuda::Open();
  std::unique_ptr<CudaDriver> driver_;
};

TEST_F(CudaBlockMemoryTest, WhatIsWrittenIsRead) {
  auto mapper = MapPage();
  auto memory = *CudaBlockMemory::Create(*driver_, "", kBlock);
  // More of them than can be under way.
  for (int i = 0; i < 100; ++i) {
    std::span<std::byte> staged = memory->BeginWrite();
    ASSERT_EQ(staged.size(), kBlock);
    std::memset(staged.data(), i, staged.size());
    memory->EndWrite(mapper->region(0) + i * kBlock);
  }
  for (int i = 0; i < 100; ++i) {
    std::span<const std::byte> read =
        memory->Read(mapper->region(0) + i * kBlock);
    ASSERT_EQ(read.size(), kBlock);
    EXPECT_EQ(read.front(), std::byte(i));
    EXPECT_EQ(read.back(), std::byte(i));
  }
  EXPECT_TRUE(memory->status().ok()) << memory->status();
}

TEST_F(CudaBlockMemoryTest, SaysWhenItIsDone) {
  auto memory = *CudaBlockMemory::Create(*driver_, "", kBlock);
  bool done = false;
  memory->WhenDone([&] { done = true; });
  memory->Wait();
  EXPECT_TRUE(done);
}

TEST_F(CudaBlockMemoryTest, TheFirstErrorStaysAndNothingOldIsReadForIt) {
  auto mapper = MapPage();
  auto memory = *CudaBlockMemory::Create(*driver_, "", kBlock);
  std::memset(memory->BeginWrite().data(), 7, kBlock);
  memory->EndWrite(mapper->region(0));
  EXPECT_EQ(memory->Read(mapper->region(0)).front(), std::byte{7});
  fake_.Fail("cuMemcpyDtoHAsync_v2", 1, cuda::CUDA_ERROR_LAUNCH_FAILED);
  EXPECT_EQ(memory->Read(mapper->region(0)).front(), std::byte{0});
  EXPECT_NE(memory->status().message().find("cuMemcpyDtoHAsync"),
            std::string::npos)
      << memory->status();
}

TEST_F(CudaBlockMemoryTest, AStartThatFailsLeavesNothing) {
  for (const char* call :
       {"cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuMemHostAlloc",
        "cuEventCreate"}) {
    for (int nth : {1, 2}) {
      fake_.Fail(call, nth, cuda::CUDA_ERROR_OUT_OF_MEMORY);
      const bool made = CudaBlockMemory::Create(*driver_, "", kBlock).ok();
      // The first one's second call of some is another's.
      EXPECT_TRUE(nth == 2 || !made) << call;
      EXPECT_EQ(fake_.Books(), FakeCudaBooks{}) << call;
    }
  }
}

TEST_F(CudaBlockMemoryTest, ACallThatCannotBeQueuedIsNotMade) {
  auto memory = *CudaBlockMemory::Create(*driver_, "", kBlock);
  fake_.Fail("cuLaunchHostFunc", 1, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  bool done = false;
  memory->WhenDone([&] { done = true; });
  EXPECT_FALSE(done);
  EXPECT_FALSE(memory->status().ok());
}

}  // namespace
}  // namespace kvbroker::replay
