// Claim: an Acquire that has not been answered yet.
//
//   Acquire --> QUEUED <---------+ memory came or went, time passed:
//                 |  |  \        | decided again by the policy
//                 |  |   +-------+ (its plan's tier is the claim's state)
//        Granted  |  |  Refused: over the own limit, past the deadline,
//        cancelled
//                 v  v
//               MAKING --> answered
//                 |
//                 +-- the backend failed: QUEUED again, not before `retry_at`
#ifndef KVBROKER_BROKER_CORE_CLAIM_H_
#define KVBROKER_BROKER_CORE_CLAIM_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "broker/base/ids.h"
#include "proto/messages.h"

namespace kvbroker {

struct Claim {
  SessionId session;
  Sequence sequence;
  PoolId pool;
  PageCount want = 0;
  PageCount at_least = 0;
  std::vector<PageIndex> indexes;  // empty: the broker chooses
  Urgency urgency = Urgency::kWaiting;
  bool credit = false;

  absl::Time since;  // of the first Acquire it stands for
  absl::Time deadline;
  absl::Time retry_at = absl::InfinitePast();
  std::string last_error;  // of the backend, if that is what it waits for

  // What the last decision was, for people and for the next recheck.
  std::optional<Tier> asked_tier;
  std::string reason = "queued";
  absl::Time recheck_at = absl::InfiniteFuture();
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_CLAIM_H_
