#include "client/cli/operands.h"

#include <optional>

#include "absl/algorithm/container.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "broker/base/status_macros.h"

namespace kvbroker::cli {
namespace {

// Digits with at most one point: neither signs nor exponents, "nan" or "inf".
std::optional<double> ParsePlainNumber(absl::string_view text) {
  auto plain = [](char c) { return absl::ascii_isdigit(c) || c == '.'; };
  double value;
  if (!absl::c_all_of(text, plain) || !absl::SimpleAtod(text, &value)) {
    return std::nullopt;
  }
  return value;
}

}  // namespace

absl::StatusOr<Percent> ParsePercent(const std::string& text) {
  absl::string_view number = absl::StripAsciiWhitespace(text);
  absl::ConsumeSuffix(&number, "%");
  std::optional<double> value =
      ParsePlainNumber(absl::StripTrailingAsciiWhitespace(number));
  if (!value.has_value() || *value > 100) {
    return absl::InvalidArgumentError(absl::StrCat(
        "not a percent: use a number from 0 to 100, such as 50 or 12.5; got \"",
        text, "\""));
  }
  return Percent{*value};
}

absl::StatusOr<Amount> ParseAmount(const std::string& text) {
  if (absl::EndsWith(absl::StripAsciiWhitespace(text), "%")) {
    ASSIGN_OR_RETURN(Percent percent, ParsePercent(text));
    return Amount(percent);
  }
  ASSIGN_OR_RETURN(Bytes bytes, ParseBytes(text));
  return Amount(bytes);
}

absl::StatusOr<double> ParseWeight(const std::string& text) {
  std::optional<double> value = ParsePlainNumber(text);
  // Beyond this, shares of bytes lose their meaning.
  if (!value.has_value() || *value <= 0 || *value > 1e6) {
    return absl::InvalidArgumentError(absl::StrCat(
        "not a weight: use a number above 0 and up to 1000000, such "
        "as 1 or 2.5; got \"",
        text, "\""));
  }
  return *value;
}

absl::StatusOr<absl::Duration> ParseSeconds(const std::string& text,
                                            absl::Duration least) {
  std::optional<double> value = ParsePlainNumber(text);
  if (!value.has_value() || absl::Seconds(*value) < least) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a number of seconds: use a number of at least ",
                     absl::ToDoubleSeconds(least), "; got \"", text, "\""));
  }
  return absl::Seconds(*value);
}

absl::StatusOr<absl::Duration> ParseExchangeTimeout(const std::string& text) {
  absl::string_view number = text;
  bool negative = absl::ConsumePrefix(&number, "-");
  std::optional<double> value = ParsePlainNumber(number);
  if (!value.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "KVCACHED_IPC_TIMEOUT is no number of seconds (0 or below: "
        "no limit); got \"",
        text, "\""));
  }
  if (negative || *value == 0) return absl::InfiniteDuration();
  return absl::Seconds(*value);
}

}  // namespace kvbroker::cli
