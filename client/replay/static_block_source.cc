#include "client/replay/static_block_source.h"

#include <errno.h>
#include <sys/mman.h>

#include <limits>

#include "absl/strings/str_cat.h"
#include "broker/base/unique_fd.h"

namespace kvbroker::replay {
namespace {

constexpr int64_t kMaxBlocks = std::numeric_limits<BlockId>::max();

}  // namespace

absl::StatusOr<std::unique_ptr<StaticBlockSource>> StaticBlockSource::Create(
    Bytes share, Bytes block_bytes) {
  if (block_bytes <= Bytes(0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("block must have bytes: ", block_bytes.count()));
  }
  const int64_t blocks = share / block_bytes;
  if (blocks < 1 || blocks > kMaxBlocks) {
    return absl::InvalidArgumentError(absl::StrCat(
        "static share must hold from 1 to ", kMaxBlocks, " blocks of ",
        block_bytes.count(), " bytes: ", share.count(), " bytes"));
  }
  void* memory =
      mmap(nullptr, (block_bytes * blocks).count(), PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return ErrnoToStatus(errno, absl::StrCat("cannot map the static share of ",
                                             share.count(), " bytes"));
  }
  return std::unique_ptr<StaticBlockSource>(new StaticBlockSource(
      static_cast<std::byte*>(memory), blocks, block_bytes));
}

StaticBlockSource::StaticBlockSource(std::byte* memory, int64_t blocks,
                                     Bytes block_bytes)
    : BlockSource(block_bytes), memory_(memory), blocks_(blocks) {
  free_.reserve(blocks);
  for (int64_t block = blocks - 1; block >= 0; --block) {
    free_.push_back(static_cast<BlockId>(block));
  }
}

StaticBlockSource::~StaticBlockSource() {
  munmap(memory_, (block_bytes() * blocks_).count());
}

bool StaticBlockSource::Alloc(int64_t blocks, Urgency /*urgency*/,
                              std::vector<BlockId>* out) {
  if (blocks > static_cast<int64_t>(free_.size())) return false;
  out->insert(out->end(), free_.end() - blocks, free_.end());
  free_.resize(free_.size() - blocks);
  return true;
}

void StaticBlockSource::Free(std::span<const BlockId> blocks) {
  free_.insert(free_.end(), blocks.begin(), blocks.end());
}

BlockUsage StaticBlockSource::Usage() const {
  const Bytes idle = block_bytes() * static_cast<int64_t>(free_.size());
  const Bytes held = block_bytes() * blocks_;
  return {.in_use = held - idle, .idle = idle, .held = held};
}

}  // namespace kvbroker::replay
