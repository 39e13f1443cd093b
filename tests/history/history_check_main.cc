// history_check: whether histories keep the promises. See --help.
#include <stdio.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "tests/history/history_checker.h"
#include "tests/history/history_reader.h"

namespace kvbroker {
namespace {

constexpr int kExitViolated = 1;
constexpr int kExitUsage = 2;

constexpr char kFooter[] =
    "\nFILEs are those of kvbrokerd's history_file and of kvbroker-replay's "
    "--history,\nand a test's own, in any order.\n"
    "Exit status: 0 no violation, 1 violations, 2 wrong usage or not a "
    "history.";

void Print(const Violation& violation, const std::vector<HistoryLine>& lines,
           const std::vector<HistoryFileText>& files) {
  absl::PrintF("%s: %s\n", NameOf(violation.rule), violation.what);
  for (EventRef ref : violation.events) {
    const HistoryLine& line = lines[ref];
    absl::PrintF("  %12.6f s  %s:%d  %s\n",
                 absl::ToDoubleSeconds(line.at - lines.front().at),
                 files[line.file].name, line.number, line.text);
  }
}

void PrintText(const HistoryChecker& checker,
               const std::vector<HistoryLine>& lines,
               const std::vector<HistoryFileText>& files) {
  for (const Violation& violation : checker.violations()) {
    Print(violation, lines, files);
  }
  const HistoryStatistics& seen = checker.statistics();
  absl::PrintF(
      "%d events, %d processes, %d grants of %d pages, %d mappings (%d handles "
      "from process to process), %d orders, %d deaths\n",
      seen.events, seen.processes, seen.grants, seen.pages, seen.intervals,
      seen.passed_on, seen.orders, seen.deaths);
  if (seen.unjudged_deaths + seen.unmatched_mappings > 0) {
    absl::PrintF("not judged: %d deaths, %d mappings of unknown processes\n",
                 seen.unjudged_deaths, seen.unmatched_mappings);
  }
  absl::PrintF("violations:");
  for (size_t i = 0; i < kRules; ++i) {
    absl::PrintF(" %s=%d", NameOf(static_cast<Rule>(i)), seen.violations[i]);
  }
  absl::PrintF("\n");
}

void PrintJson(const HistoryChecker& checker,
               const std::vector<HistoryLine>& lines,
               const std::vector<HistoryFileText>& files) {
  const HistoryStatistics& seen = checker.statistics();
  nlohmann::ordered_json result = {
      {"events", seen.events},
      {"processes", seen.processes},
      {"grants", seen.grants},
      {"pages", seen.pages},
      {"mappings", seen.intervals},
      {"passed_on", seen.passed_on},
      {"orders", seen.orders},
      {"deaths", seen.deaths},
      {"unjudged_deaths", seen.unjudged_deaths},
      {"unmatched_mappings", seen.unmatched_mappings}};
  for (size_t i = 0; i < kRules; ++i) {
    result["violations"][std::string(NameOf(static_cast<Rule>(i)))] =
        seen.violations[i];
  }
  result["first"] = nlohmann::ordered_json::array();
  for (const Violation& violation : checker.violations()) {
    nlohmann::ordered_json entry = {{"rule", NameOf(violation.rule)},
                                    {"what", violation.what}};
    for (EventRef ref : violation.events) {
      entry["events"].push_back({{"file", files[lines[ref].file].name},
                                 {"line", lines[ref].number},
                                 {"text", std::string(lines[ref].text)}});
    }
    result["first"].push_back(std::move(entry));
  }
  absl::PrintF("%s\n", result.dump());
}

int Main(int argc, char** argv) {
  CLI::App app("Checks what brokers and engines did against what is promised.",
               "history_check");
  app.footer(kFooter);
  std::vector<std::string> paths;
  double free_within_s = 1;
  bool json = false;
  app.add_option("FILE", paths, "Histories")->required();
  app.add_option("--free-within", free_within_s,
                 "What a dead process held must be free after [1]")
      ->type_name("SECONDS");
  app.add_flag("--json", json, "Print the result as one JSON object");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    absl::PrintF("%s", app.help());
    return 0;
  } catch (const CLI::ParseError& error) {
    absl::FPrintF(stderr, "history_check: %s\n", error.what());
    return kExitUsage;
  }
  std::vector<HistoryFileText> files;
  for (const std::string& path : paths) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      absl::FPrintF(stderr, "history_check: %s cannot be opened\n", path);
      return kExitUsage;
    }
    files.push_back({path, std::string(std::istreambuf_iterator<char>(file),
                                       std::istreambuf_iterator<char>())});
  }
  const absl::StatusOr<std::vector<HistoryLine>> lines = ReadHistory(files);
  if (!lines.ok()) {
    absl::FPrintF(stderr, "history_check: %s\n", lines.status().message());
    return kExitUsage;
  }
  if (lines->empty()) {
    absl::FPrintF(stderr, "history_check: there is no event in these files\n");
    return kExitUsage;
  }
  HistoryChecker checker({.free_within = absl::Seconds(free_within_s)});
  CheckHistory(*lines, checker);
  (json ? PrintJson : PrintText)(checker, *lines, files);
  return checker.violations().empty() ? 0 : kExitViolated;
}

}  // namespace
}  // namespace kvbroker

int main(int argc, char** argv) { return kvbroker::Main(argc, argv); }
