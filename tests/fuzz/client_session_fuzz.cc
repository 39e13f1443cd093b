// The client library with a broker that says anything: messages as FromWire
// lets them through, in any order, about what was asked or about nothing, and
// descriptors as ParseFrame lets them through. Between them the engine
// allocates and frees as engines do.
//
// Whatever the broker says, the session must neither crash nor hang, a page
// must never be mapped over another or outside of its pool, and what the engine
// holds must stay its own.
#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "broker/base/check.h"
#include "broker/base/clock.h"
#include "client/session/session.h"
#include "proto/fd_frame.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvbroker::client {
namespace {

using testing::FuzzInput;

constexpr int kMaxInstructions = 200;
constexpr size_t kBlocksPerPage = 4;
constexpr absl::Duration kLongestCredit = absl::Milliseconds(100);

// Holds the session to the mapper's contract.
class StrictMapper : public Mapper {
 public:
  explicit StrictMapper(const PoolGeometry& geometry) : geometry_(geometry) {}

  absl::Status Map(PageIndex page, std::vector<UniqueFd> handles) override {
    KVB_CHECK(page.value() < geometry_.max_pages);
    KVB_CHECK(handles.size() == geometry_.handles_per_page);
    KVB_CHECK(!mapped_.contains(page));
    if (fail_) return absl::ResourceExhaustedError("fuzz");
    mapped_.insert(page);
    return absl::OkStatus();
  }
  absl::Status Unmap(PageIndex page) override {
    KVB_CHECK(mapped_.contains(page));
    if (fail_) return absl::FailedPreconditionError("fuzz");
    mapped_.erase(page);
    return absl::OkStatus();
  }
  std::byte* region(size_t) const override { return nullptr; }

  void set_fail(bool fail) { fail_ = fail; }
  bool IsMapped(PageIndex page) const { return mapped_.contains(page); }

 private:
  const PoolGeometry geometry_;
  std::set<PageIndex> mapped_;
  bool fail_ = false;
};

// Hands on what the session says while there is a connection.
class FuzzLink : public BrokerLink {
 public:
  struct Wire {
    std::vector<ClientMessage> sent;
    bool connected = false;
  };

  explicit FuzzLink(Wire& wire) : wire_(wire) { wire_.connected = true; }
  ~FuzzLink() override { wire_.connected = false; }
  void Send(ClientMessage message) override {
    wire_.sent.push_back(std::move(message));
  }
  void AcknowledgeDescriptors(GrantId, uint32_t) override {}

 private:
  Wire& wire_;
};

class Program {
 public:
  explicit Program(FuzzInput input) : input_(input) {
    SessionOptions options;
    options.instance = "fuzz";
    options.on_fenced = [](const std::string&) {};
    const uint32_t pools = 1 + input_.Below(2);
    for (uint32_t i = 0; i < pools; ++i) {
      PoolOptions pool;
      pool.geometry.handles_per_page = 1 + 2 * input_.Below(2);
      pool.geometry.handle_bytes =
          Bytes(KiB(12).count() / pool.geometry.handles_per_page);
      pool.geometry.layout = pool.geometry.handles_per_page == 1
                                 ? Layout::kContiguous
                                 : Layout::kPerLayer;
      pool.geometry.max_pages = 1 + input_.Below(12);
      pool.block_bytes = KiB(3);
      pool.reserve_null_block = input_.Flip();
      pool.map_ahead = input_.Flip();
      pool.min_reserved_pages = input_.Below(4);
      if (input_.Flip()) pool.max_reserved_pages = input_.Below(4);
      // No thread that could wake it is there.
      pool.running_miss_wait = absl::ZeroDuration();
      options.pools.push_back(std::move(pool));
    }
    session_ = *Session::Create(
        std::move(options),
        [&](const PoolGeometry& geometry) {
          auto mapper = std::make_unique<StrictMapper>(geometry);
          mappers_.push_back(mapper.get());
          return mapper;
        },
        clock_);
    if (input_.Flip()) {
      session_->ReconnectWith([this]() -> absl::StatusOr<Session::Connection> {
        KVB_CHECK(!wire_.connected);
        if (input_.Below(4) == 0) return absl::UnavailableError("fuzz");
        disconnected_ = false;
        return Session::Connection{std::make_unique<FuzzLink>(wire_), Nonce{}};
      });
    }
    session_->Attach(std::make_unique<FuzzLink>(wire_), Nonce{});
    used_.resize(pools);
    cached_.resize(pools);
    if (input_.Below(8) != 0) Say(GoodOpened());
  }

  void Run() {
    for (int i = 0; i < kMaxInstructions && !input_.empty(); ++i) {
      Instruction();
      Listen();
      for (size_t p = 0; p < session_->pool_count(); ++p) {
        KVB_CHECK(session_->pool(p).CheckInvariants().ok());
        // What is in use is mapped, whatever the broker wants.
        for (BlockId block : used_[p]) {
          KVB_CHECK(mappers_[p]->IsMapped(
              PageIndex(static_cast<uint32_t>(block / kBlocksPerPage))));
        }
      }
    }
    session_->Close();
  }

 private:
  void Instruction() {
    const uint32_t op = input_.Below(24);
    if (op < 8) {
      Say(AnyMessage());
    } else if (op < 12) {
      SendDescriptors();
    } else if (op < 14) {
      AnswerWell();
    } else if (op < 20) {
      TheEngineActs();
    } else if (op < 22) {
      session_->RunOnce();
    } else if (op == 22) {
      static constexpr absl::Duration kTimes[] = {
          absl::Milliseconds(1), absl::Milliseconds(60), absl::Seconds(1),
          absl::Seconds(31)};
      clock_.Advance(kTimes[input_.Below(4)]);
    } else if (input_.Below(8) == 0) {
      // A link's last word.
      if (CanSpeak()) {
        session_->OnDisconnected(absl::UnavailableError("fuzz"));
        disconnected_ = true;
      }
    } else {
      mappers_[AnyPool()]->set_fail(input_.Flip());
    }
  }

  uint32_t AnyPool() {
    return input_.Below(static_cast<uint32_t>(session_->pool_count()));
  }

  // ---- the broker ----

  // Learns what the session asked.
  void Listen() {
    for (ClientMessage& message : wire_.sent) {
      if (auto* acquire = std::get_if<Acquire>(&message)) {
        asked_.push_back(std::move(*acquire));
        if (asked_.size() > 64) asked_.erase(asked_.begin());
      } else if (std::holds_alternative<Open>(message)) {
        opening_ = true;
      }
    }
    wire_.sent.clear();
  }
  // As far as there is a link that could.
  bool CanSpeak() const { return wire_.connected && !disconnected_; }
  void Say(BrokerMessage message) {
    if (CanSpeak()) session_->OnMessage(std::move(message));
  }
  void Send(GrantId grant, uint32_t first, size_t count) {
    if (!CanSpeak()) return;
    session_->OnDescriptors(grant, first, std::vector<UniqueFd>(count));
  }

  PoolId AnyPoolId() {
    if (input_.Below(8) == 0) return PoolId(1 + input_.Number());
    return PoolId(1 + AnyPool());
  }
  Sequence AnySequence() {
    if (!asked_.empty() && input_.Below(4) != 0) {
      return asked_[input_.Below(static_cast<uint32_t>(asked_.size()))]
          .sequence;
    }
    return Sequence(1 + input_.Number());
  }
  Bytes AnyBytes() {
    return Bytes(static_cast<int64_t>(
        input_.Number() % static_cast<uint64_t>(kMaxBytes.count() + 1)));
  }
  uint32_t AnyCount() { return static_cast<uint32_t>(input_.Number()); }
  std::vector<PageName> AnyPages() {
    std::vector<PageName> pages(input_.Below(8));
    for (PageName& page : pages) {
      page = {PageIndex(AnyCount()), Generation(AnyCount())};
    }
    return pages;
  }
  // Few, so that parts of one meet.
  GrantId AnyGrant() {
    return GrantId(input_.Below(16) == 0 ? input_.Number() : input_.Below(8));
  }

  Opened GoodOpened() {
    Opened opened = AnyOpened();
    opened.pools.clear();
    for (size_t i = 0; i < session_->pool_count(); ++i) {
      opened.pools.emplace_back(i + 1);
    }
    opening_ = false;
    return opened;
  }
  Opened AnyOpened() {
    Opened opened;
    const uint64_t features = input_.Below(4);
    opened.feature_bits = features == 0 ? 0 : kFeatureResume;
    if (features == 1) opened.slab = "slab";
    opened.incarnation = input_.Number();
    opened.session = SessionId(1 + input_.Number());
    opened.min = AnyBytes();
    opened.max = AnyBytes();
    opened.capacity = AnyBytes();
    opened.limit_revision = input_.Number();
    opened.pools.resize(input_.Below(4));
    for (PoolId& pool : opened.pools) pool = AnyPoolId();
    return opened;
  }

  BrokerMessage AnyMessage() {
    switch (input_.Below(10)) {
      case 0:
        return AnyOpened();
      case 1:
      case 2:
      case 3:
      case 4: {
        Granted granted{AnySequence(), AnyGrant(), AnyPoolId(), AnyPages()};
        if (input_.Below(4) == 0) {
          granted.credit = AnyCount();
          granted.credit_for = absl::Milliseconds(input_.Below(100));
          credit_said_ = true;
        }
        return granted;
      }
      case 5:
        return Refused{AnySequence(),
                       static_cast<absl::StatusCode>(1 + input_.Below(16))};
      case 6:
      case 7:
        return Reclaim{AnyPoolId(), Revision(input_.Number()), AnyCount(),
                       static_cast<Tier>(1 + input_.Below(4)),
                       absl::Milliseconds(AnyCount())};
      case 8:
        return LimitChanged{input_.Number(), AnyBytes(), AnyBytes()};
      default:
        return Fenced{"fuzz"};
    }
  }

  void SendDescriptors() {
    const GrantId grant = AnyGrant();
    const uint32_t count = 1 + input_.Number() % KVB_FD_MAX_PER_FRAME;
    const uint32_t first = AnyCount();
    if (first > 0xffffffff - count) return;
    Send(grant, first, count);
  }

  // Grants what was asked for last, so that pools fill; in part, and with some
  // that nobody asked for, now and then.
  void AnswerWell() {
    if (opening_) Say(GoodOpened());
    if (asked_.empty()) return;
    const Acquire acquire = asked_.back();
    asked_.pop_back();
    if (acquire.credit) {
      Granted granted{acquire.sequence, GrantId(), acquire.pool};
      granted.credit = acquire.want;
      granted.credit_for = kLongestCredit;
      credit_said_ = true;
      return Say(granted);
    }
    Granted granted{acquire.sequence, GrantId(1000 + ++good_grants_),
                    acquire.pool};
    for (PageIndex page : acquire.indexes) {
      granted.pages.push_back({page, Generation(good_grants_)});
    }
    if (input_.Below(4) == 0 && !granted.pages.empty()) {
      granted.pages.pop_back();
    }
    if (input_.Below(4) == 0) {
      for (PageName page : AnyPages()) granted.pages.push_back(page);
    }
    const uint32_t handles = static_cast<uint32_t>(granted.pages.size()) *
                             HandlesPerPage(acquire.pool);
    const bool first = input_.Flip();
    if (first) Say(granted);
    if (handles > 0) Send(granted.grant, 0, handles);
    if (!first) Say(granted);
    session_->RunOnce();
  }
  uint32_t HandlesPerPage(PoolId id) {
    const uint64_t i = id.value() - 1;
    return i < session_->pool_count()
               ? session_->pool(i).options().geometry.handles_per_page
               : 1;
  }

  // ---- the engine ----

  void TheEngineActs() {
    const uint32_t p = AnyPool();
    Pool& pool = session_->pool(p);
    std::vector<BlockId>& used = used_[p];
    switch (input_.Below(8)) {
      case 0:
      case 1:
      case 2: {
        // A miss would wait for promised credit, and this clock stands still.
        if (std::exchange(credit_said_, false)) {
          session_->RunOnce();
          clock_.Advance(kLongestCredit);
        }
        std::vector<BlockId> out(1 + input_.Below(24));
        if (pool.Alloc(absl::MakeSpan(out),
                       input_.Flip() ? Urgency::kRunning : Urgency::kWaiting)) {
          used.insert(used.end(), out.begin(), out.end());
        }
        break;
      }
      case 3: {
        const size_t count = std::min<size_t>(used.size(), input_.Below(16));
        const absl::Span<const BlockId> last = absl::MakeSpan(used).last(count);
        if (input_.Flip()) {
          KVB_CHECK(pool.Free(last).ok());
        } else {
          KVB_CHECK(pool.Cache(last).ok());
          cached_[p].assign(last.begin(), last.end());
        }
        used.resize(used.size() - count);
        break;
      }
      case 4: {
        std::vector<BlockGeneration> generations;
        for (BlockId block : cached_[p]) {
          generations.push_back(pool.generation(block));
        }
        // A block that was evicted and taken again is in the list of used ones.
        const bool mine = std::none_of(
            cached_[p].begin(), cached_[p].end(), [&](BlockId block) {
              return std::find(used.begin(), used.end(), block) != used.end();
            });
        if (mine && pool.Touch(cached_[p], generations)) {
          used.insert(used.end(), cached_[p].begin(), cached_[p].end());
        }
        cached_[p].clear();
        break;
      }
      case 5:
        pool.Reserve(1 + input_.Below(24), absl::ZeroDuration());
        break;
      case 6:
        pool.StepBegin();
        if (input_.Flip()) session_->RunOnce();
        pool.StepEnd(++step_);
        break;
      case 7:
        pool.StepDone(step_);
        break;
    }
  }

  FuzzInput input_;
  FakeClock clock_;
  FuzzLink::Wire wire_;
  bool opening_ = false;  // said Open, and has not been told Opened
  std::unique_ptr<Session> session_;
  std::vector<StrictMapper*> mappers_;
  std::vector<std::vector<BlockId>> used_, cached_;  // by pool
  std::vector<Acquire> asked_;
  bool credit_said_ = false;
  uint32_t good_grants_ = 0;
  StepId step_ = 0;
  bool disconnected_ = false;
};

}  // namespace
}  // namespace kvbroker::client

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvbroker::client::Program(kvbroker::testing::FuzzInput(data, size)).Run();
  return 0;
}
