#include "broker/device/host_backend.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <iterator>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/clock.h"
#include "broker/base/status_macros.h"
#include "broker/device/host_memory.h"

namespace kvbroker {
namespace {

// How long a reading of the machine's memory is good for.
constexpr absl::Duration kReadingLasts = absl::Milliseconds(10);

// A signal makes fallocate undo its work and fail; steps bound what is lost.
constexpr int64_t kFillStep = int64_t{64} << 20;

// Numbers below the limit of open files that are left to the rest of the
// process, and those beyond them that only exports use, which are closed again
// as soon as they are sent. Of a small limit each is a quarter at most.
constexpr rlim_t kNumbersForOthers = 256;
constexpr rlim_t kNumbersForExports = 256;

absl::Status OutOfDescriptors(rlim_t limit) {
  return absl::ResourceExhaustedError(absl::StrCat(
      "the broker has no descriptors left for more memory: each handle of the "
      "host backend is an open file, and the limit is ",
      limit,
      "; use larger pages, or raise the limit of kvbrokerd (ulimit -Hn, "
      "LimitNOFILE= of its service)"));
}

rlim_t DescriptorLimit() {
  rlimit limit;
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : RLIM_INFINITY;
}

// Whether `fd`, the lowest number that was free, leaves some for others.
absl::Status CheckNumber(int fd, rlim_t to_leave) {
  const rlim_t limit = DescriptorLimit();
  if (static_cast<rlim_t>(fd) < limit - std::min(to_leave, limit / 2)) {
    return absl::OkStatus();
  }
  return OutOfDescriptors(limit);
}

Bytes SystemPage() { return Bytes(sysconf(_SC_PAGESIZE)); }

absl::StatusOr<std::string> UuidOfThisBoot() {
  UniqueFd fd(open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoToStatus(errno, "open /proc/sys/kernel/random/boot_id");
  std::array<char, 8> digits;
  ssize_t length = read(fd.get(), digits.data(), digits.size());
  if (length != static_cast<ssize_t>(digits.size())) {
    return absl::InternalError("/proc/sys/kernel/random/boot_id is too short");
  }
  return absl::StrCat("HOST-", absl::string_view(digits.data(), digits.size()));
}

// A sealed file of `size` bytes, all of them allocated.
absl::StatusOr<UniqueFd> MakeFile(Bytes size) {
  UniqueFd fd(memfd_create("kvbroker-page", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd && errno == EMFILE) return OutOfDescriptors(DescriptorLimit());
  if (!fd) return ErrnoToStatus(errno, "memfd_create");
  RETURN_IF_ERROR(
      CheckNumber(fd.get(), kNumbersForOthers + kNumbersForExports));
  for (int64_t done = 0; done < size.count();) {
    int64_t step = std::min(kFillStep, size.count() - done);
    if (fallocate(fd.get(), 0, done, step) == 0) {
      done += step;
    } else if (errno != EINTR) {
      return ErrnoToStatus(errno, "fallocate of a memfd");
    }
  }
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) <
      0) {
    return ErrnoToStatus(errno, "sealing of a memfd");
  }
  return fd;
}

// Where OpenAnew looks files up: a walk to it for each would take a quarter of
// the time.
absl::StatusOr<UniqueFd> OpenOwnDescriptors() {
  UniqueFd folder(open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return ErrnoToStatus(errno, "open /proc/self/fd");
  return folder;
}

// A descriptor of the same file that shares no open with `fd`. An importer may
// hold a lease of the file, which an open would wait for it to give up, for as
// long as 45 s: O_NONBLOCK makes that UNAVAILABLE.
absl::StatusOr<UniqueFd> OpenAnew(const UniqueFd& own_descriptors, int fd) {
  std::array<char, 16> name;
  std::snprintf(name.data(), name.size(), "%d", fd);
  UniqueFd opened(openat(own_descriptors.get(), name.data(),
                         O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!opened) return ErrnoToStatus(errno, "open /proc/self/fd of a memfd");
  return opened;
}

// Once for each file, before IsUnreferenced(). Whoever opens a file while it is
// leased makes the kernel signal the lease's holder. The default signal, SIGIO,
// would end this process; SIGURG is ignored by default.
absl::Status PrepareLeases(int fd) {
  if (fcntl(fd, F_SETSIG, SIGURG) == 0) return absl::OkStatus();
  return ErrnoToStatus(errno, "F_SETSIG of a memfd");
}

// Whether no open of the file made by OpenAnew() is left anywhere. The lease,
// if got, ends when `fd` is closed.
bool IsUnreferenced(int fd) { return fcntl(fd, F_SETLEASE, F_RDLCK) == 0; }

// Whether leases on this kernel tell what IsUnreferenced() wants to know.
absl::StatusOr<bool> LeasesShowReferences(const UniqueFd& own_descriptors) {
  ASSIGN_OR_RETURN(UniqueFd file, MakeFile(SystemPage()));
  RETURN_IF_ERROR(PrepareLeases(file.get()));
  ASSIGN_OR_RETURN(UniqueFd other, OpenAnew(own_descriptors, file.get()));
  if (IsUnreferenced(file.get())) return false;
  other.Reset();
  return IsUnreferenced(file.get());
}

}  // namespace

absl::StatusOr<std::unique_ptr<HostBackend>> HostBackend::Create(
    HostBackendOptions options) {
  ASSIGN_OR_RETURN(HostMemory machine, ReadHostMemory());
  BackendInfo info{
      .name = "host",
      .device_uuid = std::move(options.device_uuid),
      .total = options.total.value_or(Bytes(machine.total.count() / 2)),
      .granularity = SystemPage()};
  if (info.total < info.granularity || info.total > kMaxBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the host backend's total must be at least one system page of ",
        info.granularity.count(), " bytes and at most ", kMaxBytes.count(),
        " bytes; it is ", info.total.count()));
  }
  if (info.device_uuid.empty()) {
    ASSIGN_OR_RETURN(info.device_uuid, UuidOfThisBoot());
  }
  ASSIGN_OR_RETURN(UniqueFd own_descriptors, OpenOwnDescriptors());
  bool sees_importers = false;
  if (options.watch_importers) {
    ASSIGN_OR_RETURN(sees_importers, LeasesShowReferences(own_descriptors));
  }
  return std::unique_ptr<HostBackend>(new HostBackend(
      std::move(info),
      options.keep_available.value_or(Bytes(machine.total.count() / 32)),
      std::move(own_descriptors), sees_importers));
}

HostBackend::HostBackend(BackendInfo info, Bytes keep_available,
                         UniqueFd own_descriptors, bool sees_importers)
    : info_(std::move(info)),
      keep_available_(keep_available),
      own_descriptors_(std::move(own_descriptors)),
      sees_importers_(sees_importers) {}

HostBackend::~HostBackend() {
  MutexLock lock(&mu_);
  KVB_CHECK(live_.empty());  // A handle outlives its backend.
}

absl::StatusOr<Handle> HostBackend::Create(Bytes size) {
  if (size <= Bytes(0) || size.count() % info_.granularity.count() != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a handle's size must be a positive multiple of the granularity, ",
        info_.granularity.count(), " bytes; asked for ", size.count()));
  }
  RETURN_IF_ERROR(Charge(size));
  absl::Status machine = CheckMachine(size);
  absl::StatusOr<UniqueFd> file =
      machine.ok() ? MakeFile(size) : absl::StatusOr<UniqueFd>(machine);

  MutexLock lock(&mu_);
  being_filled_ -= size;
  if (!file.ok()) {
    used_ -= size;
    return std::move(file).status();
  }
  uint64_t token = next_token_++;
  live_.emplace(token, Allocation{.fd = *std::move(file), .size = size});
  return Handle(this, token, size);
}

absl::Status HostBackend::Charge(Bytes size) {
  if (TryCharge(size)) return absl::OkStatus();
  GiveBackLingering();
  if (TryCharge(size)) return absl::OkStatus();
  MutexLock lock(&mu_);
  return absl::ResourceExhaustedError(absl::StrCat(
      "the host device has too little memory left: bytes asked for ",
      size.count(), ", free ", (info_.total - used_).count(), ", total ",
      info_.total.count()));
}

bool HostBackend::TryCharge(Bytes size) {
  MutexLock lock(&mu_);
  if (size > info_.total - used_) return false;
  used_ += size;
  being_filled_ += size;
  return true;
}

absl::Status HostBackend::CheckMachine(Bytes size) {
  const absl::Time now = Clock::Steady().Now();
  {
    MutexLock lock(&mu_);
    if (now - read_at_ < kReadingLasts &&
        available_ - size >= keep_available_) {
      available_ -= size;
      return absl::OkStatus();
    }
  }
  ASSIGN_OR_RETURN(HostMemory machine, ReadHostMemory());
  MutexLock lock(&mu_);
  read_at_ = now;
  available_ = machine.available - being_filled_;
  if (available_ >= keep_available_) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the machine has too little memory left: bytes asked for ",
                   size.count(), ", available ", machine.available.count(),
                   ", to be left available ", keep_available_.count()));
}

absl::StatusOr<UniqueFd> HostBackend::Export(const Handle& handle) {
  int file;
  bool first;
  {
    MutexLock lock(&mu_);
    auto it = handle ? live_.find(handle.token()) : live_.end();
    if (it == live_.end()) {
      return absl::InvalidArgumentError(
          "only a live handle of this backend can be exported");
    }
    first = !std::exchange(it->second.exported, true);
    file = it->second.fd.get();
  }
  // `handle` keeps the file open meanwhile.
  if (first) RETURN_IF_ERROR(PrepareLeases(file));
  ASSIGN_OR_RETURN(UniqueFd opened, OpenAnew(own_descriptors_, file));
  const rlim_t quarter = DescriptorLimit() / 4;
  RETURN_IF_ERROR(
      CheckNumber(opened.get(), std::min(kNumbersForOthers, quarter)));
  return opened;
}

absl::StatusOr<Bytes> HostBackend::UsedBytes() {
  GiveBackLingering();
  MutexLock lock(&mu_);
  return used_;
}

void HostBackend::Release(uint64_t token) {
  Allocation allocation;
  {
    MutexLock lock(&mu_);
    auto it = live_.find(token);
    KVB_CHECK(it != live_.end());
    allocation = std::move(it->second);
    live_.erase(it);
  }
  const Bytes size = allocation.size;
  const bool given_back = TryGiveBack(allocation);
  MutexLock lock(&mu_);
  if (given_back) {
    used_ -= size;
  } else {
    lingering_.push_back(std::move(allocation));
  }
}

bool HostBackend::TryGiveBack(Allocation& allocation) {
  if (allocation.exported && sees_importers_) {
    if (!IsUnreferenced(allocation.fd.get())) return false;
    // Who still holds the file by a way that leases do not show keeps an empty
    // one. Cannot fail on a memfd without F_SEAL_WRITE.
    fallocate(allocation.fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
              0, allocation.size.count());
  }
  allocation.fd.Reset();
  return true;
}

void HostBackend::GiveBackLingering() {
  MutexLock sweep(&sweep_mu_);
  std::vector<Allocation> lingering;
  {
    MutexLock lock(&mu_);
    lingering.swap(lingering_);
  }
  Bytes given_back;
  std::erase_if(lingering, [&](Allocation& allocation) {
    if (!TryGiveBack(allocation)) return false;
    given_back += allocation.size;
    return true;
  });
  MutexLock lock(&mu_);
  used_ -= given_back;
  std::move(lingering.begin(), lingering.end(), std::back_inserter(lingering_));
}

}  // namespace kvbroker
