// Core: who holds which pages, who waits for some, and what happens next.
//
// It is the broker without its sockets: sessions call in, listeners are told,
// a Backend makes the memory, a Clock says the time. The server wires it to the
// real ones, tests to fakes.
//
//   ASSIGN_OR_RETURN(auto core, Core::Create(options));
//   ASSIGN_OR_RETURN(SessionId id, core->OpenSession(peer, open, listener));
//   RETURN_IF_ERROR(core->Handle(id, Acquire{...}));    // listener: Granted
//   core->HungUp(id); core->ProcessGone(id);            // pages come back
//
// Where the backend has fixed addresses, the ledger chooses the pages' indexes,
// and all sessions are of one tenant. What is returned goes back to the backend
// at once, and nothing outlives the broker.
//
// Data has three ways through. Grant, down: Acquire -> policy -> ledger ->
// backend -> listener. Reclaim, up: policy -> listener -> Return -> ledger.
// Observation: Snapshot.
//
// Threads: every call is safe from any thread. One lock, never held over a
// backend call or a listener; what a call decides is collected under the lock,
// done after it, and checked against the ledger again where it took time.
// Nothing here sleeps or starts threads: RunDue does what time has made due.
#ifndef KVBROKER_BROKER_CORE_CORE_H_
#define KVBROKER_BROKER_CORE_CORE_H_

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/node_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "broker/base/bytes.h"
#include "broker/base/clock.h"
#include "broker/base/ids.h"
#include "broker/base/mutex.h"
#include "broker/core/actions.h"
#include "broker/core/claim.h"
#include "broker/core/history.h"
#include "broker/core/listener.h"
#include "broker/core/peer.h"
#include "broker/core/remembered.h"
#include "broker/core/session_state.h"
#include "broker/core/status.h"
#include "broker/device/backend.h"
#include "broker/ledger/ledger.h"
#include "broker/policy/policy.h"
#include "broker/policy/policy_config.h"
#include "broker/policy/snapshot.h"
#include "proto/messages.h"

namespace kvbroker {

// INVALID_ARGUMENT unless it is 1 to 128 of the characters A-Z a-z 0-9 _ . -
absl::Status CheckInstanceName(const std::string& name);

struct CoreOptions {
  Backend* backend = nullptr;  // outlives the core
  Clock* clock = nullptr;      // outlives the core
  // Bytes that may be lent; at most the device's total.
  Bytes capacity;
  // Of a device that others use as well: what is to stay free beside all that is
  // lent and used. What others use is read from the backend (RunDue begins it),
  // and what they use or have declared is not lent. Unset: the device is the
  // broker's alone.
  std::optional<Bytes> headroom;
  // Who is charged for lent memory. kBroker: the broker keeps its handles and can
  // pass pages on within a tenant. kEngine: it gives them up once the engine has
  // mapped, so that the device's tools charge the engine, and pages are made
  // anew each time.
  enum class Charge { kBroker, kEngine };
  Charge charge = Charge::kBroker;
  PolicyConfig policy;
  uint64_t incarnation = 0;
  // Stock: what comes back is kept for the next claim of the same tenant and
  // size, and some is made ahead while there are grants (with an executor), so
  // many bytes (unset: the lesser of 1/16 of the capacity and 1 GiB) and handles,
  // each a descriptor, for so long.
  std::optional<Bytes> max_stock;
  size_t max_stocked_handles = 4096;
  absl::Duration stock_decay = absl::Seconds(1);
  // Descriptors exported and not yet acknowledged, over all sessions; at least
  // 1. Half of it is for whoever comes; the other half is divided evenly, so
  // that those who do not acknowledge shut nobody out.
  uint32_t descriptor_window = 4096;
  // While the first half is taken: who leaves descriptors unacknowledged for
  // so long is ended.
  absl::Duration acknowledge_within = absl::Seconds(10);
  // Sessions of one uid, those included that have hung up and hold pages.
  size_t max_sessions_per_uid = 256;
  // Instances of one tenant that have a session.
  size_t max_instances_per_tenant = 256;
  // What an earlier broker left. Engines that were connected to it come back
  // with what they hold; until all have, but not for longer than the grace,
  // nothing is granted: what looks free may be theirs.
  Remembered remembered;
  absl::Duration resume_grace = absl::Seconds(5);
  // Called (without the lock) when Remember says something new. With `wait`
  // somebody is about to be told of it, and it is kept when the call returns,
  // or cannot be.
  std::function<void(bool wait)> remember;
  // Called (without the lock) when RunDue has to run earlier than it last said.
  std::function<void()> wake;
  // Called (without the lock) when device_status() has changed.
  std::function<void()> device_changed;
  // Readings of what the device has in use are queued there, as are makes,
  // exports and releases of more handles than `inline_handles` in one call, in
  // steps of that size, so that no caller is kept and small ones get their turn:
  // one thread, in the order given, never from within. What is queued is done or
  // dropped before the core is destroyed. Null: all is done by the caller.
  std::function<void(std::function<void()>)> executor;
  size_t inline_handles = 64;
  // One line an event: "grant instance=a pages=3 ...". Without the lock.
  std::function<void(std::string_view line)> log;
  // What was decided, in batches, each before anybody is told of it. Without
  // the lock, so that batches of several threads may change places: `number` is
  // the order. None: nothing is recorded.
  std::function<void(absl::Span<const HistoryEvent> events)> history;
};

class Core {
 public:
  static absl::StatusOr<std::unique_ptr<Core>> Create(CoreOptions options);
  ~Core();

  // ---- sessions (called by the transport) ----

  // Admits a process. The listener is told Opened before anything else.
  // INVALID_ARGUMENT names the field; FAILED_PRECONDITION: version, draining,
  // or (instance, member, rank) is taken by a live process. RESOURCE_EXHAUSTED
  // names the quota and the key that raises it.
  absl::StatusOr<SessionId> OpenSession(
      const Peer& peer, const Open& open,
      std::shared_ptr<SessionListener> listener);

  // One message of a session, any but Open. A failed status means the peer
  // broke the protocol: the transport closes the session with it.
  absl::Status Handle(SessionId session, const ClientMessage& message);

  // The peer acknowledged that many descriptors.
  absl::Status DescriptorsReceived(SessionId session, uint32_t count);

  // A connection of the session ended. No more grants; its pages stay lent,
  // since the process may still map them.
  void HungUp(SessionId session);

  // The session's process has exited: all it held is free. Implies HungUp.
  void ProcessGone(SessionId session);

  // ---- restarts ----

  // What the next broker has to know.
  Remembered Remember();
  // A process of CoreOptions.remembered has exited.
  void ExpectedGone(const Peer& process);

  // ---- operators ----

  CoreSnapshot Snapshot();
  // OK, or why the device cannot be used, and what to do. All claims are refused
  // with it until the device works again.
  absl::Status device_status();
  // All NOT_FOUND errors list the names that exist.
  absl::StatusOr<InstanceStatus> SetPolicy(const InstanceSelector& which,
                                           const PolicyChange& change);
  // Returns the pids that were fenced.
  absl::StatusOr<std::vector<uint32_t>> Delete(const InstanceSelector& which,
                                               bool force);
  absl::StatusOr<Explanation> Explain(const InstanceSelector& which);
  // No new sessions and no more grants; what is lent stays with its holders.
  void Drain();

  // ---- time ----

  // Does what is due; says when to call again (InfiniteFuture: nothing pends).
  absl::Time RunDue();

  // For tests: everything the ledger knows, recomputed from scratch.
  absl::Status CheckInvariants();

 private:
  explicit Core(CoreOptions options);

  // ---- sessions.cc: the peer's words, checked ----
  absl::Status On(SessionState& session, const Open& message, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const Acquire& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const Cancel& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const Mapped& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const Return& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const ReclaimAnswer& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const Report& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const Resend& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const LimitAck& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const Resume& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status On(SessionState& session, const MakeRoom& message,
                  Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Pages come back from the peer, whatever message says so.
  absl::Status TakeBack(SessionState& session, PoolId pool,
                        const std::vector<PageName>& pages, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<LedgerPool*> OwnPool(const SessionState& session, PoolId pool)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `name`: the one in force for it.
  absl::Status CheckOpen(const Peer& peer, const Open& open,
                         const std::string& name,
                         const std::optional<Resumption>& resumption)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckQuotas(const Peer& peer, const std::string& name,
                           const std::optional<Resumption>& resumption)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What the same sequence is answered again; old answers go for it.
  void KeepAnswer(SessionState& session, Sequence sequence, Answer answer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What the session's instance is called, by what others are called and what
  // Open says of conflicts. FAILED_PRECONDITION: it is not to be a member.
  absl::StatusOr<std::string> NameInForce(const Peer& peer, const Open& open)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Live processes of the instance other than the peer's own, in the order of
  // their sessions.
  std::vector<uint32_t> OthersOf(const Peer& peer, const std::string& name)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What Open guarantees, in bytes.
  std::optional<Bytes> MinWished(const Open& open) const;
  void EraseSession(SessionId id, std::string_view why, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Pages whose handles were never handed out: nobody can map them.
  void TakeBackUnsent(SessionState& session, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Fence(SessionState& session, std::string reason, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropClaims(SessionId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void HangUp(SessionState& session, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // ---- resume.cc: what outlives a connection, or a broker ----
  void Restore(const Remembered& remembered, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Resumption> CheckResuming(const Peer& peer, const Open& open)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // No grants: engines of the last broker are still to say what they hold.
  bool HoldsForResume() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::string WhoIsToResume() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // ---- others.cc: memory of the device that is not lent ----
  using ByProcess = std::map<uint32_t, Bytes>;  // by pid
  // What of the device's used memory may be this broker's, and what surely is.
  struct Books {
    Bytes surely, possibly;
    Bytes ever_charged, ever_taken;
  };
  Books ReadBooks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What processes of sessions surely use besides pages, of two readings.
  ByProcess OfOurs(const ByProcess& first, const ByProcess& last)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Reads what the device has in use, where it is time to: on the executor, since
  // a driver may take its time, or for ever.
  void MeasureIfDue() ABSL_LOCKS_EXCLUDED(mu_);
  void Measure() ABSL_LOCKS_EXCLUDED(mu_);
  void MeasureSoon(absl::Duration delay) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes what others use, or have declared, off what may be lent.
  void UpdateOthers(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Bytes SumOfDeclared() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What others use and engines have declared, without counting anything twice:
  // `used` by others in all, `by_process` of them by each of our sessions'
  // processes that the device knows.
  Bytes Needed(Bytes used, const ByProcess& by_process)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What may be lent where so much of the device is not the broker's.
  Bytes LendableBeside(Bytes foreign) const;
  // What more is lent than others leave room for.
  std::vector<Take> TakesToMakeRoom(const PolicySnapshot& snapshot)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Answers those who wait for room.
  void SettleRooms(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // For people, where others are the reason: "; 20 GiB of the device ...".
  std::string OthersInWords() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // ---- device_loss.cc: a device that does not work ----
  void LoseDevice(const absl::Status& error, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // REQUIRES: the device is lost.
  void RefuseLost(const Claim& claim, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Tries whether it works again, on the executor.
  void ProbeIfDue() ABSL_LOCKS_EXCLUDED(mu_);
  void Probe() ABSL_LOCKS_EXCLUDED(mu_);

  // ---- arbitration.cc: claims, orders, time ----
  PolicySnapshot TakeSnapshot() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Serves what can be served, asks for what must be asked for.
  void Arbitrate(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Grants from free memory without a snapshot. REQUIRES: nobody waits.
  bool GrantAtOnce(const Claim& claim, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Pages lent or set aside, 0 where the claim was refused instead. Nothing:
  // memory has to come back from the stock first; the claim waits.
  std::optional<PageCount> StartGrant(const Claim& claim, PageCount pages,
                                      Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Refuse(const Claim& claim, absl::StatusCode code, std::string reason,
              Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `for_others`: what this round takes from the pool's instance for claims of
  // other instances.
  void Order(PoolId pool, PageCount hold_at_most, Tier tier, Bytes for_others,
             Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ExpireClaims(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ExpireOrders(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ExpireInstances(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ExpireDescriptors(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Time NextDue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<Holder> Holders() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Of so many free bytes, what is in pieces that are too small for the pages
  // of a claim. None without fixed addresses.
  Bytes UnusableFor(const Claim& claim, Bytes free)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // ---- lending.cc: the work after the lock ----
  void Run(Actions actions) ABSL_LOCKS_EXCLUDED(mu_);
  // Whether so many handles are the calling thread's work, beside the `done`
  // ones of this call.
  bool IsSmall(size_t handles, size_t& done) const;
  // Adds up to `step` handles; true while some are missing and wanted.
  bool MakeSome(MakePages& make, size_t step) ABSL_LOCKS_EXCLUDED(mu_);
  // The handles are made, or cannot be.
  void FinishMake(MakePages make, Actions& next) ABSL_LOCKS_EXCLUDED(mu_);
  void Send(SendHandles send, Actions& next) ABSL_LOCKS_EXCLUDED(mu_);
  // Drops up to `step` of the handles.
  void ReleaseSome(std::vector<HandleRef>& handles, size_t step, Actions& next)
      ABSL_LOCKS_EXCLUDED(mu_);
  // The same, a step a turn of the executor.
  void MakeOnExecutor(std::shared_ptr<MakePages> make);
  void ReleaseOnExecutor(std::shared_ptr<std::vector<HandleRef>> handles);
  // Puts handles into stock where a claim waits for such, or nobody waits and
  // there is room; else up for release.
  void Recycle(const std::string& tenant, std::vector<HandleRef> handles,
               Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Tenants and sizes of the handles that claims wait for.
  std::set<Ledger::StockKey> WantedStock() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // So many handles were granted and are mapped: as many more are made for the
  // next grant, where there is free memory that nobody waits for. Not earlier:
  // whoever makes and whoever maps would wait for each other in the driver.
  void StockUp(const std::string& tenant, Bytes size, size_t granted,
               Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MakeStock(const StockHandles& stock) ABSL_LOCKS_EXCLUDED(mu_);
  // While claims wait, stock is for them alone; otherwise it has a bound.
  void TrimStock(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // All stock goes back to the device.
  void ReleaseStock(Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PumpDescriptors(SessionState& session, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // No more than its even part of the common window is left to a session.
  bool IsWindowTight() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool MayExport(const SessionState& session) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes `count` out of the session's window and the common one.
  void CloseWindow(SessionState& session, uint32_t count, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // ---- operators.cc ----
  absl::StatusOr<LedgerInstance*> Select(const InstanceSelector& which)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  size_t CountWithoutProcess(const std::string& tenant)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  InstanceStatus StatusOf(const LedgerInstance& instance,
                          const PolicySnapshot& snapshot)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AnnounceLimits(LedgerInstance& instance, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // ---- recording.cc: the history ----
  // A new event with the figures of now, or null where nobody wants one.
  HistoryEvent* Record(HistoryEvent::Kind kind, Actions& actions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  HistoryEvent* Record(HistoryEvent::Kind kind, const LedgerInstance& instance,
                       Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  HistoryEvent* Record(HistoryEvent::Kind kind, const LedgerPool& pool,
                       Actions& actions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  absl::Time Now() const { return options_.clock->Now(); }

  const CoreOptions options_;
  const bool fixed_addresses_;  // of the backend
  const absl::Time started_;

  Mutex mu_;
  Ledger ledger_ ABSL_GUARDED_BY(mu_);
  absl::node_hash_map<SessionId, SessionState> sessions_ ABSL_GUARDED_BY(mu_);
  absl::node_hash_map<PoolId, PoolState> pools_ ABSL_GUARDED_BY(mu_);
  std::map<Ledger::InstanceKey, InstanceState> instances_ ABSL_GUARDED_BY(mu_);
  std::list<Claim> claims_ ABSL_GUARDED_BY(mu_);  // in order of arrival
  // What time may change, so that a call need not look at everybody: pools with
  // an order in force, and instances above their limit, with credit or without
  // a process.
  std::set<PoolId> ordered_ ABSL_GUARDED_BY(mu_);
  std::set<Ledger::InstanceKey> watched_ ABSL_GUARDED_BY(mu_);
  // With fixed addresses: whoever opened first. Others are not admitted while
  // this broker lives: who has opened the slab can read and write all of it.
  std::optional<std::string> only_tenant_ ABSL_GUARDED_BY(mu_);
  uint64_t next_session_ ABSL_GUARDED_BY(mu_) = 1;
  uint64_t next_pool_ ABSL_GUARDED_BY(mu_) = 1;
  uint64_t next_grant_ ABSL_GUARDED_BY(mu_) = 1;
  uint32_t unacked_descriptors_ ABSL_GUARDED_BY(mu_) = 0;
  bool stocking_ ABSL_GUARDED_BY(mu_) = false;  // MakeStock is under way
  // A send failed for want of descriptors: pump again then.
  absl::Time pump_at_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  // Sessions of the last broker that have not resumed, and until when claims
  // wait for them; until when a process without a record may resume.
  std::vector<RememberedSession> expected_ ABSL_GUARDED_BY(mu_);
  absl::Time hold_until_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  bool hold_for_unknown_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time may_adopt_any_until_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  // Others. Used by them, as measured; a growth counts when a second reading
  // shows it, too.
  Bytes foreign_ ABSL_GUARDED_BY(mu_);
  ByProcess foreign_by_process_ ABSL_GUARDED_BY(mu_);
  std::optional<std::pair<absl::Time, Bytes>> suspected_ ABSL_GUARDED_BY(mu_);
  absl::Time measured_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time measure_at_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  bool measuring_fails_ ABSL_GUARDED_BY(mu_) = false;
  // Pages were adopted then, which an older reading shows as others'.
  absl::Time adopted_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  // Since when more is lent than others leave room for.
  absl::Time overdrawn_since_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  std::list<Room> rooms_ ABSL_GUARDED_BY(mu_);
  // Why the device cannot be used, since when, and when that is tried again.
  absl::Status device_error_ ABSL_GUARDED_BY(mu_);
  absl::Time lost_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time probe_at_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  uint64_t recorded_ ABSL_GUARDED_BY(mu_) = 0;  // events of the history
  // What RunDue answered last: `wake` is called when something is due earlier.
  absl::Time promised_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_CORE_H_
