// ReplaySummary: what one run comes to, as text, JSON and CSV.
#ifndef KVBROKER_CLIENT_REPLAY_REPLAY_SUMMARY_H_
#define KVBROKER_CLIENT_REPLAY_REPLAY_SUMMARY_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/replay/fresh_counts.h"
#include "client/replay/pattern.h"
#include "client/replay/scheduler.h"

namespace kvbroker::replay {

// Waits are from arrival to first admission, over the requests admitted; times
// in trace milliseconds unless they say otherwise.
struct ReplaySummary {
  std::string name;
  std::string mode;  // "static" or "elastic"
  int64_t requests = 0;
  int64_t rejected = 0;
  int64_t unfinished = 0;  // the run ended before they did
  double wait_p99_ms = 0;
  double wait_mean_ms = 0;
  double wait_max_ms = 0;
  int64_t preemptions = 0;
  int64_t integrity_errors = 0;  // lines of blocks overwritten by others
  int64_t blocks_written = 0;
  double late_max_ms = 0;  // real: how late a step came at worst
  double seconds = 0;      // real: from the start of trace time to the end
  // What was in pages that came, where it was looked at.
  std::optional<FreshCounts> fresh;
};

// Fills all that the scheduler and the pattern know.
ReplaySummary Summarize(const Scheduler& scheduler,
                        const BlockPattern& pattern);

std::string SummaryToJson(const ReplaySummary& summary);  // one line
std::string SummaryToText(const ReplaySummary& summary);

// A header line, then one line a request in order of arrival. Fields are empty
// for what did not happen; `outcome` is done, rejected or unfinished.
std::string RequestsToCsv(const std::vector<RequestRecord>& records);

absl::Status WriteFile(const std::string& path, const std::string& contents);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_REPLAY_SUMMARY_H_
