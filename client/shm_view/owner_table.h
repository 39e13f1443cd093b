// OwnerTable: who keeps one view, and what each of them has.
//
// Several sessions, of one process or of several, may have an instance's name
// in common, and one view. Each has a slot in a small file beside the view,
// <directory>/.<name>.kvbroker, and whoever looks adds the slots up. A slot
// counts while its owner holds a record lock (fcntl) on it, which the kernel
// takes back when the process ends, however it ends, and which a forked child
// has no part in. So what a killed owner left counts for nothing at once.
//
//   ASSIGN_OR_RETURN(OwnerTable table, OwnerTable::Open(directory, name));
//   if (table.TryLock() && table.Current()) {
//     ASSIGN_OR_RETURN(int slot, table.TakeSlot());
//     table.Write(slot, record);
//     for (auto& [index, record] : table.Live()) ...
//     table.Unlock();
//   }
//
// Record locks are a process's: it must not open the same table twice. Not
// thread-safe.
#ifndef KVBROKER_CLIENT_SHM_VIEW_OWNER_TABLE_H_
#define KVBROKER_CLIENT_SHM_VIEW_OWNER_TABLE_H_

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"
#include "client/shm_view/view_figures.h"

namespace kvbroker::client {

// What an owner says of itself.
struct OwnerRecord {
  // Of the device that the figures are of.
  uint64_t device = 0;
  ViewFigures figures;
  // CLOCK_MONOTONIC, ns: when the owner heard of its limit.
  int64_t limit_heard = 0;
  // The same: until when it asks the broker for the limit that is in the view.
  int64_t asking_until = 0;

  friend bool operator==(const OwnerRecord&, const OwnerRecord&) = default;
};

class OwnerTable {
 public:
  static constexpr int kSlots = 128;

  // `directory` is borrowed and outlives the table. FAILED_PRECONDITION:
  // something else has the name.
  static absl::StatusOr<OwnerTable> Open(int directory,
                                         const std::string& name);

  // Whether the name still is this file's; if not, other owners have another.
  bool Current() const;

  // The lock of all owners over table and view.
  bool TryLock();
  void Unlock();

  // RESOURCE_EXHAUSTED: all are taken. REQUIRES the lock, as all below but
  // Live.
  absl::StatusOr<int> TakeSlot();
  void ReturnSlot(int slot);
  // The same without the lock: what is in it counts for nothing, as after a kill.
  void AbandonSlot(int slot);
  bool Write(int slot, const OwnerRecord& record);

  // The limit that an owner wrote to the view last; any other in it is not
  // ours.
  int64_t written_limit() const;
  bool set_written_limit(int64_t limit);

  // Of owners that live, by slot.
  std::map<int, OwnerRecord> Live() const;
  // Whether anybody but this process owns the view.
  bool HasOthers() const;

  // Takes the name away where it is this file's.
  void Unlink();

 private:
  OwnerTable(int directory, std::string file_name, UniqueFd file, dev_t device,
             ino_t inode)
      : directory_(directory),
        file_name_(std::move(file_name)),
        file_(std::move(file)),
        device_(device),
        inode_(inode) {}

  int directory_;
  std::string file_name_;
  UniqueFd file_;
  dev_t device_;
  ino_t inode_;
  std::set<int> own_;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SHM_VIEW_OWNER_TABLE_H_
