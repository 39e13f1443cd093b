#include "client/block/block_geometry.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"

namespace kvbroker::client {

absl::Status BlockGeometry::Validate() const {
  if (page_bytes <= Bytes(0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "Page size must be positive; bytes: ", page_bytes.count()));
  }
  if (block_bytes <= Bytes(0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "Block size must be positive; bytes: ", block_bytes.count()));
  }
  if (max_pages == 0) {
    return absl::InvalidArgumentError("A pool needs at least one page index");
  }
  // First, so that no product below overflows.
  if (page_bytes > kMaxBytes || block_bytes > kMaxBytes ||
      max_pages > kMaxBytes / page_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("Pool is larger than any device; pages: ", max_pages,
                     ", bytes a page: ", page_bytes.count(),
                     ", most bytes a pool: ", kMaxBytes.count()));
  }
  if (block_bytes > page_bytes) {
    // A multiple, so that it is as well aligned as the size that was asked for.
    const Bytes enough = page_bytes * CeilDivide(block_bytes, page_bytes);
    return absl::InvalidArgumentError(absl::StrCat(
        "A block is larger than a page; block: ", FormatBytes(block_bytes),
        " (", block_bytes.count(), " bytes), page: ", FormatBytes(page_bytes),
        " (", page_bytes.count(), " bytes), a page size that would do: ",
        FormatBytes(enough), " (", enough.count(), " bytes)"));
  }
  int64_t ids = page_bytes * max_pages / block_bytes;
  if (max_blocks > ids) {
    return absl::InvalidArgumentError(
        absl::StrCat("Pool has fewer blocks than are asked for; blocks: ", ids,
                     ", asked for: ", max_blocks));
  }
  if (max_blocks > 0) ids = max_blocks;
  if (ids > std::numeric_limits<BlockId>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("Pool has more blocks than block ids; blocks: ", ids,
                     ", most: ", std::numeric_limits<BlockId>::max()));
  }
  return absl::OkStatus();
}

BlockId BlockGeometry::FirstBlock(PageIndex page) const {
  return static_cast<BlockId>(std::min<int64_t>(
      CeilDivide(page_bytes * page.value(), block_bytes), block_ids()));
}

BlockId BlockGeometry::EndBlock(PageIndex page) const {
  return static_cast<BlockId>(std::min<int64_t>(
      page_bytes * (int64_t{page.value()} + 1) / block_bytes, block_ids()));
}

PageIndex BlockGeometry::PageOf(BlockId block) const {
  return PageIndex(static_cast<uint32_t>(block_bytes * block / page_bytes));
}

int32_t BlockGeometry::block_ids() const {
  return max_blocks > 0
             ? static_cast<int32_t>(max_blocks)
             : static_cast<int32_t>(page_bytes * max_pages / block_bytes);
}

int32_t BlockGeometry::max_blocks_per_page() const {
  // Page 0 begins with a block, so no page fits more.
  return static_cast<int32_t>(page_bytes / block_bytes);
}

}  // namespace kvbroker::client
