#include "broker/config/config_file.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <set>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/base/status_macros.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {
namespace {

// Beyond that it is not a configuration.
constexpr size_t kMaxFileBytes = 1 << 20;

std::string Where(const std::string& name, const YAML::Node& node) {
  // yaml-cpp counts lines from 0.
  return absl::StrCat(name, " line ", node.Mark().line + 1, ": ");
}

// Keys that stand directly below `section` ("" or "policy.").
std::vector<std::string> KeysBelow(const std::string& section) {
  std::vector<std::string> keys;
  for (const Setting& setting : Settings()) {
    std::string_view key = setting.key;
    if (!key.starts_with(section)) continue;
    key.remove_prefix(section.size());
    const size_t dot = key.find('.');
    std::string name(key.substr(0, dot));
    if (keys.empty() || keys.back() != name) keys.push_back(std::move(name));
  }
  return keys;
}

// A scalar, or a list of them with commas between.
absl::StatusOr<std::string> ValueText(const YAML::Node& node,
                                      const std::string& where,
                                      const std::string& key) {
  if (node.IsScalar()) return node.Scalar();
  if (node.IsNull()) return std::string();
  if (node.IsSequence()) {
    std::vector<std::string> words;
    for (const YAML::Node& word : node) {
      if (!word.IsScalar()) break;
      words.push_back(word.Scalar());
    }
    if (words.size() == node.size()) return absl::StrJoin(words, ",");
  }
  return absl::InvalidArgumentError(
      absl::StrCat(where, key, " must be a single value"));
}

absl::Status ReadSection(const YAML::Node& node, const std::string& section,
                         const std::string& name, BrokerConfig& config) {
  if (!node.IsMap()) {
    return absl::InvalidArgumentError(
        absl::StrCat(Where(name, node), section.empty() ? "the file" : section,
                     " must be lines of the form \"key: value\""));
  }
  std::set<std::string> seen;
  for (const auto& entry : node) {
    const std::string where = Where(name, entry.first);
    const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : "?";
    if (!seen.insert(key).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, section, key, " is given twice"));
    }
    const std::string full = section + key;
    if (const Setting* setting = FindSetting(full)) {
      ASSIGN_OR_RETURN(std::string value, ValueText(entry.second, where, full));
      RETURN_IF_ERROR(ReadSetting(*setting, value, where, config));
    } else if (!KeysBelow(full + ".").empty()) {
      RETURN_IF_ERROR(ReadSection(entry.second, full + ".", name, config));
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat(where, "unknown key ", section, key,
                       SuggestKey(key, KeysBelow(section))));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ReadConfigFile(const std::string& path, BrokerConfig& config) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoToStatus(errno, "open of config file " + path);
  std::string text(kMaxFileBytes + 1, '\0');
  size_t size = 0;
  for (;;) {
    ssize_t got = read(fd.get(), text.data() + size, text.size() - size);
    if (got < 0) return ErrnoToStatus(errno, "read of config file " + path);
    if (got == 0) break;
    size += got;
    if (size > kMaxFileBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("the config file is longer than a megabyte: ", path));
    }
  }
  text.resize(size);
  return ReadConfigText(text, path, config);
}

absl::Status ReadConfigText(const std::string& text, const std::string& name,
                            BrokerConfig& config) {
  // yaml-cpp reports by exception; here is where they end.
  try {
    YAML::Node root = YAML::Load(text);
    if (root.IsNull()) return absl::OkStatus();
    return ReadSection(root, "", name, config);
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " line ", error.mark.line + 1, ": not valid YAML: ", error.msg));
  }
}

}  // namespace kvbroker
