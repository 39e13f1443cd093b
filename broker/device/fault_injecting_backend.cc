#include "broker/device/fault_injecting_backend.h"

#include <utility>

#include "broker/base/check.h"
#include "broker/base/status_macros.h"

namespace kvbroker {

FaultInjectingBackend::FaultInjectingBackend(Backend& behind, uint64_t seed)
    : behind_(behind), random_(seed) {}

void FaultInjectingBackend::SetPlan(Call call, FaultPlan plan) {
  KVB_CHECK(!plan.status.ok());
  MutexLock lock(&mu_);
  ScriptOf(call) = Script{.plan = std::move(plan)};
}

int64_t FaultInjectingBackend::calls(Call call) {
  MutexLock lock(&mu_);
  return ScriptOf(call).calls;
}

int64_t FaultInjectingBackend::faults(Call call) {
  MutexLock lock(&mu_);
  return ScriptOf(call).faults;
}

absl::StatusOr<Handle> FaultInjectingBackend::Create(Bytes size) {
  RETURN_IF_ERROR(Next(Call::kCreate));
  return behind_.Create(size);
}

absl::StatusOr<Handle> FaultInjectingBackend::CreateAt(Bytes offset,
                                                       Bytes size) {
  RETURN_IF_ERROR(Next(Call::kCreate));
  return behind_.CreateAt(offset, size);
}

absl::StatusOr<UniqueFd> FaultInjectingBackend::Export(const Handle& handle) {
  RETURN_IF_ERROR(Next(Call::kExport));
  return behind_.Export(handle);
}

absl::StatusOr<Bytes> FaultInjectingBackend::UsedBytes() {
  RETURN_IF_ERROR(Next(Call::kUsedBytes));
  return behind_.UsedBytes();
}

void FaultInjectingBackend::Release(uint64_t token) { KVB_CHECK(false); }

absl::Status FaultInjectingBackend::Next(Call call) {
  MutexLock lock(&mu_);
  Script& script = ScriptOf(call);
  ++script.calls;
  // Drawn even where it does not count, so that adding a call to `calls` leaves
  // the other faults where they were.
  const bool drawn =
      std::bernoulli_distribution(script.plan.probability)(random_);
  if (!drawn && !script.plan.calls.contains(script.calls)) {
    return absl::OkStatus();
  }
  ++script.faults;
  return script.plan.status;
}

}  // namespace kvbroker
