// FakeClient: one session with the brain of an engine, for tests of the core.
//
// It listens, imports, maps, answers and reports as a well-mannered engine
// does, and misbehaves where a test says so:
//
//   ASSERT_OK_AND_ASSIGN(auto engine, FakeClient::Open(core, device, clock,
//                                                      peer, open));
//   Sequence sequence = engine->Ask({.want = 4, .at_least = 1});
//   engine->Pump();                            // maps what was granted
//   engine->Mark(2, FakeClient::Use::kIdle);   // two requests ended
//   engine->Pump();                            // reports, answers reclaims
//
// Nothing happens within a call of the core: what the core tells is queued, and
// Pump() does what follows from it. A message that the core rejects ends the
// session, as the transport would end it.
//
// Ownership: core, device and clock are borrowed and outlive it. Threads: the
// core may call from any; all else belongs to one thread.
#ifndef KVBROKER_BROKER_CORE_TESTING_FAKE_CLIENT_H_
#define KVBROKER_BROKER_CORE_TESTING_FAKE_CLIENT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/clock.h"
#include "broker/base/ids.h"
#include "broker/core/core.h"
#include "broker/device/fake_backend.h"
#include "proto/messages.h"

namespace kvbroker {

class FakeClient {
 public:
  // What a page is to the engine. Only mapped pages have a use.
  enum class Use { kInUse, kCached, kIdle };

  // How it behaves; as a good engine where nothing is said.
  struct Manners {
    bool acknowledges_descriptors = true;
    bool maps = true;
    bool reports = true;
    bool answers_reclaims = true;
    // Empties pages in use when asked to preempt.
    bool preempts = true;
    // So many pages cannot be mapped from now on.
    int fails_to_map = 0;
    Use arrives_as = Use::kInUse;
  };

  static absl::StatusOr<std::unique_ptr<FakeClient>> Open(
      Core& core, FakeBackend& device, const Clock& clock, const Peer& peer,
      const kvbroker::Open& open);
  ~FakeClient();

  Manners& manners() { return manners_; }

  // ---- what the engine says ----

  // Sends an Acquire. Filled in: `sequence`, the next one where it is 0;
  // `pool`, the first one; `want`, as `at_least`; `deadline`, a minute where it
  // is 0.
  Sequence Ask(Acquire acquire);
  void Cancel(Sequence sequence);
  void Resend(Sequence sequence);
  // Gives pages back, mapped or not.
  void Return(PoolId pool, const std::vector<PageName>& pages);
  // So many pages of the pool get another use, those of the lowest index first;
  // all where there are fewer. Pages `from` another use only, where it is
  // given.
  void Mark(int count, Use use, std::optional<Use> from = {}, size_t pool = 0);
  void Report(size_t pool = 0);
  // Any message, as it is.
  absl::Status Send(const ClientMessage& message);

  // Does what follows from what it was told; false: there was nothing to do.
  bool Pump();

  // ---- how it ends ----

  // The connection goes, the process stays and keeps its memory.
  void HangUp();
  // The process is gone, and its mappings with it.
  void Die();

  bool connected() const { return connected_; }
  bool alive() const { return alive_; }

  // ---- what it knows ----

  SessionId id() const { return opened_.session; }
  const Opened& opened() const { return opened_; }
  PoolId pool(size_t i = 0) const { return opened_.pools[i]; }
  // Told first by the core.
  const std::string& instance() const { return opened_.instance; }
  const Peer& peer() const { return peer_; }

  // Pages it maps.
  std::vector<PageName> pages(size_t pool = 0) const;
  int Count(Use use, size_t pool = 0) const;
  int mapped(size_t pool = 0) const;
  // Handles it imports, by the device's tokens.
  std::vector<uint64_t> Tokens() const;

  // The answer to a sequence, once told.
  const Granted* granted(Sequence sequence) const;
  const Refused* refused(Sequence sequence) const;
  // Asked and not answered, and until when an answer must have come.
  const std::map<Sequence, absl::Time>& unanswered() const {
    return unanswered_;
  }
  // What it asked with that sequence, if it did.
  const Acquire* asked(Sequence sequence) const {
    auto it = asked_.find(sequence);
    return it == asked_.end() ? nullptr : &it->second;
  }
  Sequence last_sequence() const { return Sequence(last_sequence_); }

  // The latest order for the pool, if there is one in force.
  const Reclaim* order(size_t pool = 0) const;
  const std::vector<Reclaim>& orders() const { return orders_; }
  const std::vector<LimitChanged>& limits() const { return limits_; }
  const std::vector<Fenced>& fenced() const { return fenced_; }
  // Asks for room; the answer is in `rooms_made` or `refused`.
  Sequence AskRoom(Bytes declared_peak, absl::Duration deadline);
  const std::set<Sequence>& rooms_made() const { return rooms_made_; }
  // Asked and not answered.
  const std::optional<Sequence>& room_asked() const { return room_asked_; }
  // Frames of descriptors, in order: grant, first handle, handles.
  struct Frame {
    GrantId grant;
    uint32_t first = 0;
    uint32_t count = 0;
  };
  const std::vector<Frame>& frames() const { return frames_; }
  Bytes page_bytes(size_t pool = 0) const {
    return pools_[pool].geometry.page_bytes();
  }
  size_t pool_count() const { return pools_.size(); }
  // Taken and not acknowledged.
  uint32_t unacknowledged() const { return unacknowledged_; }
  // Acknowledges what manners().acknowledges_descriptors left.
  void Acknowledge();

  // What the core has lent it, and the latest order for a pool, as far as it
  // was told, pumped or not.
  Bytes lent() const;
  PageCount lent(size_t pool) const;
  std::optional<Reclaim> told_order(size_t pool) const;
  // Why the core ended the session; OK while it has not.
  const absl::Status& error() const { return error_; }
  // The core has ended the session; Pump tells the client.
  bool was_ended() const;
  // What the core did wrong.
  const std::vector<std::string>& complaints() const { return complaints_; }

 private:
  class Listener;

  struct Page {
    PageName name;
    Use use = Use::kInUse;
    absl::Time since;
    std::vector<uint64_t> tokens;
  };
  struct Pool {
    PoolId id;
    PoolGeometry geometry;
    std::map<PageIndex, Page> pages;
    std::optional<Reclaim> order;
    Revision revision;
    bool changed = false;  // since the last report
  };
  // A grant on its way: its announcement and its descriptors come separately.
  struct Arrival {
    std::optional<Granted> granted;
    std::map<uint32_t, uint64_t> tokens;  // by handle
  };

  FakeClient(Core& core, FakeBackend& device, const Clock& clock,
             const Peer& peer, const kvbroker::Open& open);

  void On(Opened opened);
  void On(Granted granted);
  void On(Refused refused);
  void On(Reclaim reclaim);
  void On(LimitChanged limit);
  void On(Fenced fenced);
  void On(RoomMade made) {
    rooms_made_.insert(made.sequence);
    room_asked_.reset();
  }
  void OnDescriptors(GrantId grant, uint32_t first,
                     std::vector<UniqueFd> descriptors);
  void MapWhatIsComplete(GrantId grant);
  // Gives what the order in force asks for and `answer`s it where nothing had
  // to be given, too.
  void Obey(Pool& pool, bool answer);
  // The page, if it is on its way, will not be mapped when it arrives.
  void ForgetArriving(const Pool& pool, PageName name);
  void Drop(const std::vector<uint64_t>& tokens);
  Pool& PoolOf(PoolId id);
  void Complain(std::string what) { complaints_.push_back(std::move(what)); }

  Core& core_;
  FakeBackend& device_;
  const Clock& clock_;
  const Peer peer_;
  Manners manners_;
  std::shared_ptr<Listener> listener_;
  bool connected_ = false;
  bool alive_ = true;
  absl::Status error_;

  Opened opened_;
  std::vector<Pool> pools_;
  std::map<GrantId, Arrival> arriving_;
  std::set<GrantId> done_;  // mapped or dropped
  uint64_t last_sequence_ = 0;
  Sequence acked_;
  std::set<Sequence> rooms_made_;
  std::optional<Sequence> room_asked_;
  std::map<Sequence, Acquire> asked_;
  std::map<Sequence, absl::Time> unanswered_;
  std::set<Sequence> cancelled_;
  std::map<Sequence, Granted> granted_;
  std::map<Sequence, Refused> refused_;
  std::vector<Reclaim> orders_;
  std::vector<LimitChanged> limits_;
  std::vector<Fenced> fenced_;
  std::vector<Frame> frames_;
  uint32_t unacknowledged_ = 0;
  std::vector<std::string> complaints_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_TESTING_FAKE_CLIENT_H_
