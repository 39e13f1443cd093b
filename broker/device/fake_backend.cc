#include "broker/device/fake_backend.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

// Linux allows no descriptor this high unless an administrator insists.
constexpr int kFirstNumber = 1 << 30;

bool HungUp(const UniqueFd& read_end) {
  pollfd poller{.fd = read_end.get(), .events = 0, .revents = 0};
  return poll(&poller, 1, 0) == 1 && (poller.revents & POLLHUP) != 0;
}

}  // namespace

FakeBackend::FakeBackend(FakeBackendOptions options)
    : info_{.name = "fake",
            .device_uuid = std::move(options.device_uuid),
            .total = options.total,
            .granularity = options.granularity,
            .slab = options.fixed_addresses ? "fake slab" : ""},
      descriptors_(options.descriptors),
      ranges_(options.total),
      next_number_(kFirstNumber) {
  KVB_CHECK(info_.granularity > Bytes(0));
}

FakeBackend::~FakeBackend() {
  MutexLock lock(&mu_);
  KVB_CHECK(live_handles_ == 0);  // A handle outlives its backend.
}

absl::StatusOr<Handle> FakeBackend::Create(Bytes size) {
  if (info_.fixed_addresses()) {
    return absl::FailedPreconditionError("with fixed addresses: CreateAt");
  }
  return Make(size, std::nullopt);
}

absl::StatusOr<Handle> FakeBackend::CreateAt(Bytes offset, Bytes size) {
  if (!info_.fixed_addresses()) return Backend::CreateAt(offset, size);
  return Make(size, offset);
}

absl::StatusOr<Handle> FakeBackend::Make(Bytes size,
                                         std::optional<Bytes> offset) {
  std::function<void(Bytes)> hook;
  {
    MutexLock lock(&mu_);
    hook = create_hook_;
  }
  if (hook) hook(size);

  if (size <= Bytes(0) || size.count() % info_.granularity.count() != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a handle's size must be a positive multiple of the granularity, ",
        info_.granularity.count(), " bytes; asked for ", size.count()));
  }
  MutexLock lock(&mu_);
  if (!create_failures_.empty()) {
    absl::Status failure = std::move(create_failures_.front());
    create_failures_.pop_front();
    return failure;
  }
  auto free = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return info_.total - foreign_ - used_;
  };
  if (size > free()) DropAllUnreferenced();
  if (size > free()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the fake device has too little memory left: bytes asked "
                     "for ",
                     size.count(), ", free ", free().count(), ", total ",
                     info_.total.count()));
  }
  if (offset && offset->count() % size.count() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a handle's offset must be a multiple of its size, ",
                     size.count(), " bytes; got ", offset->count()));
  }
  if (offset && !ranges_.Take(*offset, size)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "bytes from ", offset->count(), " on are in use: ", size.count()));
  }
  uint64_t token = next_token_++;
  Allocation& made = allocations_[token];
  made.size = size;
  made.offset = offset.value_or(Bytes(0));
  used_ += size;
  ++live_handles_;
  ++counts_.creates;
  return Handle(this, token, size, made.offset);
}

absl::StatusOr<UniqueFd> FakeBackend::Export(const Handle& handle) {
  MutexLock lock(&mu_);
  auto it = handle ? allocations_.find(handle.token()) : allocations_.end();
  if (it == allocations_.end()) {
    return absl::InvalidArgumentError(
        "only a live handle of this backend can be exported");
  }
  UniqueFd exported;
  ExportRecord record{.token = handle.token()};
  if (descriptors_ == FakeBackendOptions::Descriptors::kNumbers) {
    exported.Reset(next_number_++);
  } else {
    std::array<int, 2> ends;
    if (pipe2(ends.data(), O_CLOEXEC) < 0) return ErrnoToStatus(errno, "pipe");
    record.read_end.Reset(ends[0]);
    exported.Reset(ends[1]);
  }
  uint64_t key = KeyOf(exported.get());
  it->second.exports.push_back(key);
  exports_.insert_or_assign(key, std::move(record));
  ++counts_.exports;
  return exported;
}

absl::StatusOr<Bytes> FakeBackend::UsedBytes() {
  MutexLock lock(&mu_);
  DropAllUnreferenced();
  return used_ + foreign_;
}

absl::StatusOr<uint64_t> FakeBackend::Import(int fd) {
  uint64_t key = KeyOf(fd);
  MutexLock lock(&mu_);
  auto it = exports_.find(key);
  if (it == exports_.end()) {
    return absl::NotFoundError(
        absl::StrCat("no handle of the fake device behind descriptor ", fd));
  }
  ++allocations_.at(it->second.token).imports;
  ++counts_.imports;
  return it->second.token;
}

absl::Status FakeBackend::Unimport(uint64_t token) {
  MutexLock lock(&mu_);
  auto it = allocations_.find(token);
  if (it == allocations_.end() || it->second.imports == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("nobody imports the fake device's handle ", token));
  }
  --it->second.imports;
  ++counts_.unimports;
  DropUnreferenced(token);
  return absl::OkStatus();
}

void FakeBackend::Release(uint64_t token) {
  MutexLock lock(&mu_);
  auto it = allocations_.find(token);
  KVB_CHECK(it != allocations_.end() && it->second.live);
  it->second.live = false;
  --live_handles_;
  ++counts_.releases;
  if (info_.fixed_addresses()) {
    // Whoever has the slab open keeps no part of it.
    Allocation& lease = it->second;
    ranges_.GiveBack(lease.offset, lease.size);
    used_ -= lease.size;
    lease.in_use = false;
  }
  DropUnreferenced(token);
}

uint64_t FakeBackend::KeyOf(int fd) const {
  if (descriptors_ == FakeBackendOptions::Descriptors::kNumbers) {
    return fd >= kFirstNumber ? fd : 0;
  }
  struct stat file;
  return fstat(fd, &file) == 0 && S_ISFIFO(file.st_mode) ? file.st_ino : 0;
}

void FakeBackend::DropUnreferenced(uint64_t token) {
  auto it = allocations_.find(token);
  Allocation& allocation = it->second;
  std::erase_if(allocation.exports, [&](uint64_t key) {
    mu_.AssertHeld();
    const UniqueFd& read_end = exports_.at(key).read_end;
    if (!read_end || !HungUp(read_end)) return false;
    exports_.erase(key);
    return true;
  });
  const bool referenced_by_descriptor =
      descriptors_ == FakeBackendOptions::Descriptors::kReal &&
      !allocation.exports.empty();
  if (allocation.live || allocation.imports > 0 || referenced_by_descriptor) {
    return;
  }
  for (uint64_t key : allocation.exports) exports_.erase(key);
  if (allocation.in_use) used_ -= allocation.size;
  allocations_.erase(it);
}

void FakeBackend::DropAllUnreferenced() {
  // Numbers are no references: nothing can have gone unnoticed.
  if (descriptors_ == FakeBackendOptions::Descriptors::kNumbers) return;
  std::vector<uint64_t> tokens;
  for (const auto& [token, allocation] : allocations_) tokens.push_back(token);
  for (uint64_t token : tokens) DropUnreferenced(token);
}

void FakeBackend::FailNextCreate(absl::Status status) {
  KVB_CHECK(!status.ok());
  MutexLock lock(&mu_);
  create_failures_.push_back(std::move(status));
}

void FakeBackend::OnCreate(std::function<void(Bytes size)> hook) {
  MutexLock lock(&mu_);
  create_hook_ = std::move(hook);
}

void FakeBackend::SetForeignBytes(Bytes foreign) {
  MutexLock lock(&mu_);
  foreign_ = foreign;
}

void FakeBackend::SetProcessBytes(
    std::optional<std::map<uint32_t, Bytes>> by_process) {
  MutexLock lock(&mu_);
  by_process_ = std::move(by_process);
}

absl::StatusOr<std::map<uint32_t, Bytes>> FakeBackend::UsedByProcess() {
  MutexLock lock(&mu_);
  if (!by_process_) return Backend::UsedByProcess();
  return *by_process_;
}

Bytes FakeBackend::foreign_bytes() {
  MutexLock lock(&mu_);
  return foreign_;
}

FakeBackend::Counts FakeBackend::counts() {
  MutexLock lock(&mu_);
  return counts_;
}

int64_t FakeBackend::live_handles() {
  MutexLock lock(&mu_);
  return live_handles_;
}

bool FakeBackend::IsLive(uint64_t token) {
  MutexLock lock(&mu_);
  auto it = allocations_.find(token);
  return it != allocations_.end() && it->second.live;
}

std::optional<Bytes> FakeBackend::OffsetOf(uint64_t token) {
  MutexLock lock(&mu_);
  auto it = allocations_.find(token);
  if (it == allocations_.end()) return std::nullopt;
  return it->second.offset;
}

int64_t FakeBackend::Imports(uint64_t token) {
  MutexLock lock(&mu_);
  auto it = allocations_.find(token);
  return it == allocations_.end() ? 0 : it->second.imports;
}

Bytes FakeBackend::SizeOf(uint64_t token) {
  MutexLock lock(&mu_);
  auto it = allocations_.find(token);
  return it == allocations_.end() ? Bytes(0) : it->second.size;
}

absl::Status FakeBackend::CheckInvariants() {
  MutexLock lock(&mu_);
  Bytes sum;
  int64_t live = 0;
  int64_t imports = 0;
  size_t exports = 0;
  for (const auto& [token, allocation] : allocations_) {
    if (allocation.in_use) sum += allocation.size;
    live += allocation.live ? 1 : 0;
    imports += allocation.imports;
    exports += allocation.exports.size();
    if (!allocation.live && allocation.imports == 0 &&
        descriptors_ == FakeBackendOptions::Descriptors::kNumbers) {
      return absl::InternalError(
          absl::StrCat("nobody references the handle but it is kept: ", token));
    }
  }
  if (sum != used_) {
    return absl::InternalError(absl::StrCat(
        "bytes of all handles differ from the bytes in use: ", sum.count(),
        " and ", used_.count()));
  }
  if (info_.fixed_addresses() && ranges_.taken() != used_) {
    return absl::InternalError(
        absl::StrCat("bytes taken of the slab differ from the bytes in use: ",
                     ranges_.taken().count(), " and ", used_.count()));
  }
  if (absl::Status status = ranges_.CheckInvariants(); !status.ok()) {
    return status;
  }
  if (used_ > info_.total) {
    return absl::InternalError(
        absl::StrCat("more bytes in use than the device has: ", used_.count(),
                     " of ", info_.total.count()));
  }
  if (live != live_handles_ || live != counts_.creates - counts_.releases) {
    return absl::InternalError(absl::StrCat(
        "live handles, their count, and creates less releases differ: ", live,
        ", ", live_handles_, ", ", counts_.creates - counts_.releases));
  }
  if (imports != counts_.imports - counts_.unimports) {
    return absl::InternalError(absl::StrCat(
        "imports held and imports less unimports differ: ", imports, ", ",
        counts_.imports - counts_.unimports));
  }
  if (exports != exports_.size()) {
    return absl::InternalError(absl::StrCat(
        "descriptors of handles and descriptors known differ: ", exports, ", ",
        exports_.size()));
  }
  return absl::OkStatus();
}

}  // namespace kvbroker
