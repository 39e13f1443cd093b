// The C ABI over Session and Pool. Every error becomes a code and a message in
// one place, Fail, and exceptions (the standard library's, when memory runs out)
// in another, Guarded; elsewhere they end the program.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/probe.h"
#include "client/address/broker_address.h"
#include "client/address/broker_starter.h"
#include "client/arena/cuda_driver.h"
#include "client/arena/make_mapper.h"
#include "client/capi/admin.h"
#include "client/capi/kvbroker.h"
#include "client/session/open_session.h"
#include "client/shm_view/view_keeper.h"

using kvbroker::Bytes;
using kvbroker::client::BlockRemoval;
using kvbroker::client::BrokerAddress;
using kvbroker::client::KeptView;
using kvbroker::client::Pool;
using kvbroker::client::PoolOptions;
using kvbroker::client::PoolUsage;
using kvbroker::client::Session;
using kvbroker::client::SessionOptions;

struct kvb_session_options {
  SessionOptions session;
  std::string address;
  std::string gpu;
  std::string kvbrokerd;
  int name_conflict = KVB_JOIN;
  std::string view_directory;  // empty: no view
};

struct kvb_session {
  std::unique_ptr<Session> session;
  std::string instance;
  std::string joined_pids;
  pid_t owner = 0;
  int device = -1;
  BrokerAddress broker;
  std::unique_ptr<KeptView> view;  // last: goes first
};

struct kvb_range {
  std::shared_ptr<void> kept;
};

// kvb_pool is a client::Pool by another name: nothing of its own to keep.

namespace {

kvb_code Fail(const absl::Status& status, char** error) {
  if (status.ok()) return KVB_OK;
  if (error != nullptr) {
    *error = strndup(status.message().data(), status.message().size());
  }
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kUnavailable:
      return static_cast<kvb_code>(status.code());
    default:
      return KVB_INTERNAL;
  }
}

// Calls action() and answers with its status.
template <typename Action>
kvb_code Guarded(char** error, Action action) noexcept {
  try {
    return Fail(action(), error);
  } catch (const std::exception& thrown) {
    if (error != nullptr) *error = strdup(thrown.what());
    return KVB_INTERNAL;
  }
}

Pool& Unwrap(kvb_pool* pool) { return *reinterpret_cast<Pool*>(pool); }

absl::Duration FromMillis(int64_t ms) {
  return ms == KVB_FOREVER ? absl::InfiniteDuration() : absl::Milliseconds(ms);
}

// More than any device has is as good as all of that.
Bytes ToBytes(uint64_t bytes) {
  const uint64_t most = static_cast<uint64_t>(kvbroker::kMaxBytes.count());
  return Bytes(static_cast<int64_t>(std::min(bytes, most + 1)));
}

uint64_t Count(Bytes bytes) { return static_cast<uint64_t>(bytes.count()); }

// Into the part of a struct that the caller knows of.
template <typename Struct>
void Fill(Struct* out, Struct values) {
  values.size = out->size;
  std::memcpy(out, &values, std::min(out->size, sizeof(values)));
}

kvb_pool_options DefaultPool() {
  const PoolOptions defaults;
  kvb_pool_options options = {};
  options.handles_per_page = 1;
  options.layout = KVB_CONTIGUOUS;
  options.map_ahead = defaults.map_ahead;
  options.min_reserved_pages = defaults.min_reserved_pages;
  options.max_reserved_pages = -1;
  options.idle_decay_ms = absl::ToInt64Milliseconds(defaults.idle_decay);
  options.running_miss_wait_us =
      absl::ToInt64Microseconds(defaults.running_miss_wait);
  options.claim_deadline_ms =
      absl::ToInt64Milliseconds(defaults.claim_deadline);
  return options;
}

// What the broker does not see, or could not name in the caller's words.
absl::Status CheckPool(const kvb_pool_options& pool) {
  if (pool.handle_bytes == 0 || pool.block_bytes == 0) {
    return absl::InvalidArgumentError(
        "pool options: handle_bytes and block_bytes must be above 0");
  }
  if (pool.handles_per_page == 0 || pool.max_pages == 0) {
    return absl::InvalidArgumentError(
        "pool options: handles_per_page and max_pages must be above 0");
  }
  if (pool.layout != KVB_CONTIGUOUS && pool.layout != KVB_PER_LAYER) {
    return absl::InvalidArgumentError(
        absl::StrCat("pool options: no such layout: ",
                     static_cast<int>(pool.layout)));
  }
  if (pool.min_reserved_pages < 0 || pool.max_reserved_pages < -1) {
    return absl::InvalidArgumentError(
        "pool options: min_reserved_pages must be 0 or more, "
        "max_reserved_pages -1 or more");
  }
  if (pool.idle_decay_ms < 0 || pool.running_miss_wait_us < 0 ||
      pool.claim_deadline_ms < 0) {
    return absl::InvalidArgumentError(
        "pool options: times must be 0 or more");
  }
  if (pool.guard != 0 &&
      (pool.layout != KVB_CONTIGUOUS || pool.handles_per_page != 1)) {
    return absl::InvalidArgumentError(
        "pool options: guard is for the contiguous layout, with one handle a "
        "page");
  }
  return absl::OkStatus();
}

absl::StatusOr<PoolOptions> FromC(const kvb_pool_options* given) {
  if (given->size > sizeof(kvb_pool_options)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "pool options: the program was built for a newer libkvbroker; size is ",
        given->size, ", the library knows ", sizeof(kvb_pool_options)));
  }
  kvb_pool_options pool = DefaultPool();
  std::memcpy(&pool, given, given->size);
  RETURN_IF_ERROR(CheckPool(pool));
  PoolOptions options;
  options.geometry.handle_bytes = ToBytes(pool.handle_bytes);
  options.geometry.handles_per_page = pool.handles_per_page;
  options.geometry.layout = pool.layout == KVB_CONTIGUOUS
                                ? kvbroker::Layout::kContiguous
                                : kvbroker::Layout::kPerLayer;
  options.geometry.max_pages = pool.max_pages;
  options.block_bytes = ToBytes(pool.block_bytes);
  options.reserve_null_block = pool.reserve_null_block != 0;
  options.map_ahead = pool.map_ahead != 0;
  options.guard = pool.guard != 0;
  options.max_blocks = pool.max_blocks;
  options.grow_when_polled = pool.grow_when_polled != 0;
  options.min_reserved_pages = pool.min_reserved_pages;
  if (pool.max_reserved_pages >= 0) {
    options.max_reserved_pages = pool.max_reserved_pages;
  }
  options.idle_decay = FromMillis(pool.idle_decay_ms);
  options.running_miss_wait = absl::Microseconds(pool.running_miss_wait_us);
  options.claim_deadline = FromMillis(pool.claim_deadline_ms);
  void* const context = pool.context;
  if (pool.on_preempt != nullptr) {
    options.on_preempt = [call = pool.on_preempt, context] { call(context); };
  }
  if (pool.on_closing != nullptr) {
    options.on_closing = [call = pool.on_closing,
                          context](kvbroker::PageCount pages) {
      call(context, static_cast<uint64_t>(pages));
    };
  }
  if (pool.on_memory != nullptr) {
    options.on_memory = [call = pool.on_memory, context] { call(context); };
  }
  return options;
}

absl::StatusOr<kvbroker::NameConflict> NameConflict(int given) {
  switch (given) {
    case KVB_JOIN:
      return kvbroker::NameConflict::kJoin;
    case KVB_SUFFIX:
      return kvbroker::NameConflict::kSuffix;
    case KVB_ERROR:
      return kvbroker::NameConflict::kError;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("options: no such name_conflict: ", given));
}

// Empty: none.
absl::StatusOr<std::string> ProgramToStart(const kvb_session_options& options) {
  if (options.kvbrokerd.empty() || !options.address.empty()) {
    return std::string();
  }
  ASSIGN_OR_RETURN(const bool allowed,
                   kvbroker::client::AutostartAllowed(std::getenv));
  return allowed ? options.kvbrokerd : std::string();
}

// The GPU's ordinal in this process; -1 where the broker lends host memory.
absl::StatusOr<int> OrdinalOf(const BrokerAddress& broker) {
  if (!kvbroker::client::IsGpu(broker.device_uuid)) return -1;
  ASSIGN_OR_RETURN(const kvbroker::CudaDriver* driver,
                   kvbroker::client::LoadedCudaDriver());
  ASSIGN_OR_RETURN(kvbroker::CudaDevice device,
                   kvbroker::FindDevice(*driver, broker.device_uuid));
  return device.index;
}

// gRPC's threads do not survive a fork, and the child hangs where it waits for
// them. The process that opened the first session, or asked a broker first:
std::atomic<pid_t> opener = 0;

absl::Status CheckNotForked() {
  pid_t none = 0;
  const pid_t self = getpid();
  if (opener.compare_exchange_strong(none, self) || none == self) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "this process was forked after its parent had spoken with a broker: fork "
      "earlier, or spawn it; parent: ",
      none));
}

// How long the broker may take over kvb_session_set_max.
constexpr absl::Duration kSetMax = absl::Seconds(10);
// A limit that somebody wrote into a view does not hold up the process's other
// views for longer.
constexpr absl::Duration kSetLimit = absl::Seconds(2);

// Keeps the session's view. An engine runs without one where it cannot be.
void KeepSessionView(const std::string& directory, kvb_session& session) {
  kvbroker::client::ViewOwner owner;
  owner.device = session.broker.device_uuid;
  owner.figures = [&raw = *session.session] {
    kvbroker::client::ViewFigures figures;
    figures.limit = raw.opened().max.count();
    // A page with the null block counts as used; all others are given back when
    // somebody needs them, so that none is preallocated.
    for (size_t i = 0; i < raw.pool_count(); ++i) {
      figures.used += raw.pool(i).usage().in_use.count();
    }
    return figures;
  };
  owner.set_limit = [&raw = *session.session,
                     broker = session.broker](Bytes limit) {
    return kvbroker::client::SetOwnMax(raw, broker, limit, kSetLimit);
  };
  owner.remark = [](const std::string& text) {
    std::fprintf(stderr, "kvbroker: %s\n", text.c_str());
  };
  auto view = kvbroker::client::KeepView(directory, session.instance,
                                         std::move(owner));
  if (view.ok()) {
    session.view = *std::move(view);
  } else {
    std::fprintf(stderr, "kvbroker: no view of %s: %s\n",
                 session.instance.c_str(),
                 std::string(view.status().message()).c_str());
  }
}

// Where nobody is asked, a process may still be forked that does.
absl::Status CheckMayAsk(const kvbroker::client::AddressOptions& where) {
  RETURN_IF_ERROR(kvbroker::client::FindBrokers(where).status());
  return CheckNotForked();
}

// What brokers say, for programs; NULL stays where nobody has said anything.
using Question = absl::StatusOr<kvbroker::client::AdminAnswer> (*)(
    const kvbroker::client::AddressOptions& where, absl::Duration timeout);
absl::Status AskBrokers(Question question, const char* address, const char* gpu,
                        int64_t timeout_ms, char** json) {
  const auto where = kvbroker::client::WhereBrokersAre(address, gpu);
  RETURN_IF_ERROR(CheckMayAsk(where));
  ASSIGN_OR_RETURN(auto answer, question(where, FromMillis(timeout_ms)));
  *json = strdup(answer.json.c_str());
  return answer.missing;
}

absl::StatusOr<kvbroker::cli::PolicyChange> FromC(const char* name,
                                                  const kvb_policy* given) {
  if (given->size > sizeof(kvb_policy)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "policy: the program was built for a newer libkvbroker; size is ",
        given->size, ", the library knows ", sizeof(kvb_policy)));
  }
  kvb_policy policy = {};
  std::memcpy(&policy, given, given->size);
  constexpr uint32_t kAll = KVB_POLICY_MIN | KVB_POLICY_MAX |
                            KVB_POLICY_MAX_PERCENT | KVB_POLICY_WEIGHT;
  if (policy.fields == 0 || (policy.fields & ~kAll) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "policy: fields must be one or more of KVB_POLICY_*; got ",
        policy.fields));
  }
  if ((policy.fields & KVB_POLICY_MAX) != 0 &&
      (policy.fields & KVB_POLICY_MAX_PERCENT) != 0) {
    return absl::InvalidArgumentError(
        "policy: max_bytes or max_percent, not both");
  }
  kvbroker::cli::PolicyChange change;
  change.name = name;
  if (policy.tenant != nullptr) change.tenant = policy.tenant;
  change.preset = policy.preset != 0;
  if (policy.fields & KVB_POLICY_MIN) change.min = ToBytes(policy.min_bytes);
  if (policy.fields & KVB_POLICY_MAX) change.max = ToBytes(policy.max_bytes);
  if (policy.fields & KVB_POLICY_MAX_PERCENT) {
    if (!(policy.max_percent >= 0 && policy.max_percent <= 100)) {
      return absl::InvalidArgumentError(
          absl::StrCat("policy: max_percent must be from 0 to 100; got ",
                       policy.max_percent));
    }
    change.max = kvbroker::cli::Percent{policy.max_percent};
  }
  if (policy.fields & KVB_POLICY_WEIGHT) change.weight = policy.weight;
  return change;
}

}  // namespace

static_assert(KVB_BLOCK_UNBACKED ==
              static_cast<int>(kvbroker::client::BlockState::kUnbacked));
static_assert(KVB_BLOCK_FREE ==
              static_cast<int>(kvbroker::client::BlockState::kFree));
static_assert(KVB_BLOCK_USED ==
              static_cast<int>(kvbroker::client::BlockState::kUsed));
static_assert(KVB_BLOCK_CACHED ==
              static_cast<int>(kvbroker::client::BlockState::kCached));
static_assert(KVB_BLOCK_RESERVED ==
              static_cast<int>(kvbroker::client::BlockState::kReserved));

extern "C" {

int kvb_abi_version(void) noexcept { return KVB_ABI_VERSION; }

void kvb_error_free(char* error) noexcept { std::free(error); }

void kvb_text_free(char* text) noexcept { std::free(text); }

// ---- options ----

void kvb_pool_options_init(kvb_pool_options* options, size_t size) noexcept {
  options->size = size;
  Fill(options, DefaultPool());
}

kvb_session_options* kvb_session_options_new(const char* instance) noexcept {
  auto* options = new kvb_session_options;
  options->session.instance = instance;
  if (const char* address = std::getenv("KVBROKER_ADDRESS")) {
    options->address = address;
  }
  return options;
}

void kvb_session_options_free(kvb_session_options* options) noexcept {
  delete options;
}

void kvb_session_options_set_address(kvb_session_options* options,
                                     const char* address) noexcept {
  options->address = address;
}

void kvb_session_options_set_autostart(kvb_session_options* options,
                                       const char* kvbrokerd_path) noexcept {
  options->kvbrokerd = kvbrokerd_path == nullptr ? "" : kvbrokerd_path;
}

void kvb_session_options_set_name_conflict(kvb_session_options* options,
                                           int name_conflict) noexcept {
  options->name_conflict = name_conflict;
}

void kvb_session_options_set_min_fraction(kvb_session_options* options,
                                          double fraction) noexcept {
  options->session.min_fraction = fraction;
}

void kvb_session_options_set_gpu(kvb_session_options* options,
                                 const char* gpu) noexcept {
  options->gpu = gpu;
}

void kvb_session_options_set_backend(kvb_session_options* options,
                                     const char* backend) noexcept {
  options->session.backend = backend;
}

void kvb_session_options_set_member(kvb_session_options* options,
                                    const char* member) noexcept {
  options->session.member = member;
}

void kvb_session_options_set_min(kvb_session_options* options,
                                 uint64_t bytes) noexcept {
  options->session.min = ToBytes(bytes);
}

void kvb_session_options_set_max(kvb_session_options* options,
                                 uint64_t bytes) noexcept {
  options->session.max = ToBytes(bytes);
}

void kvb_session_options_set_max_fraction(kvb_session_options* options,
                                          double fraction) noexcept {
  options->session.max_fraction = fraction;
}

void kvb_session_options_set_weight(kvb_session_options* options,
                                    double weight) noexcept {
  options->session.weight = weight;
}

void kvb_session_options_set_declared_peak(kvb_session_options* options,
                                           uint64_t bytes) noexcept {
  options->session.declared_peak = ToBytes(bytes);
}

void kvb_session_options_set_label(kvb_session_options* options,
                                   const char* key,
                                   const char* value) noexcept {
  options->session.labels[key] = value;
}

void kvb_session_options_set_timeout(kvb_session_options* options,
                                     int64_t ms) noexcept {
  options->session.open_timeout = FromMillis(ms);
}

void kvb_session_options_set_on_fenced(kvb_session_options* options,
                                       kvb_text_callback on_fenced,
                                       void* context) noexcept {
  options->session.on_fenced = [on_fenced, context](const std::string& why) {
    on_fenced(context, why.c_str());
  };
}

void kvb_session_options_set_shm_view(kvb_session_options* options,
                                      const char* directory) noexcept {
  options->view_directory = directory == nullptr ? "" : directory;
}

kvb_code kvb_session_options_add_pool(kvb_session_options* options,
                                      const kvb_pool_options* pool,
                                      char** error) noexcept {
  return Guarded(error, [&]() -> absl::Status {
    ASSIGN_OR_RETURN(PoolOptions added, FromC(pool));
    options->session.pools.push_back(std::move(added));
    return absl::OkStatus();
  });
}

// ---- sessions ----

kvb_code kvb_session_open(const kvb_session_options* options,
                          kvb_session** session, char** error) noexcept {
  return Guarded(error, [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckNotForked());
    kvbroker::client::AddressOptions where;
    where.address = options->address;
    where.gpu = options->gpu;
    SessionOptions wished = options->session;
    ASSIGN_OR_RETURN(wished.name_conflict, NameConflict(options->name_conflict));
    ASSIGN_OR_RETURN(const std::string kvbrokerd, ProgramToStart(*options));
    auto opened = std::make_unique<kvb_session>();
    absl::StatusOr<kvbroker::client::FoundSession> found =
        kvbroker::client::FindAndOpenSession(where, std::move(wished),
                                             kvbrokerd);
    if (absl::IsNotFound(found.status()) && kvbrokerd.empty() &&
        !options->kvbrokerd.empty() && options->address.empty()) {
      return absl::NotFoundError(absl::StrCat(
          found.status().message(),
          "; none is started, since KVBROKER_AUTOSTART forbids it"));
    }
    RETURN_IF_ERROR(found.status());
    opened->session = std::move(found->session);
    const kvbroker::Opened answer = opened->session->opened();
    opened->instance = answer.instance;
    opened->joined_pids = absl::StrJoin(answer.joined_pids, ",");
    ASSIGN_OR_RETURN(opened->device, OrdinalOf(found->broker));
    opened->owner = getpid();
    opened->broker = std::move(found->broker);
    if (!options->view_directory.empty()) {
      KeepSessionView(options->view_directory, *opened);
    }
    *session = opened.release();
    return absl::OkStatus();
  });
}

void kvb_session_begin_close(kvb_session* session) noexcept {
  if (session == nullptr || session->owner != getpid()) return;
  session->session->BeginClose();
}

void kvb_session_close(kvb_session* session) noexcept {
  // A forked child has neither the threads nor the pages: the parent's stay.
  if (session == nullptr || session->owner != getpid()) return;
  delete session;
}

const char* kvb_session_instance(const kvb_session* session) noexcept {
  return session->instance.c_str();
}

const char* kvb_session_joined_pids(const kvb_session* session) noexcept {
  return session->joined_pids.c_str();
}

kvb_code kvb_session_health(kvb_session* session, char** error) noexcept {
  return Guarded(error, [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckNotForked());
    return session->session->health();
  });
}

void kvb_session_limits(kvb_session* session, kvb_limits* limits) noexcept {
  const kvbroker::Opened opened = session->session->opened();
  Fill(limits, {.min_bytes = Count(opened.min),
                .max_bytes = Count(opened.max),
                .capacity_bytes = Count(opened.capacity)});
}

void kvb_session_pause(kvb_session* session) noexcept {
  session->session->Pause();
}

void kvb_session_resume(kvb_session* session) noexcept {
  session->session->Unpause();
}

kvb_code kvb_session_make_room(kvb_session* session, uint64_t declared_peak,
                               int64_t timeout_ms, char** error) noexcept {
  return Guarded(error, [&] {
    return session->session->MakeRoom(ToBytes(declared_peak),
                                      FromMillis(timeout_ms));
  });
}

kvb_code kvb_session_set_max(kvb_session* session, uint64_t bytes,
                             char** error) noexcept {
  return Guarded(error, [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckNotForked());
    return kvbroker::client::SetOwnMax(*session->session, session->broker,
                                       ToBytes(bytes), kSetMax);
  });
}

kvb_pool* kvb_session_pool(kvb_session* session, size_t index) noexcept {
  if (index >= session->session->pool_count()) return nullptr;
  return reinterpret_cast<kvb_pool*>(&session->session->pool(index));
}

int kvb_session_device(const kvb_session* session) noexcept {
  return session->device;
}

kvb_code kvb_gpu_uuid(int ordinal, char** uuid, char** error) noexcept {
  return Guarded(error, [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const kvbroker::CudaDriver* driver,
                     kvbroker::client::LoadedCudaDriver());
    ASSIGN_OR_RETURN(kvbroker::CudaDevice device,
                     kvbroker::FindDevice(*driver, absl::StrCat(ordinal)));
    *uuid = strdup(device.uuid.c_str());
    return absl::OkStatus();
  });
}

// ---- blocks ----

int kvb_pool_try_alloc(kvb_pool* pool, size_t count, int32_t* blocks) noexcept {
  return Unwrap(pool).TryAlloc(absl::MakeSpan(blocks, count));
}

kvb_code kvb_pool_alloc_at(kvb_pool* pool, const int32_t* blocks, size_t count,
                           int64_t timeout_ms, int* taken,
                           char** error) noexcept {
  return Guarded(error, [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const bool took,
                     Unwrap(pool).AllocAt(absl::MakeConstSpan(blocks, count),
                                          FromMillis(timeout_ms)));
    *taken = took;
    return absl::OkStatus();
  });
}

kvb_code kvb_pool_set_blocks(kvb_pool* pool, uint64_t block_bytes,
                             uint32_t max_blocks, int reserve_null_block,
                             char** error) noexcept {
  return Guarded(error, [&] {
    return Unwrap(pool).SetBlocks(ToBytes(block_bytes), max_blocks,
                                  reserve_null_block != 0);
  });
}

size_t kvb_pool_block_ids(kvb_pool* pool) noexcept {
  return static_cast<size_t>(Unwrap(pool).block_geometry().block_ids());
}

int kvb_pool_block_state(kvb_pool* pool, int32_t block) noexcept {
  return static_cast<int>(Unwrap(pool).block_state(block));
}

size_t kvb_pool_page_used(kvb_pool* pool, uint32_t page) noexcept {
  return Unwrap(pool).page_used_blocks(kvbroker::PageIndex(page));
}

size_t kvb_pool_used_blocks(kvb_pool* pool, int32_t* blocks,
                            size_t count) noexcept {
  const std::vector<int32_t> used = Unwrap(pool).UsedBlocks();
  std::copy_n(used.begin(), std::min(count, used.size()), blocks);
  return used.size();
}

uint64_t kvb_pool_trim(kvb_pool* pool) noexcept {
  return static_cast<uint64_t>(Unwrap(pool).Trim());
}

int kvb_pool_alloc(kvb_pool* pool, size_t count, int urgency,
                   int32_t* blocks) noexcept {
  return Unwrap(pool).Alloc(absl::MakeSpan(blocks, count),
                            urgency == KVB_RUNNING
                                ? kvbroker::Urgency::kRunning
                                : kvbroker::Urgency::kWaiting);
}

kvb_code kvb_pool_free(kvb_pool* pool, const int32_t* blocks, size_t count,
                       char** error) noexcept {
  return Guarded(error, [&] {
    return Unwrap(pool).Free(absl::MakeConstSpan(blocks, count));
  });
}

kvb_code kvb_pool_cache(kvb_pool* pool, const int32_t* blocks, size_t count,
                        char** error) noexcept {
  return Guarded(error, [&] {
    return Unwrap(pool).Cache(absl::MakeConstSpan(blocks, count));
  });
}

void kvb_pool_set_max_cached(kvb_pool* pool, int64_t blocks) noexcept {
  Unwrap(pool).SetMaxCached(
      blocks < 0 ? std::nullopt
                 : std::make_optional(static_cast<size_t>(blocks)));
}

int kvb_pool_touch(kvb_pool* pool, const int32_t* blocks,
                   const uint32_t* generations, size_t count) noexcept {
  return Unwrap(pool).Touch(absl::MakeConstSpan(blocks, count),
                            absl::MakeConstSpan(generations, count));
}

uint32_t kvb_pool_generation(kvb_pool* pool, int32_t block) noexcept {
  return Unwrap(pool).generation(block);
}

size_t kvb_pool_drain_removals(kvb_pool* pool, kvb_removal* removals,
                               size_t count) noexcept {
  size_t drained = 0;
  BlockRemoval batch[64];
  while (drained < count) {
    const size_t got = Unwrap(pool).DrainRemovals(
        absl::MakeSpan(batch, std::min<size_t>(64, count - drained)));
    if (got == 0) break;
    for (size_t i = 0; i < got; ++i) {
      removals[drained++] = {batch[i].block, batch[i].generation};
    }
  }
  return drained;
}

size_t kvb_pool_available(kvb_pool* pool) noexcept {
  return Unwrap(pool).available_blocks();
}

size_t kvb_pool_capacity(kvb_pool* pool) noexcept {
  return Unwrap(pool).capacity_blocks();
}

int kvb_pool_reserve(kvb_pool* pool, size_t count,
                     int64_t timeout_ms) noexcept {
  return Unwrap(pool).Reserve(count, FromMillis(timeout_ms));
}

void kvb_pool_step_begin(kvb_pool* pool) noexcept { Unwrap(pool).StepBegin(); }

void kvb_pool_step_end(kvb_pool* pool, uint64_t scheduled_step) noexcept {
  Unwrap(pool).StepEnd(scheduled_step);
}

void kvb_pool_step_done(kvb_pool* pool, uint64_t completed_step) noexcept {
  Unwrap(pool).StepDone(completed_step);
}

uint64_t kvb_pool_pages_to_vacate(kvb_pool* pool) noexcept {
  return static_cast<uint64_t>(Unwrap(pool).pages_to_vacate());
}

size_t kvb_pool_blocks_to_vacate(kvb_pool* pool, int32_t* blocks,
                                 size_t count) noexcept {
  return Unwrap(pool).BlocksToVacate(absl::MakeSpan(blocks, count));
}

// ---- memory ----

void* kvb_pool_region(kvb_pool* pool, size_t handle_of_page) noexcept {
  const kvbroker::PoolGeometry& geometry = Unwrap(pool).options().geometry;
  if (handle_of_page >= geometry.handles_per_page) return nullptr;
  return Unwrap(pool).mapper().region(handle_of_page);
}

uint64_t kvb_pool_region_bytes(kvb_pool* pool) noexcept {
  const kvbroker::PoolGeometry& geometry = Unwrap(pool).options().geometry;
  return Count(geometry.handle_bytes * geometry.max_pages);
}

kvb_range* kvb_pool_retain_range(kvb_pool* pool) noexcept {
  return new kvb_range{Unwrap(pool).mapper().range()};
}

void kvb_range_release(kvb_range* range) noexcept { delete range; }

void kvb_pool_add_stream(kvb_pool* pool, void* stream) noexcept {
  Unwrap(pool).mapper().AddStream(stream);
}

void kvb_pool_remove_stream(kvb_pool* pool, void* stream) noexcept {
  Unwrap(pool).mapper().RemoveStream(stream);
}

void kvb_pool_usage(kvb_pool* pool, kvb_usage* usage) noexcept {
  const PoolUsage now = Unwrap(pool).usage();
  Fill(usage, {.in_use_bytes = Count(now.in_use),
               .cached_bytes = Count(now.cached),
               .idle_bytes = Count(now.idle),
               .arriving_bytes = Count(now.arriving),
               .waiting_bytes = Count(now.waiting)});
}

// ---- as an operator ----

kvb_code kvb_list_instances(const char* address, const char* gpu,
                            int64_t timeout_ms, char** json,
                            char** error) noexcept {
  return Guarded(error, [&] {
    return AskBrokers(kvbroker::client::ListInstances, address, gpu, timeout_ms,
                      json);
  });
}

kvb_code kvb_list_brokers(const char* address, const char* gpu,
                          int64_t timeout_ms, char** json,
                          char** error) noexcept {
  return Guarded(error, [&] {
    return AskBrokers(kvbroker::client::ListBrokers, address, gpu, timeout_ms,
                      json);
  });
}

kvb_code kvb_set_policy(const char* address, const char* gpu, const char* name,
                        const kvb_policy* policy, int64_t timeout_ms,
                        char** error) noexcept {
  return Guarded(error, [&]() -> absl::Status {
    ASSIGN_OR_RETURN(kvbroker::cli::PolicyChange change, FromC(name, policy));
    const auto where = kvbroker::client::WhereBrokersAre(address, gpu);
    RETURN_IF_ERROR(CheckMayAsk(where));
    return kvbroker::client::ChangePolicy(where, change,
                                          FromMillis(timeout_ms));
  });
}

}  // extern "C"
