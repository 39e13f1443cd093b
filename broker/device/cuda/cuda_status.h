// Where the driver's errors become statuses; nowhere else.
//
// A *sticky* error (a kernel that touched what it must not, an uncorrectable
// bit) stays: every later call of the process answers with it. Its status says
// "poisoned". Other errors say that the device is lost, for the time being at
// least. IsPoisoned() and IsDeviceLost() know both again (device_lost.h).
#ifndef KVBROKER_BROKER_DEVICE_CUDA_CUDA_STATUS_H_
#define KVBROKER_BROKER_DEVICE_CUDA_CUDA_STATUS_H_

#include <string_view>

#include "absl/status/status.h"
#include "broker/device/cuda/cuda_abi.h"
#include "broker/device/device_lost.h"

namespace kvbroker {

// `call` names the driver's function. The text has the error's name and number,
// and what to do where that is known.
//   RESOURCE_EXHAUSTED   out of memory
//   NOT_FOUND            no such device
//   FAILED_PRECONDITION  driver, library and device do not fit together
//   UNAVAILABLE          not now: the device is taken, MPS does not answer
//   PERMISSION_DENIED, UNIMPLEMENTED, INVALID_ARGUMENT  as they say
//   INTERNAL             the rest, poisoned ones too
absl::Status CudaStatus(cuda::CUresult result, std::string_view call);

absl::Status NvmlStatus(cuda::nvmlReturn_t result, std::string_view call);

// The same for a call that may have needed a descriptor: the driver has no
// error of its own for a process that is out of them. RESOURCE_EXHAUSTED with
// the limit if this process can open no further one.
absl::Status CudaStatusOfDescriptorCall(cuda::CUresult result,
                                        std::string_view call);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_CUDA_STATUS_H_
