// Ledger: who holds which pages and handles, to the byte.
//
// Nouns: an instance (name and limits) has sessions (processes), a session has
// pools (geometry), a pool holds pages, a page is made of handles. The ledger
// keeps these and the sums over them; it decides nothing, calls nobody and
// takes no lock: the core holds its own around every call.
//
// A page's life here:
//
//   absent --Charge--> MAKING --Offer--> OFFERED --ConfirmMapped--> MAPPED
//     ^  |               |                  |                       ^ |
//     |  +---------------|---- Adopt -------|-----------------------+ |
//     +------------------+------- Remove ---+-------------------------+
//
// A page is adopted where an engine holds it from an earlier broker: it counts
// as any other, but its handles are nobody's here and go with the engine's
// mapping.
//
// Bytes: a page counts from Charge to Remove. What Remove or TrimStock takes
// out still counts, as `releasing`, until EndRelease says that the driver has
// it back. `others` is what of the capacity is not to be lent at present, since
// others use the device, too. `stocking` is being made for the stock. capacity +
// overdrawn = free + lent + stock + stocking + releasing + credit + others,
// always; free or overdrawn is 0, and only adopting and others overdraw.
//
// With fixed addresses (BackendInfo) a page lies at its index times its bytes
// in a slab as large as the capacity, which all pools share: its index is
// chosen here (AbsentIndexes), and its place is free again after FreeRange.
//
// REQUIRES on the verbs are the core's duty (it has checked the peer's words);
// breaking one is a CHECK failure.
#ifndef KVBROKER_BROKER_LEDGER_LEDGER_H_
#define KVBROKER_BROKER_LEDGER_LEDGER_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/ids.h"
#include "broker/device/backend.h"
#include "broker/device/range_map.h"
#include "proto/messages.h"

namespace kvbroker {

// Shared only while a descriptor of it is being exported without the lock.
using HandleRef = std::shared_ptr<const Handle>;

enum class PageState { kMaking, kOffered, kMapped };

struct LedgerPage {
  Generation generation;
  PageState state = PageState::kMaking;
  GrantId grant;
  bool adopted = false;  // its handles, if there were any, are not kept here
  std::vector<HandleRef> handles;  // empty while MAKING, and where adopted
};

struct LedgerPool {
  PoolId id;
  SessionId session;
  PoolGeometry geometry;
  absl::flat_hash_map<PageIndex, LedgerPage> pages;
  // Counts fillings over all slots: a generation never names two pages.
  Generation last_generation;

  PageCount held() const { return static_cast<PageCount>(pages.size()); }
};

struct LedgerSession {
  SessionId id;
  std::string tenant;
  std::pair<std::string, std::string> instance;  // key: tenant, name
  uint32_t pid = 0;
  std::vector<PoolId> pools;
  Bytes held;     // pages of its pools
  Bytes adopted;  // of them, those whose handles are not kept here
};

struct LedgerInstance {
  std::string tenant;
  std::string name;
  Bytes min;
  Bytes max;
  double weight = 1;
  uint64_t limit_revision = 1;
  // The limits are an operator's: later processes do not bring their own.
  bool set_by_operator = false;
  std::map<std::string, std::string> labels;
  std::vector<SessionId> sessions;
  Bytes held;  // of its sessions, and credit
  Bytes credit;
  // When its last process went; it is forgotten some time after.
  absl::Time empty_since = absl::InfiniteFuture();
};

class Ledger {
 public:
  using InstanceKey = std::pair<std::string, std::string>;  // tenant, name
  using Instances = std::map<InstanceKey, LedgerInstance>;
  using StockKey = std::pair<std::string, Bytes>;  // tenant, handle's size

  enum class Addresses { kOfPools, kFixed };

  explicit Ledger(Bytes capacity, Addresses addresses = Addresses::kOfPools)
      : capacity_(capacity) {
    if (addresses == Addresses::kFixed) slab_.emplace(capacity);
  }

  // ---- instances, sessions, pools ----

  // The instance, made with `max` = capacity where there is none.
  LedgerInstance& AddInstance(const std::string& tenant,
                              const std::string& name);
  LedgerInstance* FindInstance(const InstanceKey& key);
  // REQUIRES: no sessions.
  void RemoveInstance(const InstanceKey& key);
  const Instances& instances() const { return instances_; }
  Instances& instances() { return instances_; }
  Bytes SumOfMins() const;

  LedgerSession& OpenSession(LedgerInstance& instance, SessionId id,
                             uint32_t pid);
  LedgerSession* FindSession(SessionId id);
  LedgerPool& OpenPool(LedgerSession& session, PoolId id,
                       const PoolGeometry& geometry);
  LedgerPool* FindPool(PoolId id);
  LedgerInstance& InstanceOf(const LedgerSession& session);
  LedgerInstance& InstanceOf(const LedgerPool& pool);
  // All of the session's pages leave; their handles are the caller's to release
  // (and EndRelease). The instance stays, without this session.
  std::vector<HandleRef> CloseSession(SessionId id, absl::Time now);

  // ---- pages ----

  // The lowest `count` absent slots of the pool, or fewer where it is full.
  // With fixed addresses, those with the best places in the slab, or fewer
  // where the slab has no more for such pages.
  std::vector<PageIndex> AbsentIndexes(const LedgerPool& pool,
                                       PageCount count) const;
  // Absent -> MAKING. REQUIRES: every index absent and in range, its place in
  // the slab free; bytes fit into free().
  std::vector<PageName> Charge(LedgerPool& pool, GrantId grant,
                               const std::vector<PageIndex>& indexes);
  // MAKING -> OFFERED; `handles` are the page's, in order.
  void Offer(LedgerPool& pool, PageName page, std::vector<HandleRef> handles);
  // OFFERED -> MAPPED; pages that have left meanwhile are passed over.
  void ConfirmMapped(LedgerPool& pool, const std::vector<PageName>& pages);
  // Gives up the page's handles: it is the engine's mapping alone that keeps its
  // memory from now on, and it goes with that, as an adopted page does. The
  // handles go to the caller. REQUIRES: FindPage, MAPPED.
  std::vector<HandleRef> LetGo(LedgerPool& pool, PageName page);
  // Absent -> MAPPED, of a page that an earlier broker lent. REQUIRES: absent,
  // in range, `name.generation` above 0.
  void Adopt(LedgerPool& pool, PageName name);
  // A page that is not MAKING goes on under the same name in another pool of
  // the same geometry, as MAPPED. REQUIRES: absent there.
  void Move(LedgerPool& from, LedgerPool& to, PageName name);
  // The page, or null where it is absent or of another generation.
  LedgerPage* FindPage(LedgerPool& pool, PageName page);
  // Any state -> absent. The handles (counted as releasing) go to the caller,
  // who puts them into stock or releases them. A page still MAKING has none;
  // its bytes count as releasing all the same, since its maker may be at it:
  // the maker drops what it made and ends the release. An adopted page has
  // neither handles nor a release. REQUIRES: FindPage.
  std::vector<HandleRef> Remove(LedgerPool& pool, PageName page);

  // ---- credit: bytes set aside for an instance ----

  void AddCredit(LedgerInstance& instance, Bytes bytes);
  void DropCredit(LedgerInstance& instance, Bytes bytes);

  // ---- stock and release ----

  // So much is about to be made for the stock. REQUIRES: it is free.
  void BeginStock(Bytes bytes);
  // Of that, so much was made: it is releasing until AddStock.
  void EndStock(Bytes bytes, Bytes made);
  // Handles (releasing) wait for a claim of the same tenant and size.
  // REQUIRES: `now` is not before that of an earlier call.
  void AddStock(const std::string& tenant, std::vector<HandleRef> handles,
                absl::Time now);
  // Up to `count` handles for a grant, those that were added last; they count
  // with the grant's pages now.
  std::vector<HandleRef> TakeStock(const std::string& tenant,
                                   Bytes handle_bytes, size_t count);
  // Stock that was added at `until` or before, to be released.
  std::vector<HandleRef> TrimStock(absl::Time until = absl::InfiniteFuture());
  // Stock of any other tenant and size, to be released.
  std::vector<HandleRef> TrimStockExcept(const std::set<StockKey>& kept);
  // Handles that count nowhere (taken from stock) are to be released.
  void BeginRelease(Bytes bytes);
  // The driver has these bytes back.
  void EndRelease(Bytes bytes);
  // Together with EndRelease, the place of one of its pages. Does nothing
  // without fixed addresses.
  void FreeRange(Bytes offset, Bytes bytes);

  // ---- others ----

  // Bytes of the capacity; at most that.
  void SetOthers(Bytes bytes);

  bool fixed_addresses() const { return slab_.has_value(); }
  Bytes capacity() const { return capacity_; }
  Bytes others() const { return others_; }
  // What may be lent at most at present.
  Bytes lendable() const { return capacity_ - others_; }
  Bytes lent() const { return lent_; }
  // Of `lent`, pages that are being made.
  Bytes making() const { return making_; }
  // Sums since the beginning: charged, adopted and begun for the stock; taken out
  // of pages and stock.
  Bytes ever_charged() const { return ever_charged_; }
  Bytes ever_taken() const { return ever_taken_; }
  Bytes stock() const { return stock_; }
  Bytes stocking() const { return stocking_; }
  size_t stocked_handles() const { return stocked_handles_; }
  // Of this tenant and size.
  size_t stocked_handles(const StockKey& key) const;
  // Of what tenants and sizes there is some.
  std::set<StockKey> StockKeys() const;
  // When the stock's oldest was added; infinite future where there is none.
  absl::Time oldest_stock() const;
  Bytes releasing() const { return releasing_; }
  Bytes credit() const { return credit_; }
  // Neither lent, set aside nor on its way back to the driver. Stock is not in
  // it.
  Bytes free() const { return std::max(Bytes(0), capacity_ - spoken_for()); }
  // What is lent (and so on) above the capacity.
  Bytes overdrawn() const {
    return std::max(Bytes(0), spoken_for() - capacity_);
  }
  // Of `free` and the stock together, what may be lent now.
  Bytes grantable() const {
    return std::max(Bytes(0), capacity_ - spoken_for() + stock_);
  }
  size_t session_count() const { return sessions_.size(); }
  const absl::node_hash_map<PoolId, LedgerPool>& pools() const {
    return pools_;
  }

  // Every sum recomputed: no handle in two pages, sums equal the capacity,
  // states and handles agree.
  absl::Status CheckInvariants() const;

 private:
  struct Stocked {
    HandleRef handle;
    absl::Time since;
  };
  // Its oldest in front.
  using Stock = std::deque<Stocked>;

  // What was taken out of the stock counts as releasing.
  void CountTrimmed(const std::vector<HandleRef>& trimmed);
  void Count(LedgerPool& pool, Bytes delta);
  void CountAdopted(LedgerPool& pool, Bytes delta);
  Bytes spoken_for() const {
    return lent_ + stock_ + stocking_ + releasing_ + credit_ + others_;
  }

  const Bytes capacity_;
  std::optional<RangeMap> slab_;  // with fixed addresses
  Bytes lent_, stock_, stocking_, releasing_, credit_, others_;
  Bytes adopted_, making_;  // of lent_
  Bytes ever_charged_, ever_taken_;
  Instances instances_;
  absl::node_hash_map<SessionId, LedgerSession> sessions_;
  absl::node_hash_map<PoolId, LedgerPool> pools_;
  std::map<StockKey, Stock> stocked_;  // none is empty
  size_t stocked_handles_ = 0;
};

// The sum of the handles' sizes.
Bytes SizeOf(const std::vector<HandleRef>& handles);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_LEDGER_LEDGER_H_
