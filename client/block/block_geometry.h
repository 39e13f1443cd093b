// BlockGeometry: which blocks lie on which page.
//
// Blocks are laid end to end from byte 0 of the pool's address range, and so
// are pages. A page fixes which blocks it backs: those that lie wholly on it.
// Where the page size is no multiple of the block size, a block that straddles
// two pages keeps its id but is never backed, and a page shorter than two
// blocks may hold none at all.
//
//   page   |       0       |       1       |       2       |
//   block  |  0  |  1  |  (2)  |  3  |  4  |  (5)  |  6  |
#ifndef KVBROKER_CLIENT_BLOCK_BLOCK_GEOMETRY_H_
#define KVBROKER_CLIENT_BLOCK_BLOCK_GEOMETRY_H_

#include <cstdint>

#include "absl/status/status.h"
#include "broker/base/bytes.h"
#include "broker/base/ids.h"
#include "client/block/block_types.h"

namespace kvbroker::client {

struct BlockGeometry {
  Bytes page_bytes;        // all layers together
  Bytes block_bytes;       // likewise
  uint32_t max_pages = 0;  // page indexes are 0 .. max_pages - 1
  // Ids are below this, and pages beyond hold no block; 0: as many as fit.
  uint32_t max_blocks = 0;
  bool reserve_null_block = true;

  // InvalidArgument names the figure that is wrong and, for a block larger than
  // a page, a page size that would do.
  absl::Status Validate() const;

  // All below REQUIRE a valid geometry and an index or id within it.

  // The page backs the blocks FirstBlock(page) .. EndBlock(page) - 1.
  BlockId FirstBlock(PageIndex page) const;
  BlockId EndBlock(PageIndex page) const;
  int32_t BlocksOn(PageIndex page) const {
    return EndBlock(page) - FirstBlock(page);
  }
  // The page that holds the block's first byte.
  PageIndex PageOf(BlockId block) const;

  // How many ids there are, straddling ones included.
  int32_t block_ids() const;
  // The most on one page; where blocks straddle, some pages hold one less.
  int32_t max_blocks_per_page() const;

  friend bool operator==(const BlockGeometry&, const BlockGeometry&) = default;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_BLOCK_GEOMETRY_H_
