// The core with hostile sessions: each instruction of the input makes one of
// them open, say something (sense or nonsense), acknowledge, hang up or die, or
// lets an operator, the device or time act. Beside them lives an engine that
// behaves well.
//
// After each instruction the core's and the device's books must add up, and the
// good engine must have no complaint. At the end, when the hostile processes
// have died, it must get what it asks for, and nothing may be left behind.
#include <array>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "broker/base/check.h"
#include "broker/core/core.h"
#include "broker/core/testing/fake_client.h"
#include "broker/core/testing/fake_world.h"
#include "proto/messages.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvbroker {
namespace {

constexpr Bytes kCapacity = MiB(16);
constexpr Bytes kGoodMin = MiB(4);
constexpr uint64_t kIncarnation = 1;  // of FakeWorld's core
constexpr int kMaxInstructions = 200;
constexpr size_t kMostAsked = 32;

// Remembers what it was told, to say it again wrongly.
class Ear : public SessionListener {
 public:
  void Tell(BrokerMessage message) override {
    if (auto* opened = std::get_if<Opened>(&message)) {
      pools_ = opened->pools;
    } else if (auto* granted = std::get_if<Granted>(&message)) {
      if (granted->credit > 0) return;
      grants_.push_back(granted->grant);
      for (PageName page : granted->pages) {
        pages_.push_back({granted->pool, page});
      }
    } else if (auto* reclaim = std::get_if<Reclaim>(&message)) {
      revision_ = reclaim->revision;
    } else if (auto* limits = std::get_if<LimitChanged>(&message)) {
      limit_revision_ = limits->revision;
    }
  }
  void SendDescriptors(GrantId, uint32_t,
                       std::vector<UniqueFd> descriptors) override {
    unacknowledged_ += static_cast<uint32_t>(descriptors.size());
  }
  void Close(const absl::Status&) override { closed_ = true; }

  std::vector<PoolId> pools_;
  std::vector<GrantId> grants_;
  std::vector<std::pair<PoolId, PageName>> pages_;
  Revision revision_;
  uint64_t limit_revision_ = 0;
  uint32_t unacknowledged_ = 0;
  bool closed_ = false;
};

struct Hostile {
  SessionId id;
  std::shared_ptr<Ear> ear;
  bool connected = false;
  uint64_t sequence = 0;
};

class Program {
 public:
  explicit Program(testing::FuzzInput input)
      : input_(input), world_(WorldOf(input_)) {
    good_ = &world_.Start({.name = "good",
                           .tenant = "uid:1",
                           .handle = MiB(1),
                           .max_pages = 64,
                           .min = kGoodMin});
    CheckAll();
  }

  void Run() {
    for (int i = 0; i < kMaxInstructions && !input_.empty(); ++i) {
      Instruction();
      CheckAll();
    }
    End();
  }

 private:
  // Half of them after a restart, of which some of the hostile are known.
  static FakeWorld::Options WorldOf(testing::FuzzInput& input) {
    FakeWorld::Options options = {.capacity = kCapacity};
    if (input.Flip()) return options;
    options.remembered.incomplete = input.Below(4) == 0;
    options.remembered.hold = input.Flip();
    for (uint32_t pid = 0; pid < 2; ++pid) {
      options.remembered.sessions.push_back(
          {.peer = {.tenant = "uid:2", .uid = 1, .pid = pid}, .instance = "a"});
    }
    return options;
  }

  Core& core() { return world_.core(); }

  void Instruction() {
    const uint32_t op = input_.Below(24);
    if (op < 12) {
      Say(Any());
    } else if (op < 14) {
      Open(AnyPlace());
    } else if (op < 17) {
      TheGoodOneActs();
    } else if (op == 17) {
      Hostile& hostile = Any();
      uint32_t count = static_cast<uint32_t>(input_.Number());
      if (input_.Flip()) count = hostile.ear->unacknowledged_;
      hostile.ear->unacknowledged_ -=
          std::min(count, hostile.ear->unacknowledged_);
      Judge(hostile, core().DescriptorsReceived(hostile.id, count));
    } else if (op == 18) {
      HangUp(Any());
    } else if (op == 19) {
      Die(AnyPlace());
    } else if (op == 20) {
      AnOperatorActs();
    } else if (op == 21) {
      world_.device().FailNextCreate(absl::ResourceExhaustedError("fuzz"));
    } else {
      static constexpr absl::Duration kTimes[] = {
          absl::Milliseconds(1), absl::Milliseconds(100), absl::Seconds(1),
          absl::Seconds(10)};
      world_.Advance(kTimes[input_.Below(4)]);
    }
  }

  std::optional<Hostile>& AnyPlace() {
    return hostiles_[input_.Below(hostiles_.size())];
  }
  // One that is there. Where nobody is, or one that was hung up on, another one
  // may come: who says nonsense is soon gone, and its place not wasted.
  Hostile& Any() {
    std::optional<Hostile>& place = AnyPlace();
    if (place && !place->connected && input_.Flip()) Die(place);
    if (!place) Open(place);
    if (!place) place.emplace(Hostile{SessionId(), std::make_shared<Ear>()});
    return *place;
  }

  std::string Name() {
    static constexpr const char* kNames[] = {"a", "b",   "good",
                                             "",  "x y", "a_1"};
    return kNames[input_.Below(6)];
  }

  // Numbers that something else goes by, or none goes by.
  template <typename Id>
  Id AnyOf(const std::vector<Id>& known) {
    if (!known.empty() && input_.Below(8) != 0) {
      return known[input_.Below(static_cast<uint32_t>(known.size()))];
    }
    return Id(input_.Number());
  }
  PoolId Pool(const Hostile& hostile) {
    // The good one's, too.
    if (input_.Below(8) == 0) return good_->pool();
    return AnyOf(hostile.ear->pools_);
  }
  PageName Page(const Hostile& hostile) {
    if (const std::vector<PageName> theirs = good_->pages();
        !theirs.empty() && input_.Below(8) == 0) {
      return theirs[input_.Below(static_cast<uint32_t>(theirs.size()))];
    }
    const auto& pages = hostile.ear->pages_;
    if (!pages.empty() && input_.Below(8) != 0) {
      return pages[input_.Below(static_cast<uint32_t>(pages.size()))].second;
    }
    return {PageIndex(static_cast<uint32_t>(input_.Number())),
            Generation(static_cast<uint32_t>(input_.Number()))};
  }
  std::vector<PageName> Pages(const Hostile& hostile) {
    std::vector<PageName> pages(input_.Below(8));
    for (PageName& page : pages) page = Page(hostile);
    if (input_.Below(4) == 0) {
      for (const auto& [pool, page] : hostile.ear->pages_) {
        pages.push_back(page);
      }
    }
    return pages;
  }
  PageCount Count() {
    return static_cast<PageCount>(static_cast<uint32_t>(input_.Number()));
  }
  Sequence AnySequence(Hostile& hostile) {
    if (input_.Below(4) != 0) return Sequence(hostile.sequence);
    return Sequence(input_.Number());
  }

  void Open(std::optional<Hostile>& place) {
    if (place) return;
    kvbroker::Open open;
    const bool sane = input_.Below(4) != 0;
    open.instance = sane ? "a" : Name();
    if (input_.Flip()) open.member.push_back('m');
    open.rank = input_.Below(2);
    const uint32_t pools = sane ? 1 + input_.Below(2) : input_.Below(4);
    for (uint32_t i = 0; i < pools; ++i) {
      PoolGeometry geometry;
      geometry.handles_per_page = sane ? 1 + input_.Below(2)
                                  : input_.Below(4) == 0
                                      ? static_cast<uint32_t>(input_.Number())
                                      : 1;
      geometry.layout = geometry.handles_per_page == 1 ? Layout::kContiguous
                                                       : Layout::kPerLayer;
      geometry.handle_bytes =
          KiB(4) * static_cast<int64_t>(1 + input_.Number() % 1024);
      geometry.max_pages = sane ? 64 : static_cast<uint32_t>(input_.Number());
      open.pools.push_back(geometry);
    }
    if (!sane) {
      if (input_.Flip()) open.min = Bytes(int64_t(input_.Number() >> 8));
      if (input_.Flip()) open.max = Bytes(int64_t(input_.Number() >> 8));
      if (input_.Flip()) open.weight = double(input_.Number());
    }
    if (input_.Below(3) == 0) {
      const std::optional<Hostile>& earlier = AnyPlace();
      open.resuming =
          Resuming{input_.Below(4) == 0 ? input_.Number() : kIncarnation,
                   earlier         ? earlier->id
                   : input_.Flip() ? good_->id()
                                   : SessionId(input_.Number())};
    }
    // Another tenant's engines, and the good one's own.
    const Peer peer = {.tenant = input_.Flip() ? "uid:1" : "uid:2",
                       .uid = 1,
                       .pid = input_.Below(4)};
    auto ear = std::make_shared<Ear>();
    absl::StatusOr<SessionId> id = core().OpenSession(peer, open, ear);
    if (id.ok()) place.emplace(Hostile{*id, ear, true});
  }

  void Say(Hostile& hostile) {
    switch (input_.Below(11)) {
      case 0:
      case 1: {
        Acquire acquire;
        if (input_.Below(4) != 0) ++hostile.sequence;
        acquire.sequence = AnySequence(hostile);
        acquire.acked =
            Sequence(input_.Flip() ? hostile.sequence - 1 : input_.Number());
        acquire.pool = Pool(hostile);
        acquire.want = input_.Below(4) == 0 ? Count() : 1 + input_.Below(8);
        acquire.at_least =
            input_.Below(8) == 0
                ? Count()
                : std::min<PageCount>(acquire.want, 1 + input_.Below(4));
        if (input_.Below(4) == 0) {
          for (PageCount i = 0; i < acquire.want % 64; ++i) {
            acquire.indexes.push_back(Page(hostile).index);
          }
        }
        acquire.urgency = static_cast<Urgency>(1 + input_.Below(3));
        acquire.deadline = absl::Milliseconds(input_.Number() % 20'000);
        if (input_.Below(8) == 0) acquire.replaces = AnySequence(hostile);
        acquire.credit = input_.Below(4) == 0;
        return Send(hostile, acquire);
      }
      case 2:
        return Send(hostile, Cancel{AnySequence(hostile)});
      case 3:
        return Send(hostile, Mapped{AnyOf(hostile.ear->grants_),
                                    input_.Flip() ? std::vector<PageName>()
                                                  : Pages(hostile)});
      case 4:
        return Send(hostile, Return{Pool(hostile), Pages(hostile)});
      case 5: {
        ReclaimAnswer answer;
        answer.pool = Pool(hostile);
        answer.revision = input_.Below(4) != 0 ? hostile.ear->revision_
                                               : Revision(input_.Number());
        answer.given = Pages(hostile);
        answer.kept = Count();
        answer.final = input_.Flip();
        return Send(hostile, answer);
      }
      case 6: {
        Report report;
        report.pool = Pool(hostile);
        report.in_use = Count();
        report.cached = Count();
        report.idle = Count();
        report.settled = std::min(report.idle, Count());
        report.oldest_idle = absl::Milliseconds(uint32_t(input_.Number()));
        report.revision =
            input_.Flip() ? hostile.ear->revision_ : Revision(input_.Number());
        return Send(hostile, report);
      }
      case 7:
        return Send(hostile, Resend{AnySequence(hostile)});
      case 8:
        return Send(hostile,
                    LimitAck{input_.Flip() ? hostile.ear->limit_revision_
                                           : input_.Number()});
    }
  }

  void Send(Hostile& hostile, const ClientMessage& message) {
    Judge(hostile, core().Handle(hostile.id, message));
  }
  // As the transport does: who breaks the protocol is hung up on.
  void Judge(Hostile& hostile, const absl::Status& status) {
    if (!status.ok()) HangUp(hostile);
  }
  void HangUp(Hostile& hostile) {
    if (std::exchange(hostile.connected, false)) core().HungUp(hostile.id);
  }
  void Die(std::optional<Hostile>& place) {
    if (!place) return;
    core().ProcessGone(place->id);
    place.reset();
  }

  void AnOperatorActs() {
    const std::string name = Name();
    if (name == "good") return;  // whose guarantee is to be kept
    PolicyChange change;
    if (input_.Flip()) change.max = Bytes(int64_t(input_.Number() >> 8));
    if (input_.Flip()) change.weight = double(input_.Number());
    if (input_.Below(8) == 0) change.max_percent = double(input_.Number());
    change.preset = input_.Flip();
    (void)core().SetPolicy({.name = name}, change);
    (void)core().Explain({.name = name});
    if (input_.Below(8) == 0) {
      (void)core().Delete({.name = name}, input_.Flip());
    }
  }

  void TheGoodOneActs() {
    switch (input_.Below(4)) {
      case 0:
        // It does not ask more than a session may.
        if (good_->unanswered().size() >= kMostAsked) break;
        good_->Ask({.at_least = 1 + PageCount{input_.Below(8)},
                    .urgency = Urgency::kRunning,
                    .deadline = absl::Seconds(2)});
        break;
      case 1:
        good_->Mark(static_cast<int>(input_.Below(8)),
                    static_cast<FakeClient::Use>(input_.Below(3)));
        break;
      case 2: {
        std::vector<PageName> pages = good_->pages();
        pages.resize(std::min<size_t>(pages.size(), input_.Below(8)));
        good_->Return(good_->pool(), pages);
        break;
      }
      case 3:
        good_->Pump();
        break;
    }
  }

  void CheckAll() {
    KVB_CHECK(core().CheckInvariants().ok());
    KVB_CHECK(world_.device().CheckInvariants().ok());
    if (!good_->error().ok()) std::cerr << good_->error() << "\n";
    KVB_CHECK(good_->connected() && good_->error().ok());
    KVB_CHECK(good_->complaints().empty());
    KVB_CHECK(good_->fenced().empty());
    // What it maps is its own still.
    for (uint64_t token : good_->Tokens()) {
      KVB_CHECK(world_.device().IsLive(token));
    }
    KVB_CHECK(good_->lent() <= world_.Status("good").held);
  }

  void End() {
    for (std::optional<Hostile>& place : hostiles_) Die(place);
    // Nothing is in its way any more.
    world_.Advance(absl::Seconds(10));
    for (const auto& [sequence, until] : good_->unanswered()) {
      KVB_CHECK(until > world_.clock().Now());
    }
    const int more = static_cast<int>(kCapacity / MiB(1)) - good_->mapped();
    KVB_CHECK(more >= 0);
    if (more > 0) {
      const Sequence asked = good_->Ask({.at_least = more});
      world_.Advance(absl::Seconds(10));
      KVB_CHECK(good_->granted(asked) != nullptr);
    }
    CheckAll();
    KVB_CHECK(world_.Check().ok());
    good_->Die();
    world_.Advance(absl::Seconds(10));
    KVB_CHECK(world_.Check().ok());
    KVB_CHECK(core().Snapshot().broker.held == Bytes(0));
    KVB_CHECK(core().Snapshot().broker.sessions == 0);
  }

  testing::FuzzInput input_;
  FakeWorld world_;
  FakeClient* good_;
  std::array<std::optional<Hostile>, 4> hostiles_;
};

}  // namespace
}  // namespace kvbroker

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvbroker::Program(kvbroker::testing::FuzzInput(data, size)).Run();
  return 0;
}
