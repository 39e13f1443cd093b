// What a driver's error says of the device, beyond its code: nothing, that the
// device is lost, or that this process cannot use it any more.
//
//   lost      no call on the device works: it fell off the bus, its driver is
//             gone, somebody has it for himself. It may work again.
//   poisoned  the same for this process, until it ends: a kernel touched what
//   it
//             must not, an uncorrectable bit. Other processes may go on.
//
// It travels with the status, unseen by who does not ask. Set where the
// driver's errors become statuses, and by tests.
#ifndef KVBROKER_BROKER_DEVICE_DEVICE_LOST_H_
#define KVBROKER_BROKER_DEVICE_DEVICE_LOST_H_

#include "absl/status/status.h"
#include "absl/strings/cord.h"

namespace kvbroker {

inline constexpr char kDeviceLostUrl[] = "kvbroker/device_lost";
inline constexpr char kPoisonedUrl[] = "kvbroker/cuda_poisoned";

inline absl::Status MarkDeviceLost(absl::Status status) {
  status.SetPayload(kDeviceLostUrl, absl::Cord());
  return status;
}

inline absl::Status MarkPoisoned(absl::Status status) {
  status.SetPayload(kPoisonedUrl, absl::Cord());
  return status;
}

inline bool IsPoisoned(const absl::Status& status) {
  return status.GetPayload(kPoisonedUrl).has_value();
}

// Poisoned or not.
inline bool IsDeviceLost(const absl::Status& status) {
  return IsPoisoned(status) || status.GetPayload(kDeviceLostUrl).has_value();
}

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_DEVICE_LOST_H_
