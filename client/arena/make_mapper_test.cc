#include "client/arena/make_mapper.h"

#include <cstdlib>

#include "client/arena/cuda_mapper.h"
#include "client/arena/gpu_mapper.h"
#include "client/arena/host_mapper.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker::client {
namespace {

constexpr char kGpu[] = "GPU-fa6e0000-0000-4000-8000-000000000000";

const PoolGeometry kGeometry = {
    .handle_bytes = MiB(2), .handles_per_page = 1, .max_pages = 4};

TEST(MakeMapperTest, ADeviceThatIsNoGpuHasTheHostsMemory) {
  for (const char* device : {"HOST-42", ""}) {
    auto mapper = MakeMapper("", device, kGeometry);
    ASSERT_TRUE(mapper.ok()) << mapper.status();
    EXPECT_NE(dynamic_cast<HostMapper*>(mapper->get()), nullptr);
  }
}

TEST(MakeMapperTest, HostMemoryNeedsNoDriver) {
  auto mapper = MakeMapper("host", "HOST-42", kGeometry);
  ASSERT_TRUE(mapper.ok()) << mapper.status();
  EXPECT_NE(dynamic_cast<HostMapper*>(mapper->get()), nullptr);
}

TEST(MakeMapperTest, AnUnknownKindIsAnsweredWithTheKnownOnes) {
  auto mapper = MakeMapper("rocm", "HOST-42", kGeometry);
  EXPECT_EQ(mapper.status(),
            absl::InvalidArgumentError(
                "a backend is one of host, cuda, cuda_ipc; it is "
                "\"rocm\""));
}

TEST(MakeMapperTest, CudaMemoryIsMappedOnTheGpuOfThatNameOnly) {
  // Before there is a driver, and then with one: a failure is not remembered.
  setenv("KVBROKER_CUDA_DRIVER", "/nowhere/libcuda.so.1", 1);
  EXPECT_TRUE(
      absl::IsNotFound(MakeMapper("cuda", kGpu, kGeometry).status()));
  FakeCuda fake = FakeCuda::Open();
  setenv("KVBROKER_CUDA_DRIVER", fake.paths().cuda.c_str(), 1);
  setenv("KVBROKER_NVML", fake.paths().nvml.c_str(), 1);
  {
    auto mapper = MakeMapper("cuda", kGpu, kGeometry);
    ASSERT_TRUE(mapper.ok()) << mapper.status();
    EXPECT_NE(dynamic_cast<CudaMapper*>(mapper->get()), nullptr);
  }
  for (const char* backend : {"", "cuda_ipc"}) {
    auto mapper = MakeMapper(backend, kGpu, kGeometry);
    ASSERT_TRUE(mapper.ok()) << mapper.status();
    EXPECT_NE(dynamic_cast<GpuMapper*>(mapper->get()), nullptr);
  }
  // Guard mode comes with what the broker lends.
  PoolGeometry per_layer = kGeometry;
  per_layer.layout = Layout::kPerLayer;
  per_layer.handles_per_page = 2;
  EXPECT_TRUE(absl::IsInvalidArgument(
      (*MakeMapper("", kGpu, per_layer))->Guard()));
  auto guarded = *MakeMapper("", kGpu, kGeometry);
  EXPECT_EQ(guarded->Guard(), absl::OkStatus());
  EXPECT_EQ(fake.Books().mappings, 0);
  EXPECT_EQ(guarded->Begin({.backend = "cuda"}), absl::OkStatus());
  EXPECT_EQ(fake.Books().mappings, kGeometry.max_pages);
  guarded.reset();
  EXPECT_EQ(fake.Books().mappings, 0);
  auto other = MakeMapper("cuda", "GPU-00000000-0000-0000-0000-000000000000",
                          kGeometry);
  EXPECT_TRUE(absl::IsNotFound(other.status())) << other.status();
}

}  // namespace
}  // namespace kvbroker::client
