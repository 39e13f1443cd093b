#include "client/arena/cuda_ipc_mapper.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/current_context.h"
#include "broker/device/cuda/probe.h"

namespace kvbroker::client {

absl::StatusOr<std::unique_ptr<CudaIpcMapper>> CudaIpcMapper::Create(
    const PoolGeometry& geometry, const CudaDriver& driver,
    std::string_view gpu, std::string_view slab) {
  if (geometry.layout != Layout::kContiguous ||
      geometry.handles_per_page != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("in a slab (cuda_ipc) a page is one piece: set "
                     "KVCACHED_CONTIGUOUS_LAYOUT=true; handles of a page: ",
                     geometry.handles_per_page));
  }
  ASSIGN_OR_RETURN(SlabFrame frame, ParseSlabFrame(slab));
  ASSIGN_OR_RETURN(CudaDevice device, FindDevice(driver, gpu));
  RETURN_IF_ERROR(device.usable_by_ipc);
  ASSIGN_OR_RETURN(std::unique_ptr<CudaSlab> opened,
                   CudaSlab::Open(driver, device, frame));
  return std::unique_ptr<CudaIpcMapper>(
      new CudaIpcMapper(geometry, driver, frame, std::move(opened)));
}

CudaIpcMapper::CudaIpcMapper(const PoolGeometry& geometry,
                             const CudaDriver& driver, const SlabFrame& frame,
                             std::unique_ptr<CudaSlab> slab)
    : geometry_(geometry),
      cuda_(driver.cuda()),
      frame_(frame),
      slab_(std::move(slab)),
      leased_(geometry.max_pages),
      fence_(driver.cuda()) {}

CudaIpcMapper::~CudaIpcMapper() {
  CurrentCudaContext current(cuda_, slab_->context());
  fence_.Clear();
}

std::byte* CudaIpcMapper::region(size_t handle_of_page) const {
  KVB_CHECK(handle_of_page == 0);
  return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(slab_->base()));
}

absl::Status CudaIpcMapper::Map(PageIndex page,
                                std::vector<UniqueFd> descriptors) {
  KVB_CHECK(page.value() < geometry_.max_pages && !leased_[page.value()]);
  if (descriptors.size() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("map: a page has one handle; got ", descriptors.size()));
  }
  ASSIGN_OR_RETURN(SlabFrame lease, ReadSlabFrame(descriptors[0].get()));
  const uint64_t bytes = static_cast<uint64_t>(geometry_.page_bytes().count());
  if (std::memcmp(lease.ipc_handle, frame_.ipc_handle,
                  sizeof(lease.ipc_handle)) != 0 ||
      lease.slab_bytes != frame_.slab_bytes) {
    return absl::InvalidArgumentError("map: a lease of another slab");
  }
  if (lease.offset != page.value() * bytes || lease.size != bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("map: not the lease of page ", page.value(), ": ",
                     lease.size, " bytes from ", lease.offset, " on"));
  }
  leased_[page.value()] = true;
  return absl::OkStatus();
}

absl::Status CudaIpcMapper::Unmap(PageIndex page) {
  KVB_CHECK(leased_[page.value()]);
  CurrentCudaContext current(cuda_, slab_->context());
  RETURN_IF_ERROR(current.status());
  RETURN_IF_ERROR(fence_.Wait());
  leased_[page.value()] = false;
  return absl::OkStatus();
}

}  // namespace kvbroker::client
