// The whole broker on the fake CUDA driver, whose GPU is lost and comes back.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "broker/base/temp_folder.h"
#include "broker/server/composition.h"
#include "broker/server/test_session.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker {
namespace {

bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class ServerDeviceLossTest : public testing::Test {
 protected:
  ServerDeviceLossTest() {
    fake_.Reset();
    setenv("KVBROKER_CUDA_DRIVER", fake_.paths().cuda.c_str(), 1);
    setenv("KVBROKER_NVML", fake_.paths().nvml.c_str(), 1);
    config_.backend = "cuda";
    config_.capacity.bytes = MiB(64);
    config_.socket_dir = folder_ / "sockets";
    config_.lock_dir = folder_ / "locks";
    config_.state_dir = folder_ / "state";
    config_.log_file = folder_ / "log";
    absl::StatusOr<std::unique_ptr<RunningBroker>> broker =
        RunningBroker::Start(config_, {.log_to_stderr = false});
    EXPECT_TRUE(broker.ok()) << broker.status();
    broker_ = *std::move(broker);
  }
  ~ServerDeviceLossTest() override {
    broker_.reset();
    fake_.Reset();
  }

  std::string Error() { return broker_->core().Snapshot().broker.device_error; }
  template <typename Condition>
  void WaitUntil(Condition condition) {
    while (!condition()) std::this_thread::yield();
  }
  // TestSession's engine with handles that a GPU can have.
  static Open OpenOf(const Nonce& nonce, const std::string& name) {
    Open open = TestSession::OpenOf(nonce, name);
    for (PoolGeometry& pool : open.pools) {
      pool.handle_bytes = MiB(2);
    }
    return open;
  }
  absl::Status Begin(TestSession& engine, const std::string& name) {
    std::optional<Nonce> nonce = engine.descriptors().GetNonce();
    if (!nonce) return absl::UnavailableError("no welcome");
    return engine.OpenWith(OpenOf(*nonce, name));
  }

  TempFolder folder_;
  FakeCuda fake_ = FakeCuda::Open();
  BrokerConfig config_;
  std::unique_ptr<RunningBroker> broker_;
};

TEST_F(ServerDeviceLossTest, HealthAndRefusalsSaySoAndAllComesBack) {
  TestSession engine(broker_->address());
  ASSERT_EQ(Begin(engine, "llama"), absl::OkStatus());
  ASSERT_TRUE(engine.Acquire(2).ok());
  TestAdmin admin(broker_->address());
  EXPECT_TRUE(admin.Healthy());

  fake_.Lose(cuda::CUDA_ERROR_NO_DEVICE);
  ASSERT_TRUE(engine.SendAcquire(3, absl::Minutes(10)));
  std::string reason;
  while (reason.empty()) {
    absl::StatusOr<BrokerMessage> message = engine.Read();
    ASSERT_TRUE(message.ok()) << message.status();
    if (auto* refused = std::get_if<Refused>(&*message)) {
      reason = refused->reason;
    }
  }
  EXPECT_TRUE(Has(reason, "GPU-fa6e0000-0000-4000-8000-000000000000"))
      << reason;
  EXPECT_TRUE(Has(reason, "NO_DEVICE (100)") || Has(reason, "GPU_IS_LOST"))
      << reason;
  EXPECT_TRUE(Has(reason, "dmesg")) << reason;
  EXPECT_EQ(Error(), reason);
  WaitUntil([&] { return !admin.Healthy(); });
  // Operators are answered, sessions live.
  EXPECT_EQ(admin.List()->size(), 1);
  EXPECT_TRUE(admin.SetMax("llama", MiB(32)).ok());
  EXPECT_EQ(admin.Explain("llama")->at(0), reason);
  TestSession late(broker_->address());
  EXPECT_EQ(Begin(late, "late"), absl::OkStatus());
  EXPECT_EQ(broker_->core().Snapshot().broker.sessions, 2);

  fake_.Lose(0);
  WaitUntil([&] { return Error().empty(); });
  WaitUntil([&] { return admin.Healthy(); });
  EXPECT_TRUE(late.Acquire(2).ok());
  broker_.reset();
  std::stringstream log;
  log << std::ifstream(config_.log_file).rdbuf();
  const std::string text = log.str();
  const size_t said = text.find("device-lost");
  EXPECT_NE(said, std::string::npos);
  EXPECT_EQ(text.find("device-lost", said + 1), std::string::npos) << "once";
  EXPECT_TRUE(Has(text, "device-back"));
}

TEST_F(ServerDeviceLossTest, AnErrorWithoutACauseIsLookedUpInNvml) {
  TestSession engine(broker_->address());
  ASSERT_EQ(Begin(engine, "llama"), absl::OkStatus());
  fake_.Lose(cuda::CUDA_ERROR_UNKNOWN);
  engine.SendAcquire(1, absl::Minutes(10));
  WaitUntil([&] { return !Error().empty(); });
  EXPECT_TRUE(Has(Error(), "GPU_IS_LOST")) << Error();
  fake_.Lose(0);
  WaitUntil([&] { return Error().empty(); });
}

}  // namespace
}  // namespace kvbroker
