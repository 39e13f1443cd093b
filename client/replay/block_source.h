// BlockSource: the KV pool as a scheduler sees it.
//
// Two kinds exist: StaticBlockSource, a fixed share of memory as a plain engine
// takes it at its start, and the elastic one (broker_block_source.h), which
// borrows pages from the broker.
#ifndef KVBROKER_CLIENT_REPLAY_BLOCK_SOURCE_H_
#define KVBROKER_CLIENT_REPLAY_BLOCK_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "broker/base/bytes.h"
#include "client/replay/fresh_counts.h"

namespace kvbroker::replay {

// Tokens that one block holds, in every pool.
inline constexpr int64_t kBlockTokens = 16;

// One block of a pool: from 0 up, without large holes. The same plain integer
// as the client library's, whose arrays so pass through as they are.
using BlockId = int32_t;

// What the pool may do about a miss.
enum class Urgency {
  // For a request that runs: may wait inside for up to 2 ms, since the
  // alternative is a preemption.
  kRunning,
  // For the head of the queue: answers at once; a miss leaves a claim behind,
  // so that a later try succeeds.
  kWaiting,
};

// held = in_use + idle + what is neither (being emptied, say).
struct BlockUsage {
  Bytes in_use;  // blocks handed out
  Bytes idle;    // held, empty, usable at once
  Bytes held;    // physical memory of this pool
};

// Called by the scheduler's thread alone.
class BlockSource {
 public:
  explicit BlockSource(Bytes block_bytes) : block_bytes_(block_bytes) {}
  virtual ~BlockSource() = default;

  Bytes block_bytes() const { return block_bytes_; }

  // Bracket one scheduling step: no block that was free at its begin is taken
  // away before its end.
  virtual void StepBegin() = 0;
  virtual void StepEnd() = 0;

  // Appends exactly `blocks` ids to `out`, or returns false and changes nothing
  // but the claim that a waiting request's miss leaves. REQUIRES: blocks > 0.
  virtual bool Alloc(int64_t blocks, Urgency urgency,
                     std::vector<BlockId>* out) = 0;
  // REQUIRES: each is allocated.
  virtual void Free(std::span<const BlockId> blocks) = 0;

  // Allocated blocks whose pages have to be vacated now; their requests are
  // preempted. Usually empty, and then costs nothing. Valid until the next call
  // to this object; frees shorten the next answer.
  virtual std::span<const BlockId> BlocksToVacate() = 0;

  // The most that this pool may come to hold as limits stand now. A request
  // that needs more is rejected instead of waiting for ever.
  virtual int64_t CapacityBlocks() const = 0;

  virtual BlockUsage Usage() const = 0;

  // How often memory besides the pool was taken, and was not there.
  struct OtherMemory {
    int64_t taken = 0, failed = 0;
  };
  virtual std::optional<OtherMemory> Other() const { return std::nullopt; }

  // What was in pages when they came; nothing where nobody looked.
  virtual std::optional<FreshCounts> Fresh() const { return std::nullopt; }

  // Not OK: the device failed, or memory went with its broker; contents are
  // what they are, and the replay ends.
  virtual absl::Status Health() const { return absl::OkStatus(); }

  // The block's contents, `block_bytes()` of them. REQUIRES: allocated, all
  // three; a span is good until the next call to this object. What was written
  // between BeginWrite and EndWrite, all of it, is in the block from then on.
  virtual std::span<std::byte> BeginWrite(BlockId block) = 0;
  virtual void EndWrite(BlockId /*block*/) {}
  virtual std::span<const std::byte> Read(BlockId block) = 0;

 private:
  const Bytes block_bytes_;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_BLOCK_SOURCE_H_
