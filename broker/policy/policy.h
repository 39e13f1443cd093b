// The policy: who gets memory, and from whom. Pure functions, no clock, lock or
// I/O; broker/policy/snapshot.h is all they see.
//
// An instance has `min` (guaranteed), `max` (hard) and `weight`. Its *share* is
// what a weighted max-min split of the capacity gives it at its present demand:
// nobody gets more than it has a use for, or less than its `min` while it has a
// use for that; the rest goes by weight. An instance with unmet demand
// therefore has at least its even (weighted) part.
//
// A claim is served from the cheapest source that suffices:
//
//   1 free        free memory; idle pages of the claimant's own other pools
//   2 idle        idle pages of those above their share, then of those above
//                 their `min`; oldest first, the just-used ones last
//   3 cached      cached pages of those above their share
//   4 closing     in-use pages of those above their share: no new blocks, they
//                 come back as their requests end
//   5 preempt     the same, but their requests are preempted and recomputed
//
// What a claim wants beside what it needs, and all that a speculative one wants,
// comes from free memory, and from idle pages of those who have more of them than
// the claimant has then.
//
// 2 and 3 serve any claim; 4 and 5 only a claim that leaves its instance within
// its share ("entitled"): 4 at once, 5 after `patience`, or at once where it
// leaves it within its `min`. A holder is never pushed below its `min`; it may
// be pushed below its share by less than one of its pages, where pages do not
// divide evenly. That asymmetry keeps two instances from trading one page for
// ever.
#ifndef KVBROKER_BROKER_POLICY_POLICY_H_
#define KVBROKER_BROKER_POLICY_POLICY_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/policy/policy_config.h"
#include "broker/policy/snapshot.h"

namespace kvbroker {

// Sets `share` of every instance. Sum of the shares <= capacity, but for what
// the sum of the `min`s in use exceeds it (which SetPolicy refuses).
void ComputeShares(PolicySnapshot& snapshot);

// Ask `pool` to give `pages` by touching pages up to `tier`.
struct Take {
  size_t pool = 0;
  Tier tier = Tier::kIdle;
  PageCount pages = 0;
};

// What becomes of a claim now.
struct Plan {
  enum class Verdict { kGrant, kWait, kRefuse };
  Verdict verdict = Verdict::kWait;
  // kGrant: pages to lend, at_least <= pages <= want.
  PageCount pages = 0;
  // kWait: what to ask for meanwhile; a speculative claim that nobody is asked
  // for does not wait. Bytes of free memory, and of what is
  // coming, kept for this claim.
  std::vector<Take> takes;
  Bytes reserve;
  Bytes awaited;
  // kWait: decide again after this long even if nothing happens.
  absl::Duration recheck = absl::InfiniteDuration();
  // kRefuse: code and reason. kWait: why, for people.
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string reason;
};

// REQUIRES: ComputeShares was called; claim.at_least >= 1.
Plan Decide(const PolicySnapshot& snapshot, const ClaimView& claim,
            const PolicyConfig& config);

// Pages that free memory gives a claim at once: between at_least and want,
// within `room` (what its instance may still take), or 0. Decide's own first
// step, for callers who know that nobody waits and want no snapshot.
PageCount FromFree(Bytes free, Bytes room, Bytes page_bytes, PageCount at_least,
                   PageCount want);

// Takes the effect of `plan` out of `snapshot`, so that the next claim in order
// is decided as if it had happened.
void Apply(const Plan& plan, const ClaimView& claim, PolicySnapshot& snapshot);

// Takes pages that were asked for out of their holders' figures, so that nobody
// asks for them again; returns their bytes.
Bytes TakeOut(const std::vector<Take>& takes, PolicySnapshot& snapshot);

// Whether `a` is served before `b`: claims within `min` first, then those
// within their share, then the rest; running before waiting; then weight,
// counted once more for every `ageing` waited; then age.
bool ServedBefore(const PolicySnapshot& snapshot, const ClaimView& a,
                  const ClaimView& b, const PolicyConfig& config);

// What to ask for where `need` more is lent than the device has left beside what
// others use, for so long. Idle pages go first, then cached ones; for `hard` of it
// (memory that somebody was promised) pages in use, too. Those above their share
// give first, and nobody below its `min`.
std::vector<Take> TakesForOthers(const PolicySnapshot& snapshot, Bytes need,
                                 Bytes hard, absl::Duration needed_for,
                                 const PolicyConfig& config);

// What to ask of an instance that holds more than its `max`, for so long.
std::vector<Take> TakesToFitLimit(const PolicySnapshot& snapshot,
                                  size_t instance, absl::Duration above_for,
                                  const PolicyConfig& config);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_POLICY_POLICY_H_
