#include "broker/server/composition.h"

#include <errno.h>
#include <grp.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "broker/base/clock.h"
#include "broker/base/status_macros.h"
#include "broker/transport/admin_service.h"
#include "broker/transport/admission.h"
#include "broker/transport/session_service.h"
#include "broker/transport/unix_listener.h"
#include "proto/version.h"

namespace kvbroker {
namespace {

// How long an answer is held back for what it says to be kept on disk.
constexpr absl::Duration kStateWait = absl::Milliseconds(200);
// Handles kept for the next claim, each a descriptor.
constexpr uint64_t kMaxStockedHandles = 4096;
// Room in the table of descriptors from the start: 256 KiB of the kernel's.
constexpr uint64_t kDescriptorTable = 32768;
// For calls that are under way when the broker stops.
constexpr absl::Duration kStopGrace = absl::Milliseconds(100);

// Every connection and every page in stock is a descriptor: as many as we may.
uint64_t RaiseDescriptorLimit() {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 1024;
  rlimit wanted = {.rlim_cur = limit.rlim_max, .rlim_max = limit.rlim_max};
  if (setrlimit(RLIMIT_NOFILE, &wanted) == 0) return wanted.rlim_cur;
  return limit.rlim_cur;
}

absl::StatusOr<uint64_t> RandomIncarnation() {
  uint64_t incarnation = 0;
  while (incarnation == 0) {
    if (getrandom(&incarnation, sizeof(incarnation), 0) !=
        sizeof(incarnation)) {
      return ErrnoToStatus(errno, "getrandom");
    }
  }
  return incarnation;
}

absl::StatusOr<std::optional<uint32_t>> ResolveGroup(const std::string& name) {
  if (name.empty()) return std::nullopt;
  uint32_t number;
  if (absl::SimpleAtoi(name, &number)) return number;
  // Read once, before there are threads.
  if (const group* entry = getgrnam(name.c_str())) return entry->gr_gid;
  return absl::InvalidArgumentError(
      absl::StrCat("socket_group must be a group's name or number that this "
                   "machine knows; got \"",
                   name, "\""));
}

absl::StatusOr<TenantBy> ParseTenantBy(const std::string& name) {
  if (name == "uid_pidns") return TenantBy::kUidAndPidNamespace;
  if (name == "uid") return TenantBy::kUid;
  if (name == "socket") return TenantBy::kSocket;
  return absl::InvalidArgumentError(absl::StrCat(
      "tenant_by must be uid_pidns, uid or socket; got \"", name, "\""));
}

absl::StatusOr<ChosenBackend> ConfiguredBackend(
    const BrokerConfig& config,
    std::function<absl::Status(const std::string& device_uuid)> claim) {
  BackendOptions options = {.name = config.backend,
                            .gpu = config.gpu,
                            .slab =
                                [&config](Bytes total, Bytes used) {
                                  return ResolveSlab(config, total, used);
                                },
                            .claim = std::move(claim),
                            .device_uuid = config.device_uuid};
  ASSIGN_OR_RETURN(ChosenBackend chosen, MakeBackend(options));
  const BackendInfo& device = chosen.backend->info();
  if (device.name == "host" && !config.gpu.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("gpu must be empty where the backend is host (",
                     chosen.reason, "); got \"", config.gpu, "\""));
  }
  // Who asks for more than the host's usual half of the machine means it.
  if (device.name == "host" && config.capacity.bytes &&
      *config.capacity.bytes > device.total) {
    options.total = config.capacity.bytes;
    return MakeBackend(options);
  }
  return chosen;
}

std::string SocketDirectory(const BrokerConfig& config) {
  if (!config.socket_dir.empty()) return config.socket_dir;
  return geteuid() == 0 ? client::SystemSocketDirectory()
                        : client::UserSocketDirectory(std::getenv);
}

// What the last broker of the device left. NOT_FOUND: nothing.
absl::StatusOr<BrokerState> LoadState(const BrokerConfig& config,
                                      const std::string& device,
                                      std::optional<StateFile>& file) {
  const std::string directory = StateDirectory(config);
  if (directory.empty()) return absl::NotFoundError("no state is kept");
  std::error_code ignored;  // Create says what is wrong
  std::filesystem::create_directories(
      std::filesystem::path(directory).parent_path(), ignored);
  absl::StatusOr<StateFile> created =
      StateFile::Create(absl::StrCat(directory, "/", device, ".state"));
  if (!created.ok()) return created.status();
  file = *std::move(created);
  return file->Load();
}

std::vector<std::string> LockDirectories(const BrokerConfig& config) {
  if (!config.lock_dir.empty()) return {config.lock_dir};
  return DefaultLockDirectories();
}

}  // namespace

std::string StateDirectory(const BrokerConfig& config) {
  if (config.state_dir == "none") return "";
  if (!config.state_dir.empty()) return config.state_dir;
  if (geteuid() == 0) return "/var/lib/kvbroker";
  if (const char* state = std::getenv("XDG_STATE_HOME");
      state != nullptr && *state == '/') {
    return absl::StrCat(state, "/kvbroker");
  }
  if (const char* home = std::getenv("HOME"); home != nullptr && *home == '/') {
    return absl::StrCat(home, "/.local/state/kvbroker");
  }
  return "";
}

absl::StatusOr<std::unique_ptr<RunningBroker>> RunningBroker::Start(
    const BrokerConfig& config, BrokerOptions options) {
  std::unique_ptr<RunningBroker> self(new RunningBroker);
  self->options_ = std::move(options);
  self->idle_exit_ = config.idle_exit;
  const uint64_t descriptor_limit = RaiseDescriptorLimit();
  // Before there are threads.
  GrowDescriptorTable(static_cast<int>(
      std::min<uint64_t>(descriptor_limit, kDescriptorTable)));

  // What can be wrong with the configuration, before anything is made.
  ASSIGN_OR_RETURN(const LogLevel level, ParseLogLevel(config.log_level));
  ASSIGN_OR_RETURN(const TenantBy tenant_by, ParseTenantBy(config.tenant_by));
  ASSIGN_OR_RETURN(const std::optional<uint32_t> group,
                   ResolveGroup(config.socket_group));
  ASSIGN_OR_RETURN(self->incarnation_, RandomIncarnation());
  const uint64_t incarnation = self->incarnation_;
  ASSIGN_OR_RETURN(self->log_,
                   EventLog::Create({.level = level,
                                     .to_stderr = self->options_.log_to_stderr,
                                     .file = config.log_file}));
  EventLog* log = self->log_.get();

  const std::string directory = SocketDirectory(config);
  // Whoever holds the lock may take the device's memory and replace the
  // sockets.
  auto lock_device = [&](const std::string& device_uuid) -> absl::Status {
    ASSIGN_OR_RETURN(self->address_,
                     client::AddressFor(directory, device_uuid));
    ASSIGN_OR_RETURN(self->lock_,
                     DeviceLock::Acquire(LockDirectories(config), device_uuid,
                                         self->address_.rpc_path));
    return absl::OkStatus();
  };
  if (self->options_.backend != nullptr) {
    self->backend_ = {.backend = std::move(self->options_.backend),
                      .reason = "given"};
  } else {
    ASSIGN_OR_RETURN(self->backend_, ConfiguredBackend(config, lock_device));
  }
  const BackendInfo& device = self->backend_.backend->info();
  // A slab was made as large as was wished.
  Bytes capacity = device.total;
  if (!device.fixed_addresses()) {
    ASSIGN_OR_RETURN(capacity,
                     ResolveCapacity(config, device.name, device.total));
  }

  if (!self->lock_) RETURN_IF_ERROR(lock_device(device.device_uuid));
  const SocketAccess access = {.group = group,
                               .anybody = !config.allow_uids.empty()};
  RETURN_IF_ERROR(PrepareSocketDirectory(directory, access));
  ASSIGN_OR_RETURN(UnixListener rpc, UnixListener::Bind(self->address_.rpc_path,
                                                        SOCK_STREAM, access));
  ASSIGN_OR_RETURN(UnixListener descriptors,
                   UnixListener::Bind(self->address_.descriptor_path,
                                      SOCK_SEQPACKET, access));

  // After the lock: the last one has written all it had to say.
  const absl::StatusOr<BrokerState> state =
      LoadState(config, device.device_uuid, self->state_file_);
  if (!state.ok() && !absl::IsNotFound(state.status())) {
    log->Write(LogLevel::kError,
               absl::StrCat("state-not-read error=\"", state.status().message(),
                            "\" (limits that operators set before are not in "
                            "force)"));
  }

  const auto [first_number, last_number] =
      ConnectionTable::NumberRange(descriptor_limit);
  self->connections_ = std::make_unique<ConnectionTable>(
      ConnectionTable::Options{.clock = &Clock::Steady(),
                               .first_number = first_number,
                               .last_number = last_number,
                               // One user leaves some to others.
                               .max_per_uid = std::min<size_t>(
                                   config.quotas.connections,
                                   (last_number - first_number + 1) / 2)});
  self->rendezvous_ = std::make_unique<Rendezvous>(config.quotas.half_open);
  ASSIGN_OR_RETURN(self->loop_, EventLoop::Create());

  CoreOptions core_options = {
      .backend = self->backend_.backend.get(),
      .clock = &Clock::Steady(),
      .capacity = capacity,
      // A GPU is used by others, too; the other totals are the broker's own,
      // and so is a slab.
      .headroom = device.name == "cuda" ? std::optional<Bytes>(config.headroom)
                                        : std::nullopt,
      .charge = config.charge == "engine" ? CoreOptions::Charge::kEngine
                                          : CoreOptions::Charge::kBroker,
      .policy = config.policy,
      .incarnation = incarnation,
      .max_stocked_handles =
          std::min<size_t>(kMaxStockedHandles, descriptor_limit / 8),
      // The kernel counts exported and unread ones of a user against the limit
      // of open files, beyond which nobody gets any.
      .descriptor_window = static_cast<uint32_t>(std::min<uint64_t>(
          self->options_.descriptor_window, descriptor_limit / 2)),
      .acknowledge_within = self->options_.acknowledge_within,
      .max_sessions_per_uid = config.quotas.sessions,
      .max_instances_per_tenant = config.quotas.instances,
      .remembered = self->Recall(state),
      .resume_grace = config.resume_grace,
      .remember =
          [broker = self.get()](bool wait) {
            if (broker->state_keeper_ == nullptr) return;
            broker->state_keeper_->Changed();
            if (wait) broker->state_keeper_->Wait(kStateWait);
          },
      .wake = [broker = self.get()] { broker->WakeCore(); },
      .device_changed = [broker = self.get()] { broker->UpdateHealth(); },
      .executor =
          [broker = self.get()](std::function<void()> work) {
            broker->driver_->Do(std::move(work));
          },
  };
  // To make a handle of a slab is to write all of it.
  if (device.fixed_addresses()) core_options.inline_handles = 1;
  self->driver_ = std::make_unique<DriverThread>();
  if (log->Wants(LogLevel::kInfo)) {
    core_options.log = [log](std::string_view line) {
      log->Write(LogLevel::kInfo, line);
    };
  }
  const auto warn = [log](std::string_view line) {
    log->Write(LogLevel::kWarn, line);
  };
  if (!config.history_file.empty()) {
    ASSIGN_OR_RETURN(self->history_,
                     HistoryFile::Create(config.history_file, warn));
    core_options.history = [history = self->history_.get()](
                               absl::Span<const HistoryEvent> events) {
      history->Write(events);
    };
  }
  ASSIGN_OR_RETURN(self->core_, Core::Create(std::move(core_options)));
  if (self->state_file_) {
    self->state_keeper_ = std::make_unique<StateKeeper>(StateKeeper::Options{
        .save = [file = &*self->state_file_](
                    const BrokerState& state) { return file->Save(state); },
        .state = [broker = self.get()] { return broker->StateToSave(); },
        .log = warn});
    self->state_keeper_->Changed();
  }
  Admission admission = {.broker_uid = geteuid(), .uids = config.allow_uids};
  if (group) admission.groups.push_back(*group);
  self->server_ =
      std::make_unique<GrpcServer>(std::vector<std::shared_ptr<grpc::Service>>{
          MakeSessionService({
              .core = self->core_.get(),
              .loop = self->loop_.get(),
              .connections = self->connections_.get(),
              .rendezvous = self->rendezvous_.get(),
              .max_waiting = self->options_.max_waiting,
              .max_waiting_bytes = self->options_.max_waiting_bytes,
              .count_session =
                  [broker = self.get()](int change) {
                    broker->CountSession(change);
                  },
              .count_opening =
                  [broker = self.get()](int change) {
                    broker->opening_ += change;
                  },
              .log = warn,
          }),
          MakeAdminService({
              .core = self->core_.get(),
              .connections = self->connections_.get(),
              .admission = admission,
              .version = kVersion,
              .backend_reason = self->backend_.reason,
          })});
  ASSIGN_OR_RETURN(
      self->accept_,
      AcceptLoop::Start(
          {.loop = self->loop_.get(),
           .connections = self->connections_.get(),
           .rendezvous = self->rendezvous_.get(),
           .admission = admission,
           .identify = {.tenant_by = tenant_by,
                        .socket_name = device.device_uuid,
                        .use_peer_pidfd = self->options_.use_peer_pidfd,
                        .use_pidfd_open = self->options_.use_pidfd_open},
           .serve_rpc = [server = self->server_.get()](
                            int number) { return server->Serve(number); },
           .rpc_ended = [broker = self.get()] { broker->UpdateRestTimer(); },
           .incarnation = incarnation,
           .join_within = self->options_.join_within,
           .log = warn},
          std::move(rpc), std::move(descriptors)));

  self->WatchExpected();
  self->loop_->Post([broker = self.get()] {
    broker->RunCore();
    broker->UpdateIdleTimer();
  });
  self->loop_->Start();
  self->description_ = absl::StrCat(
      "backend=", device.name, " (", self->backend_.reason,
      ") device=", device.device_uuid, " capacity=", FormatBytes(capacity),
      " socket=", self->address_.rpc_path);
  log->Write(LogLevel::kInfo,
             absl::StrCat("kvbrokerd ready: ", self->description_));
  return self;
}

RunningBroker::~RunningBroker() {
  Stop();
  state_keeper_.reset();  // reads the core
}

bool RunningBroker::LeaveIfIdle() {
  std::promise<bool> left;
  loop_->Post([&] {
    // In the order in which an engine goes through them: one that is seen in
    // none has not connected.
    left_ = rendezvous_->half_open() == 0 && opening_ == 0 && sessions_ == 0;
    if (left_) {
      accept_.reset();
    } else {
      UpdateIdleTimer();
    }
    left.set_value(left_);
  });
  return left.get_future().get();
}

void RunningBroker::Stop() {
  // Start may have failed half way.
  if (stopped_ || loop_ == nullptr) return;
  stopped_ = true;
  if (accept_ != nullptr || left_) {
    // Destroyed where its handlers run.
    std::promise<void> gone;
    loop_->Post([&] {
      accept_.reset();
      gone.set_value();
    });
    gone.get_future().wait();
    core_->Drain();
    // Before the sessions end: those who are connected now will come back.
    if (state_keeper_ != nullptr) state_keeper_->Finish();
    // Those who do not read now have had their time.
    loop_->RunAt(
        Clock::Steady().Now() + 2 * kStopGrace,
        [connections = connections_.get()] { connections->HangUpAll(); });
    server_->Stop(kStopGrace);
    loop_->Stop();
    driver_->Stop();
    log_->Write(LogLevel::kInfo,
                backend_.backend->info().fixed_addresses()
                    ? "kvbrokerd stopped: the slab is gone, engines have to "
                      "be restarted"
                    : "kvbrokerd stopped: engines run on with what they hold");
  }
}

Remembered RunningBroker::Recall(const absl::StatusOr<BrokerState>& state) {
  Remembered remembered;
  if (!state.ok()) {
    // Whoever was connected is not known. Where there was a record, somebody
    // may have been.
    remembered.incomplete = true;
    remembered.hold = absl::IsDataLoss(state.status()) ||
                      absl::IsFailedPrecondition(state.status());
    return remembered;
  }
  const absl::Time now = absl::Now();
  for (const SavedLimits& saved : state->limits) {
    remembered.limits.push_back(
        {.tenant = saved.tenant,
         .name = saved.name,
         .min = saved.min,
         .max = saved.max,
         .weight = saved.weight,
         .revision = saved.revision,
         // Who was connected has until now had a process.
         .unused_for =
             saved.unused_since == absl::InfiniteFuture()
                 ? absl::ZeroDuration()
                 : std::max(now - saved.unused_since, absl::ZeroDuration())});
  }
  for (const SavedSession& saved : state->sessions) {
    RememberedSession session = {.peer = {.tenant = saved.tenant,
                                          .pid = saved.pid,
                                          .start_time = saved.start_time,
                                          .process_inode = saved.process_inode},
                                 .instance = saved.instance,
                                 .member = saved.member,
                                 .rank = saved.rank};
    if (saved.pid != 0) {
      UniqueFd process = OpenProcess(saved.pid, saved.start_time);
      if (!process) continue;  // died meanwhile
      expected_.emplace_back(session.peer, std::move(process));
    }
    remembered.sessions.push_back(std::move(session));
  }
  return remembered;
}

BrokerState RunningBroker::StateToSave() {
  const Remembered remembered = core_->Remember();
  BrokerState state = {.incarnation = incarnation_};
  const absl::Time now = absl::Now();
  for (const RememberedLimits& limits : remembered.limits) {
    state.limits.push_back(
        {.tenant = limits.tenant,
         .name = limits.name,
         .min = limits.min,
         .max = limits.max,
         .weight = limits.weight,
         .revision = limits.revision,
         .unused_since = limits.unused_for == absl::ZeroDuration()
                             ? absl::InfiniteFuture()
                             : now - limits.unused_for});
  }
  for (const RememberedSession& session : remembered.sessions) {
    state.sessions.push_back({.tenant = session.peer.tenant,
                              .instance = session.instance,
                              .member = session.member,
                              .rank = session.rank,
                              .pid = session.peer.pid,
                              .start_time = session.peer.start_time,
                              .process_inode = session.peer.process_inode});
  }
  return state;
}

void RunningBroker::WatchExpected() {
  for (const auto& [peer, process] : expected_) {
    absl::StatusOr<EventLoop::WatchId> watch = loop_->WatchOnce(
        process.get(), EPOLLIN, [core = core_.get(), peer = peer](uint32_t) {
          core->ExpectedGone(peer);
        });
    // Without a watch the grace ends the wait.
    if (!watch.ok()) {
      log_->Write(LogLevel::kWarn, std::string(watch.status().message()));
    }
  }
}

void RunningBroker::RunCore() {
  core_woken_ = false;
  const absl::Time next = core_->RunDue();
  loop_->Cancel(core_timer_);
  core_timer_ = loop_->RunAt(next, [this] { RunCore(); });
}

void RunningBroker::WakeCore() {
  if (core_woken_.exchange(true)) return;
  loop_->Post([this] { RunCore(); });
}

void RunningBroker::UpdateHealth() {
  // There the latest is what is said last.
  loop_->Post([this] { server_->SetHealth(core_->device_status().ok()); });
}

void RunningBroker::UpdateRestTimer() {
  loop_->Cancel(rest_timer_);
  if (connections_->size() != 0) return;
  rest_timer_ =
      loop_->RunAt(Clock::Steady().Now() + options_.rest_after, [this] {
        if (connections_->size() == 0) server_->Rest();
      });
}

void RunningBroker::CountSession(int change) {
  sessions_ += change;
  driver_->Do([this] { backend_.backend->SetInUse(sessions_ > 0); });
  if (idle_exit_ == absl::InfiniteDuration()) return;
  loop_->Post([this] { UpdateIdleTimer(); });
}

void RunningBroker::UpdateIdleTimer() {
  if (idle_exit_ == absl::InfiniteDuration() || !options_.idle) return;
  if (sessions_ != 0) {
    if (idle_timer_) loop_->Cancel(*idle_timer_);
    idle_timer_.reset();
  } else if (!idle_timer_) {
    idle_timer_ = loop_->RunAt(Clock::Steady().Now() + idle_exit_, [this] {
      idle_timer_.reset();
      if (sessions_ == 0) options_.idle();
    });
  }
}

}  // namespace kvbroker
