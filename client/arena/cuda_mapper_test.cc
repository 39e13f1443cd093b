// The mapper on the fake driver. No engine: pages come from a CudaBackend.
#include "client/arena/cuda_mapper.h"

#include <fcntl.h>
#include <sys/resource.h>

#include <cstring>
#include <future>
#include <string>
#include <thread>

#include "broker/device/cuda/cuda_backend.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker::client {
namespace {

PoolGeometry Contiguous() {
  return {.handle_bytes = MiB(4), .handles_per_page = 1, .max_pages = 16};
}

PoolGeometry PerLayer() {
  return {.handle_bytes = MiB(2),
          .handles_per_page = 3,
          .layout = Layout::kPerLayer,
          .max_pages = 16};
}

class CudaMapperTest : public testing::Test {
 protected:
  CudaMapperTest() {
    fake_.Reset();
    driver_ = *CudaDriver::Load(fake_.paths());
    backend_ = *CudaBackend::Create(*CudaDriver::Load(fake_.paths()), {});
  }
  ~CudaMapperTest() override {
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{}) << "something leaked";
    EXPECT_EQ(Used(), Bytes(0));
    backend_.reset();
    driver_.reset();
    fake_.Reset();
  }

  Bytes Used() { return backend_->UsedBytes().value_or(Bytes(-1)); }

  std::unique_ptr<CudaMapper> MustMake(const PoolGeometry& geometry) {
    auto mapper = CudaMapper::Create(geometry, *driver_, "");
    EXPECT_TRUE(mapper.ok()) << mapper.status();
    return *std::move(mapper);
  }

  // The creator lets go: what keeps the memory is what the mapper has.
  std::vector<UniqueFd> MakePage(const PoolGeometry& geometry) {
    std::vector<UniqueFd> page;
    for (uint32_t i = 0; i < geometry.handles_per_page; ++i) {
      Handle handle = *backend_->Create(geometry.handle_bytes);
      page.push_back(*backend_->Export(handle));
    }
    return page;
  }

  FakeCuda fake_ = FakeCuda::Open();
  std::unique_ptr<CudaDriver> driver_;
  std::unique_ptr<CudaBackend> backend_;
};

using CudaMapperDeathTest = CudaMapperTest;

TEST_F(CudaMapperTest, MapsAPageWhereTheLayoutPutsIt) {
  for (const PoolGeometry& geometry : {Contiguous(), PerLayer()}) {
    auto mapper = MustMake(geometry);
    const size_t bytes = static_cast<size_t>(geometry.handle_bytes.count());
    std::vector<Handle> handles;
    std::vector<UniqueFd> first, second;
    for (uint32_t h = 0; h < geometry.handles_per_page; ++h) {
      handles.push_back(*backend_->Create(geometry.handle_bytes));
      first.push_back(*backend_->Export(handles.back()));
      second.push_back(*backend_->Export(handles.back()));
    }
    ASSERT_TRUE(mapper->Map(PageIndex(5), std::move(first)).ok());
    ASSERT_TRUE(mapper->Map(PageIndex(7), std::move(second)).ok());
    for (size_t h = 0; h < geometry.handles_per_page; ++h) {
      EXPECT_EQ(mapper->region(h),
                mapper->region(0) + h * geometry.max_pages * bytes);
      std::memset(mapper->region(h) + 5 * bytes, 'a' + h, bytes);
      EXPECT_EQ(mapper->region(h)[8 * bytes - 1],
                static_cast<std::byte>('a' + h))
          << "handle by handle, in order";
    }
    EXPECT_TRUE(mapper->Unmap(PageIndex(5)).ok());
    EXPECT_TRUE(mapper->Unmap(PageIndex(7)).ok());
  }
}

TEST_F(CudaMapperDeathTest, AnUnmappedPageFaults) {
  auto mapper = MustMake(Contiguous());
  volatile std::byte* at = mapper->region(0) + 2 * MiB(4).count();
  EXPECT_DEATH(static_cast<void>(*at), "");
  ASSERT_TRUE(mapper->Map(PageIndex(2), MakePage(Contiguous())).ok());
  EXPECT_TRUE(*at == std::byte{0});
  ASSERT_TRUE(mapper->Unmap(PageIndex(2)).ok());
  EXPECT_DEATH(static_cast<void>(*at), "");
}

TEST_F(CudaMapperTest, MemoryIsFreeOnceItIsUnmapped) {
  auto mapper = MustMake(PerLayer());
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(PerLayer())).ok());
  EXPECT_EQ(Used(), MiB(6));
  ASSERT_TRUE(mapper->Unmap(PageIndex(0)).ok());
  EXPECT_EQ(Used(), Bytes(0));
}

TEST_F(CudaMapperTest, GivesEverythingBackWhenItGoes) {
  auto mapper = MustMake(PerLayer());
  mapper->AddStream(nullptr);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(PerLayer())).ok());
  ASSERT_TRUE(mapper->Map(PageIndex(15), MakePage(PerLayer())).ok());
  ASSERT_TRUE(mapper->Unmap(PageIndex(0)).ok());
  EXPECT_EQ(fake_.Books(), (FakeCudaBooks{.imported = 3,
                                          .reservations = 1,
                                          .mappings = 3,
                                          .contexts = 1,
                                          .events = 1}));
}

TEST_F(CudaMapperTest, LeavesTheCallersContextAlone) {
  auto mapper = MustMake(Contiguous());
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  EXPECT_EQ(fake_.Books().pushed, 0);
  std::thread other([&] { EXPECT_TRUE(mapper->Unmap(PageIndex(0)).ok()); });
  other.join();
}

TEST_F(CudaMapperTest, FindsTheBrokersGpuAmongThoseThatAreVisible) {
  backend_.reset();
  driver_.reset();
  setenv("KVBROKER_FAKE_CUDA_DEVICES", "3", 1);
  for (const char* visible :
       {"2,1", "GPU-fa6e0000-0000-4000-8000-000000000002"}) {
    setenv("CUDA_VISIBLE_DEVICES", visible, 1);
    fake_.Reset();
    driver_ = *CudaDriver::Load(fake_.paths());
    backend_ = *CudaBackend::Create(
        *CudaDriver::Load(fake_.paths()),
        {.gpu = "GPU-fa6e0000-0000-4000-8000-000000000002"});
    EXPECT_EQ(backend_->device().index, 0);
    auto mapper = CudaMapper::Create(Contiguous(), *driver_,
                                     backend_->info().device_uuid);
    ASSERT_TRUE(mapper.ok()) << mapper.status();
    EXPECT_TRUE((*mapper)->Map(PageIndex(0), MakePage(Contiguous())).ok());
    EXPECT_EQ(CudaMapper::Create(Contiguous(), *driver_,
                                 "GPU-fa6e0000-0000-4000-8000-000000000000")
                  .status()
                  .code(),
              absl::StatusCode::kNotFound);
  }
  unsetenv("KVBROKER_FAKE_CUDA_DEVICES");
  unsetenv("CUDA_VISIBLE_DEVICES");
}

TEST_F(CudaMapperTest, RefusesHandlesThatTheGpuCannotHave) {
  for (Bytes size : {Bytes(0), KiB(64), MiB(3)}) {
    PoolGeometry geometry = Contiguous();
    geometry.handle_bytes = size;
    EXPECT_EQ(CudaMapper::Create(geometry, *driver_, "").status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(CudaMapperTest, SaysSoWhenAddressesRunOut) {
  fake_.Fail("cuMemAddressReserve", 1, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  absl::Status status = CudaMapper::Create(Contiguous(), *driver_, "").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("64 MiB"), absl::string_view::npos) << status;
}

TEST_F(CudaMapperTest, MapsAllHandlesOfAPageOrNone) {
  auto mapper = MustMake(PerLayer());
  std::vector<UniqueFd> page = MakePage(PerLayer());
  page[2] = std::move(MakePage(Contiguous())[0]);  // of the wrong size
  EXPECT_FALSE(mapper->Map(PageIndex(1), std::move(page)).ok());
  EXPECT_EQ(fake_.Books().mappings, 0);
  EXPECT_EQ(Used(), Bytes(0));

  page = MakePage(PerLayer());
  page[1] = UniqueFd(open("/dev/null", O_RDONLY | O_CLOEXEC));  // no memory
  EXPECT_EQ(mapper->Map(PageIndex(1), std::move(page)).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Used(), Bytes(0));

  page = MakePage(PerLayer());
  page.pop_back();
  EXPECT_EQ(mapper->Map(PageIndex(1), std::move(page)).code(),
            absl::StatusCode::kInvalidArgument);
}

// --- Each call fails once ---------------------------------------------------

TEST_F(CudaMapperTest, CreationUndoesItselfWhateverFails) {
  for (const char* call :
       {"cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid", "cuDeviceGetName",
        "cuDeviceTotalMem_v2", "cuDeviceGetAttribute",
        "cuMemGetAllocationGranularity", "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2", "cuMemAddressReserve",
        "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMigMode"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    auto mapper = CudaMapper::Create(Contiguous(), *driver_, "");
    EXPECT_EQ(mapper.status().code(), absl::StatusCode::kInternal) << call;
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{}) << call;
    EXPECT_TRUE(CudaMapper::Create(Contiguous(), *driver_, "").ok()) << call;
  }
}

TEST_F(CudaMapperTest, MapUndoesItselfWhateverFails) {
  auto mapper = MustMake(PerLayer());
  const FakeCudaBooks before = fake_.Books();
  for (const char* call :
       {"cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"}) {
    for (int nth : {1, 2, 3}) {
      fake_.Fail(call, nth, cuda::CUDA_ERROR_OUT_OF_MEMORY);
      EXPECT_EQ(mapper->Map(PageIndex(3), MakePage(PerLayer())).code(),
                absl::StatusCode::kResourceExhausted)
          << call << " " << nth;
      EXPECT_EQ(fake_.Books(), before) << call << " " << nth;
      EXPECT_EQ(Used(), Bytes(0)) << call << " " << nth;
      EXPECT_TRUE(mapper->Map(PageIndex(3), MakePage(PerLayer())).ok());
      EXPECT_TRUE(mapper->Unmap(PageIndex(3)).ok());
    }
  }
  fake_.Fail("cuCtxPushCurrent_v2", 1, cuda::CUDA_ERROR_UNKNOWN);
  EXPECT_FALSE(mapper->Map(PageIndex(3), MakePage(PerLayer())).ok());
  EXPECT_EQ(fake_.Books(), before);
}

TEST_F(CudaMapperTest, AnUnmapThatFailsLeavesThePageAsItWas) {
  auto mapper = MustMake(PerLayer());
  mapper->AddStream(nullptr);
  ASSERT_TRUE(mapper->Map(PageIndex(3), MakePage(PerLayer())).ok());
  std::byte* last = mapper->region(2) + 3 * MiB(2).count();
  for (size_t h : {0, 1, 2}) {
    mapper->region(h)[3 * MiB(2).count()] = static_cast<std::byte>(h + 1);
  }
  struct Case {
    const char* call;
    int nth;
  };
  for (Case c :
       {Case{"cuCtxPushCurrent_v2", 1}, Case{"cuEventCreate", 1},
        Case{"cuEventRecord", 1}, Case{"cuEventSynchronize", 1},
        Case{"cuMemUnmap", 1}, Case{"cuMemUnmap", 2}, Case{"cuMemUnmap", 3}}) {
    fake_.Fail(c.call, c.nth, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_EQ(mapper->Unmap(PageIndex(3)).code(), absl::StatusCode::kInternal)
        << c.call;
    EXPECT_EQ(fake_.Books().mappings, 3) << c.call << " " << c.nth;
    EXPECT_EQ(*last, std::byte{3});
    EXPECT_EQ(mapper->region(0)[3 * MiB(2).count()], std::byte{1});
  }
  EXPECT_TRUE(mapper->Unmap(PageIndex(3)).ok());
  EXPECT_EQ(Used(), Bytes(0));
}

TEST_F(CudaMapperTest, AnUnmapThatCannotBeUndoneCanBeGoneOnWith) {
  auto mapper = MustMake(PerLayer());
  ASSERT_TRUE(mapper->Map(PageIndex(3), MakePage(PerLayer())).ok());
  fake_.Fail("cuMemUnmap", 2, cuda::CUDA_ERROR_UNKNOWN);
  fake_.Fail("cuMemMap", 1, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_FALSE(mapper->Unmap(PageIndex(3)).ok());
  EXPECT_EQ(fake_.Books().mappings, 2);
  EXPECT_TRUE(mapper->Unmap(PageIndex(3)).ok());
  EXPECT_EQ(Used(), Bytes(0));
}

TEST_F(CudaMapperTest, MemoryThatIsNotReleasedIsTriedAgain) {
  auto mapper = MustMake(PerLayer());
  for (bool by_map : {false, true}) {
    ASSERT_TRUE(mapper->Map(PageIndex(3), MakePage(PerLayer())).ok());
    fake_.Fail("cuMemRelease", 2, cuda::CUDA_ERROR_UNKNOWN);
    absl::Status status = mapper->Unmap(PageIndex(3));
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_NE(status.message().find("still held"), absl::string_view::npos);
    EXPECT_EQ(Used(), MiB(2)) << "the others were released";
    if (by_map) {
      ASSERT_TRUE(mapper->Map(PageIndex(3), MakePage(PerLayer())).ok());
      EXPECT_EQ(Used(), MiB(6));
    }
    EXPECT_TRUE(mapper->Unmap(PageIndex(3)).ok());
    EXPECT_EQ(Used(), Bytes(0));
  }
}

TEST_F(CudaMapperTest, APoisonedContextSaysSo) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(nullptr);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.Poison(cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  absl::Status status = mapper->Unmap(PageIndex(0));
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(IsPoisoned(status)) << status;
  EXPECT_NE(status.message().find("poisoned"), absl::string_view::npos);
  EXPECT_TRUE(IsPoisoned(mapper->Map(PageIndex(1), MakePage(Contiguous()))));
  EXPECT_EQ(Used(), MiB(4)) << "its bytes stay charged";
  mapper.reset();  // Does what it can, without a crash.
  EXPECT_EQ(Used(), MiB(4));
  fake_.Reset();  // The process's end.
  backend_.reset();
  backend_ = *CudaBackend::Create(*CudaDriver::Load(fake_.paths()), {});
}

TEST_F(CudaMapperTest, WithoutDescriptorsItSaysHowToGetSome) {
  auto mapper = MustMake(Contiguous());
  std::vector<UniqueFd> page = MakePage(Contiguous());
  rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit none = {.rlim_cur = 0, .rlim_max = limit.rlim_max};
  setrlimit(RLIMIT_NOFILE, &none);
  absl::Status status = mapper->Map(PageIndex(0), std::move(page));
  setrlimit(RLIMIT_NOFILE, &limit);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_NE(status.message().find("files"), absl::string_view::npos);
}

// --- Running work -----------------------------------------------------------

char kv_stream, side_stream;

TEST_F(CudaMapperTest, UnmapWaitsForTheStreamsThatTouchThePool) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(&kv_stream);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.BeginWork(&kv_stream);
  auto unmapped = std::async(std::launch::async,
                             [&] { return mapper->Unmap(PageIndex(0)); });
  fake_.AwaitWaiter();
  EXPECT_EQ(fake_.Books().mappings, 1);
  mapper->region(0)[0] = std::byte{7};  // What the kernel does.
  // Work that is queued later is not waited for.
  fake_.BeginWork(&kv_stream);
  fake_.EndWork(&kv_stream);
  EXPECT_TRUE(unmapped.get().ok());
  EXPECT_EQ(fake_.Books().mappings, 0);
  fake_.EndWork(&kv_stream);
}

TEST_F(CudaMapperTest, UnmapWaitsForAllOfThem) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(&kv_stream);
  mapper->AddStream(&side_stream);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.BeginWork(&side_stream);
  auto unmapped = std::async(std::launch::async,
                             [&] { return mapper->Unmap(PageIndex(0)); });
  fake_.AwaitWaiter();
  EXPECT_EQ(fake_.Books().mappings, 1);
  fake_.EndWork(&side_stream);
  EXPECT_TRUE(unmapped.get().ok());
}

TEST_F(CudaMapperTest, UnmapWaitsForAllThereAreWhereNobodyKnowsWhichTouchIt) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(kAllStreams);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.BeginWork(&side_stream);
  auto unmapped = std::async(std::launch::async,
                             [&] { return mapper->Unmap(PageIndex(0)); });
  fake_.AwaitWaiter();
  EXPECT_EQ(fake_.Books().mappings, 1);
  fake_.EndWork(&side_stream);
  EXPECT_TRUE(unmapped.get().ok());
}

TEST_F(CudaMapperTest, APageStaysWhileAGraphIsCaptured) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(kAllStreams);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.Fail("cuCtxSynchronize", 1,
             cuda::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(mapper->Unmap(PageIndex(0)).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(fake_.Books().mappings, 1);
  EXPECT_TRUE(mapper->Unmap(PageIndex(0)).ok());
}

TEST_F(CudaMapperTest, AddressesThatAreKeptOutliveTheMapper) {
  auto mapper = MustMake(Contiguous());
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  std::shared_ptr<void> range = mapper->range();
  mapper.reset();
  EXPECT_EQ(Used(), Bytes(0));
  EXPECT_EQ(fake_.Books(),
            (FakeCudaBooks{.reservations = 1, .contexts = 1}));
  range.reset();
  EXPECT_EQ(fake_.Books(), FakeCudaBooks{});
}

TEST_F(CudaMapperTest, UnmapDoesNotWaitForOtherStreams) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(&kv_stream);
  mapper->AddStream(&side_stream);
  mapper->RemoveStream(&side_stream);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.BeginWork(&side_stream);
  EXPECT_TRUE(mapper->Unmap(PageIndex(0)).ok());
  fake_.EndWork(&side_stream);
}

TEST_F(CudaMapperTest, WorkThatFailsWhileItIsAwaitedPoisons) {
  auto mapper = MustMake(Contiguous());
  mapper->AddStream(&kv_stream);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.BeginWork(&kv_stream);
  auto unmapped = std::async(std::launch::async,
                             [&] { return mapper->Unmap(PageIndex(0)); });
  fake_.AwaitWaiter();
  fake_.Poison(cuda::CUDA_ERROR_LAUNCH_FAILED);
  EXPECT_TRUE(IsPoisoned(unmapped.get()));
  fake_.Poison(0);  // So that this test's own books can be balanced.
}

// --- Guard mode -------------------------------------------------------------

class CudaGuardTest : public CudaMapperTest {
 protected:
  static constexpr int64_t kSlots = 16;

  std::unique_ptr<CudaMapper> MustGuard() {
    auto mapper = MustMake(Contiguous());
    EXPECT_EQ(mapper->Guard(), absl::OkStatus());
    return mapper;
  }
  std::byte* SlotOf(CudaMapper& mapper, int page) {
    return mapper.region(0) + page * Contiguous().handle_bytes.count();
  }
  // With one page mapped or none, nothing else may have changed.
  FakeCudaBooks Guarded(int64_t pages) {
    return {.created = 1,
            .imported = pages,
            .reservations = 1,
            .mappings = kSlots,
            .contexts = 1};
  }
};

TEST_F(CudaGuardTest, NothingFaultsAndTheGuardIsNobodys) {
  auto mapper = MustGuard();
  EXPECT_EQ(fake_.Books(), Guarded(0));
  EXPECT_EQ(Used(), MiB(4)) << "one handle, however many slots";
  for (int page = 0; page < kSlots; ++page) {
    *SlotOf(*mapper, page) = std::byte{9};
  }
  ASSERT_TRUE(mapper->Map(PageIndex(3), MakePage(Contiguous())).ok());
  EXPECT_EQ(fake_.Books(), Guarded(1));
  EXPECT_EQ(*SlotOf(*mapper, 3), std::byte{0}) << "the page, not the guard";
  *SlotOf(*mapper, 3) = std::byte{7};
  *SlotOf(*mapper, 4) = std::byte{8};
  EXPECT_EQ(*SlotOf(*mapper, 3), std::byte{7}) << "stray writes miss it";
  ASSERT_TRUE(mapper->Unmap(PageIndex(3)).ok());
  EXPECT_EQ(fake_.Books(), Guarded(0));
  EXPECT_EQ(*SlotOf(*mapper, 3), std::byte{8}) << "the guard again";
  EXPECT_EQ(Used(), MiB(4));
}

TEST_F(CudaGuardTest, APerLayerPoolIsRefused) {
  auto mapper = MustMake(PerLayer());
  const FakeCudaBooks before = fake_.Books();
  absl::Status refused = mapper->Guard();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(refused.message().find("contiguous layout"),
            absl::string_view::npos)
      << refused;
  EXPECT_EQ(fake_.Books(), before);
}

TEST_F(CudaGuardTest, ItBeginsWhollyOrNotAtAll) {
  auto mapper = MustMake(Contiguous());
  const FakeCudaBooks before = fake_.Books();
  struct Case {
    const char* call;
    int nth;
  };
  for (Case c : {Case{"cuCtxPushCurrent_v2", 1}, Case{"cuMemCreate", 1},
                 Case{"cuMemMap", 1}, Case{"cuMemMap", 9},
                 Case{"cuMemSetAccess", 1}, Case{"cuMemSetAccess", 16}}) {
    fake_.Fail(c.call, c.nth, cuda::CUDA_ERROR_OUT_OF_MEMORY);
    EXPECT_EQ(mapper->Guard().code(), absl::StatusCode::kResourceExhausted)
        << c.call;
    EXPECT_EQ(fake_.Books(), before) << c.call << " " << c.nth;
    EXPECT_EQ(Used(), Bytes(0)) << c.call << " " << c.nth;
  }
  EXPECT_EQ(mapper->Guard(), absl::OkStatus());
}

TEST_F(CudaGuardTest, AMapThatFailsPutsTheGuardBack) {
  auto mapper = MustGuard();
  mapper->AddStream(nullptr);
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  FakeCudaBooks before = Guarded(1);
  before.events = 1;
  struct Case {
    const char* call;
    int nth;
  };
  for (Case c :
       {Case{"cuCtxPushCurrent_v2", 1}, Case{"cuEventRecord", 1},
        Case{"cuEventSynchronize", 1}, Case{"cuMemImportFromShareableHandle", 1},
        Case{"cuMemUnmap", 1}, Case{"cuMemMap", 1}, Case{"cuMemSetAccess", 1}}) {
    fake_.Fail(c.call, c.nth, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_EQ(mapper->Map(PageIndex(5), MakePage(Contiguous())).code(),
              absl::StatusCode::kInternal)
        << c.call;
    EXPECT_EQ(fake_.Books(), before) << c.call;
    EXPECT_EQ(Used(), MiB(8)) << c.call;
    *SlotOf(*mapper, 5) = std::byte{1};  // does not fault
    ASSERT_TRUE(mapper->Map(PageIndex(5), MakePage(Contiguous())).ok());
    ASSERT_TRUE(mapper->Unmap(PageIndex(5)).ok()) << c.call;
  }
}

TEST_F(CudaGuardTest, AnUnmapThatFailsLeavesThePageAsItWas) {
  auto mapper = MustGuard();
  ASSERT_TRUE(mapper->Map(PageIndex(5), MakePage(Contiguous())).ok());
  *SlotOf(*mapper, 5) = std::byte{5};
  for (const char* call :
       {"cuCtxPushCurrent_v2", "cuMemUnmap", "cuMemMap", "cuMemSetAccess"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_EQ(mapper->Unmap(PageIndex(5)).code(), absl::StatusCode::kInternal)
        << call;
    EXPECT_EQ(fake_.Books(), Guarded(1)) << call;
    EXPECT_EQ(*SlotOf(*mapper, 5), std::byte{5}) << call;
  }
  EXPECT_TRUE(mapper->Unmap(PageIndex(5)).ok());
  EXPECT_EQ(fake_.Books(), Guarded(0));
}

TEST_F(CudaGuardTest, WhatCannotBePutBackIsAtTheNextCall) {
  auto mapper = MustGuard();
  // The page's mapping fails, and the guard's after it.
  fake_.Fail("cuMemMap", 1, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  fake_.Fail("cuMemMap", 2, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_FALSE(mapper->Map(PageIndex(5), MakePage(Contiguous())).ok());
  EXPECT_EQ(fake_.Books().mappings, kSlots - 1);
  EXPECT_EQ(fake_.Books().imported, 0);
  ASSERT_TRUE(mapper->Map(PageIndex(5), MakePage(Contiguous())).ok());
  EXPECT_EQ(fake_.Books(), Guarded(1));
  // The guard's mapping fails, and the page's after it.
  fake_.Fail("cuMemMap", 1, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  fake_.Fail("cuMemMap", 2, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_FALSE(mapper->Unmap(PageIndex(5)).ok());
  EXPECT_EQ(fake_.Books().mappings, kSlots - 1);
  EXPECT_TRUE(mapper->Unmap(PageIndex(5)).ok());
  EXPECT_EQ(fake_.Books(), Guarded(0));
}

TEST_F(CudaGuardTest, MemoryThatIsNotReleasedIsTriedAgain) {
  auto mapper = MustGuard();
  ASSERT_TRUE(mapper->Map(PageIndex(5), MakePage(Contiguous())).ok());
  fake_.Fail("cuMemRelease", 1, cuda::CUDA_ERROR_UNKNOWN);
  EXPECT_FALSE(mapper->Unmap(PageIndex(5)).ok());
  *SlotOf(*mapper, 5) = std::byte{1};
  EXPECT_TRUE(mapper->Unmap(PageIndex(5)).ok());
  EXPECT_EQ(fake_.Books(), Guarded(0));
}

TEST_F(CudaGuardTest, MapWaitsForTheStreamsThatMayTouchTheGuard) {
  auto mapper = MustGuard();
  mapper->AddStream(&kv_stream);
  fake_.BeginWork(&kv_stream);
  auto mapped = std::async(std::launch::async, [&] {
    return mapper->Map(PageIndex(0), MakePage(Contiguous()));
  });
  fake_.AwaitWaiter();
  *SlotOf(*mapper, 0) = std::byte{7};  // What the kernel does.
  EXPECT_EQ(fake_.Books().imported, 0);
  fake_.EndWork(&kv_stream);
  EXPECT_TRUE(mapped.get().ok());
}

TEST_F(CudaGuardTest, APoisonedContextDoesNotCrash) {
  auto mapper = MustGuard();
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  fake_.Poison(cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_TRUE(IsPoisoned(mapper->Unmap(PageIndex(0))));
  EXPECT_TRUE(IsPoisoned(mapper->Map(PageIndex(1), MakePage(Contiguous()))));
  mapper.reset();
  fake_.Reset();  // The process's end.
  backend_.reset();
  backend_ = *CudaBackend::Create(*CudaDriver::Load(fake_.paths()), {});
}

}  // namespace
}  // namespace kvbroker::client
