#include "broker/device/backend_factory.h"

#include <cstdlib>
#include <string>

#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker {
namespace {

TEST(BackendFactoryTest, MakesTheHostBackendByName) {
  absl::StatusOr<ChosenBackend> chosen = MakeBackend(
      {.name = "host", .total = MiB(64), .device_uuid = "HOST-test"});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().name, "host");
  EXPECT_EQ(chosen->backend->info().total, MiB(64));
  EXPECT_EQ(chosen->backend->info().device_uuid, "HOST-test");
  EXPECT_EQ(chosen->reason.substr(0, 15), "host: asked for");
}

class BackendFactoryCudaTest : public testing::Test {
 protected:
  BackendFactoryCudaTest() {
    setenv("KVBROKER_CUDA_DRIVER", fake_.paths().cuda.c_str(), 1);
    setenv("KVBROKER_NVML", fake_.paths().nvml.c_str(), 1);
    fake_.Reset();
  }
  ~BackendFactoryCudaTest() override {
    for (const char* name :
         {"KVBROKER_CUDA_DRIVER", "KVBROKER_NVML", "KVBROKER_FAKE_CUDA_DEVICES",
          "KVBROKER_FAKE_CUDA_VMM", "KVBROKER_FAKE_CUDA_MIG"}) {
      unsetenv(name);
    }
    fake_.Reset();
  }
  void Set(const char* name, const char* value) {
    setenv(name, value, 1);
    fake_.Reset();
  }

  FakeCuda fake_ = FakeCuda::Open();
};

TEST_F(BackendFactoryCudaTest, CudaByNameOrByItsGpuSaysWhichOne) {
  for (const BackendOptions& options :
       {BackendOptions{.name = "cuda"}, BackendOptions{.gpu = "0"}}) {
    absl::StatusOr<ChosenBackend> chosen = MakeBackend(options);
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(chosen->backend->info().name, "cuda");
    EXPECT_NE(chosen->reason.find("Fake GPU, driver 580.0.fake, CUDA 13.0"),
              std::string::npos)
        << chosen->reason;
  }
}

TEST_F(BackendFactoryCudaTest, AutoIsCudaWhereThatCanServe) {
  absl::StatusOr<ChosenBackend> chosen = MakeBackend({});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().name, "cuda");
  EXPECT_NE(chosen->reason.find("the best here"), std::string::npos)
      << chosen->reason;
  // What is for the host alone asks for the host.
  chosen = MakeBackend({.device_uuid = "HOST-mine"});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().name, "host");
}

// Either way a driver says that it has none.
TEST_F(BackendFactoryCudaTest, AutoIsCudaIpcWithoutVmmAndSaysWhy) {
  Set("KVBROKER_FAKE_CUDA_VMM", "0");
  absl::StatusOr<ChosenBackend> chosen =
      MakeBackend({.slab = [](Bytes, Bytes) { return MiB(64); }});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().name, "cuda_ipc");
  EXPECT_EQ(chosen->backend->info().total, MiB(64));
  EXPECT_EQ(chosen->reason.rfind("cuda_ipc: Fake GPU", 0), 0u)
      << chosen->reason;
  EXPECT_NE(chosen->reason.find("has no virtual memory management"),
            std::string::npos)
      << chosen->reason;
  chosen->backend.reset();

  Set("KVBROKER_FAKE_CUDA_VMM", "1");
  const FakeCuda without = FakeCuda::Open("libfake_cuda_no_vmm.so");
  without.Reset();
  setenv("KVBROKER_CUDA_DRIVER", without.paths().cuda.c_str(), 1);
  setenv("KVBROKER_NVML", without.paths().nvml.c_str(), 1);
  chosen = MakeBackend({.slab = [](Bytes, Bytes) { return MiB(64); }});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().name, "cuda_ipc");
  EXPECT_NE(chosen->reason.find("it has no cuMemGetAllocationGranularity"),
            std::string::npos)
      << chosen->reason;
}

TEST_F(BackendFactoryCudaTest, CudaIpcByNameServesAnyGpu) {
  absl::StatusOr<ChosenBackend> chosen = MakeBackend({.name = "cuda_ipc"});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().name, "cuda_ipc");
  EXPECT_EQ(chosen->backend->info().total, GiB(16)) << "all that is free";
  EXPECT_NE(chosen->reason.find("cuda_ipc: asked for"), std::string::npos)
      << chosen->reason;
}

// A host's broker in its place would only be another surprise.
TEST_F(BackendFactoryCudaTest, AutoDoesNotPassOverAGpuWhoseSlabCannotBeMade) {
  Set("KVBROKER_FAKE_CUDA_VMM", "0");
  fake_.SetForeign(0, GiB(16).count());
  EXPECT_EQ(MakeBackend({.slab = [](Bytes, Bytes) { return GiB(1); }})
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(
      MakeBackend({.claim =
                       [](const std::string&) {
                         return absl::AlreadyExistsError("another broker's");
                       }})
          .status(),
      absl::AlreadyExistsError("another broker's"));
}

TEST_F(BackendFactoryCudaTest, AutoIsTheHostElseAndSaysWhy) {
  auto why_host = [] {
    absl::StatusOr<ChosenBackend> chosen = MakeBackend({});
    if (!chosen.ok()) return chosen.status().ToString();
    return chosen->backend->info().name + ": " + chosen->reason;
  };
  Set("KVBROKER_FAKE_CUDA_MIG", "1");
  EXPECT_NE(why_host().find("host: Fake GPU"), std::string::npos) << why_host();
  EXPECT_NE(why_host().find("is in MIG mode"), std::string::npos) << why_host();
  Set("KVBROKER_CUDA_DRIVER", "/nowhere/libcuda.so.1");
  EXPECT_NE(why_host().find("host: no CUDA driver"), std::string::npos)
      << why_host();
}

TEST_F(BackendFactoryCudaTest, AutoDoesNotChooseAmongGpus) {
  Set("KVBROKER_FAKE_CUDA_DEVICES", "2");
  EXPECT_EQ(MakeBackend({}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(BackendFactoryCudaTest, WhoAsksForAGpuIsNotGivenTheHost) {
  Set("KVBROKER_FAKE_CUDA_VMM", "0");
  absl::Status status = MakeBackend({.name = "cuda"}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("may be auto or cuda_ipc"),
            absl::string_view::npos)
      << status;
  Set("KVBROKER_FAKE_CUDA_MIG", "1");
  EXPECT_EQ(MakeBackend({.gpu = "0"}).status().code(),
            absl::StatusCode::kUnimplemented);
  Set("KVBROKER_CUDA_DRIVER", "/nowhere/libcuda.so.1");
  EXPECT_EQ(MakeBackend({.name = "cuda"}).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(BackendFactoryCudaTest, OneOfSeveralGpusMustBeNamed) {
  Set("KVBROKER_FAKE_CUDA_DEVICES", "2");
  EXPECT_EQ(MakeBackend({.name = "cuda"}).status().code(),
            absl::StatusCode::kInvalidArgument);
  absl::StatusOr<ChosenBackend> chosen = MakeBackend({.gpu = "1"});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().device_uuid,
            "GPU-fa6e0000-0000-4000-8000-000000000001");
}

TEST(BackendFactoryTest, AnUnknownNameIsAnsweredWithTheKnownOnes) {
  absl::StatusOr<ChosenBackend> chosen = MakeBackend({.name = "rocm"});
  EXPECT_EQ(chosen.status(),
            absl::InvalidArgumentError("a backend is one of auto, host, cuda, "
                                       "cuda_ipc; it is \"rocm\""));
}

TEST(BackendFactoryTest, AWrongOptionIsTheBackendsToRefuse) {
  EXPECT_EQ(MakeBackend({.name = "host", .total = Bytes(0)}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvbroker
