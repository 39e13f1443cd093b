#include "broker/state/broker_state.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/state/state_envelope.h"

namespace kvbroker {
namespace {

using Json = nlohmann::json;
// Written in the order given.
using OrderedJson = nlohmann::ordered_json;

constexpr size_t kMaxTenantLength = 256;
constexpr size_t kMaxNameLength = 128;
constexpr double kMaxWeight = 1e6;

template <typename... Words>
absl::Status Invalid(const Words&... words) {
  return absl::InvalidArgumentError(absl::StrCat(words...));
}

// ---- what a state may hold ----

absl::Status CheckTenant(const std::string& where, const std::string& tenant) {
  if (tenant.size() <= kMaxTenantLength &&
      std::all_of(tenant.begin(), tenant.end(),
                  [](unsigned char c) { return absl::ascii_isprint(c); })) {
    return absl::OkStatus();
  }
  return Invalid(where, ".tenant: must be at most ", kMaxTenantLength,
                 " characters of printable ASCII");
}

absl::Status CheckName(const std::string& field, const std::string& name) {
  if (!name.empty() && name.size() <= kMaxNameLength &&
      std::all_of(name.begin(), name.end(), [](unsigned char c) {
        return absl::ascii_isalnum(c) || c == '_' || c == '.' || c == '-';
      })) {
    return absl::OkStatus();
  }
  return Invalid(field, ": a name has 1 to ", kMaxNameLength,
                 " of the characters A-Z a-z 0-9 _ . -");
}

std::string Dump(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

// JSON has no other text.
bool IsUtf8(const std::string& text) {
  if (std::all_of(text.begin(), text.end(),
                  [](unsigned char c) { return c < 0x80; })) {
    return true;
  }
  return Json::parse(Dump(text), nullptr, false) == text;
}

// ---- times: as RFC 3339, such as 2026-01-31T12:00:00.25+00:00 ----

std::string TimeText(absl::Time time) {
  return absl::FormatTime(absl::RFC3339_full, time, absl::UTCTimeZone());
}

// Only what TimeText writes, from 1970 on.
bool ReadTimeText(const std::string& text, absl::Time& time) {
  return absl::ParseTime(absl::RFC3339_full, text, &time, nullptr) &&
         time >= absl::UnixEpoch() && time < absl::InfiniteFuture() &&
         TimeText(time) == text;
}

bool IsSavableTime(absl::Time time) {
  absl::Time again;
  return time == absl::InfiniteFuture() ||
         (ReadTimeText(TimeText(time), again) && again == time);
}

// ---- fields of a JSON object ----

// Reads the fields of one object, each under its own name in what is said.
class ObjectReader {
 public:
  ObjectReader(const Json& object, std::string where)
      : object_(object), where_(std::move(where)) {}

  absl::Status CheckIsObject() const {
    if (object_.is_object()) return absl::OkStatus();
    return Invalid(where_.empty() ? "the body" : where_, ": must be an object");
  }

  absl::Status Read(const char* key, std::string& text) const {
    const Json* value = Find(key);
    if (value == nullptr || !value->is_string()) {
      return Invalid(Name(key), ": must be a text");
    }
    text = value->get_ref<const std::string&>();
    return absl::OkStatus();
  }

  template <typename Int>
  absl::Status Read(const char* key, Int& number) const {
    constexpr uint64_t kMost = std::numeric_limits<Int>::max();
    const Json* value = Find(key);
    if (value == nullptr || !value->is_number_unsigned() ||
        value->get<uint64_t>() > kMost) {
      return Invalid(Name(key), ": must be a whole number from 0 to ", kMost);
    }
    number = static_cast<Int>(value->get<uint64_t>());
    return absl::OkStatus();
  }

  absl::Status Read(const char* key, Bytes& bytes) const {
    int64_t count = 0;
    RETURN_IF_ERROR(Read(key, count));
    bytes = Bytes(count);
    return absl::OkStatus();
  }

  absl::Status Read(const char* key, double& number) const {
    const Json* value = Find(key);
    if (value == nullptr || !value->is_number()) {
      return Invalid(Name(key), ": must be a number");
    }
    number = value->get<double>();
    return absl::OkStatus();
  }

  // Leaves `time` where there is none.
  absl::Status ReadIfPresent(const char* key, absl::Time& time) const {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_string() ||
        !ReadTimeText(value->get_ref<const std::string&>(), time)) {
      return Invalid(Name(key),
                     ": must be a time such as 2026-01-31T12:00:00+00:00");
    }
    return absl::OkStatus();
  }

  // The list's elements, at most `most`.
  absl::StatusOr<const Json*> ReadList(const char* key, size_t most) const {
    const Json* value = Find(key);
    if (value == nullptr || !value->is_array() || value->size() > most) {
      return Invalid(Name(key), ": must be a list of at most ", most);
    }
    return value;
  }

 private:
  const Json* Find(const char* key) const {
    auto it = object_.find(key);
    return it == object_.end() ? nullptr : &*it;
  }
  std::string Name(const char* key) const {
    return where_.empty() ? key : absl::StrCat(where_, ".", key);
  }

  const Json& object_;
  const std::string where_;
};

OrderedJson ToJson(const SavedLimits& limits) {
  OrderedJson json = {
      {"tenant", limits.tenant},   {"name", limits.name},
      {"min", limits.min.count()}, {"max", limits.max.count()},
      {"weight", limits.weight},   {"revision", limits.revision}};
  if (limits.unused_since != absl::InfiniteFuture()) {
    json["unused_since"] = TimeText(limits.unused_since);
  }
  return json;
}

OrderedJson ToJson(const SavedSession& session) {
  return {{"tenant", session.tenant},
          {"instance", session.instance},
          {"member", session.member},
          {"rank", session.rank},
          {"pid", session.pid},
          {"start_time", session.start_time},
          {"process_inode", session.process_inode}};
}

absl::Status FromJson(const ObjectReader& reader, SavedLimits& limits) {
  RETURN_IF_ERROR(reader.CheckIsObject());
  RETURN_IF_ERROR(reader.Read("tenant", limits.tenant));
  RETURN_IF_ERROR(reader.Read("name", limits.name));
  RETURN_IF_ERROR(reader.Read("min", limits.min));
  RETURN_IF_ERROR(reader.Read("max", limits.max));
  RETURN_IF_ERROR(reader.Read("weight", limits.weight));
  RETURN_IF_ERROR(reader.Read("revision", limits.revision));
  return reader.ReadIfPresent("unused_since", limits.unused_since);
}

absl::Status FromJson(const ObjectReader& reader, SavedSession& session) {
  RETURN_IF_ERROR(reader.CheckIsObject());
  RETURN_IF_ERROR(reader.Read("tenant", session.tenant));
  RETURN_IF_ERROR(reader.Read("instance", session.instance));
  RETURN_IF_ERROR(reader.Read("member", session.member));
  RETURN_IF_ERROR(reader.Read("rank", session.rank));
  RETURN_IF_ERROR(reader.Read("pid", session.pid));
  RETURN_IF_ERROR(reader.Read("start_time", session.start_time));
  return reader.Read("process_inode", session.process_inode);
}

std::string Where(const char* list, size_t i) {
  return absl::StrCat(list, "[", i, "]");
}

template <typename Entry>
absl::Status ReadEntries(const ObjectReader& root, const char* key, size_t most,
                         std::vector<Entry>& entries) {
  ASSIGN_OR_RETURN(const Json* list, root.ReadList(key, most));
  entries.resize(list->size());
  for (size_t i = 0; i < entries.size(); ++i) {
    RETURN_IF_ERROR(
        FromJson(ObjectReader((*list)[i], Where(key, i)), entries[i]));
  }
  return absl::OkStatus();
}

// One entry a line.
template <typename Entry>
std::string FormatEntries(const std::vector<Entry>& entries) {
  std::string text = "[";
  for (size_t i = 0; i < entries.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? "\n  " : ",\n  ", Dump(ToJson(entries[i])));
  }
  absl::StrAppend(&text, entries.empty() ? "]" : "\n]");
  return text;
}

}  // namespace

absl::Status CheckState(const BrokerState& state) {
  if (state.limits.size() > kMaxSavedLimits) {
    return Invalid("limits: must be a list of at most ", kMaxSavedLimits);
  }
  if (state.sessions.size() > kMaxSavedSessions) {
    return Invalid("sessions: must be a list of at most ", kMaxSavedSessions);
  }
  std::set<std::pair<std::string_view, std::string_view>> names;
  for (size_t i = 0; i < state.limits.size(); ++i) {
    const SavedLimits& limits = state.limits[i];
    const std::string where = Where("limits", i);
    RETURN_IF_ERROR(CheckTenant(where, limits.tenant));
    RETURN_IF_ERROR(CheckName(where + ".name", limits.name));
    if (!names.emplace(limits.tenant, limits.name).second) {
      return Invalid(where, ".name: ", limits.name, " is there twice");
    }
    if (limits.max < Bytes(0) || limits.max > kMaxBytes) {
      return Invalid(where, ".max: must be 0 to ", kMaxBytes.count(),
                     " bytes; got ", limits.max.count());
    }
    if (limits.min < Bytes(0) || limits.min > limits.max) {
      return Invalid(where, ".min: must be 0 to max, ", limits.max.count(),
                     " bytes; got ", limits.min.count());
    }
    if (!(limits.weight > 0 && limits.weight <= kMaxWeight)) {
      return Invalid(where, ".weight: must be above 0 and at most 1,000,000; ",
                     "got ", limits.weight);
    }
    if (!IsSavableTime(limits.unused_since)) {
      return Invalid(where, ".unused_since: must be a time after 1970");
    }
  }
  for (size_t i = 0; i < state.sessions.size(); ++i) {
    const SavedSession& session = state.sessions[i];
    const std::string where = Where("sessions", i);
    RETURN_IF_ERROR(CheckTenant(where, session.tenant));
    RETURN_IF_ERROR(CheckName(where + ".instance", session.instance));
    if (session.member.size() > kMaxNameLength || !IsUtf8(session.member)) {
      return Invalid(where, ".member: must be at most ", kMaxNameLength,
                     " bytes of UTF-8");
    }
  }
  return absl::OkStatus();
}

std::string FormatState(const BrokerState& state) {
  const std::string body =
      absl::StrCat("{\n\"incarnation\": ", state.incarnation,
                   ",\n\"limits\": ", FormatEntries(state.limits),
                   ",\n\"sessions\": ", FormatEntries(state.sessions), "\n}\n");
  return Seal({.version = kStateVersion,
               .readable_by = kStateReadableBy,
               .body = body});
}

absl::StatusOr<BrokerState> ParseState(std::string_view text) {
  ASSIGN_OR_RETURN(StateEnvelope envelope, Unseal(text));
  if (envelope.readable_by > kStateVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("written by a newer broker: format ", envelope.version,
                     ", which needs a reader of format ", envelope.readable_by,
                     "; this one reads ", kStateVersion,
                     ". Start that broker again, with this file put back, or "
                     "go on without it"));
  }
  if (envelope.version < kStateVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("written in format ", envelope.version,
                     ", which no broker of this kind reads; this one reads ",
                     kStateVersion, ". Go on without the state"));
  }
  const Json json = Json::parse(envelope.body, nullptr,
                                /*allow_exceptions=*/false);
  if (json.is_discarded()) return Invalid("the body: is not JSON");
  const ObjectReader root(json, "");
  RETURN_IF_ERROR(root.CheckIsObject());
  BrokerState state;
  RETURN_IF_ERROR(root.Read("incarnation", state.incarnation));
  RETURN_IF_ERROR(ReadEntries(root, "limits", kMaxSavedLimits, state.limits));
  RETURN_IF_ERROR(
      ReadEntries(root, "sessions", kMaxSavedSessions, state.sessions));
  RETURN_IF_ERROR(CheckState(state));
  return state;
}

}  // namespace kvbroker
