#include "broker/telemetry/event_log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <spdlog/logger.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {
namespace {

// How long a line waits for others: under load the writer wakes up 200 times a
// second then, and not for every line.
constexpr absl::Duration kGather = absl::Milliseconds(5);

constexpr char kPattern[] = "%Y-%m-%dT%H:%M:%S.%e%z %L [%P] %v";

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
    case LogLevel::kOff:
      break;
  }
  return spdlog::level::off;
}

std::string WithoutControlCharacters(std::string_view line) {
  std::string text(line);
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text;
}

}  // namespace

absl::StatusOr<LogLevel> ParseLogLevel(std::string_view name) {
  constexpr std::pair<std::string_view, LogLevel> kNames[] = {
      {"debug", LogLevel::kDebug}, {"info", LogLevel::kInfo},
      {"warn", LogLevel::kWarn},   {"error", LogLevel::kError},
      {"off", LogLevel::kOff},
  };
  for (const auto& [known, level] : kNames) {
    if (name == known) return level;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("a log level is one of debug, info, warn, error, off; got ",
                   absl::string_view(name.data(), name.size())));
}

absl::StatusOr<std::unique_ptr<EventLog>> EventLog::Create(
    const Options& options) {
  std::vector<spdlog::sink_ptr> sinks;
  // Single-threaded sinks: only the writer's thread uses them.
  if (options.to_stderr) {
    sinks.push_back(std::make_shared<spdlog::sinks::stderr_sink_st>());
  }
  if (!options.file.empty()) {
    // spdlog reports by exception, and makes folders nobody asked for.
    UniqueFd probe(open(options.file.c_str(),
                        O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY,
                        0640));
    if (!probe) return ErrnoToStatus(errno, "open of log file " + options.file);
    try {
      sinks.push_back(
          std::make_shared<spdlog::sinks::basic_file_sink_st>(options.file));
    } catch (const spdlog::spdlog_ex& error) {
      return absl::InternalError(
          absl::StrCat("the log file cannot be opened: ", error.what()));
    }
  }
  auto logger =
      std::make_shared<spdlog::logger>("kvbrokerd", sinks.begin(), sinks.end());
  logger->set_pattern(kPattern);
  logger->set_level(ToSpdlog(options.level));
  return std::unique_ptr<EventLog>(
      new EventLog(options.level, std::move(logger)));
}

EventLog::EventLog(LogLevel level, std::shared_ptr<spdlog::logger> logger)
    : level_(level), logger_(std::move(logger)), writer_([this] {
        pthread_setname_np(pthread_self(), "kvb-log");
        WriteQueued();
      }) {}

EventLog::~EventLog() {
  {
    MutexLock lock(&mu_);
    closing_ = true;
    changed_.Signal();
  }
  writer_.join();
}

void EventLog::Write(LogLevel level, std::string_view line) {
  if (!Wants(level) || level == LogLevel::kOff) return;
  Line entry = {std::chrono::system_clock::now(), level,
                WithoutControlCharacters(line)};
  MutexLock lock(&mu_);
  if (queue_.size() >= kMaxQueued) {
    ++left_out_;
    return;
  }
  queue_.push_back(std::move(entry));
  if (queue_.size() == 1) changed_.Signal();
}

void EventLog::WriteQueued() {
  std::vector<Line> lines;
  for (;;) {
    size_t left_out;
    bool closing;
    {
      MutexLock lock(&mu_);
      while (queue_.empty() && !closing_) changed_.Wait(&mu_);
      closing = closing_;
    }
    if (!closing) absl::SleepFor(kGather);
    {
      MutexLock lock(&mu_);
      lines.swap(queue_);
      left_out = std::exchange(left_out_, 0);
      closing = closing_;
    }
    for (const Line& line : lines) {
      logger_->log(line.time, spdlog::source_loc{}, ToSpdlog(line.level),
                   line.text);
    }
    if (left_out != 0) {
      logger_->log(spdlog::level::warn, "log-lines-left-out count={}",
                   left_out);
    }
    if (!lines.empty()) logger_->flush();
    lines.clear();
    if (closing) return;
  }
}

}  // namespace kvbroker
