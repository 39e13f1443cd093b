#include "broker/state/state_file.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

constexpr char kTemporary[] = ".tmp";
// Set aside, latest first.
constexpr const char* kBad[] = {".bad", ".bad.1", ".bad.2", ".bad.3"};
// More than the largest state needs.
constexpr size_t kMaxFileBytes = 128 << 20;

absl::string_view View(std::string_view text) {
  return absl::string_view(text.data(), text.size());
}

}  // namespace

StateFile::StateFile(std::string path, FileSystem& system)
    : path_(std::move(path)), system_(&system) {
  // No slash: npos + 1 is 0.
  const size_t slash = path_.rfind('/');
  name_ = path_.substr(slash + 1);
  directory_ = path_.substr(0, slash == std::string::npos ? 0 : slash);
  if (directory_.empty()) directory_.push_back(slash == 0 ? '/' : '.');
}

absl::StatusOr<StateFile> StateFile::Create(const std::string& path,
                                            FileSystem& system) {
  StateFile file(path, system);
  if (file.name_.empty() || file.name_ == "." || file.name_ == "..") {
    return absl::InvalidArgumentError(
        absl::StrCat("not a path of a state file: \"", path, "\""));
  }
  if (system.Mkdir(file.directory_, 0700) != 0 && errno != EEXIST) {
    return ErrnoToStatus(errno, "mkdir of " + file.directory_);
  }
  ASSIGN_OR_RETURN(UniqueFd directory, file.OpenDirectory());
  // A disk that cannot be written can still be read: Save is who complains.
  static_cast<void>(
      file.RemoveIfThere(directory.get(), file.name_ + kTemporary));
  return file;
}

absl::StatusOr<BrokerState> StateFile::Load() {
  ASSIGN_OR_RETURN(UniqueFd directory, OpenDirectory());
  // O_NONBLOCK: a FIFO must not make the broker wait.
  UniqueFd file = Open(directory.get(), name_,
                       O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
  if (!file && errno == ENOENT) {
    return absl::NotFoundError(absl::StrCat("no state was saved in ", path_));
  }
  if (!file && errno == ELOOP) {
    return absl::FailedPreconditionError(
        absl::StrCat(path_, " is a link: remove it, or name the file itself"));
  }
  if (!file) return Failed("open");
  struct stat info;
  if (system_->Fstat(file.get(), &info) != 0) return Failed("stat");
  if (!S_ISREG(info.st_mode) || info.st_uid != geteuid()) {
    return absl::FailedPreconditionError(absl::StrCat(
        path_, " is not a plain file of this user, uid ", geteuid(),
        ", but of uid ", info.st_uid, ": remove it, or name another"));
  }
  if (static_cast<uint64_t>(info.st_size) > kMaxFileBytes) {
    return SetAside(directory.get(),
                    absl::DataLossError(absl::StrCat(
                        "longer than a state can be: ", info.st_size)));
  }
  ASSIGN_OR_RETURN(std::string text, ReadAll(file.get()));
  absl::StatusOr<BrokerState> state = ParseState(text);
  if (!state.ok()) return SetAside(directory.get(), state.status());
  return state;
}

absl::Status StateFile::Save(const BrokerState& state) {
  RETURN_IF_ERROR(CheckState(state));
  ASSIGN_OR_RETURN(UniqueFd directory, OpenDirectory());
  absl::Status replaced = Replace(directory.get(), FormatState(state));
  if (!replaced.ok()) {
    // If that fails as well, the next Save or Create does it.
    static_cast<void>(RemoveIfThere(directory.get(), name_ + kTemporary));
    return replaced;
  }
  return Sync(directory.get(), directory_);
}

absl::Status StateFile::Replace(int directory, std::string_view text) {
  const std::string temporary = name_ + kTemporary;
  RETURN_IF_ERROR(RemoveIfThere(directory, temporary));
  UniqueFd file = Open(directory, temporary,
                       O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0600);
  if (!file) return Failed("open", kTemporary);
  RETURN_IF_ERROR(WriteAndSync(file.get(), text));
  if (system_->Renameat(directory, temporary, name_) != 0) {
    return Failed("rename", kTemporary);
  }
  return absl::OkStatus();
}

absl::Status StateFile::SetAside(int directory, const absl::Status& why) {
  const auto moved = [&](const std::string& from, const std::string& to) {
    return system_->Renameat(directory, from, to) == 0 || errno == ENOENT;
  };
  bool all = true;
  for (size_t i = std::size(kBad) - 1; i > 0; --i) {
    all = all && moved(name_ + kBad[i - 1], name_ + kBad[i]);
  }
  std::string outcome;
  if (all && moved(name_, name_ + kBad[0])) {
    outcome = absl::StrCat("kept as ", path_, kBad[0]);
  } else {
    outcome =
        absl::StrCat("and cannot be set aside: ", Failed("rename").message());
  }
  return absl::Status(
      why.code(), absl::StrCat("the saved state ", path_, " cannot be used: ",
                               why.message(), " (", outcome, ")"));
}

absl::StatusOr<UniqueFd> StateFile::OpenDirectory() {
  // A link is followed: systemd makes one where users are dynamic. Whose the
  // directory is counts.
  UniqueFd directory = Open(AT_FDCWD, directory_, O_RDONLY | O_DIRECTORY);
  if (!directory) return ErrnoToStatus(errno, "open of " + directory_);
  struct stat info;
  if (system_->Fstat(directory.get(), &info) != 0) {
    return ErrnoToStatus(errno, "stat of " + directory_);
  }
  if ((info.st_uid != geteuid() && info.st_uid != 0) ||
      (info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "others may replace files in ", directory_,
        ": give it to this user, uid ", geteuid(), ", with mode 0700"));
  }
  return directory;
}

UniqueFd StateFile::Open(int directory, const std::string& name, int flags,
                         mode_t mode) {
  int fd;
  do {
    fd = system_->Openat(directory, name, flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return UniqueFd(fd);
}

absl::StatusOr<std::string> StateFile::ReadAll(int fd) {
  std::string text;
  char piece[1 << 16];
  while (text.size() <= kMaxFileBytes) {
    const ssize_t size = system_->Read(fd, piece, sizeof(piece));
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return Failed("read");
    if (size == 0) break;
    text.append(piece, static_cast<size_t>(size));
  }
  return text;
}

absl::Status StateFile::WriteAndSync(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t size = system_->Write(fd, text.data(), text.size());
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return Failed("write", kTemporary);
    if (size == 0) {
      return absl::InternalError(
          absl::StrCat("write of ", path_, kTemporary, " makes no progress"));
    }
    text.remove_prefix(static_cast<size_t>(size));
  }
  return Sync(fd, path_ + kTemporary);
}

absl::Status StateFile::Sync(int fd, std::string_view what) {
  int failed;
  do {
    failed = system_->Fsync(fd);
  } while (failed != 0 && errno == EINTR);
  if (failed == 0) return absl::OkStatus();
  return ErrnoToStatus(errno, absl::StrCat("fsync of ", View(what)));
}

absl::Status StateFile::RemoveIfThere(int directory, const std::string& name) {
  if (system_->Unlinkat(directory, name) == 0 || errno == ENOENT) {
    return absl::OkStatus();
  }
  return ErrnoToStatus(errno, absl::StrCat("removing ", directory_, "/", name));
}

absl::Status StateFile::Failed(std::string_view call, std::string_view suffix) {
  return ErrnoToStatus(errno,
                       absl::StrCat(View(call), " of ", path_, View(suffix)));
}

}  // namespace kvbroker
