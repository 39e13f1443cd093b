// bench_broker: kvbrokerd on a device that costs nothing: all of its handles
// are one and the same file of 4 KiB, so that there may be more of them than a
// process may have open files.
//
//   bench_broker SOCKET_DIR CAPACITY_BYTES
//
// Says "ready" on stdout and runs until it is killed.
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/synchronization/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/config/broker_config.h"
#include "broker/device/backend.h"
#include "broker/server/composition.h"

namespace kvbroker {
namespace {

class OneFileBackend : public Backend {
 public:
  OneFileBackend(Bytes total, UniqueFd file)
      : info_({.name = "one-file",
               .device_uuid = "BENCH-0",
               .total = total,
               .granularity = KiB(4)}),
        file_(std::move(file)) {}

  const BackendInfo& info() const override { return info_; }
  absl::StatusOr<Handle> Create(Bytes size) override {
    return Handle(this, 0, size);
  }
  absl::StatusOr<UniqueFd> Export(const Handle&) override {
    return file_.Duplicate();
  }
  absl::StatusOr<Bytes> UsedBytes() override { return Bytes(0); }

 private:
  void Release(uint64_t) override {}

  const BackendInfo info_;
  const UniqueFd file_;
};

int Run(const std::string& directory, const std::string& capacity) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::signal(SIGPIPE, SIG_IGN);
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  int64_t bytes;
  if (!absl::SimpleAtoi(capacity, &bytes)) return 2;
  UniqueFd file(memfd_create("bench", MFD_CLOEXEC));
  if (!file || ftruncate(file.get(), KiB(4).count()) != 0) return 1;

  BrokerConfig config;
  config.socket_dir = config.lock_dir = directory;
  config.state_dir = "none";
  config.capacity.bytes = Bytes(bytes);
  BrokerOptions options;
  options.backend =
      std::make_unique<OneFileBackend>(Bytes(bytes), std::move(file));
  absl::StatusOr<std::unique_ptr<RunningBroker>> broker =
      RunningBroker::Start(config, std::move(options));
  if (!broker.ok()) {
    fprintf(stderr, "bench_broker: %s\n", broker.status().ToString().c_str());
    return 1;
  }
  printf("ready\n");
  fflush(stdout);
  for (;;) pause();
}

}  // namespace
}  // namespace kvbroker

int main(int argc, char** argv) {
  if (argc == 3) return kvbroker::Run(argv[1], argv[2]);
  fprintf(stderr, "usage: bench_broker SOCKET_DIR CAPACITY_BYTES\n");
  return 2;
}
