#include "client/history/mapping_event.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace kvbroker::client {
namespace {

const char* NameOf(MappingEvent::Kind kind) {
  switch (kind) {
    case MappingEvent::Kind::kPool:
      return "pool";
    case MappingEvent::Kind::kMap:
      return "map";
    case MappingEvent::Kind::kUnmap:
      return "unmap";
    case MappingEvent::Kind::kClosed:
      return "closed";
  }
  return "?";
}

}  // namespace

std::string ToJsonLine(const MappingEvent& event) {
  std::string line =
      absl::StrCat(R"({"event":")", NameOf(event.kind), R"(","at":)",
                   absl::ToUnixNanos(event.at), R"(,"pid":)", event.pid,
                   R"(,"pool":)", event.pool);
  const bool names_page = event.kind == MappingEvent::Kind::kMap ||
                          event.kind == MappingEvent::Kind::kUnmap;
  if (names_page) absl::StrAppend(&line, R"(,"page":)", event.page.value());
  if (event.kind == MappingEvent::Kind::kPool) {
    absl::StrAppend(&line, R"(,"instance":")", event.instance, "\"");
  }
  if (event.kind == MappingEvent::Kind::kMap) {
    absl::StrAppend(
        &line, R"(,"memory":[)",
        absl::StrJoin(event.memory, ",",
                      [](std::string* out, const MemoryIdentity& memory) {
                        absl::StrAppend(out, "\"", absl::Hex(memory.device),
                                        ":", absl::Hex(memory.inode), "\"");
                      }),
        "]");
  }
  return line + "}\n";
}

}  // namespace kvbroker::client
