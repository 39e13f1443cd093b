// What the core shows of itself: plain structs for kvctl, metrics and tests.
// types.proto explains the fields.
#ifndef KVBROKER_BROKER_CORE_STATUS_H_
#define KVBROKER_BROKER_CORE_STATUS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/ids.h"

namespace kvbroker {

struct InstanceStatus {
  std::string name;
  std::string tenant;
  std::vector<uint32_t> pids;
  Bytes min;
  Bytes max;  // as asked for, to the byte
  Bytes effective_limit;
  double weight = 1;
  Bytes share;
  Bytes held, in_use, cached, idle, waiting;
  std::string pressure;  // none, waiting, reclaiming, draining, ignoring
  std::map<std::string, std::string> labels;
  uint64_t grants = 0, refusals = 0, reclaims = 0, preempts = 0;
};

struct BrokerStatus {
  std::string backend;
  std::string device_uuid;
  uint64_t incarnation = 0;
  Bytes total, capacity, held, stock;
  // Of the capacity, not lent at present: others use the device, too. `foreign`:
  // what they use; `declared`: what engines will need besides pages.
  Bytes others, foreign, declared;
  uint32_t sessions = 0;
  absl::Duration uptime;
  bool draining = false;
  std::string device_error;  // why the device cannot be used, or empty
};

struct CoreSnapshot {
  BrokerStatus broker;
  std::vector<InstanceStatus> instances;  // by tenant, then name
};

struct ClaimStatus {
  Sequence sequence;
  PoolId pool;
  PageCount want = 0;
  PageCount at_least = 0;
  Bytes page_bytes;
  absl::Duration waiting;
  std::string state;  // queued, reclaiming-idle, -cached, closing, preempting
};

struct Explanation {
  InstanceStatus instance;
  std::vector<std::string> lines;
  std::vector<ClaimStatus> claims;
};

// Which instance an operator means. An empty tenant is the only one that has
// the name; several: FAILED_PRECONDITION that lists them.
struct InstanceSelector {
  std::string name;
  std::string tenant;
};

// A change of limits; absent fields stay as they are.
struct PolicyChange {
  std::optional<Bytes> min;
  std::optional<Bytes> max;
  std::optional<double> max_percent;  // of this GPU, instead of `max`
  std::optional<double> weight;
  bool preset = false;  // also for a name that does not exist yet
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_STATUS_H_
