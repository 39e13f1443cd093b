#include "broker/core/testing/fake_world.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

// Rounds of pumping after which something must be going in circles.
constexpr int kTooManyRounds = 10'000;

}  // namespace

FakeWorld::FakeWorld(Options options)
    : charge_(options.charge),
      device_(
          {.total = options.fixed_addresses ? options.capacity : options.device,
           .fixed_addresses = options.fixed_addresses}),
      faults_(device_, options.seed) {
  CoreOptions core;
  core.backend = &faults_;
  core.clock = &clock_;
  core.capacity = options.capacity;
  core.headroom = options.headroom;
  core.charge = options.charge;
  core.policy = options.policy;
  core.incarnation = 1;
  core.max_stock = options.max_stock;
  core.max_stocked_handles = options.max_stocked_handles;
  core.descriptor_window = options.descriptor_window;
  core.remembered = options.remembered;
  core.acknowledge_within = options.acknowledge_within;
  core.max_sessions_per_uid = options.max_sessions_per_uid;
  core.max_instances_per_tenant = options.max_instances_per_tenant;
  core.inline_handles = options.inline_handles;
  if (options.bulk_by_hand) {
    core.executor = [this](std::function<void()> work) {
      bulk_.push_back(std::move(work));
    };
  }
  core.wake = [this] { ++wakes_; };
  core.log = [this](std::string_view line) {
    MutexLock lock(&mu_);
    log_.emplace_back(line);
  };
  core.history = [this](absl::Span<const HistoryEvent> events) {
    MutexLock lock(&mu_);
    for (const HistoryEvent& event : events) {
      early_.emplace(event.number, event);
    }
    while (!early_.empty() && early_.begin()->first == checked_ + 1) {
      history_.Add(++checked_, early_.begin()->second);
      early_.erase(early_.begin());
    }
  };
  absl::StatusOr<std::unique_ptr<Core>> made = Core::Create(std::move(core));
  KVB_CHECK(made.ok());
  core_ = *std::move(made);
}

Open FakeWorld::OpenOf(const FakeEngine& engine) {
  Open open;
  open.instance = engine.name;
  open.member = engine.member;
  open.declared_peak = engine.declared_peak;
  open.min = engine.min;
  open.max = engine.max;
  open.weight = engine.weight;
  PoolGeometry geometry;
  geometry.handle_bytes = engine.handle;
  geometry.handles_per_page = engine.handles_per_page;
  geometry.layout =
      engine.handles_per_page == 1 ? Layout::kContiguous : Layout::kPerLayer;
  geometry.max_pages = engine.max_pages;
  open.pools.assign(engine.pools, geometry);
  return open;
}

absl::StatusOr<FakeClient*> FakeWorld::TryStart(const FakeEngine& engine) {
  Peer peer{.tenant = engine.tenant, .uid = 1, .pid = engine.pid};
  if (peer.pid == 0) peer.pid = ++next_pid_;
  return TryStart(peer, OpenOf(engine));
}

absl::StatusOr<FakeClient*> FakeWorld::TryStart(const Peer& peer,
                                                const Open& open) {
  ASSIGN_OR_RETURN(std::unique_ptr<FakeClient> client,
                   FakeClient::Open(*core_, device_, clock_, peer, open));
  clients_.push_back(std::move(client));
  return clients_.back().get();
}

FakeClient& FakeWorld::Start(const FakeEngine& engine) {
  absl::StatusOr<FakeClient*> client = TryStart(engine);
  KVB_CHECK(client.ok());
  return **client;
}

bool FakeWorld::RunBulk() {
  if (bulk_.empty()) return false;
  std::function<void()> work = std::move(bulk_.front());
  bulk_.pop_front();
  work();
  return true;
}

void FakeWorld::Settle() {
  for (int round = 0; round < kTooManyRounds; ++round) {
    bool busy = false;
    for (const auto& client : clients_) busy |= client->Pump();
    busy |= RunBulk();
    if (!busy) return;
  }
  complaints_.push_back("the core and its clients do not come to rest");
}

void FakeWorld::Advance(absl::Duration by) {
  const absl::Time end = clock_.Now() + by;
  for (int round = 0; round < kTooManyRounds; ++round) {
    Settle();
    const absl::Time due = core_->RunDue();
    Settle();
    if (due <= clock_.Now()) continue;  // made due by what was done
    const absl::Time next = std::min(due, end);
    clock_.Advance(next - clock_.Now());
    if (next == end) {
      core_->RunDue();
      Settle();
      return;
    }
  }
  complaints_.push_back("something is always due");
}

InstanceStatus FakeWorld::Status(std::string_view name) {
  for (InstanceStatus& status : core_->Snapshot().instances) {
    if (status.name == name) return std::move(status);
  }
  return {};
}

std::vector<std::string> FakeWorld::TakeLog(std::string_view words) {
  MutexLock lock(&mu_);
  std::vector<std::string> lines = std::exchange(log_, {});
  std::erase_if(lines, [&](const std::string& line) {
    return line.find(words) == std::string::npos;
  });
  return lines;
}

void FakeWorld::Forget(const FakeClient& client) {
  KVB_CHECK(!client.alive());
  std::erase_if(clients_, [&](const auto& c) { return c.get() == &client; });
}

absl::Status FakeWorld::Check(CoreSnapshot* seen) {
  auto wrong = [](auto... words) {
    return absl::InternalError(absl::StrCat(words...));
  };
  RETURN_IF_ERROR(core_->CheckInvariants());
  RETURN_IF_ERROR(device_.CheckInvariants());
  if (!complaints_.empty()) return wrong(complaints_.front());
  {
    MutexLock lock(&mu_);
    if (!early_.empty()) return wrong("history, a hole after ", checked_);
    if (!history_.violations().empty()) {
      const Violation& first = history_.violations().front();
      const std::string_view rule = NameOf(first.rule);
      return wrong("history, ", absl::string_view(rule.data(), rule.size()),
                   ": ", first.what);
    }
  }

  std::set<uint64_t> tokens;
  std::map<std::pair<std::string, std::string>, Bytes> lent;
  Bytes all_lent;
  for (const auto& client : clients_) {
    if (!client->complaints().empty()) {
      return wrong("session ", client->id().value(), ": ",
                   client->complaints().front());
    }
    for (uint64_t token : client->Tokens()) {
      if (!tokens.insert(token).second) {
        return wrong("two owners of handle ", token);
      }
      if (charge_ == CoreOptions::Charge::kBroker && client->connected() &&
          !device_.IsLive(token)) {
        return wrong("the broker dropped a handle that session ",
                     client->id().value(), " holds: ", token);
      }
    }
    lent[{client->peer().tenant, client->instance()}] += client->lent();
    all_lent += client->lent();
  }
  CoreSnapshot own;
  CoreSnapshot& snapshot = seen == nullptr ? own : *seen;
  snapshot = core_->Snapshot();
  Bytes held;
  for (const InstanceStatus& instance : snapshot.instances) {
    held += instance.held;
    // The rest is credit.
    if (lent[{instance.tenant, instance.name}] > instance.held) {
      return wrong("instance ", instance.name, " was lent ",
                   lent[{instance.tenant, instance.name}].count(),
                   " bytes, the core counts ", instance.held.count());
    }
    lent.erase({instance.tenant, instance.name});
  }
  for (const auto& [key, bytes] : lent) {
    if (bytes > Bytes(0)) return wrong("the core forgot instance ", key.second);
  }
  if (held != snapshot.broker.held) {
    return wrong("all instances hold ", held.count(), " bytes, the core says ",
                 snapshot.broker.held.count());
  }
  if (held + snapshot.broker.stock > snapshot.broker.capacity) {
    return wrong("more is held than there is: ", held.count());
  }
  const Bytes used = *device_.UsedBytes() - device_.foreign_bytes();
  // Handles that the executor is making, or has yet to release, are neither
  // lent nor in stock.
  const bool exact = bulk_.empty();
  if (exact ? used != all_lent + snapshot.broker.stock
            : used < all_lent + snapshot.broker.stock) {
    return wrong("the device has ", used.count(), " bytes in use, lent are ",
                 all_lent.count(), ", in stock ",
                 snapshot.broker.stock.count());
  }
  return absl::OkStatus();
}

}  // namespace kvbroker
