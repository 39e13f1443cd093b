// Driver, probe and backend on the fake driver: what goes wrong, and what is
// said then. What every backend does is in cuda_conformance_test.
#include "broker/device/cuda/cuda_backend.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "broker/base/temp_folder.h"
#include "broker/device/cuda/cuda_import.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker {
namespace {

using absl::StatusCode;

bool Has(const absl::Status& status, absl::string_view text) {
  return status.message().find(text) != absl::string_view::npos;
}

constexpr char kFirstUuid[] = "GPU-fa6e0000-0000-4000-8000-000000000000";

class CudaTest : public testing::Test {
 protected:
  CudaTest() { fake_.Reset(); }
  ~CudaTest() override {
    for (const std::string& name : set_) unsetenv(name.c_str());
    fake_.Reset();
  }

  // For what is loaded from now on.
  void Set(const std::string& name, const std::string& value) {
    setenv(name.c_str(), value.c_str(), 1);
    set_.insert(name);
    fake_.Reset();
  }

  absl::StatusOr<std::unique_ptr<CudaDriver>> Load() {
    return CudaDriver::Load(fake_.paths());
  }
  absl::StatusOr<std::unique_ptr<CudaBackend>> Make(
      const CudaBackendOptions& options = {}) {
    ASSIGN_OR_RETURN(std::unique_ptr<CudaDriver> driver, Load());
    return CudaBackend::Create(std::move(driver), options);
  }

  FakeCuda fake_ = FakeCuda::Open();

 private:
  std::set<std::string> set_;
};

// --- Errors ------------------------------------------------------------------

TEST(CudaStatusTest, NamesCallErrorAndNumber) {
  EXPECT_TRUE(CudaStatus(0, "cuMemMap").ok());
  absl::Status status = CudaStatus(cuda::CUDA_ERROR_NOT_SUPPORTED, "cuMemMap");
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_EQ(status.message(),
            "cuMemMap failed: CUDA error NOT_SUPPORTED (801)");
  EXPECT_EQ(CudaStatus(12345, "f").message(),
            "f failed: CUDA error unknown error (12345)");
  EXPECT_EQ(CudaStatus(12345, "f").code(), StatusCode::kInternal);
}

TEST(CudaStatusTest, EachErrorHasItsCode) {
  struct Case {
    int result;
    StatusCode code;
  };
  for (Case c :
       {Case{cuda::CUDA_ERROR_OUT_OF_MEMORY, StatusCode::kResourceExhausted},
        Case{cuda::CUDA_ERROR_NO_DEVICE, StatusCode::kNotFound},
        Case{cuda::CUDA_ERROR_INVALID_VALUE, StatusCode::kInvalidArgument},
        Case{cuda::CUDA_ERROR_INSUFFICIENT_DRIVER,
             StatusCode::kFailedPrecondition},
        Case{cuda::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
             StatusCode::kFailedPrecondition},
        Case{cuda::CUDA_ERROR_DEVICE_UNAVAILABLE, StatusCode::kUnavailable},
        Case{cuda::CUDA_ERROR_NOT_PERMITTED, StatusCode::kPermissionDenied},
        Case{cuda::CUDA_ERROR_UNKNOWN, StatusCode::kInternal}}) {
    EXPECT_EQ(CudaStatus(c.result, "f").code(), c.code) << c.result;
    EXPECT_FALSE(IsPoisoned(CudaStatus(c.result, "f"))) << c.result;
  }
}

TEST(CudaStatusTest, StickyErrorsAreKnownAgain) {
  for (int result :
       {cuda::CUDA_ERROR_ILLEGAL_ADDRESS, cuda::CUDA_ERROR_LAUNCH_FAILED,
        cuda::CUDA_ERROR_ECC_UNCORRECTABLE, cuda::CUDA_ERROR_ASSERT}) {
    absl::Status status = CudaStatus(result, "f");
    EXPECT_EQ(status.code(), StatusCode::kInternal);
    EXPECT_TRUE(IsPoisoned(status));
    EXPECT_TRUE(Has(status, "poisoned")) << status;
  }
  EXPECT_FALSE(IsPoisoned(absl::OkStatus()));
}

TEST(CudaStatusTest, ALostDeviceIsKnownAgain) {
  for (int result :
       {cuda::CUDA_ERROR_NO_DEVICE, cuda::CUDA_ERROR_INVALID_DEVICE,
        cuda::CUDA_ERROR_DEVICE_UNAVAILABLE, cuda::CUDA_ERROR_SYSTEM_NOT_READY,
        cuda::CUDA_ERROR_ECC_UNCORRECTABLE, cuda::CUDA_ERROR_MPS_RPC_FAILURE,
        cuda::CUDA_ERROR_MPS_CLIENT_TERMINATED}) {
    EXPECT_TRUE(IsDeviceLost(CudaStatus(result, "f"))) << result;
    EXPECT_TRUE(IsDeviceLost(CudaStatusOfDescriptorCall(result, "f")));
  }
  for (int result : {cuda::CUDA_ERROR_OUT_OF_MEMORY, cuda::CUDA_ERROR_UNKNOWN,
                     cuda::CUDA_ERROR_NOT_SUPPORTED}) {
    EXPECT_FALSE(IsDeviceLost(CudaStatus(result, "f"))) << result;
  }
  EXPECT_TRUE(IsDeviceLost(NvmlStatus(cuda::NVML_ERROR_GPU_IS_LOST, "f")));
  EXPECT_TRUE(IsDeviceLost(NvmlStatus(cuda::NVML_ERROR_RESET_REQUIRED, "f")));
  EXPECT_FALSE(IsDeviceLost(NvmlStatus(cuda::NVML_ERROR_NOT_FOUND, "f")));
  EXPECT_FALSE(IsDeviceLost(absl::OkStatus()));
}

TEST(NvmlStatusTest, SaysThatItIsNvmls) {
  EXPECT_TRUE(NvmlStatus(0, "f").ok());
  absl::Status status = NvmlStatus(cuda::NVML_ERROR_GPU_IS_LOST, "f");
  EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  EXPECT_TRUE(Has(status, "NVML error GPU_IS_LOST (15)")) << status;
}

// --- The libraries
// ------------------------------------------------------------

TEST_F(CudaTest, WithoutADriverItSaysWhatToDo) {
  absl::Status status =
      CudaDriver::Load({.cuda = "/nowhere/libcuda.so.1"}).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_TRUE(Has(status, "/nowhere/libcuda.so.1")) << status;
  EXPECT_TRUE(Has(status, "backend host")) << status;
}

TEST_F(CudaTest, ALibraryThatIsNoDriverIsNamedByWhatItLacks) {
  absl::Status status = CudaDriver::Load({.cuda = "libm.so.6"}).status();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Has(status, "cuInit")) << status;
}

TEST_F(CudaTest, TheEnvironmentNamesOtherLibraries) {
  EXPECT_EQ(DriverPaths::Default().cuda, "libcuda.so.1");
  EXPECT_EQ(DriverPaths::Default().nvml, "libnvidia-ml.so.1");
  Set("KVBROKER_CUDA_DRIVER", "/a/b");
  Set("KVBROKER_NVML", "/c/d");
  EXPECT_EQ(DriverPaths::Default().cuda, "/a/b");
  EXPECT_EQ(DriverPaths::Default().nvml, "/c/d");
}

TEST_F(CudaTest, KnowsTheVersions) {
  auto driver = Load();
  ASSERT_TRUE(driver.ok()) << driver.status();
  EXPECT_EQ((*driver)->cuda_version(), 13000);
  EXPECT_EQ(CudaVersionText(13000), "13.0");
  EXPECT_EQ(CudaVersionText(11040), "11.4");
  EXPECT_EQ((*driver)->nvidia_version(), "580.0.fake");
}

TEST_F(CudaTest, ADriverThatDoesNotStartSaysWhy) {
  for (const char* call : {"cuInit", "cuDriverGetVersion"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
    absl::Status status = Load().status();
    EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
    EXPECT_TRUE(Has(status, "reboot")) << status;
  }
}

TEST_F(CudaTest, WithoutNvmlTheBackendIsRefusedAndSaysWhy) {
  DriverPaths paths = fake_.paths();
  for (const char* nvml : {"/nowhere/libnvidia-ml.so.1", "libm.so.6"}) {
    paths.nvml = nvml;
    auto driver = CudaDriver::Load(paths);
    ASSERT_TRUE(driver.ok()) << driver.status();
    EXPECT_TRUE(Has((*driver)->nvml_status(), nvml));
    auto backend = CudaBackend::Create(*std::move(driver), {});
    EXPECT_TRUE(Has(backend.status(), "NVML")) << backend.status();
  }
  fake_.Fail("nvmlInit_v2", 1, cuda::NVML_ERROR_DRIVER_NOT_LOADED);
  EXPECT_EQ(Make().status().code(), StatusCode::kFailedPrecondition);
}

// --- Which GPU ---------------------------------------------------------------

TEST_F(CudaTest, NoGpuIsNotFound) {
  Set("CUDA_VISIBLE_DEVICES", "");
  EXPECT_EQ(Load().status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(Has(Load().status(), "CUDA_VISIBLE_DEVICES"));
}

TEST_F(CudaTest, ProbesWhatADeviceCanDo) {
  auto driver = Load();
  ASSERT_TRUE(driver.ok()) << driver.status();
  auto devices = ProbeDevices(**driver);
  ASSERT_TRUE(devices.ok()) << devices.status();
  ASSERT_EQ(devices->size(), 1);
  const CudaDevice& device = devices->front();
  EXPECT_EQ(device.uuid, kFirstUuid);
  EXPECT_EQ(device.name, "Fake GPU");
  EXPECT_EQ(device.total, GiB(16));
  EXPECT_TRUE(device.vmm);
  EXPECT_TRUE(device.posix_descriptors);
  EXPECT_TRUE(device.rdma_with_vmm);
  EXPECT_EQ(device.granularity, MiB(2));
  EXPECT_TRUE(device.usable.ok()) << device.usable;
}

TEST_F(CudaTest, ChoosesByIndexUuidOrItsBeginning) {
  Set("KVBROKER_FAKE_CUDA_DEVICES", "3");
  for (const char* gpu : {"2", "GPU-fa6e0000-0000-4000-8000-000000000002"}) {
    auto backend = Make({.gpu = gpu});
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_EQ((*backend)->info().device_uuid,
              "GPU-fa6e0000-0000-4000-8000-000000000002");
  }
  absl::Status several = Make().status();
  EXPECT_EQ(several.code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(Has(several, "2 = GPU-fa6e0000-0000-4000-8000-000000000002"))
      << several;
  EXPECT_EQ(Make({.gpu = "GPU-fa6e"}).status().code(),
            StatusCode::kInvalidArgument);
  absl::Status none = Make({.gpu = "7"}).status();
  EXPECT_EQ(none.code(), StatusCode::kNotFound);
  EXPECT_TRUE(Has(none, "\"7\"")) << none;
  Set("CUDA_VISIBLE_DEVICES", "1");
  EXPECT_TRUE(Make({.gpu = "GPU-fa6e"}).ok());
}

TEST_F(CudaTest, AGpuWithoutVirtualMemoryManagementIsRefused) {
  Set("KVBROKER_FAKE_CUDA_VMM", "0");
  absl::Status status = Make().status();
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_TRUE(Has(status, "virtual memory management")) << status;
}

TEST_F(CudaTest, AGpuThatExportsNoDescriptorsIsRefused) {
  Set("KVBROKER_FAKE_CUDA_POSIX", "0");
  EXPECT_EQ(Make().status().code(), StatusCode::kUnimplemented);
  EXPECT_TRUE(Has(Make().status(), "POSIX"));
}

TEST_F(CudaTest, AGpuInMigModeIsRefused) {
  Set("KVBROKER_FAKE_CUDA_MIG", "1");
  EXPECT_EQ(Make().status().code(), StatusCode::kUnimplemented);
  EXPECT_TRUE(Has(Make().status(), "MIG"));
}

TEST_F(CudaTest, AGpuThatKnowsNoMigHasNone) {
  fake_.Fail("nvmlDeviceGetMigMode", 1, cuda::NVML_ERROR_NOT_SUPPORTED);
  EXPECT_TRUE(Make().ok());
}

TEST_F(CudaTest, MemoryForNetworkCardsOnlyWhereTheGpuCan) {
  EXPECT_TRUE(Make({.rdma = true}).ok());
  Set("KVBROKER_FAKE_CUDA_RDMA", "0");
  EXPECT_TRUE(Make().ok());
  EXPECT_EQ(Make({.rdma = true}).status().code(), StatusCode::kUnimplemented);
}

TEST_F(CudaTest, WhateverFailsAtTheStartIsReported) {
  for (const char* call :
       {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet",
        "cuDeviceGetUuid", "cuDeviceGetName", "cuDeviceTotalMem_v2",
        "cuDeviceGetAttribute", "cuMemGetAllocationGranularity", "nvmlInit_v2",
        "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMigMode",
        "nvmlDeviceGetMemoryInfo_v2"}) {
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);  // NVML's has the number too
    auto backend = Make();
    EXPECT_EQ(backend.status().code(), StatusCode::kInternal) << call;
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{}) << call;
    EXPECT_TRUE(Make().ok()) << call;
  }
}

// --- Old drivers
// ---------------------------------------------------------------

TEST_F(CudaTest, BeforeVmmTheMissingSymbolIsNamed) {
  FakeCuda old = FakeCuda::Open("libfake_cuda_10_1.so");
  setenv("KVBROKER_FAKE_CUDA_VMM", "1", 1);
  old.Reset();
  auto driver = CudaDriver::Load(old.paths());
  ASSERT_TRUE(driver.ok()) << driver.status();
  absl::Status vmm = (*driver)->Require(CudaFunctionGroup::kVmm);
  EXPECT_EQ(vmm.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Has(vmm, "cuMemGetAllocationGranularity (CUDA 10.1)")) << vmm;
  EXPECT_TRUE((*driver)->Require(CudaFunctionGroup::kBase).ok());
  EXPECT_EQ(CudaBackend::Create(*std::move(driver), {}).status().code(),
            StatusCode::kFailedPrecondition);
  unsetenv("KVBROKER_FAKE_CUDA_VMM");
  old.Reset();
}

TEST_F(CudaTest, Cuda11_4WithItsNvmlIsEnough) {
  FakeCuda old = FakeCuda::Open("libfake_cuda_11_4.so");
  old.Reset();
  {
    auto driver = CudaDriver::Load(old.paths());
    ASSERT_TRUE(driver.ok()) << driver.status();
    EXPECT_EQ((*driver)->nvml().nvmlDeviceGetMemoryInfo_v2, nullptr);
    EXPECT_EQ(CudaBackend::Create(*std::move(driver), {}).status().code(),
              StatusCode::kUnimplemented)
        << "as on a GPU that has no VMM";
  }
  setenv("KVBROKER_FAKE_CUDA_VMM", "1", 1);
  old.Reset();
  auto driver = CudaDriver::Load(old.paths());
  ASSERT_TRUE(driver.ok()) << driver.status();
  auto backend = CudaBackend::Create(*std::move(driver), {});
  ASSERT_TRUE(backend.ok()) << backend.status();
  // The old figures count the driver's reserve as used.
  const Bytes before = *(*backend)->UsedBytes();
  EXPECT_GT(before, Bytes(0));
  auto handle = (*backend)->Create(MiB(4));
  ASSERT_TRUE(handle.ok()) << handle.status();
  EXPECT_EQ(*(*backend)->UsedBytes() - before, MiB(4));
  EXPECT_EQ((*backend)->UsedByProcess().status().code(),
            StatusCode::kUnimplemented)
      << "its NVML does not say";
  handle->Reset();
  backend->reset();
  unsetenv("KVBROKER_FAKE_CUDA_VMM");
  old.Reset();
}

TEST_F(CudaTest, ANewNvmlOnAnOldKernelDriverIsReadTheOldWay) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  for (int result :
       {cuda::NVML_ERROR_FUNCTION_NOT_FOUND, cuda::NVML_ERROR_NOT_SUPPORTED}) {
    fake_.Fail("nvmlDeviceGetMemoryInfo_v2", 1, result);
    EXPECT_GT(*(*backend)->UsedBytes(), Bytes(0));
  }
  EXPECT_EQ(*(*backend)->UsedBytes(), Bytes(0));
}

// --- Handles -----------------------------------------------------------------

TEST_F(CudaTest, IsNamedAfterItsGpu) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_EQ((*backend)->info().name, "cuda");
  EXPECT_EQ((*backend)->info().device_uuid, kFirstUuid);
  EXPECT_EQ((*backend)->info().total, GiB(16)) << "less the driver's reserve";
  EXPECT_EQ((*backend)->info().granularity, MiB(2));
}

TEST_F(CudaTest, HasNoContext) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  auto handle = (*backend)->Create(MiB(2));
  ASSERT_TRUE(handle.ok()) << handle.status();
  EXPECT_TRUE((*backend)->Export(*handle).ok());
  EXPECT_EQ(fake_.Calls("cuDevicePrimaryCtxRetain"), 0);
  EXPECT_EQ(fake_.Books().contexts, 0);
}

TEST_F(CudaTest, CountsTheDriverCallsOfEachOperation) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  const CudaBackend::Counts start = (*backend)->counts();
  auto handle = (*backend)->Create(MiB(2));
  (*backend)->Export(*handle).IgnoreError();
  (*backend)->Export(*handle).IgnoreError();
  (*backend)->UsedBytes().IgnoreError();
  handle->Reset();
  const CudaBackend::Counts counts = (*backend)->counts();
  EXPECT_EQ(counts.creates - start.creates, 1);
  EXPECT_EQ(counts.exports - start.exports, 1) << "the descriptor is kept";
  EXPECT_EQ(counts.releases - start.releases, 1);
  EXPECT_EQ(counts.memory_readings - start.memory_readings, 1);
  EXPECT_EQ(counts.failed_releases, 0);
}

TEST_F(CudaTest, WhatFailsHoldsNothing) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  for (int result :
       {cuda::CUDA_ERROR_OUT_OF_MEMORY, cuda::CUDA_ERROR_UNKNOWN}) {
    fake_.Fail("cuMemCreate", 1, result);
    EXPECT_EQ((*backend)->Create(MiB(2)).status().code(),
              CudaStatus(result, "").code());
    EXPECT_EQ(fake_.Books(), FakeCudaBooks{});
  }
  auto handle = (*backend)->Create(MiB(2));
  ASSERT_TRUE(handle.ok()) << handle.status();
  fake_.Fail("cuMemExportToShareableHandle", 1, cuda::CUDA_ERROR_UNKNOWN);
  EXPECT_EQ((*backend)->Export(*handle).status().code(), StatusCode::kInternal);
  EXPECT_TRUE((*backend)->Export(*handle).ok());
  fake_.Fail("nvmlDeviceGetMemoryInfo_v2", 1, cuda::NVML_ERROR_GPU_IS_LOST);
  EXPECT_EQ((*backend)->UsedBytes().status().code(), StatusCode::kUnavailable);
}

TEST_F(CudaTest, AnErrorThatNamesNoCauseIsExplainedByNvml) {
  auto backend = *Make();
  Handle handle = *backend->Create(MiB(2));
  const FakeCudaBooks before = fake_.Books();
  for (int lost : {cuda::NVML_ERROR_GPU_IS_LOST,
                   cuda::NVML_ERROR_RESET_REQUIRED}) {
    fake_.Fail("cuMemCreate", 1, cuda::CUDA_ERROR_UNKNOWN);
    fake_.Fail("nvmlDeviceGetMemoryInfo_v2", 1, lost);
    const absl::Status made = backend->Create(MiB(2)).status();
    EXPECT_TRUE(IsDeviceLost(made)) << made;
    EXPECT_TRUE(Has(made, "cuMemCreate") && Has(made, "UNKNOWN")) << made;
    EXPECT_TRUE(Has(made, "nvmlDeviceGetMemoryInfo_v2")) << made;
    fake_.Fail("cuMemExportToShareableHandle", 1,
               cuda::CUDA_ERROR_OPERATING_SYSTEM);
    fake_.Fail("nvmlDeviceGetMemoryInfo_v2", 1, lost);
    EXPECT_TRUE(IsDeviceLost(backend->Export(handle).status()));
    EXPECT_EQ(fake_.Books(), before);
  }
  fake_.Fail("cuMemCreate", 1, cuda::CUDA_ERROR_UNKNOWN);
  EXPECT_FALSE(IsDeviceLost(backend->Create(MiB(2)).status()))
      << "NVML knows of nothing";
  EXPECT_TRUE(backend->Create(MiB(2)).ok());
}

TEST_F(CudaTest, AGpuThatIsLostAtTheStartIsRefused) {
  fake_.Lose(cuda::CUDA_ERROR_NO_DEVICE);
  auto backend = Make();
  EXPECT_FALSE(backend.ok());
  EXPECT_TRUE(IsDeviceLost(backend.status())) << backend.status();
  fake_.Lose(0);
  EXPECT_TRUE(Make().ok());
}

TEST_F(CudaTest, WhatIsNoHandleOfItsIsNotExported) {
  auto backend = *Make();
  EXPECT_EQ(backend->Export(Handle()).status().code(),
            StatusCode::kInvalidArgument);
}

TEST_F(CudaTest, ARefusalForLackOfMemoryHasTheFigures) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  fake_.SetForeign(0, (GiB(16) - MiB(6)).count());
  absl::Status status = (*backend)->Create(MiB(8)).status();
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(Has(status, "asked for 8388608, free 6291456")) << status;
  EXPECT_EQ(*(*backend)->UsedBytes(), GiB(16) - MiB(6));
  EXPECT_TRUE((*backend)->Create(MiB(6)).ok());

  fake_.Fail("nvmlDeviceGetMemoryInfo_v2", 1, cuda::NVML_ERROR_UNKNOWN);
  EXPECT_EQ((*backend)->Create(MiB(8)).status().code(),
            StatusCode::kResourceExhausted);
}

TEST_F(CudaTest, WithoutDescriptorsItSaysHowToGetSome) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  auto handle = (*backend)->Create(MiB(2));
  ASSERT_TRUE(handle.ok()) << handle.status();
  rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit none = {.rlim_cur = 0, .rlim_max = limit.rlim_max};
  setrlimit(RLIMIT_NOFILE, &none);
  absl::Status status = (*backend)->Export(*handle).status();
  setrlimit(RLIMIT_NOFILE, &limit);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(Has(status, "LimitNOFILE")) << status;
}

TEST_F(CudaTest, KeepsSoManyDescriptorsUntilTheirHandlesGo) {
  auto backend = *CudaBackend::Create(*CudaDriver::Load(fake_.paths()),
                                      {.kept_descriptors = 2});
  Handle handles[3];
  for (Handle& handle : handles) {
    handle = *backend->Create(MiB(2));
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(backend->Export(handle).ok());
  }
  EXPECT_EQ(backend->kept_descriptors(), 2);
  EXPECT_EQ(backend->counts().exports, 1 + 1 + 3);
  handles[0].Reset();
  EXPECT_EQ(backend->kept_descriptors(), 1);
  EXPECT_EQ(*backend->UsedBytes(), MiB(4)) << "a kept one keeps no memory";
  EXPECT_TRUE(backend->Export(handles[2]).ok());
  EXPECT_EQ(backend->kept_descriptors(), 2);
}

// The first descriptor of a process and the last one are dear.
TEST_F(CudaTest, WhileInUseThereIsAlwaysADescriptor) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  auto observer = Make();
  ASSERT_TRUE(observer.ok()) << observer.status();
  for (int round = 0; round < 2; ++round) {
    (*backend)->SetInUse(true);
    (*backend)->SetInUse(true);
    EXPECT_EQ((*backend)->counts().exports, round + 1);
    EXPECT_EQ(*(*backend)->UsedBytes(), Bytes(0)) << "its own does not count";
    EXPECT_EQ(*(*observer)->UsedBytes(), (*backend)->info().granularity);
    {
      Handle handle = *(*backend)->Create(MiB(4));
      EXPECT_EQ(*(*backend)->UsedBytes(), MiB(4));
    }
    (*backend)->SetInUse(false);
    (*backend)->SetInUse(false);
    EXPECT_EQ(*(*observer)->UsedBytes(), Bytes(0));
  }
  (*backend)->SetInUse(true);
  backend->reset();
  EXPECT_EQ(*(*observer)->UsedBytes(), Bytes(0)) << "it goes with the backend";
}

TEST_F(CudaTest, InUseWithoutADescriptorOfItsOwnItWorksAllTheSame) {
  for (const char* call : {"cuMemCreate", "cuMemExportToShareableHandle"}) {
    auto backend = Make();
    ASSERT_TRUE(backend.ok()) << backend.status();
    fake_.Fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    (*backend)->SetInUse(true);
    EXPECT_EQ(*(*backend)->UsedBytes(), Bytes(0));
    Handle handle = *(*backend)->Create(MiB(2));
    EXPECT_TRUE((*backend)->Export(handle).ok());
    // Until somebody comes again.
    (*backend)->SetInUse(true);
    EXPECT_EQ(*(*backend)->UsedBytes(), MiB(2));
    EXPECT_EQ((*backend)->counts().creates, 3);
  }
}

TEST_F(CudaTest, WhatIsPreparedIsExportedAlready) {
  auto backend = *CudaBackend::Create(*CudaDriver::Load(fake_.paths()),
                                      {.kept_descriptors = 1});
  Handle first = *backend->Create(MiB(2));
  Handle second = *backend->Create(MiB(2));
  fake_.Fail("cuMemExportToShareableHandle", 1, cuda::CUDA_ERROR_UNKNOWN);
  backend->Prepare(first);
  EXPECT_EQ(backend->kept_descriptors(), 0) << "its Export will say why";
  backend->Prepare(first);
  EXPECT_EQ(backend->counts().exports, 2);
  EXPECT_TRUE(backend->Export(first).ok());
  EXPECT_EQ(backend->counts().exports, 2);
  // No more are kept: it would be for nothing.
  backend->Prepare(second);
  EXPECT_EQ(backend->counts().exports, 2);
}

TEST_F(CudaTest, WhereDescriptorsAreShortTheKeptOnesGo) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  Handle first = *(*backend)->Create(MiB(2));
  Handle second = *(*backend)->Create(MiB(2));
  ASSERT_TRUE((*backend)->Export(first).ok());
  ASSERT_TRUE((*backend)->Export(second).ok());
  ASSERT_EQ((*backend)->kept_descriptors(), 2);
  // No other descriptor than those that are open now.
  std::vector<UniqueFd> filler;
  rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit few = {.rlim_cur = 64, .rlim_max = limit.rlim_max};
  setrlimit(RLIMIT_NOFILE, &few);
  for (;;) {
    UniqueFd fd(open("/dev/null", O_RDONLY | O_CLOEXEC));
    if (!fd) break;
    filler.push_back(std::move(fd));
  }
  absl::StatusOr<UniqueFd> exported = (*backend)->Export(second);
  setrlimit(RLIMIT_NOFILE, &limit);
  EXPECT_TRUE(exported.ok()) << exported.status();
  EXPECT_LT((*backend)->kept_descriptors(), 2);
}

TEST_F(CudaTest, SaysWhichProcessUsesHowMuch) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_TRUE((*backend)->UsedByProcess()->empty());
  // More than are asked for at first, and one that is not known.
  for (uint32_t pid = 1; pid <= 40; ++pid) fake_.SetProcess(pid, 1000 * pid);
  fake_.SetProcess(41, -1);
  auto used = (*backend)->UsedByProcess();
  ASSERT_TRUE(used.ok()) << used.status();
  EXPECT_EQ(used->size(), 40);
  EXPECT_EQ(used->at(40), Bytes(40'000));
  fake_.Fail("nvmlDeviceGetComputeRunningProcesses_v3", 1,
             cuda::NVML_ERROR_GPU_IS_LOST);
  EXPECT_EQ((*backend)->UsedByProcess().status().code(),
            StatusCode::kUnavailable);
}

TEST_F(CudaTest, AReleaseThatFailsIsCountedAndHarmless) {
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  auto handle = (*backend)->Create(MiB(2));
  ASSERT_TRUE(handle.ok()) << handle.status();
  fake_.Fail("cuMemRelease", 1, cuda::CUDA_ERROR_UNKNOWN);
  handle->Reset();
  EXPECT_EQ((*backend)->counts().failed_releases, 1);
  EXPECT_EQ(*(*backend)->UsedBytes(), MiB(2)) << "the driver still has it";
  EXPECT_TRUE((*backend)->Create(MiB(2)).ok());
}

// --- Several processes ------------------------------------------------------

// Runs `body` in a process of its own, killed once it says that it is done.
class OtherProcess {
 public:
  template <typename Body>
  explicit OtherProcess(Body body) {
    int pipe_ends[2];
    KVB_CHECK(pipe2(pipe_ends, O_CLOEXEC) == 0);
    pid_ = fork();
    if (pid_ == 0) {
      const bool ok = body();
      char byte = ok ? 'y' : 'n';
      if (write(pipe_ends[1], &byte, 1) == 1) pause();
      _exit(1);
    }
    close(pipe_ends[1]);
    char byte = 0;
    ok_ = read(pipe_ends[0], &byte, 1) == 1 && byte == 'y';
    close(pipe_ends[0]);
  }
  ~OtherProcess() { Kill(); }

  bool ok() const { return ok_; }
  void Kill() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  pid_t pid_;
  bool ok_ = false;
};

TEST_F(CudaTest, AnImporterThatIsKilledGivesItsMemoryBack) {
  TempFolder machine("_cuda");
  Set("KVBROKER_FAKE_CUDA_DIR", machine.path());
  auto backend = Make();
  ASSERT_TRUE(backend.ok()) << backend.status();
  auto handle = (*backend)->Create(MiB(4));
  ASSERT_TRUE(handle.ok()) << handle.status();
  auto fd = (*backend)->Export(*handle);
  ASSERT_TRUE(fd.ok()) << fd.status();
  // A process with a driver of its own, as an engine is: what it inherited of
  // this one's is dropped first.
  OtherProcess importer([&] {
    fake_.Reset();
    auto driver = Load();
    if (!driver.ok()) return false;
    cuda::CUcontext context;
    if ((*driver)->cuda().cuDevicePrimaryCtxRetain(&context, 0) != 0) {
      return false;
    }
    auto import =
        CudaImport::Create((*driver)->cuda(), context, 0, fd->get(), MiB(4));
    return import.ok() && (*import)->Write("mine", 4).ok() &&
           (import->release(), driver->release(), true);
  });
  ASSERT_TRUE(importer.ok());
  handle->Reset();
  fd->Reset();
  EXPECT_EQ(*(*backend)->UsedBytes(), MiB(4));
  importer.Kill();
  EXPECT_EQ(*(*backend)->UsedBytes(), Bytes(0));
}

TEST_F(CudaTest, ACreatorThatIsKilledGivesItsMemoryBack) {
  TempFolder machine("_cuda");
  Set("KVBROKER_FAKE_CUDA_DIR", machine.path());
  auto observer = Make();
  ASSERT_TRUE(observer.ok()) << observer.status();
  OtherProcess creator([&] {
    fake_.Reset();
    auto backend = Make();
    if (!backend.ok()) return false;
    auto handle = (*backend)->Create(MiB(4));
    // For the rest of its life.
    new Handle(*std::move(handle));
    return backend->release() != nullptr;
  });
  ASSERT_TRUE(creator.ok());
  EXPECT_EQ(*(*observer)->UsedBytes(), MiB(4));
  creator.Kill();
  EXPECT_EQ(*(*observer)->UsedBytes(), Bytes(0));
}

}  // namespace
}  // namespace kvbroker
