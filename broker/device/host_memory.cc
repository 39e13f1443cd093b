#include "broker/device/host_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {
namespace {

// Reads `name` followed by blanks, a number and " kB", at the start of a line.
absl::StatusOr<Bytes> Field(std::string_view text, std::string_view name) {
  for (size_t line = 0; line < text.size();) {
    std::string_view rest = text.substr(line);
    if (rest.starts_with(name)) {
      rest.remove_prefix(name.size());
      rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
      int64_t kib = 0;
      auto [end, error] =
          std::from_chars(rest.data(), rest.data() + rest.size(), kib);
      std::string_view unit = rest.substr(end - rest.data());
      if (error == std::errc() && kib >= 0 && kib <= kMaxBytes / KiB(1) &&
          unit.starts_with(" kB")) {
        return KiB(kib);
      }
      break;
    }
    size_t newline = rest.find('\n');
    if (newline == std::string_view::npos) break;
    line += newline + 1;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("/proc/meminfo has no readable field: ",
                   absl::string_view(name.data(), name.size())));
}

}  // namespace

absl::StatusOr<HostMemory> ParseMeminfo(std::string_view text) {
  HostMemory memory;
  ASSIGN_OR_RETURN(memory.total, Field(text, "MemTotal:"));
  ASSIGN_OR_RETURN(memory.available, Field(text, "MemAvailable:"));
  ASSIGN_OR_RETURN(memory.shared, Field(text, "Shmem:"));
  return memory;
}

absl::StatusOr<HostMemory> ReadHostMemory() {
  UniqueFd fd(open("/proc/meminfo", O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoToStatus(errno, "open /proc/meminfo");
  // The fields wanted stand within the first KiB.
  std::array<char, 4096> text;
  ssize_t length = read(fd.get(), text.data(), text.size());
  if (length < 0) return ErrnoToStatus(errno, "read /proc/meminfo");
  return ParseMeminfo({text.data(), static_cast<size_t>(length)});
}

}  // namespace kvbroker
