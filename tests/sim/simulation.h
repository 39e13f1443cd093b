// Simulation: engines, client library and broker core in one thread and in
// virtual time. Only the sockets, the mappings and the clock are stand-ins; what
// decides is the real code. Twenty minutes of traffic take seconds, and the same
// input gives the same result on any machine.
#ifndef KVBROKER_TESTS_SIM_SIMULATION_H_
#define KVBROKER_TESTS_SIM_SIMULATION_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "broker/base/bytes.h"
#include "broker/policy/policy_config.h"
#include "client/replay/tokens_in_flight.h"
#include "client/replay/trace.h"

namespace kvbroker::testing {

struct SimulatedEngine {
  std::string name;
  replay::Trace trace;
  std::optional<Bytes> min;
  std::optional<double> weight;
  // Unset: on the broker. Set: a fixed share, as a plain engine.
  std::optional<Bytes> static_share;
};

struct SimulationOptions {
  std::vector<SimulatedEngine> engines;
  Bytes capacity;
  Bytes page_bytes = KiB(256);
  Bytes block_bytes = KiB(4);
  replay::EngineSpeed speed;
  // Trace seconds; engines that are not done by then are cut off.
  double until_s = 1200;
  PolicyConfig policy;  // in trace time
  // Print the broker's log.
  bool log = false;
};

struct EngineResult {
  std::string name;
  int64_t requests = 0;  // admitted
  double wait_mean_ms = 0;
  double wait_p99_ms = 0;
  double wait_max_ms = 0;
  int64_t preemptions = 0;
};

// Nothing leaks, or the run fails a CHECK.
std::vector<EngineResult> Simulate(const SimulationOptions& options);

}  // namespace kvbroker::testing

#endif  // KVBROKER_TESTS_SIM_SIMULATION_H_
