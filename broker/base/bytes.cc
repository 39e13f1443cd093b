#include "broker/base/bytes.h"

#include <array>
#include <cctype>
#include <cmath>
#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvbroker {
namespace {

absl::Status NotASize(std::string_view text) {
  return absl::InvalidArgumentError(absl::StrCat(
      "not a size: use a whole or decimal number with an optional suffix K, M, "
      "G or T (1024-based), such as 512M, 2GB, 1,000 or 100_000; got \"",
      absl::string_view(text.data(), text.size()), "\""));
}

// The multiplier of a suffix, or 0 where there is no such suffix.
double SuffixFactor(std::string_view suffix) {
  std::string s =
      absl::AsciiStrToUpper(absl::string_view(suffix.data(), suffix.size()));
  if (s.empty() || s == "B") return 1;
  static constexpr std::string_view kLetters = "KMGT";
  size_t power = kLetters.find(s[0]);
  if (power == std::string_view::npos) return 0;
  std::string rest = s.substr(1);
  if (!rest.empty() && rest != "B" && rest != "IB") return 0;
  return std::ldexp(1.0, 10 * (static_cast<int>(power) + 1));
}

}  // namespace

std::string FormatBytes(Bytes bytes) {
  static constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB",
                                                        "GiB", "TiB"};
  double value = static_cast<double>(bytes.count());
  size_t unit = 0;
  while (std::abs(value) >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  if (value == std::floor(value)) {
    return absl::StrFormat("%.0f %s", value, kUnits[unit]);
  }
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

absl::StatusOr<Bytes> ParseBytes(std::string_view text) {
  absl::string_view trimmed =
      absl::StripAsciiWhitespace(absl::string_view(text.data(), text.size()));
  std::string digits;
  size_t i = 0;
  for (; i < trimmed.size(); ++i) {
    char c = trimmed[i];
    if (std::isdigit(static_cast<unsigned char>(c)) || c == '.') {
      digits += c;
    } else if ((c == ',' || c == '_') && !digits.empty() &&
               i + 1 < trimmed.size() &&
               std::isdigit(static_cast<unsigned char>(trimmed[i + 1]))) {
      continue;  // a thousands separator
    } else {
      break;
    }
  }
  absl::string_view suffix = absl::StripAsciiWhitespace(trimmed.substr(i));
  double factor = SuffixFactor(std::string_view(suffix.data(), suffix.size()));
  if (digits.empty() || factor == 0) return NotASize(text);

  if (int64_t whole; absl::SimpleAtoi(digits, &whole)) {
    // Whole numbers stay exact to the byte.
    if (whole > kMaxBytes.count() / static_cast<int64_t>(factor)) {
      return NotASize(text);
    }
    return Bytes(whole * static_cast<int64_t>(factor));
  }
  double value;
  if (!absl::SimpleAtod(digits, &value) || !std::isfinite(value)) {
    return NotASize(text);
  }
  double total = value * factor;
  if (total > static_cast<double>(kMaxBytes.count())) return NotASize(text);
  return Bytes(static_cast<int64_t>(total));
}

}  // namespace kvbroker
