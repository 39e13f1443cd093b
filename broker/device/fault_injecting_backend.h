// FaultInjectingBackend: a backend whose calls fail when a test says so.
//
// It stands before any other backend and hands every call on, except those that
// a FaultPlan lets fail. A failing call never reaches the backend behind it, so
// nothing is held then. Dropping a handle cannot fail.
//
//   FakeBackend device;
//   FaultInjectingBackend backend(device, /*seed=*/42);
//   backend.SetPlan(FaultInjectingBackend::Call::kCreate,
//                   {.calls = {3}, .status =
//                   absl::ResourceExhaustedError("x")});
//
// The same seed and the same order of calls give the same faults.
// Ownership: the backend behind it is borrowed; handles are that backend's own.
// Threads: safe.
#ifndef KVBROKER_BROKER_DEVICE_FAULT_INJECTING_BACKEND_H_
#define KVBROKER_BROKER_DEVICE_FAULT_INJECTING_BACKEND_H_

#include <array>
#include <cstdint>
#include <random>
#include <set>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/device/backend.h"

namespace kvbroker {

// Which calls of one kind fail, and how.
struct FaultPlan {
  // Each call fails with this probability, 0 to 1.
  double probability = 0;
  // These fail for certain; 1 is the first call after SetPlan().
  std::set<int64_t> calls;
  absl::Status status = absl::ResourceExhaustedError("injected fault");
};

class FaultInjectingBackend : public Backend {
 public:
  enum class Call { kCreate, kExport, kUsedBytes };

  // `behind` outlives this and all handles.
  FaultInjectingBackend(Backend& behind, uint64_t seed);

  // Replaces the plan for `call` and counts its calls and faults from 0 again.
  // An empty plan ends the faults. REQUIRES: !plan.status.ok().
  void SetPlan(Call call, FaultPlan plan);

  // Since SetPlan(), or the beginning: calls made, and how many of them failed
  // by plan.
  int64_t calls(Call call);
  int64_t faults(Call call);

  const BackendInfo& info() const override { return behind_.info(); }
  absl::StatusOr<Handle> Create(Bytes size) override;
  // Counts as kCreate.
  absl::StatusOr<Handle> CreateAt(Bytes offset, Bytes size) override;
  absl::StatusOr<UniqueFd> Export(const Handle& handle) override;
  absl::StatusOr<Bytes> UsedBytes() override;
  absl::StatusOr<std::map<uint32_t, Bytes>> UsedByProcess() override {
    return behind_.UsedByProcess();
  }
  void Prepare(const Handle& handle) override { behind_.Prepare(handle); }
  void SetInUse(bool in_use) override { behind_.SetInUse(in_use); }

 private:
  struct Script {
    FaultPlan plan;
    int64_t calls = 0;
    int64_t faults = 0;
  };

  // Never called: no handle names this backend.
  void Release(uint64_t token) override;

  // Counts one call; the plan's status when it is to fail.
  absl::Status Next(Call call);
  Script& ScriptOf(Call call) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return scripts_[static_cast<size_t>(call)];
  }

  Backend& behind_;

  Mutex mu_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  std::array<Script, 3> scripts_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_FAULT_INJECTING_BACKEND_H_
