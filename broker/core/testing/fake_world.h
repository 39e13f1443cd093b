// FakeWorld: a whole broker in one object: the core on a fake device with a
// fake clock, and its fake clients.
//
//   FakeWorld world({.capacity = MiB(10)});
//   FakeClient& a = world.Start({.name = "a"});
//   a.Ask({.at_least = 4});
//   world.Settle();                       // a maps 4 pages
//   world.Advance(absl::Seconds(1));      // what comes due meanwhile, does
//
// Threads: one, unless a test uses the core of several itself.
#ifndef KVBROKER_BROKER_CORE_TESTING_FAKE_WORLD_H_
#define KVBROKER_BROKER_CORE_TESTING_FAKE_WORLD_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/clock.h"
#include "broker/base/mutex.h"
#include "broker/core/core.h"
#include "broker/core/testing/fake_client.h"
#include "broker/device/fake_backend.h"
#include "broker/device/fault_injecting_backend.h"
#include "broker/policy/policy_config.h"
#include "tests/history/history_checker.h"

namespace kvbroker {

// An engine with one pool, or several alike.
struct FakeEngine {
  std::string name;
  std::string tenant = "uid:1";
  uint32_t pid = 0;  // another one for each where it is 0
  Bytes handle = MiB(1);
  uint32_t handles_per_page = 1;
  uint32_t max_pages = 4096;
  int pools = 1;
  std::optional<Bytes> min, max;
  std::optional<double> weight;
  std::string member;
  Bytes declared_peak;
};

class FakeWorld {
 public:
  struct Options {
    Bytes capacity = MiB(10);
    Bytes device = GiB(4);
    // Others use the device as well; see CoreOptions.
    std::optional<Bytes> headroom;
    CoreOptions::Charge charge = CoreOptions::Charge::kBroker;
    PolicyConfig policy;
    std::optional<Bytes> max_stock;  // the core's own where it is not given
    size_t max_stocked_handles = 4096;
    uint32_t descriptor_window = 4096;
    Remembered remembered;
    absl::Duration acknowledge_within = absl::Seconds(10);
    size_t max_sessions_per_uid = 256;
    size_t max_instances_per_tenant = 256;
    // Work on more handles than `inline_handles` waits for RunBulk, or Settle.
    bool bulk_by_hand = false;
    size_t inline_handles = 64;
    uint64_t seed = 1;
    // The device is one slab, as large as the capacity.
    bool fixed_addresses = false;
  };

  FakeWorld() : FakeWorld(Options()) {}
  explicit FakeWorld(Options options);

  // What the engine says at first.
  static Open OpenOf(const FakeEngine& engine);
  absl::StatusOr<FakeClient*> TryStart(const FakeEngine& engine);
  absl::StatusOr<FakeClient*> TryStart(const Peer& peer, const Open& open);
  // The same for an engine that must be admitted.
  FakeClient& Start(const FakeEngine& engine);

  // Does the next step of the work that the core leaves to its executor; false
  // where there is none.
  bool RunBulk();
  size_t bulk_waiting() const { return bulk_.size(); }

  // Pumps all clients until nobody has anything to do, bulk work included.
  void Settle();
  // Lets time pass, from one due moment to the next, and settles at each.
  void Advance(absl::Duration by);

  // Figures of an instance; all zero where there is none.
  InstanceStatus Status(std::string_view name);

  // The log's lines since the last call that have `words` in them.
  std::vector<std::string> TakeLog(std::string_view words = "");
  int wakes() const { return wakes_; }

  // OK, or what is wrong: the core's own view, the device's, the clients'
  // complaints, that all three agree on who holds what, and that the history
  // keeps the promises. `seen`: what the
  // core shows of itself at that.
  absl::Status Check(CoreSnapshot* seen = nullptr);

  Core& core() { return *core_; }
  FakeBackend& device() { return device_; }
  FaultInjectingBackend& faults() { return faults_; }
  FakeClock& clock() { return clock_; }
  const std::vector<std::unique_ptr<FakeClient>>& clients() const {
    return clients_;
  }
  // Forgets a client whose process is gone.
  void Forget(const FakeClient& client);

 private:
  const CoreOptions::Charge charge_;
  FakeClock clock_;
  FakeBackend device_;
  FaultInjectingBackend faults_;
  uint32_t next_pid_ = 1000;
  std::atomic<int> wakes_ = 0;
  Mutex mu_;
  std::vector<std::string> log_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> complaints_;
  HistoryChecker history_ ABSL_GUARDED_BY(mu_);
  uint64_t checked_ ABSL_GUARDED_BY(mu_) = 0;  // events
  // Came before one with a smaller number, by another thread.
  std::map<uint64_t, HistoryEvent> early_ ABSL_GUARDED_BY(mu_);
  std::deque<std::function<void()>> bulk_;
  std::unique_ptr<Core> core_;
  std::vector<std::unique_ptr<FakeClient>> clients_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_TESTING_FAKE_WORLD_H_
