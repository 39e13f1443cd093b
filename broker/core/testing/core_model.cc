#include "broker/core/testing/core_model.h"

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

constexpr Bytes kCapacity = KiB(3000);  // some 24 pages
constexpr absl::Duration kTick = absl::Milliseconds(100);

// Who may be started: three page sizes, two tenants, one with two handles to a
// page and one with two pools. Engines of one name and tenant join.
const FakeEngine& EngineWithHandles(uint32_t which) {
  static const auto& engines = *new std::array<FakeEngine, 7>{{
      {.name = "a", .tenant = "t", .handle = KiB(128), .max_pages = 24},
      {.name = "b", .tenant = "t", .handle = KiB(144), .max_pages = 24},
      {.name = "c", .tenant = "t", .handle = KiB(112), .max_pages = 7},
      {.name = "d", .tenant = "u", .handle = KiB(128), .max_pages = 24},
      {.name = "e",
       .tenant = "u",
       .handle = KiB(72),
       .handles_per_page = 2,
       .max_pages = 24},
      {.name = "f",
       .tenant = "u",
       .handle = KiB(112),
       .max_pages = 24,
       .pools = 2},
      {.name = "a", .tenant = "u", .handle = KiB(144), .max_pages = 24},
  }};
  return engines[which % engines.size()];
}

// The same for a slab: page sizes that are no multiples of each other, and one
// pool whose addresses end before the slab does.
const FakeEngine& EngineInSlab(uint32_t which) {
  static const auto& engines = *new std::array<FakeEngine, 5>{{
      {.name = "a", .tenant = "t", .handle = KiB(128), .max_pages = 24},
      {.name = "b", .tenant = "t", .handle = KiB(192), .max_pages = 24},
      {.name = "c", .tenant = "t", .handle = KiB(112), .max_pages = 7},
      {.name = "d",
       .tenant = "t",
       .handle = KiB(320),
       .max_pages = 24,
       .pools = 2},
      {.name = "a", .tenant = "t", .handle = KiB(192), .max_pages = 24},
  }};
  return engines[which % engines.size()];
}

// The weighted max-min split, found by walking from one bend of the curve to
// the next: another way than the policy's.
std::vector<double> SplitOf(const std::vector<InstanceStatus>& instances,
                            Bytes lendable) {
  struct Bounds {
    double low, high, weight;
  };
  std::vector<Bounds> bounds;
  std::vector<double> bends = {0};
  for (const InstanceStatus& instance : instances) {
    const Bytes demand = instance.held - instance.idle + instance.waiting;
    const double high = static_cast<double>(
        std::min({demand, instance.max, lendable}).count());
    const double low =
        std::min(static_cast<double>(instance.min.count()), high);
    bounds.push_back({low, high, instance.weight});
    bends.push_back(low / instance.weight);
    bends.push_back(high / instance.weight);
  }
  std::sort(bends.begin(), bends.end());
  auto sum_at = [&](double level) {
    double sum = 0;
    for (const Bounds& b : bounds) {
      sum += std::clamp(level * b.weight, b.low, b.high);
    }
    return sum;
  };
  const double capacity = static_cast<double>(lendable.count());
  double level = bends.back();
  for (size_t i = 1; i < bends.size(); ++i) {
    const double before = sum_at(bends[i - 1]), after = sum_at(bends[i]);
    if (after <= capacity) continue;
    level = after == before
                ? bends[i - 1]
                : bends[i - 1] + (bends[i] - bends[i - 1]) *
                                     (capacity - before) / (after - before);
    break;
  }
  std::vector<double> shares;
  for (const Bounds& b : bounds) {
    shares.push_back(std::clamp(level * b.weight, b.low, b.high));
  }
  return shares;
}

}  // namespace

CoreModel::CoreModel(Variant variant)
    : variant_(variant),
      world_({.capacity = kCapacity,
              // No room for anything that is not on the books.
              .device = kCapacity,
              // Others may use it, too.
              .headroom = variant.memory == Variant::Memory::kSlab
                              ? std::nullopt
                              : std::optional<Bytes>(0),
              .max_stock = Bytes(kCapacity.count() / 4),
              .descriptor_window = 16,
              .bulk_by_hand = variant.bulk == Variant::Bulk::kOnExecutor,
              .inline_handles = 2,
              .fixed_addresses = variant.memory == Variant::Memory::kSlab}) {}

const FakeEngine& CoreModel::EngineOf(uint32_t which) const {
  return variant_.memory == Variant::Memory::kSlab ? EngineInSlab(which)
                                                   : EngineWithHandles(which);
}

void CoreModel::Complain(std::string what) {
  if (status_.ok()) status_ = absl::InternalError(std::move(what));
}

absl::Status CoreModel::Run(const std::vector<Instruction>& program,
                            Statistics* statistics, Variant variant) {
  CoreModel model(variant);
  for (size_t i = 0; i < program.size(); ++i) {
    model.Do(program[i]);
    absl::Status status = model.status_.ok() ? model.Check() : model.status_;
    if (!status.ok()) {
      return absl::InternalError(
          absl::StrCat("instruction ", i, ": ", status.message()));
    }
  }
  if (statistics == nullptr) return absl::OkStatus();
  statistics->instructions += program.size();
  statistics->below_share += model.below_share_;
  for (const std::string& line : model.world_.TakeLog()) {
    auto is = [&](std::string_view head) { return line.rfind(head, 0) == 0; };
    statistics->grants += is("grant ");
    statistics->refusals += is("refuse ");
    statistics->orders += is("reclaim ");
    statistics->preempts += line.find("tier=preempt") != std::string::npos;
    statistics->no_place +=
        is("refuse ") && line.find("pieces too small") != std::string::npos;
  }
  return absl::OkStatus();
}

void CoreModel::Start(const Instruction& instruction) {
  FakeClient*& process = processes_[instruction.who % processes_.size()];
  if (process != nullptr) return;
  FakeEngine engine = EngineOf(instruction.a);
  const uint32_t b = instruction.b;
  if (b % 3 == 1) engine.min = kCapacity * (b / 3 % 5) - Bytes(b % 7);
  if (b % 3 == 1) engine.min = Bytes(engine.min->count() / 10);
  if (b % 5 == 1) engine.max = Bytes(kCapacity.count() / 10 * (3 + b / 5 % 9));
  if (b % 4 == 1) engine.weight = 1 + b / 4 % 5;
  absl::StatusOr<FakeClient*> started = world_.TryStart(engine);
  if (started.ok()) {
    process = *started;
  } else if (!absl::IsFailedPrecondition(started.status()) &&
             !absl::IsInvalidArgument(started.status())) {
    Complain(
        absl::StrCat("an engine cannot start: ", started.status().message()));
  }
}

void CoreModel::Ask(FakeClient& client, const Instruction& instruction) {
  const auto [op, who, a, b, c] = instruction;
  const size_t pool = a % client.pool_count();
  Acquire acquire;
  acquire.pool = client.pool(pool);
  acquire.at_least = 1 + b % 4;
  acquire.want = acquire.at_least + b / 4 % 4;
  acquire.urgency = static_cast<Urgency>(1 + a / 2 % 3);
  constexpr int kDeadlines[] = {50, 500, 4000, 20000};
  acquire.deadline = absl::Milliseconds(kDeadlines[c % 4]);
  acquire.credit = c / 4 % 8 == 1;
  if (c / 32 % 6 == 1 && variant_.memory == Variant::Memory::kHandles) {
    acquire.want = std::min<PageCount>(acquire.want, 3);
    acquire.at_least = std::min(acquire.at_least, acquire.want);
    for (int i = 0; i < acquire.want; ++i) {
      acquire.indexes.push_back(PageIndex((c / 192 + i) % 6));
    }
  }
  if (c / 192 % 10 == 1 && !client.unanswered().empty()) {
    acquire.replaces = client.unanswered().rbegin()->first;
  }
  if (a / 6 % 3 == 1 && client.unanswered().empty()) {
    acquire.acked = client.last_sequence();
  }
  client.Ask(std::move(acquire));
}

void CoreModel::Policy(const Instruction& instruction) {
  const FakeEngine& engine = EngineOf(instruction.a);
  const uint32_t b = instruction.b;
  PolicyChange change;
  switch (b % 4) {
    case 0:
      change.min = Bytes(kCapacity.count() / 10 * (b / 4 % 6));
      break;
    case 1:
      change.max = Bytes(kCapacity.count() / 10 * (b / 4 % 12));
      break;
    case 2:
      change.weight = 1 + b / 4 % 6;
      break;
    case 3:  // Back to nothing special.
      change.min = Bytes(0);
      change.max = kCapacity;
      break;
  }
  change.preset = b / 48 % 4 == 1;
  absl::Status status =
      world_.core()
          .SetPolicy({.name = engine.name, .tenant = engine.tenant}, change)
          .status();
  if (!status.ok() && !absl::IsNotFound(status) &&
      !absl::IsFailedPrecondition(status) && !absl::IsInvalidArgument(status)) {
    Complain(std::string(status.message()));
  }
}

void CoreModel::Do(const Instruction& instruction) {
  const auto [op, who, a, b, c] = instruction;
  FakeClient*& process = processes_[who % processes_.size()];
  auto sequence = [&] {
    const uint64_t last = process->last_sequence().value();
    return Sequence(last - std::min<uint64_t>(instruction.a % 6, last));
  };
  switch (op) {
    case Op::kStart:
      return Start(instruction);
    case Op::kPolicy:
      return Policy(instruction);
    case Op::kDelete: {
      const FakeEngine& engine = EngineOf(a);
      world_.core()
          .Delete({.name = engine.name, .tenant = engine.tenant}, b % 2 == 1)
          .status()
          .IgnoreError();
      return;
    }
    case Op::kForeign:
      if (variant_.memory == Variant::Memory::kSlab) return;
      // No more than there is beside what is lent already.
      world_.device().SetForeignBytes(std::min(
          Bytes(kCapacity.count() / 10 * (a % 8)),
          kCapacity - (*world_.device().UsedBytes() -
                       world_.device().foreign_bytes())));
      return;
    case Op::kFailCreates:
      for (uint32_t i = 0; i <= a % 3; ++i) {
        world_.device().FailNextCreate(
            absl::ResourceExhaustedError("injected"));
      }
      return;
    case Op::kFailExports:
      return world_.faults().SetPlan(FaultInjectingBackend::Call::kExport,
                                     {.calls = {1 + a % 3}});
    case Op::kTick: {
      world_.clock().Advance(absl::Milliseconds(a));
      int rounds = 0;
      while (world_.core().RunDue() <= world_.clock().Now()) {
        if (++rounds == 10) return Complain("something is always due");
      }
      return;
    }
    case Op::kAdvance:
      world_.Advance(absl::Milliseconds(a));
      for (FakeClient* client : processes_) {
        if (client == nullptr) continue;
        for (const auto& [asked, deadline] : client->unanswered()) {
          if (deadline > world_.clock().Now()) continue;
          Complain(absl::StrCat("no answer to sequence ", asked.value(),
                                " by its deadline"));
        }
      }
      return;
    case Op::kBulk:
      for (uint32_t i = 0; i <= a % 4; ++i) world_.RunBulk();
      return;
    case Op::kCooperate:
      if (absl::Status status = Cooperate(instruction); !status.ok()) {
        Complain(std::string(status.message()));
      }
      return;
    default:
      break;
  }
  if (process == nullptr) return;
  if (op == Op::kDie) {
    process->Die();
    return;
  }
  if (op == Op::kDieMaking) {
    // Wherever the process is by then, and if there is another in its place.
    world_.device().OnCreate([this, place = &process](Bytes) {
      world_.device().OnCreate(nullptr);
      if (*place != nullptr) (*place)->Die();
    });
    return;
  }
  if (!process->connected()) return;
  switch (op) {
    case Op::kAsk:
      return Ask(*process, instruction);
    case Op::kRepeat:
      if (const Acquire* asked = process->asked(sequence())) {
        process->Ask(*asked);
      }
      return;
    case Op::kCancel:
      return process->Cancel(sequence());
    case Op::kResend:
      return process->Resend(sequence());
    case Op::kReturn: {
      const size_t pool = a % process->pool_count();
      std::vector<PageName> pages = process->pages(pool);
      pages.resize(std::min<size_t>(pages.size(), 1 + b % 4));
      return process->Return(process->pool(pool), pages);
    }
    case Op::kRoom: {
      if (process->room_asked()) return;
      constexpr int kDeadlines[] = {50, 500, 4000, 20000};
      process->AskRoom(Bytes(kCapacity.count() / 10 * (a % 6)),
                       absl::Milliseconds(kDeadlines[c % 4]));
      return;
    }
    case Op::kMark:
      return process->Mark(1 + b % 6, static_cast<FakeClient::Use>(c % 3), {},
                           a % process->pool_count());
    case Op::kPump:
      process->Pump();
      return;
    case Op::kManners: {
      FakeClient::Manners& manners = process->manners();
      manners.acknowledges_descriptors = a % 8 != 1;
      manners.answers_reclaims = a / 8 % 4 != 1;
      manners.preempts = a / 32 % 4 != 1;
      manners.reports = a / 128 % 4 != 1;
      manners.fails_to_map = a / 512 % 8 == 1 ? 2 : 0;
      manners.arrives_as = static_cast<FakeClient::Use>(a / 4096 % 3);
      if (manners.acknowledges_descriptors) process->Acknowledge();
      return;
    }
    case Op::kHangUp:
      return process->HangUp();
    default:
      return Complain("an unknown instruction");
  }
}

std::vector<std::pair<const FakeClient*, Sequence>> CoreModel::MustBeServed() {
  const CoreSnapshot snapshot = world_.core().Snapshot();
  const std::vector<InstanceStatus>& instances = snapshot.instances;
  const Bytes lendable = kCapacity - snapshot.broker.others;
  // What comes back now is for others.
  if (snapshot.broker.held > lendable) return {};
  if (variant_.memory == Variant::Memory::kSlab) return {};
  const std::vector<double> shares = SplitOf(instances, lendable);
  auto clients_of = [&](const InstanceStatus& instance) {
    std::vector<const FakeClient*> clients;
    for (const FakeClient* client : processes_) {
      if (client != nullptr && client->instance() == instance.name &&
          client->peer().tenant == instance.tenant) {
        clients.push_back(client);
      }
    }
    return clients;
  };

  // What is free, and what each instance can give: pages above its share, of
  // which the last may cross it, none below its `min`.
  Bytes free = lendable;
  std::vector<Bytes> excess(instances.size());
  for (size_t i = 0; i < instances.size(); ++i) {
    free -= instances[i].held;
    if (instances[i].pressure == "ignoring") continue;
    Bytes page, given;
    bool alike = true;
    for (const FakeClient* client : clients_of(instances[i])) {
      for (size_t p = 0; p < client->pool_count(); ++p) {
        alike &= page == Bytes(0) || page == client->page_bytes(p);
        page = client->page_bytes(p);
        if (client->connected()) given += page * client->lent(p);
      }
    }
    const Bytes share = Bytes(static_cast<int64_t>(shares[i]) + 2);
    const Bytes above_share = instances[i].held - share;
    const Bytes above_min = instances[i].held - instances[i].min;
    if (!alike || page == Bytes(0) || above_min <= Bytes(0)) continue;
    excess[i] = std::min(
        page * std::min(CeilDivide(above_share, page), above_min / page),
        given);
  }
  Bytes all_excess;
  for (Bytes bytes : excess) all_excess += bytes;

  std::vector<std::pair<const FakeClient*, Sequence>> found;
  std::vector<std::pair<Bytes, Bytes>> needs;  // with what may serve it
  Bytes all_needs;
  for (size_t i = 0; i < instances.size(); ++i) {
    for (const FakeClient* client : clients_of(instances[i])) {
      for (const auto& [sequence, deadline] : client->unanswered()) {
        const Acquire& claim = *client->asked(sequence);
        if (claim.urgency == Urgency::kSpeculative) continue;
        size_t pool = 0;
        while (client->pool(pool) != claim.pool) ++pool;
        const Bytes need = client->page_bytes(pool) * claim.at_least;
        const Bytes after = instances[i].held + need;
        if (static_cast<double>(after.count()) > shares[i] + 2 &&
            after > instances[i].min) {
          continue;
        }
        // Anything that may be served first counts as if it were.
        all_needs += need;
        if (static_cast<double>(after.count()) > shares[i] - 2) continue;
        found.emplace_back(client, sequence);
        needs.emplace_back(need, free + all_excess - excess[i]);
      }
    }
  }
  std::vector<std::pair<const FakeClient*, Sequence>> must;
  for (size_t i = 0; i < found.size(); ++i) {
    if (all_needs <= needs[i].second) must.push_back(found[i]);
  }
  return must;
}

absl::Status CoreModel::Cooperate(const Instruction& instruction) {
  world_.faults().SetPlan(FaultInjectingBackend::Call::kExport, {});
  world_.device().OnCreate(nullptr);
  world_.device().SetForeignBytes(Bytes(0));
  for (size_t i = 0; i < processes_.size(); ++i) {
    FakeClient* client = processes_[i];
    if (client == nullptr || !client->connected()) continue;
    client->manners() = {};
    client->Acknowledge();
    client->Pump();
    if (instruction.b >> i & 1) client->Mark(100, FakeClient::Use::kInUse);
    if ((instruction.a >> i & 1) == 0) continue;
    client->Ask({.at_least = 1 + (instruction.a >> (i + 6)) % 2,
                 .deadline = absl::Seconds(20)});
  }
  const PolicyConfig policy;
  const absl::Duration bound =
      policy.patience + policy.reclaim_deadline + kTick * 2;
  std::map<std::pair<const FakeClient*, Sequence>, absl::Time> since;
  const absl::Time end = world_.clock().Now() + bound + kTick * 5;
  while (world_.clock().Now() < end) {
    world_.Advance(kTick);
    const auto must = MustBeServed();
    std::erase_if(since, [&](const auto& entry) {
      if (std::find(must.begin(), must.end(), entry.first) != must.end()) {
        return false;
      }
      if (entry.first.first->granted(entry.first.second)) ++below_share_;
      return true;
    });
    for (const auto& claim : must) {
      auto [entry, added] = since.try_emplace(claim, world_.clock().Now());
      if (world_.clock().Now() - entry->second <= bound) continue;
      std::string text;
      for (const InstanceStatus& status : world_.core().Snapshot().instances) {
        absl::StrAppend(&text, "; ", status.name, " of ", status.tenant,
                        " holds ", status.held.count(), ", share ",
                        status.share.count(), ", min ", status.min.count(),
                        ", ", status.pressure);
      }
      return absl::InternalError(absl::StrCat(
          "below its share and not served: session ", claim.first->id().value(),
          " of ", claim.first->instance(), ", sequence ", claim.second.value(),
          text));
    }
  }
  return absl::OkStatus();
}

absl::Status CoreModel::Check() {
  for (FakeClient*& client : processes_) {
    if (client == nullptr) continue;
    if (client->was_ended()) client->Pump();
    // Who does not acknowledge is ended where others wait for it.
    if (!client->error().ok() && !absl::IsDeadlineExceeded(client->error())) {
      return absl::InternalError(
          absl::StrCat("a session was ended: ", client->error().message()));
    }
    if (client->alive()) continue;
    world_.Forget(*client);
    client = nullptr;
  }
  CoreSnapshot snapshot;
  RETURN_IF_ERROR(world_.Check(&snapshot));
  const std::map<Key, Bytes> held_before = std::exchange(held_, {});
  for (const InstanceStatus& instance : snapshot.instances) {
    const Key key(instance.tenant, instance.name);
    held_[key] = instance.held;
    auto found = held_before.find(key);
    const Bytes before = found == held_before.end() ? Bytes(0) : found->second;
    if (instance.held > before &&
        instance.held > std::min(instance.max, kCapacity)) {
      return absl::InternalError(
          absl::StrCat(instance.name, " grew above its max: to ",
                       instance.held.count(), " of ", instance.max.count()));
    }
    // What is left of it when all orders are obeyed. It may go lower for its
    // own sake: for its limit, or from one of its pools to another.
    Bytes left = instance.held;
    size_t pools = 0;
    for (const FakeClient* client : processes_) {
      if (client == nullptr || client->instance() != instance.name ||
          client->peer().tenant != instance.tenant) {
        continue;
      }
      pools += client->pool_count();
      if (!client->connected()) continue;
      for (size_t p = 0; p < client->pool_count(); ++p) {
        std::optional<Reclaim> order = client->told_order(p);
        if (!order) continue;
        left -= client->page_bytes(p) *
                std::max<PageCount>(client->lent(p) - order->hold_at_most, 0);
      }
    }
    if (pools == 1 && left < instance.held && left < instance.min &&
        instance.held <= instance.max) {
      return absl::InternalError(absl::StrCat(
          instance.name, " is asked to go below its min: to ", left.count(),
          " of ", instance.min.count(), ", holds ", instance.held.count()));
    }
  }
  return absl::OkStatus();
}

// ---- programs --------------------------------------------------------------

std::vector<Instruction> RandomProgram(std::mt19937_64& random, int length) {
  auto draw = [&](uint32_t below) {
    return std::uniform_int_distribution<uint32_t>(0, below - 1)(random);
  };
  constexpr std::pair<Op, double> kOften[] = {
      {Op::kStart, 6},       {Op::kAsk, 34},        {Op::kRepeat, 2},
      {Op::kCancel, 3},      {Op::kResend, 2},      {Op::kReturn, 5},
      {Op::kMark, 14},       {Op::kPump, 24},       {Op::kManners, 3},
      {Op::kHangUp, 0.5},    {Op::kDie, 2},         {Op::kDieMaking, 0.5},
      {Op::kPolicy, 3},      {Op::kDelete, 0.4},    {Op::kFailCreates, 1},
      {Op::kFailExports, 1}, {Op::kTick, 8},        {Op::kAdvance, 6},
      {Op::kBulk, 12},       {Op::kCooperate, 1.5}, {Op::kForeign, 1.5},
      {Op::kRoom, 1},
  };
  std::vector<double> weights;
  for (const auto& [op, weight] : kOften) weights.push_back(weight);
  std::discrete_distribution<size_t> which(weights.begin(), weights.end());
  std::vector<Instruction> program;
  for (int i = 0; i < length; ++i) {
    Instruction instruction{kOften[which(random)].first, draw(6), draw(1 << 14),
                            draw(1 << 14), draw(1 << 14)};
    if (instruction.op == Op::kTick || instruction.op == Op::kAdvance) {
      constexpr uint32_t kMillis[] = {0, 1, 20, 100, 300, 1000, 2500};
      instruction.a = kMillis[draw(7)];
    }
    program.push_back(instruction);
  }
  return program;
}

std::vector<Instruction> Shrink(std::vector<Instruction> program,
                                CoreModel::Variant variant) {
  auto fails = [&](const std::vector<Instruction>& candidate) {
    return !CoreModel::Run(candidate, nullptr, variant).ok();
  };
  for (size_t chunk = std::max<size_t>(program.size() / 2, 1);;) {
    bool removed = false;
    for (size_t at = 0; at < program.size();) {
      std::vector<Instruction> candidate = program;
      candidate.erase(
          candidate.begin() + at,
          candidate.begin() + std::min(at + chunk, candidate.size()));
      if (fails(candidate)) {
        program = std::move(candidate);
        removed = true;
      } else {
        at += chunk;
      }
    }
    if (chunk == 1 && !removed) return program;
    if (!removed) chunk /= 2;
  }
}

std::string ToCpp(const std::vector<Instruction>& program) {
  static constexpr const char* kNames[] = {
      "kStart",       "kAsk",       "kRepeat",  "kCancel",  "kResend",
      "kReturn",      "kMark",      "kPump",    "kManners", "kHangUp",
      "kDie",         "kDieMaking", "kPolicy",  "kDelete",  "kFailCreates",
      "kFailExports", "kTick",      "kAdvance", "kBulk",    "kCooperate"};
  std::string text = "{\n";
  for (const auto& [op, who, a, b, c] : program) {
    absl::StrAppend(&text, "    {Op::", kNames[static_cast<size_t>(op)], ", ",
                    who, ", ", a, ", ", b, ", ", c, "},\n");
  }
  return text + "}";
}

}  // namespace kvbroker
