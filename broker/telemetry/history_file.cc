#include "broker/telemetry/history_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvbroker {
namespace {

using Kind = HistoryEvent::Kind;

const char* NameOf(Kind kind) {
  switch (kind) {
    case Kind::kStart:
      return "start";
    case Kind::kOpen:
      return "open";
    case Kind::kLimits:
      return "limits";
    case Kind::kGrant:
      return "grant";
    case Kind::kBack:
      return "back";
    case Kind::kResume:
      return "resume";
    case Kind::kCredit:
      return "credit";
    case Kind::kOrder:
      return "order";
    case Kind::kRefuse:
      return "refuse";
    case Kind::kHangUp:
      return "hang-up";
    case Kind::kGone:
      return "gone";
    case Kind::kReleased:
      return "released";
    case Kind::kDrain:
      return "drain";
  }
  return "?";
}

const char* NameOf(Tier tier) {
  switch (tier) {
    case Tier::kIdle:
      return "idle";
    case Tier::kCached:
      return "cached";
    case Tier::kClosing:
      return "closing";
    case Tier::kPreempt:
      return "preempt";
  }
  return "?";
}

// One JSON object, field by field.
class Line {
 public:
  void Text(const char* key, std::string_view value) {
    Key(key);
    text_ += '"';
    for (unsigned char c : value) {
      if (c == '"' || c == '\\') {
        text_ += '\\';
        text_ += static_cast<char>(c);
      } else if (c < 0x20 || c >= 0x7f) {
        absl::StrAppendFormat(&text_, "\\u%04x", c);
      } else {
        text_ += static_cast<char>(c);
      }
    }
    text_ += '"';
  }
  void Number(const char* key, int64_t value) {
    Key(key);
    absl::StrAppend(&text_, value);
  }
  void Number(const char* key, uint64_t value) {
    Key(key);
    absl::StrAppend(&text_, value);
  }
  void Number(const char* key, Bytes value) { Number(key, value.count()); }
  // `write` appends one element to its argument.
  template <typename Elements, typename Write>
  void List(const char* key, const Elements& elements, Write write) {
    Key(key);
    text_ += '[';
    const char* separator = "";
    for (const auto& element : elements) {
      text_ += separator;
      separator = ",";
      write(text_, element);
    }
    text_ += ']';
  }
  std::string Finish() && { return std::move(text_) + "}\n"; }

 private:
  void Key(const char* key) {
    absl::StrAppend(&text_, text_.size() == 1 ? "\"" : ",\"", key, "\":");
  }

  std::string text_ = "{";
};

absl::Status WriteAll(int file, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(file, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return ErrnoToStatus(errno, "write of the history file");
    text.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

}  // namespace

std::string ToJsonLine(const HistoryEvent& event) {
  Line line;
  line.Text("event", NameOf(event.kind));
  line.Number("number", event.number);
  line.Number("at", absl::ToUnixNanos(event.at));
  line.Number("lent", event.lent);
  line.Number("credit", event.credit);
  line.Number("stock", event.stock);
  line.Number("releasing", event.releasing);
  if (!event.instance.empty()) {
    line.Text("tenant", event.tenant);
    line.Text("instance", event.instance);
    line.Number("held", event.held);
    line.Number("instance_credit", event.instance_credit);
    line.Number("min", event.min);
    line.Number("max", event.max);
  }
  if (event.session != SessionId()) {
    line.Number("session", event.session.value());
  }
  if (event.pool != PoolId()) line.Number("pool", event.pool.value());
  switch (event.kind) {
    case Kind::kStart:
      line.Number("incarnation", event.incarnation);
      line.Number("capacity", event.capacity);
      break;
    case Kind::kOpen:
      line.Number("pid", uint64_t{event.pid});
      line.List("pools", event.pools,
                [](std::string& text, const HistoryEvent::Pool& pool) {
                  absl::StrAppend(&text, "[", pool.id.value(), ",",
                                  pool.page_bytes.count(), "]");
                });
      break;
    case Kind::kGrant:
      line.Number("grant", event.grant.value());
      line.Number("drawn", event.drawn);
      break;
    case Kind::kResume:
      line.Number("from", event.from.value());
      break;
    case Kind::kOrder:
      line.Number("hold_at_most", event.hold_at_most);
      line.Text("tier", NameOf(event.tier));
      line.Number("for_others", event.for_others);
      break;
    case Kind::kGone:
      line.Number("pid", uint64_t{event.pid});
      line.Number("bytes", event.bytes);
      break;
    case Kind::kReleased:
      line.Number("bytes", event.bytes);
      break;
    case Kind::kLimits:
    case Kind::kBack:
    case Kind::kCredit:
    case Kind::kRefuse:
    case Kind::kHangUp:
    case Kind::kDrain:
      break;
  }
  if (!event.pages.empty()) {
    line.List("pages", event.pages, [](std::string& text, PageName page) {
      absl::StrAppend(&text, "[", page.index.value(), ",",
                      page.generation.value(), "]");
    });
  }
  if (!event.why.empty()) line.Text("why", event.why);
  return std::move(line).Finish();
}

absl::StatusOr<std::unique_ptr<HistoryFile>> HistoryFile::Create(
    const std::string& path, std::function<void(std::string_view)> warn) {
  UniqueFd file(open(path.c_str(),
                     O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY, 0640));
  if (!file) return ErrnoToStatus(errno, "open of history_file " + path);
  // A broker that was killed may have left half a line.
  struct stat info;
  char last = '\n';
  if (fstat(file.get(), &info) == 0 && info.st_size > 0 &&
      pread(file.get(), &last, 1, info.st_size - 1) == 1 && last != '\n') {
    if (absl::Status status = WriteAll(file.get(), "\n"); !status.ok()) {
      return status;
    }
  }
  return std::unique_ptr<HistoryFile>(
      new HistoryFile(std::move(file), std::move(warn)));
}

void HistoryFile::Write(absl::Span<const HistoryEvent> events) {
  std::string text;
  for (const HistoryEvent& event : events) text += ToJsonLine(event);
  absl::Status status;
  {
    MutexLock lock(&mu_);
    if (!file_) return;
    status = WriteAll(file_.get(), text);
    if (!status.ok()) file_.Reset();
  }
  if (!status.ok()) {
    warn_(absl::StrCat("history-ended, the file is cut off here: ",
                       absl::string_view(status.message())));
  }
}

}  // namespace kvbroker
