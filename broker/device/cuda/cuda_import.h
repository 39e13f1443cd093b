// CudaImport: imports and maps a whole handle by the driver's own calls, as an
// importing process would. For tests of the backend; the client library has a
// mapper of its own.
#ifndef KVBROKER_BROKER_DEVICE_CUDA_CUDA_IMPORT_H_
#define KVBROKER_BROKER_DEVICE_CUDA_CUDA_IMPORT_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/current_context.h"
#include "broker/device/cuda/driver.h"

namespace kvbroker {

class CudaImport {
 public:
  // `context` is made current for each call; `fd` stays the caller's.
  static absl::StatusOr<std::unique_ptr<CudaImport>> Create(
      const CudaFunctions& cuda, cuda::CUcontext context, int device, int fd,
      Bytes size) {
    std::unique_ptr<CudaImport> import(
        new CudaImport(cuda, context, static_cast<size_t>(size.count())));
    RETURN_IF_ERROR(import->Start(device, fd));
    return import;
  }

  CudaImport(const CudaImport&) = delete;
  CudaImport& operator=(const CudaImport&) = delete;
  ~CudaImport() {
    CurrentCudaContext current(cuda_, context_);
    if (mapped_) cuda_.cuMemUnmap(address_, size_);
    if (address_ != 0) cuda_.cuMemAddressFree(address_, size_);
    if (imported_) cuda_.cuMemRelease(handle_);
  }

  cuda::CUdeviceptr address() const { return address_; }

  absl::Status Write(const void* from, size_t size) {
    CurrentCudaContext current(cuda_, context_);
    return CudaStatus(cuda_.cuMemcpyHtoD(address_, from, size), "cuMemcpyHtoD");
  }
  absl::Status Read(void* to, size_t size) {
    CurrentCudaContext current(cuda_, context_);
    return CudaStatus(cuda_.cuMemcpyDtoH(to, address_, size), "cuMemcpyDtoH");
  }

 private:
  CudaImport(const CudaFunctions& cuda, cuda::CUcontext context, size_t size)
      : cuda_(cuda), context_(context), size_(size) {}

  absl::Status Start(int device, int fd) {
    CurrentCudaContext current(cuda_, context_);
    RETURN_IF_ERROR(CudaStatus(
        cuda_.cuMemImportFromShareableHandle(
            &handle_, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
            cuda::kHandlePosixDescriptor),
        "cuMemImportFromShareableHandle"));
    imported_ = true;
    RETURN_IF_ERROR(
        CudaStatus(cuda_.cuMemAddressReserve(&address_, size_, 0, 0, 0),
                   "cuMemAddressReserve"));
    RETURN_IF_ERROR(
        CudaStatus(cuda_.cuMemMap(address_, size_, 0, handle_, 0), "cuMemMap"));
    mapped_ = true;
    const cuda::CUmemAccessDesc access = {
        .location = {.type = cuda::kLocationDevice, .id = device},
        .flags = cuda::kAccessReadWrite};
    return CudaStatus(cuda_.cuMemSetAccess(address_, size_, &access, 1),
                      "cuMemSetAccess");
  }

  const CudaFunctions& cuda_;
  const cuda::CUcontext context_;
  const size_t size_;
  cuda::CUmemGenericAllocationHandle handle_ = 0;
  cuda::CUdeviceptr address_ = 0;
  bool imported_ = false, mapped_ = false;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_CUDA_CUDA_IMPORT_H_
