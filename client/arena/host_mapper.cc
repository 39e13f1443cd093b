#include "client/arena/host_mapper.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"

namespace kvbroker::client {
namespace {

// Addresses that fault and cost nothing. `place` says where: 0 for anywhere.
void* Reserve(void* at, size_t bytes, int place = MAP_FIXED) {
  return mmap(at, bytes, PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | place, -1, 0);
}

}  // namespace

absl::StatusOr<std::unique_ptr<HostMapper>> HostMapper::Create(
    const PoolGeometry& geometry) {
  Bytes total = geometry.page_bytes() * geometry.max_pages;
  void* base = Reserve(nullptr, static_cast<size_t>(total.count()), 0);
  if (base == MAP_FAILED) {
    return ErrnoToStatus(
        errno, absl::StrCat("reserving ", FormatBytes(total), " of addresses"));
  }
  std::shared_ptr<void> range(base, [total](void* start) {
    munmap(start, static_cast<size_t>(total.count()));
  });
  return std::unique_ptr<HostMapper>(
      new HostMapper(geometry, std::move(range)));
}

HostMapper::HostMapper(const PoolGeometry& geometry,
                       std::shared_ptr<void> range)
    : geometry_(geometry),
      range_(std::move(range)),
      base_(static_cast<std::byte*>(range_.get())),
      work_(geometry.max_pages) {}

HostMapper::~HostMapper() {
  if (range_.use_count() == 1) return;
  // Somebody keeps the addresses: with nobody's memory behind them, all pages
  // go. Where even that is refused, they fault.
  const size_t total = static_cast<size_t>(
      (geometry_.page_bytes() * geometry_.max_pages).count());
  if (mmap(base_, total, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
           0) == MAP_FAILED) {
    Reserve(base_, total);
  }
}

std::byte* HostMapper::region(size_t handle_of_page) const {
  return base_ + handle_of_page * geometry_.max_pages * handle_bytes();
}

std::byte* HostMapper::AddressOf(PageIndex page, size_t handle) const {
  return region(handle) + page.value() * handle_bytes();
}

absl::Status HostMapper::Map(PageIndex page,
                             std::vector<UniqueFd> descriptors) {
  KVB_CHECK(page.value() < geometry_.max_pages);
  if (descriptors.size() != geometry_.handles_per_page) {
    return absl::InvalidArgumentError(
        absl::StrCat("map: a page has ", geometry_.handles_per_page,
                     " handles; got ", descriptors.size()));
  }
  for (size_t i = 0; i < descriptors.size(); ++i) {
    struct stat info;
    absl::Status failed;
    if (fstat(descriptors[i].get(), &info) != 0) {
      failed = ErrnoToStatus(errno, "fstat of a page's handle");
    } else if (info.st_size != geometry_.handle_bytes.count()) {
      failed = absl::InvalidArgumentError(
          absl::StrCat("map: a handle is mapped whole: its size is ",
                       info.st_size, ", the pool's is ", handle_bytes()));
    } else if (mmap(AddressOf(page, i), handle_bytes(), PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, descriptors[i].get(),
                    0) == MAP_FAILED) {
      failed = ErrnoToStatus(errno, "mmap of a page's handle");
    }
    if (!failed.ok()) {
      UnmapHandles(page, i);
      return failed;
    }
  }
  return absl::OkStatus();
}

absl::Status HostMapper::Guard() {
  absl::Status contiguous = CheckGuardLayout(geometry_);
  if (!contiguous.ok()) return contiguous;
  guard_ = UniqueFd(memfd_create("kvbroker-guard", MFD_CLOEXEC));
  absl::Status failed;
  if (!guard_ ||
      ftruncate(guard_.get(), geometry_.handle_bytes.count()) != 0) {
    failed = ErrnoToStatus(errno, "guard mode: making its memory");
  }
  for (uint32_t page = 0; failed.ok() && page < geometry_.max_pages; ++page) {
    if (MapNothing(AddressOf(PageIndex(page), 0), MAP_FIXED) == MAP_FAILED) {
      failed = ErrnoToStatus(
          errno, absl::StrCat("guard mode: mapping it behind ",
                              geometry_.max_pages,
                              " slots (vm.max_map_count bounds them)"));
    }
  }
  if (failed.ok()) return failed;
  guard_.Reset();
  const Bytes total = geometry_.page_bytes() * geometry_.max_pages;
  KVB_CHECK(Reserve(base_, static_cast<size_t>(total.count())) == base_);
  return failed;
}

void* HostMapper::MapNothing(void* at, int place) {
  if (!guard_) return Reserve(at, handle_bytes(), place);
  return mmap(at, handle_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | place,
              guard_.get(), 0);
}

absl::Status HostMapper::Unmap(PageIndex page) {
  if (work_[page.value()].load() != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("unmap: running work uses page ", page.value()));
  }
  UnmapHandles(page, geometry_.handles_per_page);
  return absl::OkStatus();
}

void HostMapper::UnmapHandles(PageIndex page, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    void* const at = AddressOf(page, i);
    if (MapNothing(at, MAP_FIXED) != MAP_FAILED) continue;
    // A process that has all the mappings that it may have (vm.max_map_count)
    // is refused even one that replaces another. Without the old one there is
    // room for the new one. Whoever maps something elsewhere in between takes
    // that room, or even the addresses: then this process cannot go on.
    KVB_CHECK(munmap(at, handle_bytes()) == 0);
    KVB_CHECK(MapNothing(at, MAP_FIXED_NOREPLACE) == at);
  }
}

}  // namespace kvbroker::client
