#include "client/replay/recorded_traces.h"

#include <stdio.h>
#include <stdlib.h>

#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvbroker::replay {
namespace {

namespace fs = std::filesystem;

// In runfiles, sources are links into the source tree.
constexpr char kSource[] = "client/replay/recorded_traces.cc";

// Both begin within the same 20 minutes; this is conv's first row.
constexpr char kOrigin[] = "2023-11-16 18:15:46.6805900";

fs::path TraceFolder() {
  if (const char* folder = getenv("KVBROKER_TRACE_DIR"); folder != nullptr) {
    return folder;
  }
  std::error_code error;
  const fs::path source = fs::canonical(kSource, error);
  if (error) return {};
  const fs::path root = source.parent_path().parent_path().parent_path();
  return root.parent_path() / "shared" / "data";
}

Trace Load(const fs::path& folder, const char* name) {
  const fs::path file =
      folder / absl::StrCat("azure_llm_2023_", name, "_20min.csv");
  absl::StatusOr<Trace> trace =
      ReadTraceFile(file.string(), *ParseTimestamp(kOrigin));
  if (!trace.ok()) {
    fprintf(stderr, "%s\n", std::string(trace.status().message()).c_str());
    abort();
  }
  return *std::move(trace);
}

}  // namespace

std::optional<RecordedTraces> LoadRecordedTraces() {
  const fs::path folder = TraceFolder();
  std::error_code error;
  if (!fs::exists(folder / "azure_llm_2023_conv_20min.csv", error)) {
    return std::nullopt;
  }
  return RecordedTraces{.conv = Load(folder, "conv"),
                        .code = Load(folder, "code")};
}

}  // namespace kvbroker::replay
