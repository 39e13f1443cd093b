// A broker that runs out of descriptors: each live handle of the host backend
// is one. Whoever asks for more memory is told so; everything else goes on.
#include <errno.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "broker/base/temp_folder.h"
#include "broker/server/composition.h"
#include "broker/server/test_peer.h"
#include "broker/server/test_session.h"

namespace kvbroker {
namespace {

constexpr rlim_t kLimit = 1200;

bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class DescriptorLimitTest : public testing::Test {
 protected:
  DescriptorLimitTest() {
    const rlimit limit = {.rlim_cur = kLimit, .rlim_max = kLimit};
    EXPECT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
    config_.backend = "host";
    config_.device_uuid = "HOST-test";
    config_.capacity.bytes = MiB(256);
    config_.socket_dir = folder_ / "sockets";
    config_.lock_dir = folder_ / "locks";
    config_.state_dir = folder_ / "state";
    config_.log_file = folder_ / "log";
    config_.resume_grace = absl::ZeroDuration();
    BrokerOptions options;
    options.log_to_stderr = false;
    absl::StatusOr<std::unique_ptr<RunningBroker>> broker =
        RunningBroker::Start(config_, std::move(options));
    EXPECT_TRUE(broker.ok()) << broker.status();
    broker_ = *std::move(broker);
  }

  const client::BrokerAddress& address() { return broker_->address(); }

  std::string Log() {
    broker_.reset();  // writes all of it
    std::string text;
    UniqueFd fd(open(config_.log_file.c_str(), O_RDONLY));
    char bytes[4096];
    for (ssize_t size; (size = read(fd.get(), bytes, sizeof(bytes))) > 0;) {
      text.append(bytes, size);
    }
    return text;
  }

  TempFolder folder_;
  BrokerConfig config_;
  std::unique_ptr<RunningBroker> broker_;
};

TEST_F(DescriptorLimitTest, MemoryIsRefusedAndEverythingElseGoesOn) {
  TestSession holder(address());
  ASSERT_TRUE(holder.Begin("holder").ok());
  ASSERT_TRUE(holder.Acquire(1).ok());
  TestPeer grabber(address(), "grab");
  const std::string refusal = grabber.Line();
  EXPECT_TRUE(Has(refusal, "the limit is 1200")) << refusal;
  EXPECT_TRUE(Has(refusal, "LimitNOFILE")) << refusal;
  EXPECT_GT(broker_->core().Snapshot().broker.held, KiB(128) * 200);

  // New sessions, the operator's commands and the state file have room.
  std::vector<std::unique_ptr<TestSession>> others;
  for (int i = 0; i < 20; ++i) {
    others.push_back(std::make_unique<TestSession>(address()));
    absl::Status begun = others.back()->Begin("other");
    ASSERT_TRUE(begun.ok()) << i << ": " << begun;
  }
  TestAdmin admin(address());
  EXPECT_TRUE(admin.List().ok());
  const std::string state = folder_ / "state/HOST-test.state";
  const auto written = std::filesystem::last_write_time(state);
  EXPECT_TRUE(admin.SetMax("holder", MiB(100)).ok());
  EXPECT_NE(std::filesystem::last_write_time(state), written);
  // Who gives back is heard.
  EXPECT_TRUE(holder.ReturnLast());

  grabber.Kill();
  while (broker_->core().Snapshot().broker.held > Bytes(0)) {
    std::this_thread::yield();
  }
  absl::Status again = others[0]->Acquire(100).status();
  EXPECT_TRUE(again.ok()) << again;
  EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
}

TEST_F(DescriptorLimitTest, ConnectionsThatCannotBeTakenWaitWithoutASpin) {
  DescriptorClient waits(address().descriptor_path);
  ASSERT_TRUE(waits.connected());
  ASSERT_TRUE(waits.GetNonce());
  // A socket whose connection the broker cannot accept.
  std::vector<UniqueFd> all;
  std::unique_ptr<DescriptorClient> late;
  for (;;) {
    const int fd = fcntl(waits.fd(), F_DUPFD_CLOEXEC, 3);
    if (fd < 0) break;
    all.emplace_back(fd);
  }
  all.pop_back();
  late = std::make_unique<DescriptorClient>(address().descriptor_path);
  ASSERT_TRUE(late->connected());
  late->SayHello();
  rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  // A spin would use up all of it.
  absl::SleepFor(absl::Milliseconds(500));
  getrusage(RUSAGE_SELF, &after);
  const absl::Duration used = absl::DurationFromTimeval(after.ru_utime) +
                              absl::DurationFromTimeval(after.ru_stime) -
                              absl::DurationFromTimeval(before.ru_utime) -
                              absl::DurationFromTimeval(before.ru_stime);
  EXPECT_LT(used, absl::Milliseconds(250));
  all.clear();
  // Taken as soon as it can be; or dropped, where the first numbers that came
  // free were too few to look who it is, and then the next attempt is.
  EXPECT_TRUE(late->ReadWelcome().has_value() ||
              DescriptorClient(address().descriptor_path).GetNonce());
  EXPECT_TRUE(Has(Log(), "accept-paused"));
}

}  // namespace
}  // namespace kvbroker
