// HistoryFile: what the core has decided, one JSON object a line.
//
//   ASSIGN_OR_RETURN(auto file, HistoryFile::Create(path));
//   core_options.history = [&](auto events) { file->Write(events); };
//
// For tests and for finding out what happened; tests/history reads it:
//
//   {"event":"grant","number":17,"at":1234567890,"lent":...,"session":3,
//    "pool":4,"pages":[[0,17],[1,18]],"instance":"chat","held":...,"max":...}
//
// `at` is in nanoseconds of CLOCK_MONOTONIC, so that the histories of all
// processes of a machine fit together. A page is [index, generation].
//
// A batch is one write: a process that is killed leaves whole lines, but for
// the last one. Unlike the log it leaves nothing out, and so whoever writes
// waits for the disk. Where that fails, nothing more is written, since a
// history with holes would accuse the innocent.
//
// Thread-safe.
#ifndef KVBROKER_BROKER_TELEMETRY_HISTORY_FILE_H_
#define KVBROKER_BROKER_TELEMETRY_HISTORY_FILE_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/core/history.h"

namespace kvbroker {

// As one line, with its end.
std::string ToJsonLine(const HistoryEvent& event);

class HistoryFile {
 public:
  // Appends. `warn` is told once when a write fails. PERMISSION_DENIED and the
  // like: the file cannot be opened.
  static absl::StatusOr<std::unique_ptr<HistoryFile>> Create(
      const std::string& path, std::function<void(std::string_view)> warn);

  void Write(absl::Span<const HistoryEvent> events);

 private:
  HistoryFile(UniqueFd file, std::function<void(std::string_view)> warn)
      : warn_(std::move(warn)), file_(std::move(file)) {}

  const std::function<void(std::string_view)> warn_;
  Mutex mu_;
  UniqueFd file_ ABSL_GUARDED_BY(mu_);  // empty once a write has failed
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TELEMETRY_HISTORY_FILE_H_
