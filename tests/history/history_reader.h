// ReadHistory: the lines of history files, in the order in which they happened.
//
// Who writes them: broker/telemetry/history_file.h, client/history, and tests,
// which add a line when they have waited for the end of a process:
//
//   {"event":"exited","at":<nanoseconds of CLOCK_MONOTONIC>,"pid":4711}
#ifndef KVBROKER_TESTS_HISTORY_HISTORY_READER_H_
#define KVBROKER_TESTS_HISTORY_HISTORY_READER_H_

#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "broker/core/history.h"
#include "client/history/mapping_event.h"
#include "tests/history/history_checker.h"

namespace kvbroker {

struct HistoryFileText {
  std::string name;
  std::string text;
};

using AnyEvent =
    std::variant<HistoryEvent, client::MappingEvent, ProcessExited>;

struct HistoryLine {
  absl::Time at;
  std::unique_ptr<const AnyEvent> event;  // apart: lines are sorted
  size_t file = 0;                        // in the order of the files
  size_t number = 0;                      // of the line, from 1
  std::string_view text;                  // within the file's
};

// InvalidArgument: not a line of a history.
absl::StatusOr<HistoryLine> ParseHistoryLine(std::string_view text);

// The lines of all files, merged. The last line of a file may be torn, and so
// may one before a broker's `start`, which is where the one before it died.
// InvalidArgument names file and line. `files` outlive the result.
absl::StatusOr<std::vector<HistoryLine>> ReadHistory(
    const std::vector<HistoryFileText>& files);

// Feeds the lines to the checker; an event's ref is its place in `lines`.
void CheckHistory(const std::vector<HistoryLine>& lines,
                  HistoryChecker& checker);

}  // namespace kvbroker

#endif  // KVBROKER_TESTS_HISTORY_HISTORY_READER_H_
