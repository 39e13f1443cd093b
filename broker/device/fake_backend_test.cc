#include "broker/device/fake_backend.h"

#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "broker/base/status_macros.h"
#include "broker/device/backend_conformance.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using Descriptors = FakeBackendOptions::Descriptors;

class FakeHarness : public BackendHarness {
 public:
  explicit FakeHarness(bool fixed_addresses)
      : backend_({.total = MiB(16),
                  .descriptors = Descriptors::kReal,
                  .fixed_addresses = fixed_addresses}) {}
  ~FakeHarness() override {
    EXPECT_TRUE(backend_.CheckInvariants().ok()) << backend_.CheckInvariants();
  }
  Backend& backend() override { return backend_; }
  Bytes handle_size() const override { return MiB(2); }
  Traits traits() const override {
    return {.importers_keep_bytes = !backend_.info().fixed_addresses()};
  }
  absl::StatusOr<std::unique_ptr<ImportedHandle>> Import(int fd,
                                                         Bytes size) override {
    ASSIGN_OR_RETURN(uint64_t token, backend_.Import(fd));
    auto imported = std::make_unique<FakeImport>(backend_, token);
    if (backend_.SizeOf(token) != size) {
      return absl::InvalidArgumentError(
          "a handle is mapped whole or not at all");
    }
    return imported;
  }

 private:
  class FakeImport : public ImportedHandle {
   public:
    FakeImport(FakeBackend& backend, uint64_t token)
        : backend_(backend), token_(token) {}
    ~FakeImport() override { EXPECT_TRUE(backend_.Unimport(token_).ok()); }

   private:
    FakeBackend& backend_;
    const uint64_t token_;
  };

  FakeBackend backend_;
};

INSTANTIATE_TEST_SUITE_P(
    Fake, BackendConformanceTest,
    testing::Values(
        ConformanceParam{"fake",
                         [] { return std::make_unique<FakeHarness>(false); }},
        ConformanceParam{"slab",
                         [] { return std::make_unique<FakeHarness>(true); }}),
    ConformanceParamName);

TEST(FakeBackendTest, NumbersCostNoDescriptorAndCanBeImported) {
  FakeBackend device({.total = MiB(1)});
  const int before = CountOpenDescriptors();
  Handle handle = *device.Create(KiB(4));
  UniqueFd fd = *device.Export(handle);
  EXPECT_EQ(CountOpenDescriptors(), before);
  EXPECT_EQ(*device.Import(fd.get()), handle.token());
  EXPECT_EQ(device.Imports(handle.token()), 1);
  fd.Reset();  // Only a number: nothing to close.
  handle.Reset();
  EXPECT_EQ(*device.UsedBytes(), KiB(4));
  EXPECT_EQ(device.live_handles(), 0);
  EXPECT_TRUE(device.Unimport(1).ok());
  EXPECT_EQ(*device.UsedBytes(), Bytes(0));
  EXPECT_TRUE(device.CheckInvariants().ok()) << device.CheckInvariants();
}

TEST(FakeBackendTest, ANumberIsNoReference) {
  FakeBackend device;
  Handle handle = *device.Create(KiB(4));
  UniqueFd fd = *device.Export(handle);
  handle.Reset();
  EXPECT_EQ(*device.UsedBytes(), Bytes(0));
  EXPECT_EQ(device.Import(fd.get()).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_TRUE(device.CheckInvariants().ok()) << device.CheckInvariants();
}

TEST(FakeBackendTest, ImportsOnlyWhatItExported) {
  for (Descriptors kind : {Descriptors::kNumbers, Descriptors::kReal}) {
    FakeBackend device({.descriptors = kind});
    for (int fd : {-1, 0, 1, 1 << 30, 1 << 20}) {
      EXPECT_EQ(device.Import(fd).status().code(), absl::StatusCode::kNotFound);
    }
  }
}

TEST(FakeBackendTest, UnimportNeedsAnImport) {
  FakeBackend device;
  Handle handle = *device.Create(KiB(4));
  EXPECT_EQ(device.Unimport(handle.token()).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(device.Unimport(handle.token() + 1).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(FakeBackendTest, FailsTheCreatesItIsToldTo) {
  FakeBackend device;
  device.FailNextCreate(absl::InternalError("first"));
  device.FailNextCreate(absl::UnavailableError("second"));
  EXPECT_EQ(device.Create(Bytes(1)).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(device.Create(KiB(4)).status(), absl::InternalError("first"));
  EXPECT_EQ(device.Create(KiB(4)).status(), absl::UnavailableError("second"));
  EXPECT_TRUE(device.Create(KiB(4)).ok());
  EXPECT_EQ(device.counts().creates, 1);
}

TEST(FakeBackendTest, TheHookRunsInsideCreateWithoutALock) {
  FakeBackend device({.total = MiB(1)});
  std::vector<Handle> inner;
  device.OnCreate([&](Bytes size) {
    EXPECT_EQ(size, KiB(8));
    device.OnCreate(nullptr);
    inner.push_back(*device.Create(KiB(4)));
    EXPECT_EQ(*device.UsedBytes(), KiB(4));
  });
  Handle outer = *device.Create(KiB(8));
  EXPECT_EQ(inner.size(), 1);
  EXPECT_EQ(*device.UsedBytes(), KiB(12));
}

TEST(FakeBackendTest, ForeignBytesTakeRoom) {
  FakeBackend device({.total = MiB(1)});
  device.SetForeignBytes(KiB(1020));
  EXPECT_EQ(*device.UsedBytes(), KiB(1020));
  Handle handle = *device.Create(KiB(4));
  EXPECT_EQ(device.Create(KiB(4)).status().code(),
            absl::StatusCode::kResourceExhausted);
  device.SetForeignBytes(Bytes(0));
  EXPECT_TRUE(device.Create(KiB(4)).ok());
}

TEST(FakeBackendTest, CountsWhatSucceeded) {
  FakeBackend device;
  Handle a = *device.Create(KiB(4));
  Handle b = *device.Create(KiB(4));
  UniqueFd fd = *device.Export(a);
  ASSERT_TRUE(device.Import(fd.get()).ok());
  ASSERT_TRUE(device.Unimport(a.token()).ok());
  EXPECT_TRUE(device.IsLive(b.token()));
  const uint64_t token = b.token();
  b.Reset();
  EXPECT_FALSE(device.IsLive(token));
  EXPECT_EQ(device.SizeOf(token), Bytes(0));
  FakeBackend::Counts counts = device.counts();
  EXPECT_EQ(counts.creates, 2);
  EXPECT_EQ(counts.exports, 1);
  EXPECT_EQ(counts.releases, 1);
  EXPECT_EQ(counts.imports, 1);
  EXPECT_EQ(counts.unimports, 1);
  EXPECT_EQ(device.live_handles(), 1);
}

TEST(FakeBackendTest, BooksAddUpUnderRandomUse) {
  for (Descriptors kind : {Descriptors::kNumbers, Descriptors::kReal}) {
    const uint64_t seed = testing::UnitTest::GetInstance()->random_seed();
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    FakeBackend device({.total = KiB(256), .descriptors = kind});
    std::vector<Handle> handles;
    std::vector<UniqueFd> fds;
    std::vector<uint64_t> imports;
    auto pick = [&](auto& from) {
      std::swap(from[random() % from.size()], from.back());
      auto last = std::move(from.back());
      from.pop_back();
      return last;
    };
    for (int i = 0; i < 5000; ++i) {
      switch (random() % 6) {
        case 0: {
          auto handle = device.Create(KiB(4) * (1 + random() % 8));
          if (handle.ok()) handles.push_back(*std::move(handle));
          break;
        }
        case 1:
          if (!handles.empty()) pick(handles);
          break;
        case 2:
          if (handles.empty()) break;
          fds.push_back(*device.Export(handles[random() % handles.size()]));
          break;
        case 3:
          if (!fds.empty()) pick(fds);
          break;
        case 4: {
          if (fds.empty()) break;
          auto token = device.Import(fds[random() % fds.size()].get());
          EXPECT_TRUE(token.ok() || kind == Descriptors::kNumbers);
          if (token.ok()) imports.push_back(*token);
          break;
        }
        case 5:
          if (imports.empty()) break;
          ASSERT_TRUE(device.Unimport(pick(imports)).ok());
          break;
      }
      ASSERT_TRUE(device.CheckInvariants().ok()) << device.CheckInvariants();
    }
    handles.clear();
    fds.clear();
    while (!imports.empty()) ASSERT_TRUE(device.Unimport(pick(imports)).ok());
    EXPECT_EQ(*device.UsedBytes(), Bytes(0));
    EXPECT_TRUE(device.CheckInvariants().ok()) << device.CheckInvariants();
  }
}

}  // namespace
}  // namespace kvbroker
