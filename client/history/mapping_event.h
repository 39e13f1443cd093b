// MappingEvent: what a process has mapped, and from when to when.
#ifndef KVBROKER_CLIENT_HISTORY_MAPPING_EVENT_H_
#define KVBROKER_CLIENT_HISTORY_MAPPING_EVENT_H_

#include <compare>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "broker/base/ids.h"

namespace kvbroker::client {

// Which memory a handle is, whatever descriptor names it: device and inode of
// its file. The kernel does not use an inode number of a memfd again before it
// has used four billion others.
struct MemoryIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;

  friend auto operator<=>(const MemoryIdentity&,
                          const MemoryIdentity&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const MemoryIdentity& id) {
    return H::combine(std::move(h), id.device, id.inode);
  }
};

struct MappingEvent {
  enum class Kind {
    kPool,    // a pool without any page mapped
    kMap,     // a page is about to be mapped
    kUnmap,   // a page is no longer mapped
    kClosed,  // nothing of the pool is mapped any more
  };

  Kind kind = Kind::kPool;
  absl::Time at;  // CLOCK_MONOTONIC
  uint32_t pid = 0;
  uint32_t pool = 0;     // counted from 0, in the order of the session's pools
  std::string instance;  // kPool: as the process calls itself
  PageIndex page;        // kMap, kUnmap
  // kMap: of each handle of the page whose descriptor tells.
  std::vector<MemoryIdentity> memory;
};

// {"event":"map","at":123,"pid":7,"pool":0,"page":3,"memory":["1:2af"]}, with
// the line's end. `at` is in nanoseconds, identities are hexadecimal. REQUIRES:
// `instance` is a valid name of an instance.
std::string ToJsonLine(const MappingEvent& event);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_HISTORY_MAPPING_EVENT_H_
