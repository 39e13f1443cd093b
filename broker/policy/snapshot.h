// PolicySnapshot: all the policy may look at, as plain figures.
//
// The core builds one under its lock; Decide and its kin read it and nothing
// else, so every decision can be replayed from its input. Instances and pools
// are named by their place in the vectors.
#ifndef KVBROKER_BROKER_POLICY_SNAPSHOT_H_
#define KVBROKER_BROKER_POLICY_SNAPSHOT_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/ids.h"
#include "proto/messages.h"

namespace kvbroker {

struct InstanceView {
  std::string name;
  Bytes min;
  Bytes max;
  double weight = 1;
  // Lent to it: pages of all its pools, those being made, and credit.
  Bytes held;
  // What the claims decided before in the same round have come to. Of `held`,
  // asked for: nobody else gets it, and it counts until it is gone.
  Bytes leaving;
  // Beside `held`, kept or asked for on behalf of its own claims: its next one
  // comes on top of it, but nobody can be given what it does not hold yet.
  Bytes promised;
  // What it has a use for: pages in use or cached, plus what its claims need.
  // Idle pages are no demand.
  Bytes demand;
  // Filled by ComputeShares.
  Bytes share;
  // Was made to preempt a moment ago and may not grow above its share.
  bool held_off = false;
};

struct PoolView {
  PoolId id;
  size_t instance = 0;
  Bytes page_bytes;
  PageCount held = 0;
  // By the pool's last report, less what it has returned since.
  PageCount idle = 0;
  PageCount settled = 0;  // of `idle`: not used for PolicyConfig::idle_fresh
  PageCount cached = 0;
  absl::Duration oldest_idle;
  // Its process answers: connected, and not ignoring an order.
  bool answers = true;
};

struct ClaimView {
  size_t instance = 0;
  size_t pool = 0;
  PageCount want = 0;
  PageCount at_least = 0;
  Urgency urgency = Urgency::kWaiting;
  absl::Duration age;
  // Of the snapshot's free memory, what has no place for the claim's pages.
  Bytes unusable;
};

struct PolicySnapshot {
  Bytes capacity;
  // Not lent, not being released: what a grant can be made of now. The broker's
  // stock counts as free.
  Bytes free;
  // On its way to `free` without anybody being asked for more: handles that the
  // driver has not got back yet, pages that a lowered limit takes.
  Bytes coming;
  std::vector<InstanceView> instances;
  std::vector<PoolView> pools;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_POLICY_SNAPSHOT_H_
