#include "broker/device/fault_injecting_backend.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "broker/device/backend_conformance.h"
#include "broker/device/fake_backend.h"
#include "broker/device/host_backend.h"
#include "broker/device/host_import.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using Call = FaultInjectingBackend::Call;

// Without a plan the decorator is as good as the backend behind it.
class DecoratedHarness : public BackendHarness {
 public:
  Backend& backend() override { return decorator_; }
  Bytes handle_size() const override { return KiB(64); }
  absl::StatusOr<std::unique_ptr<ImportedHandle>> Import(int fd,
                                                         Bytes size) override {
    return HostImport::Create(fd, size);
  }

 private:
  std::unique_ptr<HostBackend> host_ =
      *HostBackend::Create(HostBackendOptions{.total = MiB(1)});
  FaultInjectingBackend decorator_{*host_, /*seed=*/1};
};

INSTANTIATE_TEST_SUITE_P(
    WithoutFaults, BackendConformanceTest,
    testing::Values(ConformanceParam{
        "decorator", [] { return std::make_unique<DecoratedHarness>(); }}),
    ConformanceParamName);

class FaultInjectingBackendTest : public testing::Test {
 protected:
  bool Creates() { return backend_.Create(KiB(4)).ok(); }

  FakeBackend device_;
  FaultInjectingBackend backend_{device_, /*seed=*/42};
};

TEST_F(FaultInjectingBackendTest, FailsTheCallsNamed) {
  backend_.SetPlan(Call::kCreate,
                   {.calls = {1, 3}, .status = absl::InternalError("driver")});
  EXPECT_EQ(backend_.Create(KiB(4)).status(), absl::InternalError("driver"));
  EXPECT_TRUE(Creates());
  EXPECT_FALSE(Creates());
  EXPECT_TRUE(Creates());
  EXPECT_EQ(backend_.calls(Call::kCreate), 4);
  EXPECT_EQ(backend_.faults(Call::kCreate), 2);
  EXPECT_EQ(device_.counts().creates, 2);
}

TEST_F(FaultInjectingBackendTest, EachKindOfCallHasItsOwnPlan) {
  Handle handle = *backend_.Create(KiB(4));
  backend_.SetPlan(Call::kExport, {.calls = {1}});
  backend_.SetPlan(Call::kUsedBytes,
                   {.calls = {2}, .status = absl::UnavailableError("nvml")});
  EXPECT_EQ(backend_.Export(handle).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(backend_.Export(handle).ok());
  EXPECT_EQ(*backend_.UsedBytes(), KiB(4));
  EXPECT_EQ(backend_.UsedBytes().status(), absl::UnavailableError("nvml"));
  EXPECT_TRUE(Creates());
  EXPECT_EQ(backend_.faults(Call::kCreate), 0);
  EXPECT_EQ(backend_.faults(Call::kExport), 1);
  EXPECT_EQ(backend_.faults(Call::kUsedBytes), 1);
  EXPECT_EQ(device_.counts().exports, 1);
}

TEST_F(FaultInjectingBackendTest, ANewPlanCountsFromTheStart) {
  backend_.SetPlan(Call::kCreate, {.probability = 1});
  EXPECT_FALSE(Creates());
  backend_.SetPlan(Call::kCreate, {.calls = {2}});
  EXPECT_EQ(backend_.calls(Call::kCreate), 0);
  EXPECT_EQ(backend_.faults(Call::kCreate), 0);
  EXPECT_TRUE(Creates());
  EXPECT_FALSE(Creates());
  backend_.SetPlan(Call::kCreate, {});
  EXPECT_TRUE(Creates());
  EXPECT_TRUE(Creates());
}

TEST_F(FaultInjectingBackendTest, TheSeedDecidesWhichCallsFail) {
  auto faults = [](uint64_t seed) {
    FakeBackend device;
    FaultInjectingBackend backend(device, seed);
    backend.SetPlan(Call::kCreate, {.probability = 0.25});
    std::vector<bool> failed;
    for (int i = 0; i < 1000; ++i) {
      failed.push_back(!backend.Create(KiB(4)).ok());
    }
    EXPECT_EQ(std::count(failed.begin(), failed.end(), true),
              backend.faults(Call::kCreate));
    EXPECT_GT(backend.faults(Call::kCreate), 150);
    EXPECT_LT(backend.faults(Call::kCreate), 350);
    return failed;
  };
  EXPECT_EQ(faults(7), faults(7));
  EXPECT_NE(faults(7), faults(8));
}

}  // namespace
}  // namespace kvbroker
