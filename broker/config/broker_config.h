// BrokerConfig: everything an operator may set of a broker.
//
// Each setting is one key with one way to read and write its value, whatever it
// comes from:
//
//   in the YAML file       policy:
//                            reclaim_patience: 500ms
//   in the environment     KVBROKERD_POLICY_RECLAIM_PATIENCE=500ms
//   on the command line    --policy-reclaim-patience 500ms
//
// Flags win over the environment, that over the file, that over the defaults.
// The file is read by config_file.h, flags by command_line.h.
#ifndef KVBROKER_BROKER_CONFIG_BROKER_CONFIG_H_
#define KVBROKER_BROKER_CONFIG_BROKER_CONFIG_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/policy/policy_config.h"

namespace kvbroker {

// How much of the device may be lent.
struct CapacityWish {
  // At most one of them; none is `auto`.
  std::optional<Bytes> bytes;
  std::optional<double> percent;
};

// What one user may have of what costs the broker memory or descriptors.
struct Quotas {
  uint32_t connections = 1024;  // of a uid
  uint32_t half_open = 64;      // of a uid
  uint32_t sessions = 256;      // of a uid
  uint32_t instances = 256;     // of a tenant
};

struct BrokerConfig {
  std::string backend = "auto";
  std::string gpu;          // index or uuid; empty: the only one
  std::string device_uuid;  // instead of the machine's own, for `host`
  CapacityWish capacity;
  Bytes headroom = GiB(2);
  std::string charge = "broker";
  std::string socket_dir;  // empty: /run/kvbroker for root, else the user's own
  std::string socket_group;  // name or number; empty: none
  std::vector<uint32_t> allow_uids;
  std::string tenant_by = "uid_pidns";
  std::string lock_dir;  // empty: where all users of the machine look
  // empty: /var/lib/kvbroker for root, else the user's own; "none": none
  std::string state_dir;
  absl::Duration resume_grace = absl::Seconds(5);
  PolicyConfig policy;
  Quotas quotas;
  std::string log_level = "info";
  std::string log_file;      // besides stderr; empty: none
  std::string history_file;  // empty: none
  absl::Duration idle_exit = absl::InfiniteDuration();
};

struct Setting {
  const char* key;      // "policy.reclaim_patience"
  const char* allowed;  // "a duration such as 500ms or 2s"
  const char* meaning;  // one line for --help
  // InvalidArgument without text: the value is not what `allowed` says.
  std::function<absl::Status(const std::string& value, BrokerConfig& config)>
      read;
  // The value as `read` takes it; empty: as unset.
  std::function<std::string(const BrokerConfig& config)> write;
};

// In the order of --help and --print-config.
const std::vector<Setting>& Settings();

// Null where there is no such key.
const Setting* FindSetting(std::string_view key);

// "; did you mean X?" for a key much like a known one, else the list of them.
std::string SuggestKey(std::string_view unknown,
                       const std::vector<std::string>& known);

// Reads one value. `where` begins the error: "config.yaml line 3: ".
absl::Status ReadSetting(const Setting& setting, const std::string& value,
                         std::string_view where, BrokerConfig& config);

// KVBROKERD_POLICY_RECLAIM_PATIENCE, and what of the environment is set.
std::string EnvironmentName(const Setting& setting);
absl::Status ReadEnvironment(
    const std::function<const char*(const char*)>& lookup,
    BrokerConfig& config);

// As a YAML file that reads back to the same.
std::string PrintConfig(const BrokerConfig& config);

// The size of the slab of a GPU with `total`, of which `used` are in use as the
// broker starts. `auto` is what headroom leaves of the rest. InvalidArgument
// names the key.
absl::StatusOr<Bytes> ResolveSlab(const BrokerConfig& config, Bytes total,
                                  Bytes used);

// The bytes that may be lent of a device with `total`. `auto` is total less
// headroom; the host backend's total has room beside it already (by default it
// is half the machine). InvalidArgument names the key.
absl::StatusOr<Bytes> ResolveCapacity(const BrokerConfig& config,
                                      std::string_view backend, Bytes total);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CONFIG_BROKER_CONFIG_H_
