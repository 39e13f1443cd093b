#include "client/arena/cuda_slab.h"

#include <cstring>
#include <map>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "broker/base/mutex.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/current_context.h"

namespace kvbroker::client {
namespace {

struct OpenSlab {
  cuda::CUdeviceptr base = 0;
  int users = 0;
};

// What this process has open, by its handle. The lock is held over the driver's
// calls: who comes second must find what the first has opened, or closed.
struct OpenSlabs {
  Mutex mu;
  std::map<std::string, OpenSlab> slabs ABSL_GUARDED_BY(mu);
};

OpenSlabs& AllOpen() {
  static OpenSlabs& slabs = *new OpenSlabs;
  return slabs;
}

}  // namespace

CudaSlab::CudaSlab(const CudaFunctions& cuda, cuda::CUdevice device,
                   cuda::CUcontext context)
    : cuda_(cuda), device_(device), context_(context) {}

absl::StatusOr<std::unique_ptr<CudaSlab>> CudaSlab::Open(
    const CudaDriver& driver, const CudaDevice& device, const SlabFrame& slab) {
  const CudaFunctions& cuda = driver.cuda();
  cuda::CUcontext context = nullptr;
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuDevicePrimaryCtxRetain(&context, device.device),
                 "cuDevicePrimaryCtxRetain"));
  std::unique_ptr<CudaSlab> opened(new CudaSlab(cuda, device.device, context));
  const std::string key(reinterpret_cast<const char*>(slab.ipc_handle),
                        sizeof(slab.ipc_handle));
  OpenSlabs& all = AllOpen();
  MutexLock lock(&all.mu);
  OpenSlab& mine = all.slabs[key];
  if (mine.users == 0) {
    CurrentCudaContext current(cuda, context);
    cuda::CUipcMemHandle handle;
    static_assert(sizeof(handle.reserved) == sizeof(slab.ipc_handle));
    std::memcpy(handle.reserved, slab.ipc_handle, sizeof(handle.reserved));
    absl::Status status = current.status();
    if (status.ok()) {
      status = CudaStatus(
          cuda.cuIpcOpenMemHandle(&mine.base, handle, cuda::kIpcLazyPeerAccess),
          "cuIpcOpenMemHandle");
    }
    if (!status.ok()) {
      all.slabs.erase(key);
      return absl::Status(status.code(),
                          absl::StrCat("the broker's memory cannot be opened: ",
                                       status.message()));
    }
  }
  ++mine.users;
  opened->base_ = mine.base;
  opened->key_ = key;
  return opened;
}

CudaSlab::~CudaSlab() {
  if (!key_.empty()) {
    OpenSlabs& all = AllOpen();
    MutexLock lock(&all.mu);
    auto mine = all.slabs.find(key_);
    if (--mine->second.users == 0) {
      CurrentCudaContext current(cuda_, context_);
      cuda_.cuIpcCloseMemHandle(base_);
      all.slabs.erase(mine);
    }
  }
  cuda_.cuDevicePrimaryCtxRelease(device_);
}

}  // namespace kvbroker::client
