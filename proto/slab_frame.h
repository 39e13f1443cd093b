// What is said of a slab, all memory of a device with fixed addresses, and of
// leases of parts of it.
//
//   Opened.slab             the slab as a whole: an engine opens it once
//   a grant's descriptors   the lease of a page each: a sealed memfd
//
// Both hold this struct, in the machine's own byte order (both ends share the
// machine). It only grows at the end and by a new version.
#ifndef KVBROKER_PROTO_SLAB_FRAME_H_
#define KVBROKER_PROTO_SLAB_FRAME_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {

inline constexpr uint32_t kSlabMagic = 0x4b564c42;  // "KVLB"
inline constexpr uint32_t kSlabVersion = 1;

struct SlabFrame {
  uint32_t magic = kSlabMagic;
  uint32_t version = kSlabVersion;
  uint8_t ipc_handle[64] = {};  // a CUipcMemHandle
  uint64_t slab_bytes = 0;
  // The part that is meant, within the slab.
  uint64_t offset = 0;
  uint64_t size = 0;
};
static_assert(sizeof(SlabFrame) == 96);

std::string SlabFrameText(const SlabFrame& frame);
// INVALID_ARGUMENT: not such a frame, or one whose part is not in its slab.
absl::StatusOr<SlabFrame> ParseSlabFrame(std::string_view text);

// As a file that nobody can change any more. RESOURCE_EXHAUSTED: this process
// can open no further one.
absl::StatusOr<UniqueFd> SealSlabFrame(const SlabFrame& frame);
// Of such a file. INVALID_ARGUMENT as above.
absl::StatusOr<SlabFrame> ReadSlabFrame(int fd);

}  // namespace kvbroker

#endif  // KVBROKER_PROTO_SLAB_FRAME_H_
