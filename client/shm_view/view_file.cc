#include "client/shm_view/view_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker::client {
namespace {

constexpr size_t kMaxNameLength = 128;
constexpr mode_t kMode = 0666;  // the umask takes from it
// Something may get in between a look and a step that often.
constexpr int kAttempts = 8;

enum class Found { kNothing, kView, kReplaceable, kForeign };

Found Classify(const struct stat& status) {
  if (S_ISLNK(status.st_mode) || S_ISFIFO(status.st_mode) ||
      S_ISSOCK(status.st_mode)) {
    return Found::kReplaceable;
  }
  if (!S_ISREG(status.st_mode) || status.st_uid != geteuid()) {
    return Found::kForeign;
  }
  if (status.st_nlink > 1 || status.st_size == 0) return Found::kReplaceable;
  return status.st_size == sizeof(ViewFigures) ? Found::kView : Found::kForeign;
}

std::string InWords(const struct stat& status) {
  if (S_ISDIR(status.st_mode)) return "a directory";
  if (!S_ISREG(status.st_mode)) return "a device";
  if (status.st_uid != geteuid()) {
    return absl::StrCat("a file of another user, uid ", status.st_uid);
  }
  return absl::StrCat("a file of ", status.st_size, " bytes");
}

absl::Status WriteAt(int file, const void* data, size_t size, off_t offset) {
  const ssize_t written = pwrite(file, data, size, offset);
  if (written < 0) return ErrnoToStatus(errno, "pwrite to the view");
  if (static_cast<size_t>(written) != size) {
    return absl::ResourceExhaustedError("the view cannot be written whole");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckViewName(const std::string& name) {
  // Names that begin with a dot are those of the tables beside the views.
  bool good =
      !name.empty() && name.size() <= kMaxNameLength && name.front() != '.';
  for (char c : name) {
    good = good && (absl::ascii_isalnum(c) || c == '_' || c == '.' || c == '-');
  }
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("no name for a view, 1 to ", kMaxNameLength,
                   " of A-Z a-z 0-9 _ . - are, no dot first: \"", name, "\""));
}

absl::StatusOr<ViewFile> ViewFile::Open(int directory, const std::string& name,
                                        const ViewFigures& figures) {
  RETURN_IF_ERROR(CheckViewName(name));
  absl::Status last;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    struct stat before;
    Found found = Found::kNothing;
    if (fstatat(directory, name.c_str(), &before, AT_SYMLINK_NOFOLLOW) == 0) {
      found = Classify(before);
    } else if (errno != ENOENT) {
      return ErrnoToStatus(errno, "fstatat of the view");
    }
    if (found == Found::kForeign) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the name is taken by what is no view, ", InWords(before)));
    }
    if (found == Found::kView) {
      // O_NONBLOCK: a FIFO may have come in its place.
      UniqueFd file(openat(directory, name.c_str(),
                           O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
      struct stat after;
      if (file && fstat(file.get(), &after) == 0 &&
          Classify(after) == Found::kView) {
        return ViewFile(directory, name, std::move(file), after.st_dev,
                        after.st_ino, /*made=*/false);
      }
      // One of ours that may not even be opened is replaced.
      if (file || errno != EACCES) {
        last = absl::AbortedError("the view changes all the time");
        continue;
      }
      found = Found::kReplaceable;
    }
    absl::StatusOr<ViewFile> file =
        Make(directory, name, figures, found == Found::kReplaceable);
    if (file.ok() || !absl::IsAlreadyExists(file.status())) return file;
    last = file.status();
  }
  return last;
}

absl::StatusOr<ViewFile> ViewFile::Make(int directory, const std::string& name,
                                        const ViewFigures& figures,
                                        bool in_its_place) {
  // Whoever died over it may have left it.
  const std::string unfinished = absl::StrCat(".", name, ".new");
  if (unlinkat(directory, unfinished.c_str(), 0) != 0 && errno != ENOENT) {
    return ErrnoToStatus(errno, "unlinkat of an unfinished view");
  }
  UniqueFd file(openat(directory, unfinished.c_str(),
                       O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                       kMode));
  if (!file) return ErrnoToStatus(errno, "openat of a new view");
  struct stat status;
  absl::Status ready = WriteAt(file.get(), &figures, sizeof(figures), 0);
  if (ready.ok() && fstat(file.get(), &status) != 0) {
    ready = ErrnoToStatus(errno, "fstat of a new view");
  }
  if (ready.ok()) {
    int renamed = renameat2(directory, unfinished.c_str(), directory,
                            name.c_str(), in_its_place ? 0 : RENAME_NOREPLACE);
    if (renamed != 0 && errno == EINVAL) {  // a file system without the flag
      renamed =
          renameat(directory, unfinished.c_str(), directory, name.c_str());
    }
    if (renamed != 0) {
      ready = errno == EEXIST || errno == EISDIR
                  ? absl::AlreadyExistsError("something else came first")
                  : ErrnoToStatus(errno, "renameat2 of a new view");
    }
  }
  if (!ready.ok()) {
    unlinkat(directory, unfinished.c_str(), 0);
    return ready;
  }
  return ViewFile(directory, name, std::move(file), status.st_dev,
                  status.st_ino, /*made=*/true);
}

bool ViewFile::Current() const {
  struct stat status;
  return fstatat(directory_, name_.c_str(), &status, AT_SYMLINK_NOFOLLOW) ==
             0 &&
         status.st_dev == device_ && status.st_ino == inode_;
}

bool ViewFile::TryLock() { return flock(file_.get(), LOCK_EX | LOCK_NB) == 0; }

void ViewFile::Unlock() { flock(file_.get(), LOCK_UN); }

absl::StatusOr<ViewFigures> ViewFile::Read() const {
  // One byte more shows that there is more.
  struct {
    ViewFigures figures;
    char beyond;
  } content;
  const ssize_t got = pread(file_.get(), &content, sizeof(ViewFigures) + 1, 0);
  if (got < 0) return ErrnoToStatus(errno, "pread of the view");
  if (got != sizeof(ViewFigures)) {
    return absl::OutOfRangeError("the view has another size than 24 bytes");
  }
  return content.figures;
}

absl::Status ViewFile::WriteLimit(int64_t limit) {
  return WriteAt(file_.get(), &limit, sizeof(limit),
                 offsetof(ViewFigures, limit));
}

absl::Status ViewFile::WriteUse(int64_t used, int64_t preallocated) {
  const int64_t both[] = {used, preallocated};
  return WriteAt(file_.get(), both, sizeof(both), offsetof(ViewFigures, used));
}

absl::Status ViewFile::Restore(const ViewFigures& figures) {
  if (ftruncate(file_.get(), sizeof(figures)) != 0) {
    return ErrnoToStatus(errno, "ftruncate of the view");
  }
  return WriteAt(file_.get(), &figures, sizeof(figures), 0);
}

void ViewFile::Unlink() {
  if (Current()) unlinkat(directory_, name_.c_str(), 0);
}

}  // namespace kvbroker::client
