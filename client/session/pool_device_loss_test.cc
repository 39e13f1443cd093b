// A pool whose device is lost to its process, on the fake CUDA driver: its
// health says so, nothing aborts, nobody is asked for memory in vain, and Close
// ends.
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "broker/device/cuda/cuda_backend.h"
#include "client/arena/cuda_mapper.h"
#include "client/session/pool.h"
#include "client/session/scripted_session.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker::client {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr Bytes kPage = MiB(2);
constexpr size_t kBlocksPerPage = 4;
constexpr PoolId kPool(7);

class PoolDeviceLossTest : public ::testing::Test {
 protected:
  PoolDeviceLossTest() {
    fake_.Reset();
    driver_ = *CudaDriver::Load(fake_.paths());
    backend_ = *CudaBackend::Create(*CudaDriver::Load(fake_.paths()), {});
    PoolOptions options;
    options.geometry.handle_bytes = kPage;
    options.geometry.max_pages = 16;
    options.block_bytes = Bytes(kPage.count() / kBlocksPerPage);
    options.map_ahead = false;
    options.min_reserved_pages = 0;
    options.idle_decay = absl::Seconds(1);
    options.running_miss_wait = absl::ZeroDuration();
    auto mapper = *CudaMapper::Create(options.geometry, *driver_, "");
    pool_ = *Pool::Create(options, std::move(mapper), session_, clock_);
    pool_->OnOpened(kPool, GiB(1), GiB(1));
  }
  ~PoolDeviceLossTest() override {
    EXPECT_EQ(pool_->CheckInvariants(), absl::OkStatus());
  }

  bool Alloc(size_t pages) {
    std::vector<BlockId> out(pages * kBlocksPerPage);
    const bool got = pool_->Alloc(absl::MakeSpan(out), Urgency::kWaiting);
    if (got) taken_.insert(taken_.end(), out.begin(), out.end());
    return got;
  }
  void Grant(const Acquire& asked) {
    Granted granted;
    granted.sequence = asked.sequence;
    granted.grant = GrantId(++last_grant_);
    granted.pool = kPool;
    std::vector<UniqueFd> descriptors;
    for (PageIndex index : asked.indexes) {
      granted.pages.push_back({index, Generation(++last_generation_)});
      handles_.push_back(*backend_->Create(kPage));
      descriptors.push_back(*backend_->Export(handles_.back()));
    }
    pool_->OnGranted(granted, std::move(descriptors));
  }
  void Fill(size_t pages) {
    EXPECT_FALSE(Alloc(pages));
    pool_->Work();
    Grant(session_.TakeOnly<Acquire>());
    EXPECT_TRUE(Alloc(pages));
    EXPECT_THAT(session_.TakeOnly<Mapped>().failed, IsEmpty());
  }
  absl::Duration WorkDueIn() { return pool_->Work() - clock_.Now(); }

  FakeCuda fake_ = FakeCuda::Open();
  std::unique_ptr<CudaDriver> driver_;
  std::unique_ptr<CudaBackend> backend_;
  std::vector<Handle> handles_;
  ScriptedSession session_;
  FakeClock clock_;
  std::unique_ptr<Pool> pool_;
  std::vector<BlockId> taken_;
  uint64_t last_grant_ = 0, last_generation_ = 0;
};

TEST_F(PoolDeviceLossTest, APoisonedMapIsHealthAndNothingIsAskedForAnyMore) {
  Fill(2);
  EXPECT_EQ(pool_->health(), absl::OkStatus());
  EXPECT_FALSE(Alloc(1));
  pool_->Work();
  const Acquire asked = session_.TakeOnly<Acquire>();
  fake_.Poison(cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  Grant(asked);
  EXPECT_THAT(session_.TakeOnly<Mapped>().failed, SizeIs(1));
  const std::string why(pool_->health().message());
  EXPECT_THAT(why, HasSubstr("does not work for this process any more"));
  EXPECT_THAT(why, HasSubstr("restart it"));
  EXPECT_THAT(why, HasSubstr("ILLEGAL_ADDRESS"));
  for (int i = 0; i < 5; ++i) {
    EXPECT_FALSE(Alloc(1));
    pool_->Work();
    clock_.Advance(absl::Milliseconds(500));
  }
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty());
  // What is mapped stays the engine's to free.
  EXPECT_EQ(pool_->Free(taken_), absl::OkStatus());
}

TEST_F(PoolDeviceLossTest, APoisonedUnmapEndsTheOrderAndIsNotTriedAgain) {
  Fill(3);
  EXPECT_EQ(pool_->Free(taken_), absl::OkStatus());
  fake_.Poison(cuda::CUDA_ERROR_LAUNCH_FAILED);
  clock_.Advance(absl::Seconds(2));
  pool_->Work();  // idle pages have decayed
  EXPECT_THAT(std::string(pool_->health().message()),
              HasSubstr("LAUNCH_FAILED"));
  const int64_t unmaps = fake_.Calls("cuMemUnmap");
  session_.Take<Return>();
  Reclaim order;
  order.pool = kPool;
  order.revision = Revision(1);
  order.hold_at_most = 0;
  order.tier = Tier::kIdle;
  pool_->OnReclaim(order);
  pool_->Work();
  const ReclaimAnswer answer = session_.TakeOnly<ReclaimAnswer>();
  EXPECT_TRUE(answer.final);
  EXPECT_EQ(answer.kept, 3);
  EXPECT_THAT(answer.reason, HasSubstr("lost to this process"));
  const int64_t after = fake_.Calls("cuMemUnmap");
  for (int i = 0; i < 10; ++i) {
    clock_.Advance(absl::Seconds(1));
    pool_->Work();
  }
  EXPECT_EQ(fake_.Calls("cuMemUnmap"), after);
  EXPECT_LE(unmaps, after);
  EXPECT_EQ(pool_->usage().idle, kPage * 3) << "they stay lent";
}

TEST_F(PoolDeviceLossTest, CloseEndsWithoutNamingWhatItCouldNotUnmap) {
  Fill(3);
  fake_.Poison(cuda::CUDA_ERROR_ECC_UNCORRECTABLE);
  pool_->Close();
  EXPECT_TRUE(pool_->left());
  EXPECT_EQ(WorkDueIn(), absl::InfiniteDuration());
  EXPECT_THAT(session_.Take<Return>(), IsEmpty()) << "the process maps them";
}

TEST_F(PoolDeviceLossTest, ALostDeviceIsTriedNowAndThenAndComesBack) {
  Fill(1);
  EXPECT_FALSE(Alloc(1));
  pool_->Work();
  const Acquire asked = session_.TakeOnly<Acquire>();
  // Made, and opened to access in vain; nor can that be undone.
  fake_.Fail("cuMemSetAccess", 1, cuda::CUDA_ERROR_DEVICE_UNAVAILABLE);
  fake_.Fail("cuMemUnmap", 1, cuda::CUDA_ERROR_DEVICE_UNAVAILABLE);
  Grant(asked);
  EXPECT_THAT(session_.TakeOnly<Mapped>().failed, SizeIs(1));
  EXPECT_THAT(std::string(pool_->health().message()),
              HasSubstr("the device does not work: cuMemSetAccess"));
  EXPECT_EQ(fake_.Books().mappings, 2);
  clock_.Advance(absl::Milliseconds(900));
  EXPECT_FALSE(Alloc(1));
  pool_->Work();
  EXPECT_THAT(session_.Take<Acquire>(), IsEmpty()) << "not yet";
  clock_.Advance(absl::Milliseconds(200));
  EXPECT_FALSE(Alloc(1));
  pool_->Work();
  // On the same slot as before.
  const Acquire again = session_.TakeOnly<Acquire>();
  EXPECT_EQ(again.indexes, asked.indexes);
  Grant(again);
  EXPECT_THAT(session_.TakeOnly<Mapped>().failed, IsEmpty());
  EXPECT_EQ(pool_->health(), absl::OkStatus());
  EXPECT_TRUE(Alloc(1));
  EXPECT_EQ(fake_.Books().mappings, 2);
}

}  // namespace
}  // namespace kvbroker::client
