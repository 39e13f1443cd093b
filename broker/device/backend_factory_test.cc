#include "broker/device/backend_factory.h"

#include <string>

#include "gtest/gtest.h"

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

TEST(BackendFactoryTest, AutoIsTheHostAndSaysWhy) {
  absl::StatusOr<ChosenBackend> chosen = MakeBackend({});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  EXPECT_EQ(chosen->backend->info().name, "host");
  EXPECT_NE(chosen->reason.find("no CUDA backend in this build"),
            std::string::npos);
}

TEST(BackendFactoryTest, CudaIsNotInThisBuild) {
  for (const char* name : {"cuda", "cuda_ipc"}) {
    absl::StatusOr<ChosenBackend> chosen = MakeBackend({.name = name});
    EXPECT_EQ(chosen.status().code(), absl::StatusCode::kUnimplemented);
    EXPECT_NE(chosen.status().message().find(name), absl::string_view::npos);
  }
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
