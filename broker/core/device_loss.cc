// Core: a device that does not work any more.
//
// A call on it that says so (IsDeviceLost) ends all claims at once: waiting
// would help nobody, and asking others for pages would hurt them for nothing.
// What is lent stays lent; its holders know best what it is worth. Whether the
// device works again is tried now and then, with an allocation of its least
// size.
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/core/core.h"
#include "broker/device/device_lost.h"

namespace kvbroker {
namespace {

constexpr absl::Duration kProbeEvery = absl::Seconds(1);

}  // namespace

absl::Status Core::device_status() {
  MutexLock lock(&mu_);
  return device_error_;
}

void Core::LoseDevice(const absl::Status& error, Actions& actions) {
  if (!device_error_.ok()) return;
  device_error_ = absl::UnavailableError(absl::StrCat(
      "the device ", options_.backend->info().device_uuid,
      " does not work: ", error.message(),
      "; nothing is lent until it does again, which is tried every ",
      absl::FormatDuration(kProbeEvery),
      ". See the kernel's log (dmesg); a GPU that stays so has to be reset, "
      "and "
      "the broker and its engines restarted"));
  lost_at_ = Now();
  probe_at_ = Now() + kProbeEvery;
  actions.log.push_back(absl::StrCat("device-lost error=\"",
                                     device_error_.message(),
                                     "\" claims=", claims_.size()));
  actions.device_changed = true;
  while (!claims_.empty()) {
    const Claim claim = std::move(claims_.front());
    claims_.pop_front();
    RefuseLost(claim, actions);
  }
  ReleaseStock(actions);
}

void Core::RefuseLost(const Claim& claim, Actions& actions) {
  Refuse(claim, device_error_.code(), std::string(device_error_.message()),
         actions);
}

void Core::ProbeIfDue() {
  {
    MutexLock lock(&mu_);
    if (Now() < probe_at_) return;
    probe_at_ = absl::InfiniteFuture();
  }
  if (options_.executor) {
    options_.executor([this] { Probe(); });
  } else {
    Probe();
  }
}

void Core::Probe() {
  // In a slab there is no place that is nobody's to try with.
  absl::Status works =
      fixed_addresses_
          ? absl::OkStatus()
          : options_.backend->Create(options_.backend->info().granularity)
                .status();
  // One that is full works.
  if (absl::IsResourceExhausted(works)) works = absl::OkStatus();
  if (works.ok()) works = options_.backend->UsedBytes().status();
  Actions actions;
  {
    MutexLock lock(&mu_);
    if (!works.ok()) {
      probe_at_ = Now() + kProbeEvery;
    } else {
      device_error_ = absl::OkStatus();
      actions.log.push_back(
          absl::StrCat("device-back after_ms=",
                       absl::ToInt64Milliseconds(Now() - lost_at_)));
      actions.device_changed = true;
      for (auto& [id, session] : sessions_) PumpDescriptors(session, actions);
      MeasureSoon(absl::ZeroDuration());
      Arbitrate(actions);
    }
  }
  Run(std::move(actions));
}

}  // namespace kvbroker
