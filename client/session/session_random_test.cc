// Random engines on one small broker: three sessions of two pools each, with
// pages of three sizes, under limits that change and a link that loses things
// and breaks, and a broker that is restarted. After each instruction the books
// of all must agree.
//
// KVBROKER_TEST_SEED and KVBROKER_TEST_INSTRUCTIONS choose another run; the
// seed is printed. KVBROKER_TEST_LOG=1 prints the broker's log as well.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/core/core.h"
#include "broker/device/fake_backend.h"
#include "client/history/mapping_event.h"
#include "client/session/lossy_link.h"
#include "client/session/session.h"
#include "gtest/gtest.h"
#include "tests/harness/null_mapper.h"
#include "tests/history/history_checker.h"

namespace kvbroker::client {
namespace {

constexpr Bytes kCapacity = KiB(960);
constexpr Bytes kBlock = KiB(4);
constexpr int kSessions = 3;
constexpr int kPools = 2;

uint64_t FromEnvironment(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  uint64_t value = otherwise;
  if (text != nullptr && !absl::SimpleAtoi(text, &value)) {
    ADD_FAILURE() << variable << ": not a number: " << text;
  }
  return value;
}

// Knows which pages are mapped, and records it.
class KnowingMapper : public testing::NullMapper {
 public:
  using Record = std::function<void(MappingEvent::Kind, PageIndex)>;

  explicit KnowingMapper(Record record) : record_(std::move(record)) {
    record_(MappingEvent::Kind::kPool, PageIndex());
  }

  absl::Status Map(PageIndex page, std::vector<UniqueFd> handles) override {
    RETURN_IF_ERROR(NullMapper::Map(page, std::move(handles)));
    record_(MappingEvent::Kind::kMap, page);
    pages_.insert(page);
    return absl::OkStatus();
  }
  absl::Status Unmap(PageIndex page) override {
    if (busy_) return absl::FailedPreconditionError("running work");
    RETURN_IF_ERROR(NullMapper::Unmap(page));
    record_(MappingEvent::Kind::kUnmap, page);
    pages_.erase(page);
    return absl::OkStatus();
  }
  bool Has(PageIndex page) const { return pages_.contains(page); }
  void SetBusy(bool busy) { busy_ = busy; }

 private:
  const Record record_;
  std::set<PageIndex> pages_;
  bool busy_ = false;
};

// A pool and the engine that uses it.
struct User {
  Pool* pool = nullptr;
  KnowingMapper* mapper = nullptr;
  Bytes page;
  std::vector<BlockId> used;
  std::vector<std::pair<BlockId, BlockGeneration>> cached;
  StepId scheduled = 0, completed = 0;
  bool in_step = false;
  size_t seen_free = 0;  // what the step has been told is available, mapped
};

class World {
 public:
  explicit World(uint64_t seed) : random_(seed) {
    StartBroker(Remembered{});
    for (int i = 0; i < kSessions; ++i) AddSession(i);
  }

  absl::Status Run(uint64_t instructions) {
    RETURN_IF_ERROR(Settle());
    for (uint64_t i = 1; i <= instructions; ++i) {
      absl::Status status = Step();
      if (Below(2) == 0) Pump(Below(kSessions));
      if (status.ok()) status = Check();
      if (status.ok() && i % 64 == 0) status = CheckAtRest();
      if (status.ok() && i % 2500 == 0) status = CheckServed();
      if (!status.ok()) {
        return absl::Status(status.code(),
                            absl::StrCat("instruction ", i, ": ",
                                         std::string(status.message())));
      }
    }
    return Leave();
  }

  void PrintStatistics() const {
    std::cout << allocs_ << " allocations, " << misses_ << " misses, "
              << grants() << " grants, " << refusals_ << " refusals, "
              << reclaims_ << " reclaims, " << preempts_ << " to preempt, "
              << removals_ << " evictions, " << resends_ << " sent again, "
              << breaks_ << " broken links, " << restarts_ << " restarts\n";
    // It is no use to check what never happens.
    EXPECT_GT(allocs_, 1000);
    EXPECT_GT(misses_, 100);
    EXPECT_GT(grants(), 500);
    EXPECT_GT(refusals_, 10);
    EXPECT_GT(reclaims_, 100);
    EXPECT_GT(preempts_, 10);
    EXPECT_GT(removals_, 100);
    EXPECT_GT(resends_, 5);
    const HistoryStatistics& history = history_.statistics();
    EXPECT_GT(history.intervals - history.unmatched_mappings, 500);
    EXPECT_GT(breaks_, 10);
    EXPECT_GT(restarts_, 10);
  }

 private:
  uint32_t Below(uint32_t n) {
    return std::uniform_int_distribution<uint32_t>(0, n - 1)(random_);
  }

  void AddSession(int number) {
    SessionOptions options;
    options.instance = absl::StrCat("engine", number);
    if (number == 0) options.min = KiB(256);
    for (int i = 0; i < kPools; ++i) {
      PoolOptions pool;
      pool.geometry.handles_per_page = i == 0 ? 1 : 3;
      pool.geometry.handle_bytes = i == 1 ? KiB(16) : KiB(64 + 16 * number);
      pool.geometry.layout = i == 0 ? Layout::kContiguous : Layout::kPerLayer;
      pool.geometry.max_pages = 12;
      pool.block_bytes = kBlock;
      pool.reserve_null_block = number == 1;
      pool.map_ahead = number != 2;
      pool.min_reserved_pages = 2;
      if (number == 0) pool.max_reserved_pages = 4;
      pool.idle_decay = number == 1 ? absl::ZeroDuration() : absl::Seconds(2);
      pool.running_miss_wait = absl::ZeroDuration();
      options.pools.push_back(pool);
    }
    const std::vector<PoolOptions> pools = options.pools;
    std::vector<KnowingMapper*> mappers;
    auto session = *Session::Create(
        std::move(options),
        [&](const PoolGeometry&) {
          auto mapper = std::make_unique<KnowingMapper>(
              [this, number, pool = static_cast<uint32_t>(mappers.size())](
                  MappingEvent::Kind kind, PageIndex page) {
                history_.Add(++events_, MappingEvent{.kind = kind,
                                                     .at = clock_.Now(),
                                                     .pid = PeerOf(number).pid,
                                                     .pool = pool,
                                                     .page = page});
              });
          mappers.push_back(mapper.get());
          return mapper;
        },
        clock_);
    session->ReconnectWith(
        [this, number,
         raw = session.get()]() -> absl::StatusOr<Session::Connection> {
          links_[number] = nullptr;  // the old one is gone
          if (Below(3) == 0) return absl::UnavailableError("nobody listens");
          auto link = std::make_unique<LossyLink>(*core_, PeerOf(number), *raw);
          links_[number] = link.get();
          return Session::Connection{std::move(link), Nonce{}};
        });
    links_.push_back(&LossyLink::Join(*core_, PeerOf(number), *session));
    for (int i = 0; i < kPools; ++i) {
      User user;
      user.pool = &session->pool(i);
      user.mapper = mappers[i];
      user.page = pools[i].geometry.page_bytes();
      users_.push_back(user);
    }
    sessions_.push_back(std::move(session));
  }

  static Peer PeerOf(int number) {
    return {.tenant = "uid:0", .pid = static_cast<uint32_t>(100 + number)};
  }

  // A new one, with its own handles, as if on memory that nobody holds: what
  // engines still map is theirs.
  void StartBroker(Remembered remembered) {
    backend_ =
        std::make_unique<FakeBackend>(FakeBackendOptions{.total = MiB(2)});
    CoreOptions options;
    options.backend = backend_.get();
    options.clock = &clock_;
    options.capacity = kCapacity;
    options.incarnation = ++incarnation_;
    options.remembered = std::move(remembered);
    const bool log = FromEnvironment("KVBROKER_TEST_LOG", 0) != 0;
    options.history = [this](absl::Span<const HistoryEvent> events) {
      for (const HistoryEvent& event : events) history_.Add(++events_, event);
    };
    options.log = [this, log](std::string_view line) {
      if (log) std::cout << clock_.Now() << " " << line << "\n";
      if (line.substr(0, 6) == "grant ") ++grants_;
      if (line.substr(0, 7) == "reclaim") ++reclaims_;
      if (line.substr(0, 6) == "refuse") ++refusals_;
      if (line.find("tier=preempt") != line.npos) ++preempts_;
    };
    core_ = *Core::Create(std::move(options));
  }

  void RestartBroker() {
    ++restarts_;
    Remembered remembered = core_->Remember();
    for (LossyLink* link : links_) {
      if (link != nullptr) link->Break(/*broker_gone=*/true);
    }
    core_.reset();
    StartBroker(std::move(remembered));
  }

  // ---- instructions ----

  absl::Status Step() {
    User& user = users_[Below(kSessions * kPools)];
    const uint32_t session = Below(kSessions);
    switch (Below(20)) {
      case 0:
      case 1:
      case 2:
        return Alloc(user, 1 + Below(6), Urgency::kRunning);
      case 3:
      case 4:
        return Alloc(user, 1 + Below(70), Urgency::kWaiting);
      case 5:
      case 6:
        return Free(user, Below(3) == 0 ? user.used.size() : Below(12));
      case 7:
        return Cache(user, Below(30));
      case 8:
        Touch(user);
        return absl::OkStatus();
      case 9:
        DrainRemovals(user);
        return absl::OkStatus();
      case 10:
        return Preempt(user);
      case 11:
        if (!user.in_step) BeginStep(user);
        return absl::OkStatus();
      case 12:
        return EndStep(user);
      case 13:
        if (user.completed < user.scheduled) {
          user.pool->StepDone(++user.completed);
        }
        return absl::OkStatus();
      case 14:
        clock_.Advance(absl::Microseconds(1 + Below(2000)));
        return absl::OkStatus();
      case 15:
        if (Below(8) == 0) clock_.Advance(absl::Milliseconds(Below(1500)));
        return absl::OkStatus();
      case 16:
        sessions_[session]->RunOnce();
        return absl::OkStatus();
      case 17:
        Deliver(session);
        return absl::OkStatus();
      case 18:
        core_->RunDue();
        return absl::OkStatus();
      default:
        return GoWrong(user, session);
    }
  }

  void Pump(uint32_t session) {
    sessions_[session]->RunOnce();
    Deliver(session);
    core_->RunDue();
  }

  bool Deliver(uint32_t session) {
    return links_[session] != nullptr && links_[session]->Deliver();
  }

  absl::Status GoWrong(User& user, uint32_t session) {
    if (links_[session] == nullptr) return absl::OkStatus();
    switch (Below(9)) {
      case 8:
        if (Below(4) > 0) break;
        if (Below(2) == 0) {
          RestartBroker();
        } else {
          ++breaks_;
          links_[session]->Break(/*broker_gone=*/false);
        }
        break;
      case 0:
        links_[session]->LoseNextGrant();
        break;
      case 1:
        links_[session]->LoseNextDescriptors();
        break;
      case 2:
        links_[session]->DescriptorsFirst(Below(2) == 0);
        break;
      case 3:
        user.mapper->FailNextMap();
        break;
      case 4:
        user.mapper->SetBusy(Below(3) == 0);
        break;
      case 5:
        return SetLimit(session, kCapacity);
      case 6:
        if (Below(3) > 0) break;
        return SetLimit(session, Bytes(kCapacity.count() / 8 * (1 + Below(8))));
      case 7:
        links_[session]->RepeatEverything(Below(2) == 0);
        break;
    }
    return absl::OkStatus();
  }

  absl::Status SetLimit(uint32_t session, Bytes max) {
    if (session == 0) max = std::max(max, KiB(256));  // its `min`
    return core_
        ->SetPolicy(InstanceSelector{absl::StrCat("engine", session), "uid:0"},
                    {.max = max, .preset = true})
        .status();
  }

  absl::Status Alloc(User& user, size_t count, Urgency urgency) {
    std::vector<BlockId> blocks(count);
    const bool must = user.in_step && count <= user.seen_free;
    if (!user.pool->Alloc(absl::MakeSpan(blocks), urgency)) {
      ++misses_;
      if (!must) return absl::OkStatus();
      return absl::InternalError("a step lost blocks that it had counted");
    }
    ++allocs_;
    user.seen_free -= std::min(user.seen_free, count);
    for (BlockId block : blocks) {
      if (std::find(user.used.begin(), user.used.end(), block) !=
          user.used.end()) {
        return absl::InternalError(absl::StrCat("handed out twice: ", block));
      }
      user.used.push_back(block);
    }
    return absl::OkStatus();
  }

  absl::Status Free(User& user, size_t count) {
    std::vector<BlockId> blocks = Some(user, count);
    return user.pool->Free(blocks);
  }

  absl::Status Cache(User& user, size_t count) {
    for (BlockId block : Some(user, count)) {
      const BlockGeneration generation = user.pool->generation(block);
      RETURN_IF_ERROR(user.pool->Cache({block}));
      user.cached.emplace_back(block, generation);
    }
    return absl::OkStatus();
  }

  void Touch(User& user) {
    if (user.cached.empty()) return;
    const size_t which = Below(static_cast<uint32_t>(user.cached.size()));
    const auto [block, generation] = user.cached[which];
    user.cached.erase(user.cached.begin() + static_cast<ptrdiff_t>(which));
    if (user.pool->Touch({block}, {generation})) {
      user.used.push_back(block);
      user.seen_free -= std::min<size_t>(user.seen_free, 1);
    }
  }

  void DrainRemovals(User& user) {
    std::vector<BlockRemoval> removals(64);
    removals.resize(user.pool->DrainRemovals(absl::MakeSpan(removals)));
    removals_ += static_cast<int64_t>(removals.size());
    for (const BlockRemoval& removal : removals) {
      std::erase_if(user.cached, [&](const auto& held) {
        return held.first == removal.block && held.second <= removal.generation;
      });
    }
  }

  // Frees what the broker wants back, as a scheduler does.
  absl::Status Preempt(User& user) {
    std::vector<BlockId> blocks(256);
    blocks.resize(user.pool->BlocksToVacate(absl::MakeSpan(blocks)));
    for (BlockId block : blocks) std::erase(user.used, block);
    return user.pool->Free(blocks);
  }

  void BeginStep(User& user) {
    user.in_step = true;
    user.pool->StepBegin();
    user.seen_free = user.pool->available_blocks();
  }

  absl::Status EndStep(User& user) {
    if (!user.in_step) return absl::OkStatus();
    user.in_step = false;
    user.pool->StepEnd(++user.scheduled);
    return absl::OkStatus();
  }

  // Takes that many out of what the engine uses, the latest first.
  std::vector<BlockId> Some(User& user, size_t count) {
    count = std::min(count, user.used.size());
    std::vector<BlockId> some(user.used.end() - static_cast<ptrdiff_t>(count),
                              user.used.end());
    user.used.resize(user.used.size() - count);
    return some;
  }

  // ---- what must hold ----

  absl::Status Check() {
    if (!history_.violations().empty()) {
      return absl::InternalError(
          absl::StrCat("history: ", history_.violations().front().what));
    }
    RETURN_IF_ERROR(core_->CheckInvariants());
    for (User& user : users_) {
      RETURN_IF_ERROR(user.pool->CheckInvariants());
      for (BlockId block : user.used) {
        const PageIndex page(static_cast<uint32_t>(kBlock * block / user.page));
        if (!user.mapper->Has(page)) {
          return absl::InternalError(
              absl::StrCat("a used block is not mapped: ", block));
        }
      }
    }
    for (auto& session : sessions_) {
      const absl::Status health = session->health();
      if (!health.ok() && !absl::IsUnavailable(health)) return health;
    }
    return absl::OkStatus();
  }

  // Until nobody has anything more to do now.
  absl::Status Settle() {
    for (int rounds = 0; rounds < 1000; ++rounds) {
      bool busy = core_->RunDue() <= clock_.Now();
      for (int i = 0; i < kSessions; ++i) {
        busy |= sessions_[i]->RunOnce() <= clock_.Now();
        busy |= Deliver(i);
      }
      if (!busy) return absl::OkStatus();
    }
    return absl::InternalError("somebody spins");
  }

  absl::Status CheckAtRest() {
    for (LossyLink* link : links_) {
      if (link == nullptr) continue;
      link->LoseNothing();
      resends_ += static_cast<int64_t>(link->Said<Resend>().size());
      link->Forget();
    }
    RETURN_IF_ERROR(Settle());
    // For who is away.
    for (int tries = 0; tries < 20; ++tries) {
      clock_.Advance(absl::Milliseconds(500));
      RETURN_IF_ERROR(Settle());
    }
    for (auto& session : sessions_) RETURN_IF_ERROR(session->health());
    clock_.Advance(absl::Milliseconds(2100));  // for what was lost
    RETURN_IF_ERROR(Settle());
    clock_.Advance(absl::Milliseconds(1100));  // for credit and guards
    RETURN_IF_ERROR(Settle());
    RETURN_IF_ERROR(Check());
    const CoreSnapshot snapshot = core_->Snapshot();
    for (int i = 0; i < kSessions; ++i) {
      Bytes mapped;
      for (int p = 0; p < kPools; ++p) {
        const User& user = users_[i * kPools + p];
        mapped += user.page * static_cast<int64_t>(user.mapper->mapped());
      }
      const Bytes held = snapshot.instances[i].held;
      if (held != mapped) {
        return absl::InternalError(
            absl::StrCat(snapshot.instances[i].name, ": the broker lends ",
                         held.count(), " bytes, mapped are ", mapped.count()));
      }
    }
    return absl::OkStatus();
  }

  // When all others want nothing, each gets what it may hold, soon.
  absl::Status CheckServed() {
    for (User& user : users_) {
      user.mapper->SetBusy(false);
      RETURN_IF_ERROR(EndStep(user));
      user.pool->StepDone(user.completed = user.scheduled);
      while (!user.cached.empty()) Touch(user);
      RETURN_IF_ERROR(Free(user, user.used.size()));
    }
    for (int i = 0; i < kSessions; ++i) {
      RETURN_IF_ERROR(SetLimit(i, kCapacity));
    }
    for (User& user : users_) {
      // engine0's `min` and the pages of engine1's null blocks stay.
      const Bytes may_have = kCapacity - KiB(256) - KiB(128);
      const int64_t pages = std::min<int64_t>(may_have / user.page, 11);
      std::vector<BlockId> out(static_cast<size_t>(user.page * pages / kBlock));
      bool got = false;
      for (int tries = 0; tries < 1000 && !got; ++tries) {
        got = user.pool->Alloc(absl::MakeSpan(out), Urgency::kWaiting);
        if (got) break;
        clock_.Advance(absl::Milliseconds(10));
        RETURN_IF_ERROR(Settle());
      }
      if (!got) {
        return absl::InternalError(absl::StrCat(
            "nobody else wants memory, and ", out.size(), " blocks of ",
            user.page.count(), " byte pages do not come"));
      }
      RETURN_IF_ERROR(user.pool->Free(out));
    }
    return absl::OkStatus();
  }

  absl::Status Leave() {
    for (User& user : users_) user.mapper->SetBusy(false);
    for (auto& session : sessions_) session->BeginClose();
    RETURN_IF_ERROR(Settle());
    clock_.Advance(absl::Seconds(2));
    RETURN_IF_ERROR(Settle());
    for (auto& session : sessions_) {
      if (!session->left()) return absl::InternalError("a session stays");
      session->Close();
    }
    RETURN_IF_ERROR(core_->CheckInvariants());
    if (backend_->live_handles() != 0) {
      return absl::InternalError(
          absl::StrCat("handles are left: ", backend_->live_handles()));
    }
    return absl::OkStatus();
  }

  int64_t grants() const { return grants_; }

  std::mt19937_64 random_;
  FakeClock clock_;
  HistoryChecker history_;
  EventRef events_ = 0;
  std::unique_ptr<FakeBackend> backend_;
  uint64_t incarnation_ = 0;
  std::unique_ptr<Core> core_;
  std::vector<User> users_;
  std::vector<LossyLink*> links_;
  std::vector<std::unique_ptr<Session>> sessions_;
  int64_t allocs_ = 0, misses_ = 0, refusals_ = 0, reclaims_ = 0;
  int64_t preempts_ = 0, removals_ = 0, resends_ = 0, grants_ = 0;
  int64_t breaks_ = 0, restarts_ = 0;
};

TEST(SessionRandomTest, TheBooksOfAllAgree) {
  const uint64_t seed = FromEnvironment("KVBROKER_TEST_SEED", 1);
  const uint64_t instructions =
      FromEnvironment("KVBROKER_TEST_INSTRUCTIONS", 40'000);
  std::cout << "KVBROKER_TEST_SEED=" << seed << "\n";
  World world(seed);
  const absl::Status status = world.Run(instructions);
  EXPECT_TRUE(status.ok()) << "seed " << seed << ": " << status;
  world.PrintStatistics();
}

}  // namespace
}  // namespace kvbroker::client
