// The conformance suite: what every Backend must do, whatever its memory is.
//
// A backend brings a BackendHarness, which makes the device and plays the
// importing process, and instantiates the suite in its own test:
//
//   INSTANTIATE_TEST_SUITE_P(Host, BackendConformanceTest,
//                            testing::Values(ConformanceParam{
//                                "host", [] { return NewHostHarness(); }}),
//                            ConformanceParamName);
#ifndef KVBROKER_BROKER_DEVICE_BACKEND_CONFORMANCE_H_
#define KVBROKER_BROKER_DEVICE_BACKEND_CONFORMANCE_H_

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "broker/base/bytes.h"
#include "broker/base/unique_fd.h"
#include "broker/device/backend.h"
#include "gtest/gtest.h"

namespace kvbroker {

// One import of one handle, mapped whole; destroying it unmaps and gives the
// reference up.
class ImportedHandle {
 public:
  virtual ~ImportedHandle() = default;
  // The handle's memory. Empty where the backend has none.
  virtual absl::Span<uint8_t> memory() { return {}; }
};

// What the suite has to know about a backend. A new one for each test.
class BackendHarness {
 public:
  virtual ~BackendHarness() = default;

  // A device that nobody else uses meanwhile, with room for at least four
  // handles of `handle_size()` and not for more than a few thousand.
  virtual Backend& backend() = 0;
  virtual Bytes handle_size() const = 0;

  // Where backends differ.
  struct Traits {
    // A handle's bytes are in use as long as anybody has a descriptor, import
    // or mapping of it; else as long as its creator does.
    bool importers_keep_bytes = true;
  };
  virtual Traits traits() const { return {}; }

  // Imports the whole of a handle of `size` bytes, as another process would.
  // Fails where the handle behind `fd` has another size. `fd` stays the
  // caller's.
  virtual absl::StatusOr<std::unique_ptr<ImportedHandle>> Import(
      int fd, Bytes size) = 0;
};

struct ConformanceParam {
  std::string name;
  std::function<std::unique_ptr<BackendHarness>()> make;

  friend std::ostream& operator<<(std::ostream& os,
                                  const ConformanceParam& param) {
    return os << param.name;
  }
};

inline std::string ConformanceParamName(
    const testing::TestParamInfo<ConformanceParam>& info) {
  return info.param.name;
}

// Descriptors that this process has open.
inline int CountOpenDescriptors() {
  DIR* dir = opendir("/proc/self/fd");
  if (dir == nullptr) return -1;
  int count = 0;
  while (readdir(dir) != nullptr) ++count;
  closedir(dir);
  return count - 3;  // ".", ".." and the folder's own
}

// While it lives, this process can open no further descriptor.
class NoMoreDescriptors {
 public:
  NoMoreDescriptors() {
    getrlimit(RLIMIT_NOFILE, &old_limit_);
    UniqueFd next(open("/dev/null", O_RDONLY | O_CLOEXEC));
    rlimit limit = old_limit_;
    limit.rlim_cur = static_cast<rlim_t>(next.get()) + 64;
    setrlimit(RLIMIT_NOFILE, &limit);
    while (next) {
      taken_.push_back(std::move(next));
      next.Reset(open("/dev/null", O_RDONLY | O_CLOEXEC));
    }
  }
  ~NoMoreDescriptors() {
    taken_.clear();
    setrlimit(RLIMIT_NOFILE, &old_limit_);
  }

 private:
  rlimit old_limit_;
  std::vector<UniqueFd> taken_;
};

class BackendConformanceTest : public testing::TestWithParam<ConformanceParam> {
 protected:
  Backend& backend() { return harness_->backend(); }
  Bytes handle_size() const { return harness_->handle_size(); }

  Bytes Used() {
    absl::StatusOr<Bytes> used = backend().UsedBytes();
    EXPECT_TRUE(used.ok()) << used.status();
    return used.value_or(Bytes(-1));
  }
  // Use beyond what the device had when the test began.
  Bytes UsedByTest() { return Used() - used_at_start_; }

  // With fixed addresses, at the first place that is free.
  absl::StatusOr<Handle> Create(Bytes size) {
    if (!backend().info().fixed_addresses()) return backend().Create(size);
    absl::StatusOr<Handle> handle = backend().CreateAt(Bytes(0), size);
    for (Bytes at = size; absl::IsResourceExhausted(handle.status()) &&
                          size <= backend().info().total - at;
         at += size) {
      handle = backend().CreateAt(at, size);
    }
    return handle;
  }
  // What is in use of a handle that only importers have.
  Bytes KeptByImporters() const {
    return harness_->traits().importers_keep_bytes ? handle_size() : Bytes(0);
  }

  Handle MustCreate() {
    absl::StatusOr<Handle> handle = Create(handle_size());
    EXPECT_TRUE(handle.ok()) << handle.status();
    return handle.ok() ? *std::move(handle) : Handle();
  }
  UniqueFd MustExport(const Handle& handle) {
    absl::StatusOr<UniqueFd> fd = backend().Export(handle);
    EXPECT_TRUE(fd.ok()) << fd.status();
    return fd.ok() ? *std::move(fd) : UniqueFd();
  }
  std::unique_ptr<ImportedHandle> MustImport(const UniqueFd& fd) {
    auto imported = harness_->Import(fd.get(), handle_size());
    EXPECT_TRUE(imported.ok()) << imported.status();
    return imported.ok() ? *std::move(imported)
                         : std::make_unique<ImportedNothing>();
  }

  // Creates until the device is full.
  std::vector<Handle> Fill() {
    std::vector<Handle> handles;
    for (;;) {
      absl::StatusOr<Handle> handle = Create(handle_size());
      if (!handle.ok()) {
        EXPECT_EQ(handle.status().code(), absl::StatusCode::kResourceExhausted)
            << handle.status();
        return handles;
      }
      handles.push_back(*std::move(handle));
    }
  }

  std::unique_ptr<BackendHarness> harness_ = GetParam().make();
  const Bytes used_at_start_ = Used();

 private:
  class ImportedNothing : public ImportedHandle {};
};

TEST_P(BackendConformanceTest, SaysWhatItIs) {
  const BackendInfo& info = backend().info();
  EXPECT_FALSE(info.name.empty());
  EXPECT_FALSE(info.device_uuid.empty());
  EXPECT_GT(info.granularity, Bytes(0));
  EXPECT_GE(info.total, handle_size() * 4);
  EXPECT_EQ(handle_size().count() % info.granularity.count(), 0);
}

TEST_P(BackendConformanceTest, SizeMustBeAPositiveMultipleOfTheGranularity) {
  const Bytes granule = backend().info().granularity;
  for (Bytes size : {Bytes(0), Bytes(1), granule - Bytes(1), granule + Bytes(1),
                     Bytes(0) - granule, Bytes(-1), Bytes(INT64_MIN)}) {
    absl::StatusOr<Handle> handle = Create(size);
    EXPECT_EQ(handle.status().code(), absl::StatusCode::kInvalidArgument)
        << size.count() << ": " << handle.status();
  }
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, CreatesInSeveralSizes) {
  const Bytes granule = backend().info().granularity;
  for (int64_t granules : {1, 2, 3, 7}) {
    absl::StatusOr<Handle> handle = Create(granule * granules);
    ASSERT_TRUE(handle.ok()) << handle.status();
    EXPECT_EQ(handle->size(), granule * granules);
    EXPECT_EQ(UsedByTest(), granule * granules);
  }
}

TEST_P(BackendConformanceTest, ChargesTheHandleAndFreesItWhenDropped) {
  Handle handle = MustCreate();
  EXPECT_TRUE(handle);
  EXPECT_EQ(handle.size(), handle_size());
  EXPECT_EQ(UsedByTest(), handle_size());
  handle.Reset();
  EXPECT_FALSE(handle);
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, HandlesHaveTheirOwnTokens) {
  Handle a = MustCreate();
  Handle b = MustCreate();
  EXPECT_NE(a.token(), b.token());
}

TEST_P(BackendConformanceTest, MovingAHandleMovesTheReference) {
  Handle a = MustCreate();
  const uint64_t token = a.token();
  Handle b = std::move(a);
  EXPECT_FALSE(a);  // NOLINT(bugprone-use-after-move)
  EXPECT_TRUE(b);
  EXPECT_EQ(b.token(), token);
  EXPECT_EQ(UsedByTest(), handle_size());

  Handle other = MustCreate();
  EXPECT_EQ(UsedByTest(), handle_size() * 2);
  b = std::move(other);  // Drops what `b` held.
  EXPECT_EQ(UsedByTest(), handle_size());

  Handle& same = b;
  b = std::move(same);
  EXPECT_TRUE(b);
  EXPECT_EQ(UsedByTest(), handle_size());
}

TEST_P(BackendConformanceTest, OnlyALiveHandleCanBeExported) {
  EXPECT_EQ(backend().Export(Handle()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_P(BackendConformanceTest, ImportsTheWholeHandle) {
  Handle handle = MustCreate();
  UniqueFd fd = MustExport(handle);
  auto imported = MustImport(fd);
  if (!imported->memory().empty()) {
    EXPECT_EQ(static_cast<int64_t>(imported->memory().size()),
              handle_size().count());
  }
  EXPECT_FALSE(harness_->Import(fd.get(), handle_size() * 2).ok());
}

TEST_P(BackendConformanceTest, FreshMemoryReadsAsZeroAfterADirtyPredecessor) {
  for (int round = 0; round < 3; ++round) {
    std::vector<Handle> handles;
    for (int i = 0; i < 4; ++i) {
      handles.push_back(MustCreate());
      auto imported = MustImport(MustExport(handles.back()));
      absl::Span<uint8_t> memory = imported->memory();
      EXPECT_EQ(std::count(memory.begin(), memory.end(), 0), memory.size());
      std::fill(memory.begin(), memory.end(), 0xA5);
    }
  }
}

TEST_P(BackendConformanceTest, TwoExportsOfAHandleShareItsMemory) {
  Handle handle = MustCreate();
  UniqueFd first = MustExport(handle);
  UniqueFd second = MustExport(handle);
  EXPECT_NE(first.get(), second.get());
  auto a = MustImport(first);
  auto b = MustImport(second);
  EXPECT_EQ(UsedByTest(), handle_size()) << "a second import costs nothing";
  if (a->memory().empty()) return;
  a->memory().front() = 17;
  b->memory().back() = 42;
  EXPECT_EQ(b->memory().front(), 17);
  EXPECT_EQ(a->memory().back(), 42);
}

TEST_P(BackendConformanceTest, DataStaysWhenTheCreatorLetsGo) {
  Handle handle = MustCreate();
  auto imported = MustImport(MustExport(handle));
  if (!imported->memory().empty()) imported->memory().front() = 17;
  handle.Reset();
  UsedByTest();  // Looks for what can be freed.
  if (!imported->memory().empty()) {
    EXPECT_EQ(imported->memory().front(), 17);
  }
}

TEST_P(BackendConformanceTest, BytesStayInUseUntilTheLastImportIsGone) {
  Handle handle = MustCreate();
  auto a = MustImport(MustExport(handle));
  auto b = MustImport(MustExport(handle));
  handle.Reset();
  EXPECT_EQ(UsedByTest(), KeptByImporters());
  a.reset();
  EXPECT_EQ(UsedByTest(), KeptByImporters());
  b.reset();
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, BytesStayInUseWhileADescriptorIsOpen) {
  Handle handle = MustCreate();
  UniqueFd fd = MustExport(handle);
  absl::StatusOr<UniqueFd> copy = fd.Duplicate();
  ASSERT_TRUE(copy.ok()) << copy.status();
  handle.Reset();
  EXPECT_EQ(UsedByTest(), KeptByImporters());
  fd.Reset();
  EXPECT_EQ(UsedByTest(), KeptByImporters());
  auto imported = MustImport(*copy);
  copy->Reset();
  EXPECT_EQ(UsedByTest(), KeptByImporters());
  imported.reset();
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, BytesStayInUseWhileOnlyTheCreatorIsLeft) {
  Handle handle = MustCreate();
  MustImport(MustExport(handle)).reset();
  EXPECT_EQ(UsedByTest(), handle_size());
  handle.Reset();
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, AFullDeviceRefusesAndHoldsNothing) {
  std::vector<Handle> handles = Fill();
  EXPECT_GE(handles.size(), 4);
  EXPECT_EQ(UsedByTest(), handle_size() * handles.size());
  EXPECT_LE(Used(), backend().info().total);

  handles.pop_back();
  handles.push_back(MustCreate());
  EXPECT_EQ(Create(handle_size()).status().code(),
            absl::StatusCode::kResourceExhausted);
  handles.clear();
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, MoreThanTheWholeDeviceIsRefused) {
  const Bytes granule = backend().info().granularity;
  for (Bytes size : {backend().info().total + granule, kMaxBytes,
                     Bytes(INT64_MAX / granule.count() * granule.count())}) {
    // A total that is no multiple of the granularity makes the first one odd.
    size -= Bytes(size.count() % granule.count());
    if (size <= backend().info().total) continue;
    absl::StatusOr<Handle> handle = Create(size);
    EXPECT_EQ(handle.status().code(), absl::StatusCode::kResourceExhausted)
        << size.count() << ": " << handle.status();
  }
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, AFullDeviceHasRoomWhenAnImporterLeaves) {
  std::vector<Handle> handles = Fill();
  auto imported = MustImport(MustExport(handles.back()));
  handles.pop_back();
  if (harness_->traits().importers_keep_bytes) {
    EXPECT_EQ(Create(handle_size()).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
  imported.reset();
  // Nobody asked for UsedBytes() meanwhile.
  EXPECT_TRUE(MustCreate());
}

TEST_P(BackendConformanceTest, ClosesItsDescriptors) {
  const int before = CountOpenDescriptors();
  {
    std::vector<Handle> handles;
    for (int i = 0; i < 4; ++i) {
      handles.push_back(MustCreate());
      UniqueFd fd = MustExport(handles.back());
      MustImport(fd);
      MustExport(handles.back());
    }
    std::vector<Handle> rest = Fill();
  }
  EXPECT_EQ(UsedByTest(), Bytes(0));
  EXPECT_EQ(CountOpenDescriptors(), before);
}

TEST_P(BackendConformanceTest, DescriptorsDoNotSurviveExec) {
  Handle handle = MustCreate();
  UniqueFd fd = MustExport(handle);
  EXPECT_EQ(fcntl(fd.get(), F_GETFD), FD_CLOEXEC);
}

TEST_P(BackendConformanceTest, WithoutDescriptorsItRefusesAndHoldsNothing) {
  Handle handle = MustCreate();
  UniqueFd exported = MustExport(handle);  // Warms up what is done only once.
  absl::Status export_refusal;
  std::vector<UniqueFd> more;
  absl::StatusOr<Handle> created;
  {
    NoMoreDescriptors none;
    // A backend may find one by closing what it only keeps.
    for (int i = 0; i < 8 && export_refusal.ok(); ++i) {
      absl::StatusOr<UniqueFd> fd = backend().Export(handle);
      export_refusal = fd.status();
      if (fd.ok()) more.push_back(*std::move(fd));
    }
    created = Create(handle_size());
    // A handle needs no descriptor in every backend; giving one up never does.
    if (created.ok()) created->Reset();
  }
  EXPECT_EQ(export_refusal.code(), absl::StatusCode::kResourceExhausted)
      << export_refusal;
  if (!created.ok()) {
    EXPECT_EQ(created.status().code(), absl::StatusCode::kResourceExhausted)
        << created.status();
  }
  EXPECT_EQ(UsedByTest(), handle_size());
  EXPECT_TRUE(MustExport(handle));
}

TEST_P(BackendConformanceTest, AnImporterCannotResizeTheHandle) {
  Handle handle = MustCreate();
  UniqueFd fd = MustExport(handle);
  EXPECT_NE(ftruncate(fd.get(), 0), 0);
  EXPECT_NE(ftruncate(fd.get(), handle_size().count() * 2), 0);
  EXPECT_TRUE(harness_->Import(fd.get(), handle_size()).ok());
  EXPECT_EQ(UsedByTest(), handle_size());
}

TEST_P(BackendConformanceTest, OnlyOneWayToCreateIsIts) {
  const bool fixed = backend().info().fixed_addresses();
  EXPECT_EQ(fixed ? backend().Create(handle_size()).status().code()
                  : backend().CreateAt(Bytes(0), handle_size()).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(UsedByTest(), Bytes(0));
}

TEST_P(BackendConformanceTest, AHandleLiesWhereItWasPut) {
  if (!backend().info().fixed_addresses()) {
    EXPECT_EQ(MustCreate().offset(), Bytes(0)) << "it has no address";
    return;
  }
  const Bytes size = handle_size();
  absl::StatusOr<Handle> handle = backend().CreateAt(size * 2, size);
  ASSERT_TRUE(handle.ok()) << handle.status();
  EXPECT_EQ(handle->offset(), size * 2);
  // What is taken is taken, by whatever size.
  for (auto [offset, bytes] :
       {std::pair(size * 2, size), std::pair(Bytes(0), size * 3)}) {
    EXPECT_EQ(backend().CreateAt(offset, bytes).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(backend().CreateAt(size, size * 2).status().code(),
            absl::StatusCode::kInvalidArgument)
      << "no multiple of its size";
  EXPECT_EQ(UsedByTest(), size);
  handle->Reset();
  EXPECT_TRUE(backend().CreateAt(Bytes(0), size * 3).ok());
}

TEST_P(BackendConformanceTest, ServesSeveralThreads) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 100;
  const int before = CountOpenDescriptors();
  std::atomic<int> created = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, mark = static_cast<uint8_t>(t + 1)] {
      for (int i = 0; i < kRounds; ++i) {
        absl::StatusOr<Handle> handle = Create(handle_size());
        if (!handle.ok()) {
          EXPECT_EQ(handle.status().code(),
                    absl::StatusCode::kResourceExhausted);
          continue;
        }
        ++created;
        auto imported = MustImport(MustExport(*handle));
        absl::Span<uint8_t> memory = imported->memory();
        if (!memory.empty()) {
          EXPECT_EQ(memory.front(), 0);
          EXPECT_EQ(memory.back(), 0);
          memory.front() = memory.back() = mark;
        }
        EXPECT_LE(Used(), backend().info().total);
        if (!memory.empty()) {
          EXPECT_EQ(memory.front(), mark);
          EXPECT_EQ(memory.back(), mark);
        }
        // Now the creator leaves first, now the importer.
        if (i % 2 == 0) handle->Reset();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(created, 0);
  EXPECT_EQ(UsedByTest(), Bytes(0));
  EXPECT_EQ(CountOpenDescriptors(), before);
}

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_BACKEND_CONFORMANCE_H_
