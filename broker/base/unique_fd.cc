#include "broker/base/unique_fd.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace kvbroker {

absl::StatusOr<UniqueFd> UniqueFd::Duplicate() const {
  int copy = fcntl(fd_, F_DUPFD_CLOEXEC, 3);
  if (copy < 0) return ErrnoToStatus(errno, "dup");
  return UniqueFd(copy);
}

void GrowDescriptorTable(int count) {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  const int last =
      static_cast<int>(std::min<rlim_t>(static_cast<rlim_t>(count),
                                        limit.rlim_cur)) -
      1;
  const UniqueFd any(open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (!any) return;
  // The table stays as large as its highest number once needed.
  const UniqueFd highest(fcntl(any.get(), F_DUPFD_CLOEXEC, last));
}

absl::Status ErrnoToStatus(int error, std::string_view doing) {
  absl::StatusCode code;
  switch (error) {
    case ENOMEM:
    case ENOSPC:
    case EMFILE:
    case ENFILE:
    case ETOOMANYREFS:
    case EDQUOT:
      code = absl::StatusCode::kResourceExhausted;
      break;
    case EACCES:
    case EPERM:
      code = absl::StatusCode::kPermissionDenied;
      break;
    case ENOENT:
    case ESRCH:
      code = absl::StatusCode::kNotFound;
      break;
    case EAGAIN:
    case EINTR:
    case ECONNREFUSED:
    case ECONNRESET:
    case EPIPE:
      code = absl::StatusCode::kUnavailable;
      break;
    case EEXIST:
    case EADDRINUSE:
      code = absl::StatusCode::kAlreadyExists;
      break;
    case EINVAL:
      code = absl::StatusCode::kInvalidArgument;
      break;
    default:
      code = absl::StatusCode::kInternal;
  }
  return absl::Status(
      code, absl::StrCat(absl::string_view(doing.data(), doing.size()),
                         " failed: ", strerror(error)));
}

}  // namespace kvbroker
