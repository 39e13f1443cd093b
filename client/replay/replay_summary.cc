#include "client/replay/replay_summary.h"

#include <errno.h>
#include <stdio.h>

#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "broker/base/unique_fd.h"

namespace kvbroker::replay {
namespace {

constexpr double kMillis = 1000;

std::string MillisOrEmpty(std::optional<double> seconds) {
  return seconds.has_value() ? absl::StrFormat("%.3f", *seconds * kMillis) : "";
}

const char* OutcomeOf(const RequestRecord& record) {
  if (record.rejected) return "rejected";
  return record.end_s.has_value() ? "done" : "unfinished";
}

}  // namespace

ReplaySummary Summarize(const Scheduler& scheduler,
                        const BlockPattern& pattern) {
  ReplaySummary summary;
  std::vector<double> waits_ms;
  for (const RequestRecord& record : scheduler.records()) {
    ++summary.requests;
    if (record.rejected) {
      ++summary.rejected;
    } else if (!record.end_s.has_value()) {
      ++summary.unfinished;
    }
    if (record.admitted_s.has_value()) {
      waits_ms.push_back((*record.admitted_s - record.arrival_s) * kMillis);
    }
  }
  if (!waits_ms.empty()) {
    std::sort(waits_ms.begin(), waits_ms.end());
    double sum = 0;
    for (double wait : waits_ms) sum += wait;
    summary.wait_p99_ms = waits_ms[waits_ms.size() * 99 / 100];
    summary.wait_mean_ms = sum / static_cast<double>(waits_ms.size());
    summary.wait_max_ms = waits_ms.back();
  }
  summary.preemptions = scheduler.preemptions();
  summary.integrity_errors = pattern.errors();
  summary.blocks_written = pattern.blocks_written();
  return summary;
}

namespace {

std::string FreshToJson(const std::optional<FreshCounts>& fresh) {
  if (!fresh) return "";
  return absl::StrFormat(
      R"(,"fresh_pages":%d,"fresh_zero_pages":%d,"fresh_own_tenant_pages":%d,)"
      R"("foreign_patterns":%d,"fresh_garbage_lines":%d,"fresh_errors":%d)",
      fresh->pages, fresh->zero_pages, fresh->own_pages,
      fresh->foreign_patterns, fresh->garbage, fresh->errors);
}

}  // namespace

// The name needs no escaping: its characters are checked with the options.
std::string SummaryToJson(const ReplaySummary& s) {
  return absl::StrFormat(
      R"({"name":"%s","mode":"%s","requests":%d,"rejected":%d,)"
      R"("unfinished":%d,"wait_p99_ms":%.3f,"wait_mean_ms":%.3f,)"
      R"("wait_max_ms":%.3f,"preemptions":%d,"integrity_errors":%d,)"
      R"("blocks_written":%d,"late_max_ms":%.3f,"seconds":%.3f%s})"
      "\n",
      s.name, s.mode, s.requests, s.rejected, s.unfinished, s.wait_p99_ms,
      s.wait_mean_ms, s.wait_max_ms, s.preemptions, s.integrity_errors,
      s.blocks_written, s.late_max_ms, s.seconds, FreshToJson(s.fresh));
}

std::string SummaryToText(const ReplaySummary& s) {
  return absl::StrFormat(
      "%s (%s): %d requests, %d rejected, %d unfinished, in %.1f s\n"
      "  wait     p99 %.0f ms, mean %.0f ms, max %.0f ms (trace time)\n"
      "  blocks   %d written and checked, %d wrong lines, %d preemptions\n",
      s.name, s.mode, s.requests, s.rejected, s.unfinished, s.seconds,
      s.wait_p99_ms, s.wait_mean_ms, s.wait_max_ms, s.blocks_written,
      s.integrity_errors, s.preemptions);
}

std::string RequestsToCsv(const std::vector<RequestRecord>& records) {
  std::string csv =
      "arrival_ms,wait_ms,first_token_ms,end_ms,preemptions,outcome\n";
  for (const RequestRecord& record : records) {
    std::optional<double> wait_s;
    if (record.admitted_s.has_value()) {
      wait_s = *record.admitted_s - record.arrival_s;
    }
    absl::StrAppend(
        &csv, MillisOrEmpty(record.arrival_s), ",", MillisOrEmpty(wait_s), ",",
        MillisOrEmpty(record.first_token_s), ",", MillisOrEmpty(record.end_s),
        ",", record.preemptions, ",", OutcomeOf(record), "\n");
  }
  return csv;
}

absl::Status WriteFile(const std::string& path, const std::string& contents) {
  FILE* file = fopen(path.c_str(), "we");
  if (file == nullptr) {
    return ErrnoToStatus(errno, absl::StrCat("cannot create ", path));
  }
  const bool written =
      fwrite(contents.data(), 1, contents.size(), file) == contents.size();
  const int write_error = errno;
  if (fclose(file) != 0) {  // A full disk may show only now.
    return ErrnoToStatus(errno, absl::StrCat("cannot write ", path));
  }
  if (!written) {
    return ErrnoToStatus(write_error, absl::StrCat("cannot write ", path));
  }
  return absl::OkStatus();
}

}  // namespace kvbroker::replay
