// The broker's settings. Input: a YAML file up to the first zero byte, then
// values of environment variables, each after a byte that says which and ended
// by a zero byte.
#include <map>
#include <string>

#include "broker/base/check.h"
#include "broker/config/broker_config.h"
#include "broker/config/config_file.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvbroker {
namespace {

// What was read is printed so that it is read again.
void CheckPrints(const BrokerConfig& config) {
  const std::string printed = PrintConfig(config);
  BrokerConfig again;
  KVB_CHECK(ReadConfigText(printed, "printed", again).ok());
  KVB_CHECK(PrintConfig(again) == printed);
}

void Run(testing::FuzzInput input) {
  BrokerConfig config;
  const absl::Status read =
      ReadConfigText(std::string(input.TakeUntil('\0')), "file", config);
  if (read.ok()) {
    CheckPrints(config);
  } else {
    KVB_CHECK(absl::IsInvalidArgument(read));
  }

  std::map<std::string, std::string> environment;
  const std::vector<Setting>& settings = Settings();
  while (!input.empty()) {
    const Setting& setting = settings[input.Byte() % settings.size()];
    environment[EnvironmentName(setting)] = input.TakeUntil('\0');
  }
  BrokerConfig from_environment;
  const absl::Status took = ReadEnvironment(
      [&](const char* name) -> const char* {
        auto it = environment.find(name);
        return it == environment.end() ? nullptr : it->second.c_str();
      },
      from_environment);
  if (took.ok()) CheckPrints(from_environment);
  for (const char* backend : {"host", "fake"}) {
    const absl::StatusOr<Bytes> capacity =
        ResolveCapacity(from_environment, backend, GiB(80));
    if (took.ok() && capacity.ok()) {
      KVB_CHECK(*capacity > Bytes(0) && *capacity <= GiB(80));
    }
  }
}

}  // namespace
}  // namespace kvbroker

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvbroker::Run(kvbroker::testing::FuzzInput(data, size));
  return 0;
}
