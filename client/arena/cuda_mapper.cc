#include "client/arena/cuda_mapper.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/current_context.h"

namespace kvbroker::client {

absl::StatusOr<std::unique_ptr<CudaMapper>> CudaMapper::Create(
    const PoolGeometry& geometry, const CudaDriver& driver,
    std::string_view gpu) {
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kVmm));
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kContext));
  ASSIGN_OR_RETURN(CudaDevice device, FindDevice(driver, gpu));
  RETURN_IF_ERROR(device.usable);
  if (geometry.handle_bytes <= Bytes(0) ||
      geometry.handle_bytes.count() % device.granularity.count() != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a pool's handles must be a positive multiple of the GPU's "
        "granularity, ",
        device.granularity.count(), " bytes; they are ",
        geometry.handle_bytes.count()));
  }
  std::unique_ptr<CudaMapper> mapper(
      new CudaMapper(geometry, driver, std::move(device)));
  RETURN_IF_ERROR(mapper->Start());
  return mapper;
}

CudaMapper::CudaMapper(const PoolGeometry& geometry, const CudaDriver& driver,
                       CudaDevice device)
    : geometry_(geometry),
      cuda_(driver.cuda()),
      device_(std::move(device)),
      handles_(size_t{geometry.handles_per_page} * geometry.max_pages),
      guarded_(geometry.max_pages),
      fence_(driver.cuda()) {}

absl::Status CudaMapper::Start() {
  RETURN_IF_ERROR(
      CudaStatus(cuda_.cuDevicePrimaryCtxRetain(&context_, device_.device),
                 "cuDevicePrimaryCtxRetain"));
  CurrentCudaContext current(cuda_, context_);
  RETURN_IF_ERROR(current.status());
  absl::Status reserved =
      CudaStatus(cuda_.cuMemAddressReserve(&base_, range_bytes(), 0, 0, 0),
                 "cuMemAddressReserve");
  if (reserved.code() == absl::StatusCode::kResourceExhausted) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no range of addresses is left for ",
                     FormatBytes(geometry_.page_bytes() * geometry_.max_pages),
                     ": ", reserved.message()));
  }
  RETURN_IF_ERROR(reserved);
  // The driver outlives every mapper, and what they leave behind. At the end of
  // a process it may be gone already: it answers so, and that is fine.
  range_ = std::shared_ptr<void>(
      reinterpret_cast<void*>(static_cast<uintptr_t>(base_)),
      [&cuda = cuda_, device = device_.device, context = context_, base = base_,
       bytes = range_bytes()](void*) {
        {
          CurrentCudaContext current(cuda, context);
          if (current.status().ok()) cuda.cuMemAddressFree(base, bytes);
        }
        cuda.cuDevicePrimaryCtxRelease(device);
      });
  return absl::OkStatus();
}

CudaMapper::~CudaMapper() {
  if (context_ == nullptr) return;
  {
    CurrentCudaContext current(cuda_, context_);
    DropGuard();
    for (uint32_t page = 0; page < geometry_.max_pages; ++page) {
      RollBack(PageIndex(page), geometry_.handles_per_page);
    }
    fence_.Clear();
  }
  if (range_ == nullptr) cuda_.cuDevicePrimaryCtxRelease(device_.device);
}

std::byte* CudaMapper::region(size_t handle_of_page) const {
  return reinterpret_cast<std::byte*>(
      static_cast<uintptr_t>(AddressOf(PageIndex(0), handle_of_page)));
}

cuda::CUdeviceptr CudaMapper::AddressOf(PageIndex page, size_t handle) const {
  return base_ + (handle * geometry_.max_pages + page.value()) * handle_bytes();
}

absl::Status CudaMapper::Map(PageIndex page,
                             std::vector<UniqueFd> descriptors) {
  KVB_CHECK(page.value() < geometry_.max_pages);
  if (descriptors.size() != geometry_.handles_per_page) {
    return absl::InvalidArgumentError(
        absl::StrCat("map: a page has ", geometry_.handles_per_page,
                     " handles; got ", descriptors.size()));
  }
  CurrentCudaContext current(cuda_, context_);
  RETURN_IF_ERROR(current.status());
  // They may touch the guard, which is about to go.
  if (guard_) RETURN_IF_ERROR(fence_.Wait());
  for (size_t i = 0; i < descriptors.size(); ++i) {
    absl::Status mapped = MapHandle(page, i, descriptors[i].get());
    // The import is a reference of its own, and descriptors are scarce.
    descriptors[i].Reset();
    if (!mapped.ok()) {
      RollBack(page, i + 1);
      return mapped;
    }
  }
  return absl::OkStatus();
}

absl::Status CudaMapper::MapHandle(PageIndex page, size_t handle,
                                   int descriptor) {
  MappedHandle& mine = at(page, handle);
  // What an earlier call could not undo.
  if (mine.mapped) RETURN_IF_ERROR(UnmapHandle(page, handle));
  if (mine.imported) RETURN_IF_ERROR(ReleaseHandle(page, handle));
  RETURN_IF_ERROR(CudaStatusOfDescriptorCall(
      cuda_.cuMemImportFromShareableHandle(
          &mine.import,
          reinterpret_cast<void*>(static_cast<intptr_t>(descriptor)),
          cuda::kHandlePosixDescriptor),
      "cuMemImportFromShareableHandle"));
  mine.imported = true;
  RETURN_IF_ERROR(UnmapGuard(page));
  return MapImport(page, handle);
}

absl::Status CudaMapper::MapImport(PageIndex page, size_t handle) {
  MappedHandle& mine = at(page, handle);
  const cuda::CUdeviceptr address = AddressOf(page, handle);
  RETURN_IF_ERROR(CudaStatusOfDescriptorCall(
      cuda_.cuMemMap(address, handle_bytes(), 0, mine.import, 0), "cuMemMap"));
  mine.mapped = true;
  return OpenToAccess(address);
}

absl::Status CudaMapper::OpenToAccess(cuda::CUdeviceptr address) {
  const cuda::CUmemAccessDesc access = {
      .location = {.type = cuda::kLocationDevice, .id = device_.device},
      .flags = cuda::kAccessReadWrite};
  return CudaStatus(cuda_.cuMemSetAccess(address, handle_bytes(), &access, 1),
                    "cuMemSetAccess");
}

absl::Status CudaMapper::Guard() {
  RETURN_IF_ERROR(CheckGuardLayout(geometry_));
  CurrentCudaContext current(cuda_, context_);
  RETURN_IF_ERROR(current.status());
  const cuda::CUmemAllocationProp prop = AllocationProp(device_);
  cuda::CUmemGenericAllocationHandle made = 0;
  RETURN_IF_ERROR(CudaStatusOfDescriptorCall(
      cuda_.cuMemCreate(&made, handle_bytes(), &prop, 0), "cuMemCreate"));
  guard_ = made;
  for (uint32_t page = 0; page < geometry_.max_pages; ++page) {
    absl::Status mapped = MapGuard(PageIndex(page));
    if (mapped.ok()) continue;
    DropGuard();
    return mapped;
  }
  return absl::OkStatus();
}

absl::Status CudaMapper::MapGuard(PageIndex page) {
  if (!guard_ || guarded_[page.value()]) return absl::OkStatus();
  const cuda::CUdeviceptr address = AddressOf(page, 0);
  RETURN_IF_ERROR(CudaStatusOfDescriptorCall(
      cuda_.cuMemMap(address, handle_bytes(), 0, *guard_, 0), "cuMemMap"));
  guarded_[page.value()] = true;
  absl::Status open = OpenToAccess(address);
  if (!open.ok()) UnmapGuard(page).IgnoreError();
  return open;
}

absl::Status CudaMapper::UnmapGuard(PageIndex page) {
  if (!guarded_[page.value()]) return absl::OkStatus();
  RETURN_IF_ERROR(CudaStatus(
      cuda_.cuMemUnmap(AddressOf(page, 0), handle_bytes()), "cuMemUnmap"));
  guarded_[page.value()] = false;
  return absl::OkStatus();
}

void CudaMapper::DropGuard() {
  if (!guard_) return;
  for (uint32_t page = 0; page < geometry_.max_pages; ++page) {
    UnmapGuard(PageIndex(page)).IgnoreError();
  }
  cuda_.cuMemRelease(*guard_);
  guard_.reset();
}

absl::Status CudaMapper::UnmapHandle(PageIndex page, size_t handle) {
  MappedHandle& mine = at(page, handle);
  if (!mine.mapped) return absl::OkStatus();
  RETURN_IF_ERROR(CudaStatus(
      cuda_.cuMemUnmap(AddressOf(page, handle), handle_bytes()), "cuMemUnmap"));
  mine.mapped = false;
  return absl::OkStatus();
}

absl::Status CudaMapper::ReleaseHandle(PageIndex page, size_t handle) {
  MappedHandle& mine = at(page, handle);
  if (!mine.imported) return absl::OkStatus();
  RETURN_IF_ERROR(CudaStatus(cuda_.cuMemRelease(mine.import), "cuMemRelease"));
  mine.imported = false;
  return absl::OkStatus();
}

void CudaMapper::RollBack(PageIndex page, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (UnmapHandle(page, i).ok()) ReleaseHandle(page, i).IgnoreError();
  }
  if (!at(page, 0).mapped) MapGuard(page).IgnoreError();
}

absl::Status CudaMapper::Unmap(PageIndex page) {
  CurrentCudaContext current(cuda_, context_);
  RETURN_IF_ERROR(current.status());
  RETURN_IF_ERROR(fence_.Wait());
  for (size_t i = 0; i < geometry_.handles_per_page; ++i) {
    absl::Status unmapped = UnmapHandle(page, i);
    if (unmapped.ok()) continue;
    for (size_t undo = 0; undo < i; ++undo) {
      absl::Status mapped = MapImport(page, undo);
      if (!mapped.ok()) return mapped;
    }
    return unmapped;
  }
  if (absl::Status guarded = MapGuard(page); !guarded.ok()) {
    if (at(page, 0).imported) RETURN_IF_ERROR(MapImport(page, 0));
    return guarded;
  }
  absl::Status first;
  for (size_t i = 0; i < geometry_.handles_per_page; ++i) {
    first.Update(ReleaseHandle(page, i));
  }
  if (first.ok() || IsPoisoned(first)) return first;
  return absl::InternalError(absl::StrCat(
      "the page is unmapped, but its memory is still held: ", first.message()));
}

}  // namespace kvbroker::client
