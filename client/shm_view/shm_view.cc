#include "client/shm_view/shm_view.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "broker/base/status_macros.h"

namespace kvbroker::client {
namespace {

constexpr absl::Duration kLockPatience = absl::Milliseconds(200);
constexpr absl::Duration kLockPause = absl::Milliseconds(1);
// An owner that is stopped while it asks the broker holds up the others for no
// longer, in ns.
constexpr int64_t kAskingCounts = 5'000'000'000;

// One clock for all processes.
int64_t MonotonicNanos() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

// The same in every process and build, unlike std::hash.
uint64_t NumberOf(const std::string& device) {
  uint64_t number = 14695981039346656037u;  // FNV-1a
  for (unsigned char c : device) number = (number ^ c) * 1099511628211u;
  return number;
}

}  // namespace

absl::StatusOr<ShmView> ShmView::Open(const std::string& directory,
                                      const std::string& name) {
  RETURN_IF_ERROR(CheckViewName(name));
  UniqueFd opened(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!opened) {
    return ErrnoToStatus(errno, absl::StrCat("opening ", directory));
  }
  return ShmView(std::move(opened), name);
}

bool ShmView::Is(const std::string& directory, const std::string& name) const {
  struct stat own, other;
  return name == name_ && fstat(directory_.get(), &own) == 0 &&
         stat(directory.c_str(), &other) == 0 && own.st_dev == other.st_dev &&
         own.st_ino == other.st_ino;
}

ShmView::Owner ShmView::AddOwner(const std::string& device) {
  owners_[++last_owner_].device = NumberOf(device);
  return last_owner_;
}

bool ShmView::LockTablePatiently() {
  const absl::Time give_up = absl::Now() + kLockPatience;
  while (!table_->TryLock()) {
    if (absl::Now() > give_up) return false;
    absl::SleepFor(kLockPause);
  }
  return true;
}

void ShmView::RemoveOwner(Owner owner) {
  auto it = owners_.find(owner);
  if (it == owners_.end()) return;
  const int slot = it->second.slot;
  owners_.erase(it);
  if (!table_ || slot < 0) return;
  // Without the lock, what is left is the next owner's to take over.
  if (!LockTablePatiently()) {
    table_->AbandonSlot(slot);
    if (owners_.empty()) {
      file_.reset();
      table_.reset();
    }
    return;
  }
  table_->ReturnSlot(slot);
  if (owners_.empty()) {
    if (table_->Current() && !table_->HasOthers()) {
      if (file_) file_->Unlink();
      table_->Unlink();
    }
    file_.reset();
    table_.reset();  // and with it the lock
    return;
  }
  table_->Unlock();
}

ViewFigures ShmView::Sum(const std::map<int, OwnerRecord>& live) {
  std::map<uint64_t, ViewFigures> by_device;
  const OwnerRecord* latest = nullptr;
  for (const auto& [slot, record] : live) {
    ViewFigures& device = by_device[record.device];
    device.used += record.figures.used;
    device.preallocated += record.figures.preallocated;
    if (latest == nullptr || record.limit_heard > latest->limit_heard) {
      latest = &record;
    }
  }
  ViewFigures sum;
  for (const auto& [device, figures] : by_device) {
    if (figures.used >= sum.used) sum = figures;
  }
  if (latest != nullptr) sum.limit = latest->figures.limit;
  return sum;
}

bool ShmView::AnyAsking(const std::map<int, OwnerRecord>& live) {
  const int64_t now = MonotonicNanos();
  return std::any_of(live.begin(), live.end(), [now](const auto& owner) {
    return owner.second.asking_until > now;
  });
}

bool ShmView::UpToDate() const {
  if (!table_ || !file_ || !table_->Current() || !file_->Current()) {
    return false;
  }
  for (const auto& [owner, own] : owners_) {
    if (!own.written) return false;
  }
  if (found_) return false;
  absl::StatusOr<ViewFigures> now = file_->Read();
  if (!now.ok()) return false;
  const std::map<int, OwnerRecord> live = table_->Live();
  ViewFigures want = Sum(live);
  if (AnyAsking(live)) want.limit = now->limit;
  return *now == want;
}

ShmView::Outcome ShmView::Pass(const std::map<Owner, ViewFigures>& figures) {
  for (auto& [owner, own] : owners_) {
    auto given = figures.find(owner);
    if (given == figures.end()) continue;
    OwnerRecord record = own.record;
    if (record.limit_heard == 0 ||
        record.figures.limit != given->second.limit) {
      record.limit_heard = MonotonicNanos();
    }
    record.device = own.device;
    record.figures = given->second;
    record.asking_until = asking_until_;
    if (record == own.record) continue;
    own.record = record;
    own.written = false;
  }
  Outcome outcome;
  if (UpToDate()) {
    outcome.done = true;
    return outcome;
  }
  outcome.problem = BringUpToDate(outcome);
  return outcome;
}

absl::Status ShmView::TakeSlots() {
  for (auto& [owner, own] : owners_) {
    if (own.slot < 0) {
      ASSIGN_OR_RETURN(own.slot, table_->TakeSlot());
    }
  }
  return absl::OkStatus();
}

void ShmView::WriteRecords() {
  for (auto& [owner, own] : owners_) {
    if (!own.written) own.written = table_->Write(own.slot, own.record);
  }
}

absl::Status ShmView::BringUpToDate(Outcome& outcome) {
  if (table_ && !table_->Current()) {
    table_.reset();
    for (auto& [owner, own] : owners_) own.slot = -1;
  }
  if (!table_) {
    ASSIGN_OR_RETURN(OwnerTable table,
                     OwnerTable::Open(directory_.get(), name_));
    table_.emplace(std::move(table));
    for (auto& [owner, own] : owners_) own.written = false;
  }
  if (!table_->TryLock()) return absl::OkStatus();
  absl::Status status;
  // If it is not current, the last owner of it left meanwhile.
  if (table_->Current()) {
    status = TakeSlots();
    if (status.ok()) {
      WriteRecords();
      status = OpenFile(Sum(table_->Live()));
      outcome.done = status.ok() && UpToDate();
      if (status.ok() && !outcome.done && file_->TryLock()) {
        status = Reconcile(outcome);
        file_->Unlock();
      }
    }
  }
  table_->Unlock();
  return status;
}

absl::Status ShmView::OpenFile(const ViewFigures& figures) {
  if (file_ && file_->Current()) return absl::OkStatus();
  file_.reset();
  ASSIGN_OR_RETURN(ViewFile file,
                   ViewFile::Open(directory_.get(), name_, figures));
  // One that takes the place of ours is a way to write.
  found_ = !file.made() && file_number_ == 0;
  if (file.made()) table_->set_written_limit(figures.limit);
  file_.emplace(std::move(file));
  ++file_number_;
  return absl::OkStatus();
}

absl::Status ShmView::Reconcile(Outcome& outcome) {
  std::map<int, OwnerRecord> live = table_->Live();
  ViewFigures want = Sum(live);
  absl::StatusOr<ViewFigures> now = file_->Read();
  if (absl::IsOutOfRange(now.status())) {
    RETURN_IF_ERROR(file_->Restore(want));
    table_->set_written_limit(want.limit);
    outcome.done = true;
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(now.status());
  // What a file says that nobody kept is nobody's wish.
  const bool stale = found_ && !table_->HasOthers();
  found_ = false;
  const bool foreign = !stale && now->limit != table_->written_limit();
  bool leave_limit = AnyAsking(live);
  if (foreign && (now->limit < 0 || now->limit > kMaxBytes.count())) {
    outcome.ignored = now->limit;
    leave_limit = false;
  } else if (foreign && !leave_limit) {
    table_->set_written_limit(now->limit);
    if (now->limit != want.limit) {
      outcome.asked = Bytes(now->limit);
      leave_limit = true;
      asking_until_ = MonotonicNanos() + kAskingCounts;
      for (auto& [owner, own] : owners_) {
        own.record.asking_until = asking_until_;
        own.written = false;
      }
      WriteRecords();
    }
  }
  if (now->limit != want.limit && !leave_limit) {
    // In this order: who is killed in between leaves a limit that is in force.
    RETURN_IF_ERROR(file_->WriteLimit(want.limit));
    table_->set_written_limit(want.limit);
  }
  if (now->used != want.used || now->preallocated != want.preallocated) {
    RETURN_IF_ERROR(file_->WriteUse(want.used, want.preallocated));
  }
  outcome.done = true;
  return absl::OkStatus();
}

}  // namespace kvbroker::client
