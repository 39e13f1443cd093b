// Mapper: a pool's address range, and the pages mapped into it.
//
//   ASSIGN_OR_RETURN(auto mapper, HostMapper::Create(geometry));
//   RETURN_IF_ERROR(mapper->Begin(opened));
//   RETURN_IF_ERROR(mapper->Map(page, std::move(descriptors)));
//   ... engines read and write within mapper->region(0) ...
//   RETURN_IF_ERROR(mapper->Unmap(page));
//
// The range is reserved once, for all pages the pool may ever hold, and costs no
// memory. In the contiguous layout there is one region, and page p lies at
// p * page bytes. In the per-layer layout there is a region for each handle of a
// page (a layer's K or V buffer), and handle h of page p lies in region h at
// p * handle bytes. An address that is not mapped faults, except in guard mode and
// in a slab that several processes share (cuda_ipc_mapper.h).
//
// Guard mode is for engines whose kernels touch addresses of pages that they do
// not hold: stale rows of a block table, whole-tensor operations. One handle of
// the mapper's own lies behind every slot without a page. What is written there
// is nobody's, and what is read is anything.
#ifndef KVBROKER_CLIENT_ARENA_MAPPER_H_
#define KVBROKER_CLIENT_ARENA_MAPPER_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "broker/base/ids.h"
#include "broker/base/unique_fd.h"
#include "proto/messages.h"

namespace kvbroker::client {

// Map and Unmap are called by one thread at a time; the rest from any.
class Mapper {
 public:
  virtual ~Mapper() = default;

  // The broker has opened the session, for the first time: what it lends is
  // known. Once, and before all else. Fails where the pool cannot map that.
  virtual absl::Status Begin(const Opened& /*opened*/) {
    return absl::OkStatus();
  }

  // Imports and maps the page's handles, in order. All or nothing.
  // REQUIRES: the page is not mapped, as many descriptors as handles a page.
  virtual absl::Status Map(PageIndex page,
                           std::vector<UniqueFd> descriptors) = 0;

  // Unmaps the page and releases its imports. FAILED_PRECONDITION, and nothing
  // happened: work that was queued before still uses it.
  virtual absl::Status Unmap(PageIndex page) = 0;

  // Start of a region; fixed from Begin on. An address of the device:
  // whether this process can read it depends on the kind of memory.
  virtual std::byte* region(size_t handle_of_page) const = 0;

  // Who holds it keeps the addresses of all regions from being anybody else's,
  // also past the end of the mapper: host memory reads as zeros then, and what is
  // written there is lost; a GPU's must not be touched. Null where the mapper
  // maps nothing. From Begin on, any thread.
  virtual std::shared_ptr<void> range() const { return nullptr; }

  // Guard mode from now on, for the contiguous layout. It costs the device's
  // memory of one handle, charged to this process; a mapping for each slot now;
  // and with each Map and Unmap a mapping more. Between the two the slot has
  // neither for a moment, so Map, too, waits for the streams that were added.
  // REQUIRES: nothing is mapped. All or nothing. INVALID_ARGUMENT: another
  // layout. UNIMPLEMENTED: this kind of memory has no use for it.
  virtual absl::Status Guard() {
    return absl::UnimplementedError(
        "guard mode: this kind of memory has none: turn it off");
  }

  // A stream (a CUstream) whose work touches the pool: Unmap waits for what was
  // queued on it before. To be removed before it is destroyed. The value of -1
  // (kAllStreams) stands for all there are. Any thread. Does nothing where memory
  // has no streams.
  virtual void AddStream(void* /*stream*/) {}
  virtual void RemoveStream(void* /*stream*/) {}
};

// What Guard() answers for the layout.
inline absl::Status CheckGuardLayout(const PoolGeometry& geometry) {
  if (geometry.layout != Layout::kPerLayer && geometry.handles_per_page == 1) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      "guard mode: it is for pools of the contiguous layout, with one handle a "
      "page; a per-layer pool would need a mapping for each layer of each slot: "
      "turn it off, or use the contiguous layout");
}

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_MAPPER_H_
