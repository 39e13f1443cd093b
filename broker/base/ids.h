// Names of things, each its own type, so that a page count never lands where a
// page index is wanted and a session id never where a pool id is.
#ifndef KVBROKER_BROKER_BASE_IDS_H_
#define KVBROKER_BROKER_BASE_IDS_H_

#include <compare>
#include <cstdint>
#include <functional>
#include <ostream>

#include "broker/base/bytes.h"

namespace kvbroker {

// An integer that only equals, orders and hashes; `Tag` makes each one
// distinct.
template <typename Tag, typename Int>
class Id {
 public:
  constexpr Id() = default;
  constexpr explicit Id(Int value) : value_(value) {}
  constexpr Int value() const { return value_; }

  friend constexpr auto operator<=>(Id, Id) = default;
  template <typename H>
  friend H AbslHashValue(H h, Id id) {
    return H::combine(std::move(h), id.value_);
  }
  friend std::ostream& operator<<(std::ostream& os, Id id) {
    return os << id.value_;
  }

 private:
  Int value_ = 0;
};

// One connected process. Unique for a broker's life; 0 names none.
using SessionId = Id<struct SessionIdTag, uint64_t>;
// One KV pool of one session. Unique for a broker's life; 0 names none.
using PoolId = Id<struct PoolIdTag, uint64_t>;
// One physical allocation of the backend. Unique for a broker's life.
using HandleId = Id<struct HandleIdTag, uint64_t>;
// One grant of pages to a pool. Unique for a broker's life.
using GrantId = Id<struct GrantIdTag, uint64_t>;
// A client's number for one Acquire; rises by one a request within a session.
using Sequence = Id<struct SequenceTag, uint64_t>;
// Counts the broker's orders to a pool; the highest one counts.
using Revision = Id<struct RevisionTag, uint64_t>;

// A slot in a pool's address range.
using PageIndex = Id<struct PageIndexTag, uint32_t>;
// How often a slot was filled; (pool, index, generation) names a page for ever.
using Generation = Id<struct GenerationTag, uint32_t>;

// How many pages.
using PageCount = int64_t;

}  // namespace kvbroker

template <typename Tag, typename Int>
struct std::hash<kvbroker::Id<Tag, Int>> {
  size_t operator()(kvbroker::Id<Tag, Int> id) const noexcept {
    return std::hash<Int>()(id.value());
  }
};

#endif  // KVBROKER_BROKER_BASE_IDS_H_
