// ViewFile: the file <directory>/<name> of exactly 24 bytes that other programs
// read, and write the limit into.
//
//   ASSIGN_OR_RETURN(ViewFile file, ViewFile::Open(directory, name, figures));
//   if (file.TryLock()) {
//     ASSIGN_OR_RETURN(ViewFigures now, file.Read());
//     ...
//     file.Unlock();
//   }
//
// Anybody may have put anything under the name. What is there decides:
//
//   a regular file of 24 bytes, of this user, with one name   is used
//   nothing                                                   a file is made
//   a symbolic link, FIFO, socket, empty file of this user,   a file is made in
//     or one with several names                                 its place
//   anything else (a directory, a file of another user or     is left alone: it
//     another size)                                             may be of use
//     to
//                                                               somebody
//
// No link is followed, nothing but a view is ever written to, and a file comes
// into being with its figures in it.
//
// The lock is flock, which other programs take as well; it is tried, never
// waited for. Not thread-safe. Who opens sees to it that nobody of ours does so
// at the same time (OwnerTable).
#ifndef KVBROKER_CLIENT_SHM_VIEW_VIEW_FILE_H_
#define KVBROKER_CLIENT_SHM_VIEW_VIEW_FILE_H_

#include <sys/types.h>

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"
#include "client/shm_view/view_figures.h"

namespace kvbroker::client {

// INVALID_ARGUMENT where an instance's name cannot be a view's: 1 to 128 of
// A-Z a-z 0-9 _ . - and no dot first.
absl::Status CheckViewName(const std::string& name);

class ViewFile {
 public:
  // `directory` is borrowed and outlives the file. FAILED_PRECONDITION:
  // something else has the name; says what.
  static absl::StatusOr<ViewFile> Open(int directory, const std::string& name,
                                       const ViewFigures& figures);

  // Whether Open made the file, with its figures.
  bool made() const { return made_; }
  // Whether the name still is this file's.
  bool Current() const;
  int descriptor() const { return file_.get(); }

  bool TryLock();
  void Unlock();

  // OUT_OF_RANGE: the file has another size; see Restore.
  absl::StatusOr<ViewFigures> Read() const;
  // These two REQUIRE the lock. The limit stays apart from the rest, so that a
  // limit that somebody writes without the lock is not overwritten in passing.
  absl::Status WriteLimit(int64_t limit);
  absl::Status WriteUse(int64_t used, int64_t preallocated);
  // Makes it 24 bytes again, whatever has been done to it. REQUIRES the lock.
  absl::Status Restore(const ViewFigures& figures);

  // Takes the name away where it is this file's.
  void Unlink();

 private:
  ViewFile(int directory, std::string name, UniqueFd file, dev_t device,
           ino_t inode, bool made)
      : directory_(directory),
        name_(std::move(name)),
        file_(std::move(file)),
        device_(device),
        inode_(inode),
        made_(made) {}

  static absl::StatusOr<ViewFile> Make(int directory, const std::string& name,
                                       const ViewFigures& figures,
                                       bool in_its_place);

  int directory_;
  std::string name_;
  UniqueFd file_;
  dev_t device_;
  ino_t inode_;
  bool made_;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SHM_VIEW_VIEW_FILE_H_
