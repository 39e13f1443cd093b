// StatusWriter: lines for whoever watches a run, never waited for.
#ifndef KVBROKER_CLIENT_REPLAY_STATUS_WRITER_H_
#define KVBROKER_CLIENT_REPLAY_STATUS_WRITER_H_

#include <string_view>

#include "absl/status/statusor.h"

namespace kvbroker::replay {

// Writes to a descriptor that others own. A line that a slow reader leaves no
// room for is dropped, whole; once the reader is gone, all are.
class StatusWriter {
 public:
  // InvalidArgument: `fd` is not open.
  static absl::StatusOr<StatusWriter> Create(int fd);

  // REQUIRES: ends in a line break and is not longer than PIPE_BUF.
  void Write(std::string_view line);

 private:
  explicit StatusWriter(int fd) : fd_(fd) {}

  int fd_;  // -1: the reader is gone
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_STATUS_WRITER_H_
