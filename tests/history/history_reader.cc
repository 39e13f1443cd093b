#include "tests/history/history_reader.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/types/optional.h"

namespace kvbroker {
namespace {

using nlohmann::json;

// Thrown by the readers of single fields, and caught by ParseHistoryLine: the
// JSON library reports in the same way.
struct WrongField {
  std::string what;
};

absl::Time TimeOf(const json& line) {
  return absl::FromUnixNanos(line.at("at").get<int64_t>());
}

Bytes BytesOf(const json& line, const char* key) {
  return Bytes(line.at(key).get<int64_t>());
}

const json& PairOf(const json& element) {
  if (!element.is_array() || element.size() != 2) {
    throw WrongField{"a page or pool is a list of two numbers"};
  }
  return element;
}

client::MemoryIdentity IdentityOf(const std::string& text) {
  const std::pair<absl::string_view, absl::string_view> halves =
      absl::StrSplit(text, absl::MaxSplits(':', 1));
  client::MemoryIdentity identity;
  if (!absl::SimpleHexAtoi(halves.first, &identity.device) ||
      !absl::SimpleHexAtoi(halves.second, &identity.inode)) {
    throw WrongField{"memory is device:inode, hexadecimal; got " + text};
  }
  return identity;
}

template <typename Value>
std::optional<Value> Named(
    std::string_view name,
    std::initializer_list<std::pair<std::string_view, Value>> all) {
  for (const auto& [known, value] : all) {
    if (known == name) return value;
  }
  return std::nullopt;
}

std::optional<client::MappingEvent::Kind> MappingKind(std::string_view name) {
  using Kind = client::MappingEvent::Kind;
  return Named<Kind>(name, {{"map", Kind::kMap},
                            {"unmap", Kind::kUnmap},
                            {"pool", Kind::kPool},
                            {"closed", Kind::kClosed}});
}

std::optional<HistoryEvent::Kind> BrokerKind(std::string_view name) {
  using Kind = HistoryEvent::Kind;
  return Named<Kind>(name, {{"start", Kind::kStart},
                            {"open", Kind::kOpen},
                            {"limits", Kind::kLimits},
                            {"grant", Kind::kGrant},
                            {"back", Kind::kBack},
                            {"resume", Kind::kResume},
                            {"credit", Kind::kCredit},
                            {"order", Kind::kOrder},
                            {"refuse", Kind::kRefuse},
                            {"hang-up", Kind::kHangUp},
                            {"gone", Kind::kGone},
                            {"released", Kind::kReleased},
                            {"drain", Kind::kDrain}});
}

Tier TierOf(const std::string& name) {
  const std::optional<Tier> tier =
      Named<Tier>(name, {{"idle", Tier::kIdle},
                         {"cached", Tier::kCached},
                         {"closing", Tier::kClosing},
                         {"preempt", Tier::kPreempt}});
  if (!tier) throw WrongField{"no such tier: " + name};
  return *tier;
}

client::MappingEvent ReadMapping(client::MappingEvent::Kind kind,
                                 const json& line) {
  client::MappingEvent event;
  event.kind = kind;
  event.at = TimeOf(line);
  event.pid = line.at("pid").get<uint32_t>();
  event.pool = line.at("pool").get<uint32_t>();
  switch (kind) {
    case client::MappingEvent::Kind::kPool:
      event.instance = line.at("instance").get<std::string>();
      break;
    case client::MappingEvent::Kind::kMap:
      for (const json& memory : line.at("memory")) {
        event.memory.push_back(IdentityOf(memory.get<std::string>()));
      }
      [[fallthrough]];
    case client::MappingEvent::Kind::kUnmap:
      event.page = PageIndex(line.at("page").get<uint32_t>());
      break;
    case client::MappingEvent::Kind::kClosed:
      break;
  }
  return event;
}

HistoryEvent ReadBroker(HistoryEvent::Kind kind, const json& line) {
  using Kind = HistoryEvent::Kind;
  HistoryEvent event;
  event.kind = kind;
  event.number = line.at("number").get<uint64_t>();
  event.at = TimeOf(line);
  event.lent = BytesOf(line, "lent");
  event.credit = BytesOf(line, "credit");
  event.stock = BytesOf(line, "stock");
  event.releasing = BytesOf(line, "releasing");
  const bool of_instance = kind != Kind::kStart && kind != Kind::kHangUp &&
                           kind != Kind::kReleased && kind != Kind::kDrain;
  if (of_instance) {
    event.tenant = line.at("tenant").get<std::string>();
    event.instance = line.at("instance").get<std::string>();
    event.held = BytesOf(line, "held");
    event.instance_credit = BytesOf(line, "instance_credit");
    event.min = BytesOf(line, "min");
    event.max = BytesOf(line, "max");
  }
  // Credit that lapses is an instance's, not a session's.
  event.session = SessionId(line.value("session", uint64_t{0}));
  event.pool = PoolId(line.value("pool", uint64_t{0}));
  event.why = line.value("why", std::string());
  if (auto pages = line.find("pages"); pages != line.end()) {
    for (const json& page : *pages) {
      event.pages.push_back({PageIndex(PairOf(page)[0].get<uint32_t>()),
                             Generation(page[1].get<uint32_t>())});
    }
  }
  switch (kind) {
    case Kind::kStart:
      event.incarnation = line.at("incarnation").get<uint64_t>();
      event.capacity = BytesOf(line, "capacity");
      break;
    case Kind::kOpen:
      event.pid = line.at("pid").get<uint32_t>();
      for (const json& pool : line.at("pools")) {
        event.pools.push_back({PoolId(PairOf(pool)[0].get<uint64_t>()),
                               Bytes(pool[1].get<int64_t>())});
      }
      break;
    case Kind::kGrant:
      event.grant = GrantId(line.at("grant").get<uint64_t>());
      event.drawn = BytesOf(line, "drawn");
      break;
    case Kind::kResume:
      event.from = PoolId(line.at("from").get<uint64_t>());
      break;
    case Kind::kOrder:
      event.hold_at_most = line.at("hold_at_most").get<PageCount>();
      event.tier = TierOf(line.at("tier").get<std::string>());
      event.for_others = BytesOf(line, "for_others");
      break;
    case Kind::kGone:
      event.pid = line.at("pid").get<uint32_t>();
      event.bytes = BytesOf(line, "bytes");
      break;
    case Kind::kReleased:
      event.bytes = BytesOf(line, "bytes");
      break;
    case Kind::kLimits:
    case Kind::kBack:
    case Kind::kCredit:
    case Kind::kRefuse:
    case Kind::kHangUp:
    case Kind::kDrain:
      break;
  }
  return event;
}

AnyEvent ReadEvent(const json& object) {
  const std::string name = object.at("event").get<std::string>();
  if (const auto mapping = MappingKind(name)) {
    return ReadMapping(*mapping, object);
  }
  if (const auto broker = BrokerKind(name)) return ReadBroker(*broker, object);
  if (name == "exited") {
    return ProcessExited{TimeOf(object), object.at("pid").get<uint32_t>()};
  }
  throw WrongField{"no such event: " + name};
}

const HistoryEvent* BrokersEvent(const HistoryLine& line) {
  return std::get_if<HistoryEvent>(line.event.get());
}

bool IsStart(const HistoryLine& line) {
  const HistoryEvent* event = BrokersEvent(line);
  return event != nullptr && event->kind == HistoryEvent::Kind::kStart;
}

// Batches of a broker's threads may have changed places in its file.
void SortByNumber(std::vector<HistoryLine>& lines) {
  auto begin = lines.begin();
  while (begin != lines.end()) {
    const auto end = std::find_if(begin + 1, lines.end(), IsStart);
    std::stable_sort(
        begin, end, [](const HistoryLine& a, const HistoryLine& b) {
          const HistoryEvent* x = BrokersEvent(a);
          const HistoryEvent* y = BrokersEvent(b);
          return x != nullptr && y != nullptr && x->number < y->number;
        });
    begin = end;
  }
}

absl::Status ReadFile(const HistoryFileText& file, size_t place,
                      std::vector<HistoryLine>& all) {
  std::vector<HistoryLine> lines;
  absl::Status torn;
  std::string_view rest = file.text;
  for (size_t number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view text = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (text.empty()) continue;
    absl::StatusOr<HistoryLine> line = ParseHistoryLine(text);
    if (!torn.ok() && !(line.ok() && IsStart(*line))) return torn;
    torn = absl::OkStatus();
    if (line.ok()) {
      line->file = place;
      line->number = number;
      lines.push_back(*std::move(line));
    } else {
      torn = absl::InvalidArgumentError(absl::StrCat(
          file.name, " line ", number, ": ", line.status().message()));
    }
  }
  SortByNumber(lines);
  std::move(lines.begin(), lines.end(), std::back_inserter(all));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<HistoryLine> ParseHistoryLine(std::string_view text) {
  try {
    HistoryLine line;
    line.event = std::make_unique<AnyEvent>(ReadEvent(json::parse(text)));
    line.at =
        std::visit([](const auto& event) { return event.at; }, *line.event);
    line.text = text;
    return line;
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a line of a history: ", error.what()));
  } catch (const WrongField& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a line of a history: ", error.what));
  }
}

absl::StatusOr<std::vector<HistoryLine>> ReadHistory(
    const std::vector<HistoryFileText>& files) {
  std::vector<HistoryLine> lines;
  for (size_t i = 0; i < files.size(); ++i) {
    if (absl::Status status = ReadFile(files[i], i, lines); !status.ok()) {
      return status;
    }
  }
  std::stable_sort(
      lines.begin(), lines.end(),
      [](const HistoryLine& a, const HistoryLine& b) { return a.at < b.at; });
  return lines;
}

void CheckHistory(const std::vector<HistoryLine>& lines,
                  HistoryChecker& checker) {
  for (size_t i = 0; i < lines.size(); ++i) {
    std::visit([&](const auto& event) { checker.Add(i, event); },
               *lines[i].event);
  }
  checker.Finish();
}

}  // namespace kvbroker
