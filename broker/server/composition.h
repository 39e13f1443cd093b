// RunningBroker: a whole broker in one object. The only place that sees every
// layer, and where they are wired to each other:
//
//   config -> backend, lock, sockets
//   sockets -> AcceptLoop -> GrpcServer (SessionService, AdminService)
//                         -> DescriptorConnection
//   all of them -> Core -> backend
//   Core, AcceptLoop, SessionService -> EventLog
//   Core -> StateKeeper -> state file
//   Core -> HistoryFile, where one is configured
//
//   ASSIGN_OR_RETURN(auto broker, RunningBroker::Start(config, {}));
//   log(broker->description());
//   ...
//   broker->Stop();
//
// Threads: the event loop's, the log's, the state's, and gRPC's few; Start and
// Stop are the
// owner's. While nobody is connected gRPC rests, and no thread wakes up.
#ifndef KVBROKER_BROKER_SERVER_COMPOSITION_H_
#define KVBROKER_BROKER_SERVER_COMPOSITION_H_

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "broker/config/broker_config.h"
#include "broker/core/core.h"
#include "broker/device/backend.h"
#include "broker/device/backend_factory.h"
#include "broker/server/device_lock.h"
#include "broker/server/driver_thread.h"
#include "broker/server/state_keeper.h"
#include "broker/state/broker_state.h"
#include "broker/state/state_file.h"
#include "broker/telemetry/event_log.h"
#include "broker/telemetry/history_file.h"
#include "broker/transport/accept_loop.h"
#include "broker/transport/connection_table.h"
#include "broker/transport/event_loop.h"
#include "broker/transport/grpc_server.h"
#include "broker/transport/peer_identity.h"
#include "broker/transport/rendezvous.h"
#include "client/address/broker_address.h"

namespace kvbroker {

// What is not an operator's to set.
struct BrokerOptions {
  // Called from the event loop when no engine has lived for
  // `config.idle_exit`, at the start or since the last one. Stopping is the
  // owner's, after LeaveIfIdle.
  std::function<void()> idle;
  // For tests: instead of the configured one; ways of older kernels; haste.
  std::unique_ptr<Backend> backend;
  bool use_peer_pidfd = true;
  bool use_pidfd_open = true;
  absl::Duration join_within = absl::Seconds(10);
  absl::Duration rest_after = absl::Seconds(5);
  size_t max_waiting = 4096;
  size_t max_waiting_bytes = 8 << 20;
  uint32_t descriptor_window = 4096;
  absl::Duration acknowledge_within = absl::Seconds(10);
  bool log_to_stderr = true;
};

// Where a broker so configured keeps its state; empty: nowhere.
std::string StateDirectory(const BrokerConfig& config);

class RunningBroker {
 public:
  // Serves when it returns. ALREADY_EXISTS: another broker has the device.
  // Otherwise the error names what was set wrong, or what the system refused.
  static absl::StatusOr<std::unique_ptr<RunningBroker>> Start(
      const BrokerConfig& config, BrokerOptions options);
  // Stops first.
  ~RunningBroker();

  // True where no engine has a session or is about to open one: then nobody can
  // connect any more, and Stop is next. Otherwise nothing has changed, and
  // BrokerOptions::idle is called again in time.
  bool LeaveIfIdle();
  // No more grants, no more connections, sockets removed; streams end. Engines
  // run on with what they have mapped. Done within a second.
  void Stop();

  // "backend=host (...) device=... capacity=... socket=..."
  const std::string& description() const { return description_; }
  const client::BrokerAddress& address() const { return address_; }
  Core& core() { return *core_; }

 private:
  RunningBroker() = default;

  // What the last broker left, as far as it still matters.
  Remembered Recall(const absl::StatusOr<BrokerState>& state);
  BrokerState StateToSave();
  // Tells the core of expected processes that end before they come back.
  void WatchExpected();

  // Runs what the core has due, and has itself called again in time.
  void RunCore();
  void WakeCore();
  // Health follows the device.
  void UpdateHealth();
  // gRPC rests when nobody has been connected for a while.
  void UpdateRestTimer();
  // A session began or its process ended.
  void CountSession(int change);
  void UpdateIdleTimer();

  // In the order of construction; each may use those before it.
  BrokerOptions options_;
  absl::Duration idle_exit_;
  std::string description_;
  client::BrokerAddress address_;
  std::unique_ptr<EventLog> log_;
  std::unique_ptr<HistoryFile> history_;
  ChosenBackend backend_;
  std::optional<DeviceLock> lock_;
  uint64_t incarnation_ = 0;
  std::optional<StateFile> state_file_;
  std::unique_ptr<ConnectionTable> connections_;
  std::unique_ptr<Rendezvous> rendezvous_;
  std::unique_ptr<EventLoop> loop_;
  // Expected of before, and the pidfds they are watched by.
  std::vector<std::pair<Peer, UniqueFd>> expected_;
  std::unique_ptr<StateKeeper> state_keeper_;  // set before anybody connects
  std::unique_ptr<Core> core_;
  std::unique_ptr<DriverThread> driver_;
  std::unique_ptr<GrpcServer> server_;
  std::unique_ptr<AcceptLoop> accept_;
  bool left_ = false;  // LeaveIfIdle
  bool stopped_ = false;

  std::atomic<bool> core_woken_ = false;
  std::atomic<int> sessions_ = 0;
  std::atomic<int> opening_ = 0;  // sessions, not all of which come to be
  // The event loop's.
  EventLoop::TimerId core_timer_;
  EventLoop::TimerId rest_timer_;
  std::optional<EventLoop::TimerId> idle_timer_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_COMPOSITION_H_
