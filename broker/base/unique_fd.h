// UniqueFd: owns one file descriptor and closes it.
#ifndef KVBROKER_BROKER_BASE_UNIQUE_FD_H_
#define KVBROKER_BROKER_BASE_UNIQUE_FD_H_

#include <unistd.h>

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvbroker {

// Move-only; -1 is empty.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.Release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) Reset(other.Release());
    return *this;
  }
  ~UniqueFd() { Reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  // Hands ownership to the caller.
  [[nodiscard]] int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd = -1) {
    if (int old = std::exchange(fd_, fd); old >= 0) ::close(old);
  }
  // A second descriptor of the same file, close-on-exec.
  absl::StatusOr<UniqueFd> Duplicate() const;

 private:
  int fd_ = -1;
};

// Makes room in the process's table of descriptors for so many, as far as its limit
// allows. When the table has to grow in a process of several threads, the kernel
// waits for all processors to have seen it (12 to 19 ms measured): better at the
// start than with some page.
void GrowDescriptorTable(int count);

// The one place where errno becomes a status. `doing` names the call and its
// object ("memfd_create"); the result ends with the system's own words.
absl::Status ErrnoToStatus(int error, std::string_view doing);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_BASE_UNIQUE_FD_H_
