// What the core remembers over a restart of the broker. The server keeps it in
// a file (broker/state).
#ifndef KVBROKER_BROKER_CORE_REMEMBERED_H_
#define KVBROKER_BROKER_CORE_REMEMBERED_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/core/peer.h"

namespace kvbroker {

// An operator's limits of an instance.
struct RememberedLimits {
  std::string tenant;
  std::string name;
  Bytes min;
  Bytes max;
  double weight = 1;
  uint64_t revision = 1;
  // Since its last process went; 0 while there is one.
  absl::Duration unused_for;
};

// An engine that was connected, and may come back with the pages it maps.
struct RememberedSession {
  Peer peer;
  std::string instance;
  std::string member;
  uint32_t rank = 0;
};

struct Remembered {
  std::vector<RememberedLimits> limits;
  std::vector<RememberedSession> sessions;
  // The record is missing or was unreadable: any process may come back within
  // the grace, and `hold` says whether claims wait that long.
  bool incomplete = false;
  bool hold = false;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_REMEMBERED_H_
