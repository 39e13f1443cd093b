// ShmView: the shared-memory view of one instance, as this process keeps it.
//
// Control planes made for kvcached read the file <directory>/<name> and write
// an instance's limit into it (docs/shm_view.md). Each session of the instance
// is an *owner*. A Pass brings the file up to date and says what others have
// written:
//
//   ASSIGN_OR_RETURN(ShmView view, ShmView::Open("/dev/shm", "llama"));
//   ShmView::Owner owner = view.AddOwner("GPU-1a2b");
//   ShmView::Outcome outcome = view.Pass({{owner, figures}});
//   if (outcome.asked) {
//     ... have the broker set *outcome.asked ...
//     view.Answered();
//   }
//   view.RemoveOwner(owner);
//
// What the file shows, whoever of the owners writes it: of the device with most
// in use, the sums of its owners; and the limit that one of them heard last,
// which is the instance's on each device.
//
// A limit in the file that no owner wrote is asked for by whoever sees it
// first; the others leave it alone meanwhile. Once it is answered the file
// shows what is in force, be it that one or not.
//
// Where nothing has changed a Pass takes no lock: two looks at names, two
// reads. Where another holds a lock it comes back without having waited.
//
// Not thread-safe; the views of one process are kept by its ViewKeeper.
#ifndef KVBROKER_CLIENT_SHM_VIEW_SHM_VIEW_H_
#define KVBROKER_CLIENT_SHM_VIEW_SHM_VIEW_H_

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/unique_fd.h"
#include "client/shm_view/owner_table.h"
#include "client/shm_view/view_figures.h"
#include "client/shm_view/view_file.h"

namespace kvbroker::client {

class ShmView {
 public:
  using Owner = int;

  struct Outcome {
    // The file is up to date; false: a lock is held by others, or `problem`.
    bool done = false;
    // A limit that somebody wrote, for the broker. Answered() when it has
    // answered.
    std::optional<Bytes> asked;
    // A limit that makes no sense, and is written over.
    std::optional<int64_t> ignored;
    // Why there is no view at present.
    absl::Status problem;
  };

  // Makes nothing yet. NOT_FOUND, PERMISSION_DENIED: `directory` cannot be
  // opened. INVALID_ARGUMENT: no such name can be.
  static absl::StatusOr<ShmView> Open(const std::string& directory,
                                      const std::string& name);
  ShmView(ShmView&&) = default;

  // Whether `directory` and `name` mean this view, by whatever path.
  bool Is(const std::string& directory, const std::string& name) const;

  // `device`: the uuid of the one whose memory the figures are of.
  Owner AddOwner(const std::string& device);
  // With the last one of all processes the file goes.
  void RemoveOwner(Owner owner);
  bool has_owners() const { return !owners_.empty(); }

  // The figures of each owner of this process.
  Outcome Pass(const std::map<Owner, ViewFigures>& figures);
  // The broker has answered what was asked; the next Pass shows what is in
  // force.
  void Answered() { asking_until_ = 0; }

  // Of the file, to be watched; -1: there is none. Another file has another
  // number, which counts up.
  int descriptor() const { return file_ ? file_->descriptor() : -1; }
  uint64_t file_number() const { return file_number_; }

 private:
  struct OwnOwner {
    uint64_t device = 0;
    int slot = -1;
    OwnerRecord record;
    bool written = false;
  };

  ShmView(UniqueFd directory, std::string name)
      : directory_(std::move(directory)), name_(std::move(name)) {}

  // What the file has to show, but for the limit while an owner asks for one.
  static ViewFigures Sum(const std::map<int, OwnerRecord>& live);
  static bool AnyAsking(const std::map<int, OwnerRecord>& live);
  bool UpToDate() const;
  // With the table's lock.
  absl::Status TakeSlots();
  void WriteRecords();
  absl::Status BringUpToDate(Outcome& outcome);
  absl::Status OpenFile(const ViewFigures& figures);
  // With both locks.
  absl::Status Reconcile(Outcome& outcome);
  // The table's lock, tried for a while: who holds it is quick, unless stopped.
  bool LockTablePatiently();

  UniqueFd directory_;
  std::string name_;
  std::optional<OwnerTable> table_;
  std::optional<ViewFile> file_;
  uint64_t file_number_ = 0;
  bool found_ = false;  // the file was there before us, and may be stale
  std::map<Owner, OwnOwner> owners_;
  Owner last_owner_ = 0;
  int64_t asking_until_ = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SHM_VIEW_SHM_VIEW_H_
