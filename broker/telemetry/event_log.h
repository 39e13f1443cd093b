// EventLog: one line an event, to stderr and, where wished, to a file.
//
//   ASSIGN_OR_RETURN(auto log, EventLog::Create({.level = LogLevel::kInfo}));
//   log->Write(LogLevel::kInfo, "grant instance=llama pages=3 grant=17");
//
// Whoever writes only queues the line: a terminal that stands still or a disk
// that is slow stops the log, not the broker. Lines that find kMaxQueued others
// before them are left out, and a line says how many. Lines may quote what
// peers sent; control characters in them become '?', so that nobody forges a
// line.
//
// Thread-safe. Everything queued is written before destruction ends.
#ifndef KVBROKER_BROKER_TELEMETRY_EVENT_LOG_H_
#define KVBROKER_BROKER_TELEMETRY_EVENT_LOG_H_

#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "broker/base/mutex.h"

namespace spdlog {
class logger;
}  // namespace spdlog

namespace kvbroker {

enum class LogLevel { kDebug, kInfo, kWarn, kError, kOff };

// "debug", "info", "warn", "error", "off".
absl::StatusOr<LogLevel> ParseLogLevel(std::string_view name);

class EventLog {
 public:
  static constexpr size_t kMaxQueued = 16384;

  struct Options {
    LogLevel level = LogLevel::kInfo;
    bool to_stderr = true;
    std::string file;  // appended to; empty: none
  };

  // PERMISSION_DENIED and the like: the file cannot be opened.
  static absl::StatusOr<std::unique_ptr<EventLog>> Create(
      const Options& options);
  ~EventLog();

  bool Wants(LogLevel level) const { return level >= level_; }
  void Write(LogLevel level, std::string_view line);

 private:
  struct Line {
    std::chrono::system_clock::time_point time;
    LogLevel level;
    std::string text;
  };

  EventLog(LogLevel level, std::shared_ptr<spdlog::logger> logger);
  void WriteQueued();

  const LogLevel level_;
  const std::shared_ptr<spdlog::logger> logger_;

  Mutex mu_;
  CondVar changed_;
  std::vector<Line> queue_ ABSL_GUARDED_BY(mu_);
  size_t left_out_ ABSL_GUARDED_BY(mu_) = 0;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;
  std::thread writer_;  // last: it uses all of the above
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TELEMETRY_EVENT_LOG_H_
