// HostMemory: the kernel's own figures of the machine's memory.
#ifndef KVBROKER_BROKER_DEVICE_HOST_MEMORY_H_
#define KVBROKER_BROKER_DEVICE_HOST_MEMORY_H_

#include <string_view>

#include "absl/status/statusor.h"
#include "broker/base/bytes.h"

namespace kvbroker {

struct HostMemory {
  Bytes total;
  Bytes available;  // can be had without swapping: free plus what is evictable
  Bytes shared;     // tmpfs and memfd pages of all processes
};

// Reads the text of /proc/meminfo. InvalidArgument names the missing field.
absl::StatusOr<HostMemory> ParseMeminfo(std::string_view text);

// The figures of now; about 10 us.
absl::StatusOr<HostMemory> ReadHostMemory();

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_HOST_MEMORY_H_
