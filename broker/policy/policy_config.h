// The times an operator may set; the rest of the policy has no knobs.
#ifndef KVBROKER_BROKER_POLICY_POLICY_CONFIG_H_
#define KVBROKER_BROKER_POLICY_POLICY_CONFIG_H_

#include "absl/time/time.h"

namespace kvbroker {

struct PolicyConfig {
  // How long a claimant below its share waits for others' requests to end by
  // themselves before they are preempted for it.
  absl::Duration patience = absl::Seconds(1);
  // How long an instance that was made to preempt may not grow above its share.
  absl::Duration hold_off = absl::Seconds(5);
  // How long a holder has to answer a reclaim before it is reported as ignoring
  // it (and fenced, where `fence_ignoring`).
  absl::Duration reclaim_deadline = absl::Seconds(2);
  // A claim's weight counts once more for every such span it has waited.
  absl::Duration ageing = absl::Seconds(10);
  // How long use above a lowered limit may drain before requests are preempted.
  absl::Duration limit_patience = absl::Milliseconds(250);
  // Idle pages younger than this are taken only when no older ones exist.
  absl::Duration idle_fresh = absl::Milliseconds(100);
  // End sessions that ignore a reclaim past the deadline.
  bool fence_ignoring = false;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_POLICY_POLICY_CONFIG_H_
