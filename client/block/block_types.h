// What the client library calls a block, a page's state and a step.
//
// Block ids, generations and steps are plain integers, unlike the ids of
// broker/base: arrays of them cross the C ABI and engines' own buffers as they
// are, without a copy.
#ifndef KVBROKER_CLIENT_BLOCK_BLOCK_TYPES_H_
#define KVBROKER_CLIENT_BLOCK_BLOCK_TYPES_H_

#include <cstdint>

namespace kvbroker::client {

// One KV block of a pool, 0 .. BlockGeometry::block_ids() - 1.
using BlockId = int32_t;

// Names a block's content: it rises each time the content is given up, and
// never starts anew, so (block, generation) from any time can be checked later.
using BlockGeneration = uint32_t;

// An engine's scheduling step; rises by one a step, 0 is before the first.
using StepId = uint64_t;

// Padding points here: always backed, never handed out (where it is reserved).
inline constexpr BlockId kNullBlock = 0;

enum class BlockState : uint8_t {
  kUnbacked,  // no memory behind it: its page is not mapped, or it straddles
              // two
  kFree,      // may be handed out
  kUsed,      // handed out
  kCached,    // nobody's, but its content is worth keeping: evicted when needed
  kReserved,  // the null block
};

// Who moves a page between these states is drawn in block_table.h.
enum class PageState : uint8_t { kAbsent, kRequested, kBacked, kReturning };
inline constexpr int kPageStates = 4;

// How dear a backed page is to its holder, cheapest first, and then the pages
// that are on their way out.
enum class PageTier : uint8_t {
  kIdle,      // free blocks only
  kCached,    // cached and free blocks only
  kInUse,     // some used or reserved block
  kClosing,   // gets no new blocks; some are still in use
  kVacating,  // closing, and its used blocks shall be preempted
  kClosed,    // closing, and empty
};
inline constexpr int kPageTiers = 6;

// Cached content of `block` that the table gave up: that of `generation`, and
// of any earlier one.
struct BlockRemoval {
  BlockId block = 0;
  BlockGeneration generation = 0;
  friend bool operator==(const BlockRemoval&, const BlockRemoval&) = default;
};

constexpr const char* Name(BlockState state) {
  switch (state) {
    case BlockState::kUnbacked:
      return "unbacked";
    case BlockState::kFree:
      return "free";
    case BlockState::kUsed:
      return "used";
    case BlockState::kCached:
      return "cached";
    case BlockState::kReserved:
      return "reserved";
  }
  return "invalid";
}

constexpr const char* Name(PageState state) {
  switch (state) {
    case PageState::kAbsent:
      return "absent";
    case PageState::kRequested:
      return "requested";
    case PageState::kBacked:
      return "backed";
    case PageState::kReturning:
      return "returning";
  }
  return "invalid";
}

constexpr const char* Name(PageTier tier) {
  switch (tier) {
    case PageTier::kIdle:
      return "idle";
    case PageTier::kCached:
      return "cached";
    case PageTier::kInUse:
      return "in use";
    case PageTier::kClosing:
      return "closing";
    case PageTier::kVacating:
      return "vacating";
    case PageTier::kClosed:
      return "closed";
  }
  return "invalid";
}

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_BLOCK_TYPES_H_
