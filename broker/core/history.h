// HistoryEvent: what the core has decided, for whoever checks it afterwards.
//
// A history is complete: from its events alone, in the order of `number`, it
// can be recomputed who held what at any moment. tests/history does that and
// checks the core's promises; docs/testing.md says how.
//
//   kStart -> kOpen -> (kGrant | kBack | kCredit | kOrder | kLimits | ...)*
//                   -> kGone ... -> kDrain
#ifndef KVBROKER_BROKER_CORE_HISTORY_H_
#define KVBROKER_BROKER_CORE_HISTORY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/ids.h"
#include "proto/messages.h"

namespace kvbroker {

struct HistoryEvent {
  enum class Kind {
    kStart,   // incarnation, capacity
    kOpen,    // session, pid, pools; `min` and `max` are in force
    kLimits,  // of an instance, in force from here on
    kGrant,   // pages charged to a pool, `drawn` of them from credit
    kBack,    // pages taken out of a pool, `why`
    kResume,  // pages that go on in a pool: out of pool `from`, or (0) adopted,
              // as an earlier broker lent them
    kCredit,  // the instance's credit is now `instance_credit`
    kOrder,   // a pool holds at most `hold_at_most` (kHoldAny: lifted)
    kRefuse,  // a claim, `why`
    kHangUp,  // a session's connection ended; its pages stay lent
    kGone,    // a session ended, `why`; `bytes` it held are taken out
    kReleased,  // the device has `bytes` back
    kDrain,     // nothing more is lent
  };
  struct Pool {
    PoolId id;
    Bytes page_bytes;
  };

  Kind kind = Kind::kStart;
  // Rises by one an event, from 1; the order in which it was decided.
  uint64_t number = 0;
  absl::Time at;  // by the core's clock

  // The ledger's sums, after the event.
  Bytes lent, credit, stock, releasing;

  // The instance and what it holds after the event.
  std::string tenant, instance;
  Bytes held, instance_credit, min, max;

  // What happened; which fields count depends on the kind.
  uint64_t incarnation = 0;
  Bytes capacity;
  SessionId session;
  uint32_t pid = 0;
  std::vector<Pool> pools;
  PoolId pool;
  GrantId grant;
  std::vector<PageName> pages;
  PoolId from;
  Bytes drawn;
  Bytes bytes;
  PageCount hold_at_most = kHoldAny;
  Tier tier = Tier::kIdle;
  // What this round of decisions takes from the instance, from all its pools,
  // for the claims of other instances.
  Bytes for_others;
  std::string why;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_HISTORY_H_
