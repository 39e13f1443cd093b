#include "client/shm_view/owner_table.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>

#include "absl/strings/str_cat.h"

namespace kvbroker::client {
namespace {

// The file: the limit that was written last, then the slots.
struct Slot {
  int64_t taken = 0;
  OwnerRecord record;
};
struct Table {
  int64_t written_limit = 0;
  Slot slots[OwnerTable::kSlots];
};

// Where the locks lie, beyond what is written: that of all, then the slots'.
constexpr off_t kLocks = off_t{1} << 30;

off_t LockOf(int slot) { return kLocks + 1 + slot; }

struct flock RecordLock(short type, off_t start, off_t length) {
  struct flock lock = {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = start;
  lock.l_len = length;
  return lock;
}

bool TryTake(int file, off_t start) {
  struct flock lock = RecordLock(F_WRLCK, start, 1);
  return fcntl(file, F_SETLK, &lock) == 0;
}

void LetGo(int file, off_t start) {
  struct flock lock = RecordLock(F_UNLCK, start, 1);
  fcntl(file, F_SETLK, &lock);
}

bool AnotherHolds(int file, off_t start, off_t length) {
  struct flock lock = RecordLock(F_WRLCK, start, length);
  return fcntl(file, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

template <typename Value>
bool WriteAt(int file, const Value& value, size_t offset) {
  return pwrite(file, &value, sizeof(value), static_cast<off_t>(offset)) ==
         static_cast<ssize_t>(sizeof(value));
}

bool IsOurs(const struct stat& status) {
  return S_ISREG(status.st_mode) && status.st_uid == geteuid() &&
         status.st_nlink == 1;
}

}  // namespace

absl::StatusOr<OwnerTable> OwnerTable::Open(int directory,
                                            const std::string& name) {
  const std::string file_name = absl::StrCat(".", name, ".kvbroker");
  struct stat status;
  for (int attempt = 0; attempt < 2; ++attempt) {
    UniqueFd file(openat(directory, file_name.c_str(),
                         O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC,
                         0600));
    if (file && fstat(file.get(), &status) == 0 && IsOurs(status)) {
      return OwnerTable(directory, file_name, std::move(file), status.st_dev,
                        status.st_ino);
    }
    const int error = file ? EEXIST : errno;
    // What cannot be a table goes, if it is nobody's data.
    if (fstatat(directory, file_name.c_str(), &status, AT_SYMLINK_NOFOLLOW) !=
            0 ||
        !(S_ISLNK(status.st_mode) || S_ISFIFO(status.st_mode) ||
          S_ISSOCK(status.st_mode) || status.st_nlink > 1) ||
        S_ISDIR(status.st_mode) ||
        unlinkat(directory, file_name.c_str(), 0) != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("the table of owners cannot be opened, ", file_name,
                       ": ", ErrnoToStatus(error, "openat").message()));
    }
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the table of owners changes all the time: ", file_name));
}

bool OwnerTable::Current() const {
  struct stat status;
  return fstatat(directory_, file_name_.c_str(), &status,
                 AT_SYMLINK_NOFOLLOW) == 0 &&
         status.st_dev == device_ && status.st_ino == inode_;
}

bool OwnerTable::TryLock() { return TryTake(file_.get(), kLocks); }

void OwnerTable::Unlock() { LetGo(file_.get(), kLocks); }

absl::StatusOr<int> OwnerTable::TakeSlot() {
  for (int slot = 0; slot < kSlots; ++slot) {
    if (own_.count(slot) > 0 || !TryTake(file_.get(), LockOf(slot))) continue;
    own_.insert(slot);
    return slot;
  }
  return absl::ResourceExhaustedError(
      absl::StrCat("the view has as many owners as it can have, ", kSlots));
}

void OwnerTable::ReturnSlot(int slot) {
  WriteAt(file_.get(), Slot{}, offsetof(Table, slots) + slot * sizeof(Slot));
  LetGo(file_.get(), LockOf(slot));
  own_.erase(slot);
}

void OwnerTable::AbandonSlot(int slot) {
  LetGo(file_.get(), LockOf(slot));
  own_.erase(slot);
}

bool OwnerTable::Write(int slot, const OwnerRecord& record) {
  return WriteAt(file_.get(), Slot{.taken = 1, .record = record},
                 offsetof(Table, slots) + slot * sizeof(Slot));
}

int64_t OwnerTable::written_limit() const {
  int64_t limit = 0;
  if (pread(file_.get(), &limit, sizeof(limit),
            offsetof(Table, written_limit)) != sizeof(limit)) {
    return 0;
  }
  return limit;
}

bool OwnerTable::set_written_limit(int64_t limit) {
  return WriteAt(file_.get(), limit, offsetof(Table, written_limit));
}

std::map<int, OwnerRecord> OwnerTable::Live() const {
  Table table;
  // What is not there reads as not taken.
  if (pread(file_.get(), &table, sizeof(table), 0) < 0) return {};
  std::map<int, OwnerRecord> live;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (table.slots[slot].taken == 0) continue;
    if (own_.count(slot) > 0 || AnotherHolds(file_.get(), LockOf(slot), 1)) {
      live[slot] = table.slots[slot].record;
    }
  }
  return live;
}

bool OwnerTable::HasOthers() const {
  return AnotherHolds(file_.get(), LockOf(0), kSlots);
}

void OwnerTable::Unlink() {
  if (Current()) unlinkat(directory_, file_name_.c_str(), 0);
}

}  // namespace kvbroker::client
