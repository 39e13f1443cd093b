#include "broker/config/broker_config.h"

#include <algorithm>
#include <cmath>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

absl::string_view View(std::string_view text) {
  return absl::string_view(text.data(), text.size());
}

absl::Status NotAllowed() { return absl::InvalidArgumentError(""); }

Setting Text(const char* key, const char* allowed, const char* meaning,
             std::string BrokerConfig::*field) {
  return {key, allowed, meaning,
          [field](const std::string& value, BrokerConfig& config) {
            config.*field = value;
            return absl::OkStatus();
          },
          [field](const BrokerConfig& config) { return config.*field; }};
}

Setting OneOf(const char* key, const char* allowed, const char* meaning,
              std::string BrokerConfig::*field) {
  return {key, allowed, meaning,
          [field, allowed](const std::string& value, BrokerConfig& config) {
            std::vector<std::string> words = absl::StrSplit(allowed, ", ");
            if (!absl::c_linear_search(words, value)) return NotAllowed();
            config.*field = value;
            return absl::OkStatus();
          },
          [field](const BrokerConfig& config) { return config.*field; }};
}

constexpr char kDuration[] = "a duration such as 500ms, 2s or 1m";

absl::Status ReadDuration(const std::string& value, absl::Duration& duration) {
  absl::Duration parsed;
  if (!absl::ParseDuration(value, &parsed) || parsed < absl::ZeroDuration() ||
      parsed == absl::InfiniteDuration()) {
    return NotAllowed();
  }
  duration = parsed;
  return absl::OkStatus();
}

Setting PolicyTime(const char* key, const char* meaning,
                   absl::Duration PolicyConfig::*field) {
  return {key, kDuration, meaning,
          [field](const std::string& value, BrokerConfig& config) {
            return ReadDuration(value, config.policy.*field);
          },
          [field](const BrokerConfig& config) {
            return absl::FormatDuration(config.policy.*field);
          }};
}

Setting Quota(const char* key, const char* meaning, uint32_t Quotas::*field) {
  return {key, "a number above 0", meaning,
          [field](const std::string& value, BrokerConfig& config) {
            uint32_t number;
            if (!absl::SimpleAtoi(value, &number) || number == 0) {
              return NotAllowed();
            }
            config.quotas.*field = number;
            return absl::OkStatus();
          },
          [field](const BrokerConfig& config) {
            return absl::StrCat(config.quotas.*field);
          }};
}

absl::Status ReadBytes(const std::string& value, Bytes& bytes) {
  absl::StatusOr<Bytes> parsed = ParseBytes(value);
  if (!parsed.ok()) return NotAllowed();
  bytes = *parsed;
  return absl::OkStatus();
}

absl::Status ReadCapacity(const std::string& value, BrokerConfig& config) {
  CapacityWish wish;
  absl::string_view text = value;
  if (absl::ConsumeSuffix(&text, "%")) {
    double percent;
    // Written so that NaN fails too.
    if (!absl::SimpleAtod(text, &percent) || !(percent > 0 && percent <= 100)) {
      return NotAllowed();
    }
    wish.percent = percent;
  } else if (text != "auto") {
    Bytes bytes;
    RETURN_IF_ERROR(ReadBytes(value, bytes));
    if (bytes <= Bytes(0)) return NotAllowed();
    wish.bytes = bytes;
  }
  config.capacity = wish;
  return absl::OkStatus();
}

std::string WriteCapacity(const BrokerConfig& config) {
  if (config.capacity.bytes) {
    return absl::StrCat(config.capacity.bytes->count());
  }
  if (config.capacity.percent) {
    return absl::StrCat(*config.capacity.percent, "%");
  }
  return "auto";
}

absl::Status ReadUids(const std::string& value, BrokerConfig& config) {
  std::vector<uint32_t> uids;
  for (absl::string_view word : absl::StrSplit(value, ',', absl::SkipEmpty())) {
    uint32_t uid;
    if (!absl::SimpleAtoi(absl::StripAsciiWhitespace(word), &uid)) {
      return NotAllowed();
    }
    uids.push_back(uid);
  }
  config.allow_uids = std::move(uids);
  return absl::OkStatus();
}

absl::Status ReadFence(const std::string& value, BrokerConfig& config) {
  if (value != "true" && value != "false") return NotAllowed();
  config.policy.fence_ignoring = value == "true";
  return absl::OkStatus();
}

absl::Status ReadIdleExit(const std::string& value, BrokerConfig& config) {
  if (value == "never") {
    config.idle_exit = absl::InfiniteDuration();
    return absl::OkStatus();
  }
  return ReadDuration(value, config.idle_exit);
}

std::string WriteIdleExit(const BrokerConfig& config) {
  if (config.idle_exit == absl::InfiniteDuration()) return "never";
  return absl::FormatDuration(config.idle_exit);
}

// How many letters apart two words are (inserted, left out, exchanged).
size_t Distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t change = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

const std::vector<Setting>& Settings() {
  static const auto* const settings = new std::vector<Setting>{
      OneOf("backend", "auto, host, cuda, cuda_ipc",
            "Where memory comes from; auto is the best for the GPU, else host.",
            &BrokerConfig::backend),
      Text("gpu", "a GPU's index or uuid",
           "Which GPU to serve; one broker each.", &BrokerConfig::gpu),
      Text("device_uuid", "letters, digits, - and _",
           "Name of the device, for the host backend.",
           &BrokerConfig::device_uuid),
      {"capacity", "a size such as 16G, a percentage such as 80%, or auto",
       "What may be lent; auto is all but headroom, on the host half the "
       "machine.",
       ReadCapacity, WriteCapacity},
      {"headroom", "a size such as 2G",
       "What of the device's memory stays untouched.",
       [](const std::string& value, BrokerConfig& config) {
         return ReadBytes(value, config.headroom);
       },
       [](const BrokerConfig& config) {
         return absl::StrCat(config.headroom.count());
       }},
      Text(
          "socket_dir", "a directory",
          "Where the sockets are; /run/kvbroker for root, else the user's own.",
          &BrokerConfig::socket_dir),
      Text("socket_group", "a group's name or number",
           "Besides root and the broker's user, members may connect.",
           &BrokerConfig::socket_group),
      {"allow_uids", "user ids, separated by commas",
       "These users may connect too.", ReadUids,
       [](const BrokerConfig& config) {
         return absl::StrJoin(config.allow_uids, ",");
       }},
      OneOf("charge", "broker, engine",
            "Whom the device's tools charge for lent pages: nobody, since the "
            "broker holds them, or each engine for what it maps.",
            &BrokerConfig::charge),
      OneOf("tenant_by", "uid_pidns, uid, socket",
            "What tells tenants apart, who share neither names nor pages.",
            &BrokerConfig::tenant_by),
      Text("lock_dir", "a directory",
           "Where brokers of one device see each other, of whatever user.",
           &BrokerConfig::lock_dir),
      Text("state_dir", "a directory, or none",
           "What outlives a restart: limits, and who was connected; "
           "/var/lib/kvbroker for root, else the user's own.",
           &BrokerConfig::state_dir),
      {"resume_grace", kDuration,
       "After a restart no memory is granted until the engines of before have "
       "said what they hold, for so long at most.",
       [](const std::string& value, BrokerConfig& config) {
         return ReadDuration(value, config.resume_grace);
       },
       [](const BrokerConfig& config) {
         return absl::FormatDuration(config.resume_grace);
       }},
      PolicyTime("policy.reclaim_patience",
                 "A claim below its share waits so long before others preempt.",
                 &PolicyConfig::patience),
      PolicyTime("policy.hold_off",
                 "Who had to preempt stays within its share for so long.",
                 &PolicyConfig::hold_off),
      PolicyTime("policy.reclaim_deadline",
                 "A holder that gives nothing for so long ignores the order.",
                 &PolicyConfig::reclaim_deadline),
      PolicyTime(
          "policy.ageing",
          "A waiting claim's weight counts once more after each of these.",
          &PolicyConfig::ageing),
      PolicyTime("policy.limit_patience",
                 "Use above a lowered limit may end by itself for so long.",
                 &PolicyConfig::limit_patience),
      {"policy.fence", "true, false",
       "End the processes that ignore an order past its deadline.", ReadFence,
       [](const BrokerConfig& config) -> std::string {
         return config.policy.fence_ignoring ? "true" : "false";
       }},
      Quota("quota.connections",
            "Connections of one user, those included that ended just now.",
            &Quotas::connections),
      Quota("quota.half_open",
            "Connections of one user that have not opened a session yet.",
            &Quotas::half_open),
      Quota("quota.sessions", "Sessions of one user.", &Quotas::sessions),
      Quota("quota.instances", "Instances of one tenant.", &Quotas::instances),
      OneOf("log_level", "debug, info, warn, error, off",
            "The least that is logged.", &BrokerConfig::log_level),
      Text("log_file", "a file", "Log there too, besides stderr.",
           &BrokerConfig::log_file),
      Text("history_file", "a file",
           "Append every decision as a JSON line, to be checked afterwards.",
           &BrokerConfig::history_file),
      {"idle_exit", "a duration such as 30s, or never",
       "Leave when no engine has been connected for so long.", ReadIdleExit,
       WriteIdleExit},
  };
  return *settings;
}

const Setting* FindSetting(std::string_view key) {
  for (const Setting& setting : Settings()) {
    if (key == setting.key) return &setting;
  }
  return nullptr;
}

std::string SuggestKey(std::string_view unknown,
                       const std::vector<std::string>& known) {
  auto nearest = absl::c_min_element(
      known, [&](const std::string& a, const std::string& b) {
        return Distance(unknown, a) < Distance(unknown, b);
      });
  if (nearest != known.end() && Distance(unknown, *nearest) <= 3) {
    return absl::StrCat("; did you mean ", *nearest, "?");
  }
  return absl::StrCat("; known are ", absl::StrJoin(known, ", "));
}

absl::Status ReadSetting(const Setting& setting, const std::string& value,
                         std::string_view where, BrokerConfig& config) {
  if (setting.read(value, config).ok()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(View(where), setting.key,
                                                 " must be ", setting.allowed,
                                                 "; got \"", value, "\""));
}

std::string EnvironmentName(const Setting& setting) {
  return absl::StrCat("KVBROKERD_", absl::AsciiStrToUpper(absl::StrReplaceAll(
                                        setting.key, {{".", "_"}})));
}

absl::Status ReadEnvironment(
    const std::function<const char*(const char*)>& lookup,
    BrokerConfig& config) {
  for (const Setting& setting : Settings()) {
    const std::string name = EnvironmentName(setting);
    const char* value = lookup(name.c_str());
    if (value == nullptr) continue;
    RETURN_IF_ERROR(
        ReadSetting(setting, value,
                    absl::StrCat("environment variable ", name, ": "), config));
  }
  return absl::OkStatus();
}

namespace {

// Whether YAML cannot see anything but this text in it.
bool IsPlain(const std::string& value) {
  const bool begins =
      !value.empty() && (absl::ascii_isalnum(value[0]) || value[0] == '/');
  return begins && !absl::EqualsIgnoreCase(value, "null") &&
         absl::c_all_of(value, [](char c) {
           return absl::ascii_isalnum(c) || absl::StrContains("._/-%", c);
         });
}

// In YAML's double quotes, whatever it holds.
std::string Quoted(const std::string& value) {
  std::string quoted = "\"";
  for (char c : value) {
    if (absl::ascii_iscntrl(c)) {
      absl::StrAppend(
          &quoted, "\\x",
          absl::Hex(static_cast<unsigned char>(c), absl::kZeroPad2));
      continue;
    }
    if (c == '"' || c == '\\') quoted.push_back('\\');
    quoted.push_back(c);
  }
  quoted.push_back('"');
  return quoted;
}

}  // namespace

std::string PrintConfig(const BrokerConfig& config) {
  std::string text;
  bool in_policy = false;
  for (const Setting& setting : Settings()) {
    absl::string_view key = setting.key;
    const bool policy = absl::ConsumePrefix(&key, "policy.");
    if (policy && !in_policy) absl::StrAppend(&text, "policy:\n");
    in_policy = policy;
    std::string value = setting.write(config);
    if (!IsPlain(value)) value = Quoted(value);
    absl::StrAppend(&text, policy ? "  " : "", key, ": ", value, "\n");
  }
  return text;
}

absl::StatusOr<Bytes> ResolveSlab(const BrokerConfig& config, Bytes total,
                                  Bytes used) {
  if (config.capacity.bytes || config.capacity.percent) {
    return ResolveCapacity(config, "cuda_ipc", total);
  }
  const Bytes slab = total - used - config.headroom;
  if (slab > Bytes(0)) return slab;
  return absl::InvalidArgumentError(
      absl::StrCat("headroom must leave something of the device's memory, ",
                   FormatBytes(total), ", beside what is in use, ",
                   FormatBytes(used), "; got ", FormatBytes(config.headroom)));
}

absl::StatusOr<Bytes> ResolveCapacity(const BrokerConfig& config,
                                      std::string_view backend, Bytes total) {
  // The host's total is what the backend takes of the machine, not all of it.
  Bytes capacity = backend == "host" ? total : total - config.headroom;
  if (config.capacity.bytes) {
    capacity = *config.capacity.bytes;
  } else if (config.capacity.percent) {
    capacity = Bytes(
        static_cast<int64_t>(std::floor(static_cast<double>(total.count()) *
                                        (*config.capacity.percent / 100))));
  }
  if (capacity > total) {
    return absl::InvalidArgumentError(
        absl::StrCat("capacity must be at most the device's memory, ",
                     FormatBytes(total), "; got ", FormatBytes(capacity)));
  }
  if (capacity <= Bytes(0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "headroom must leave something of the device's memory, ",
        FormatBytes(total), "; got ", FormatBytes(config.headroom)));
  }
  return capacity;
}

}  // namespace kvbroker
