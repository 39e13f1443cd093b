#include "broker/state/state_envelope.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "broker/state/crc32.h"

namespace kvbroker {
namespace {

constexpr std::string_view kMagic = "kvbroker-state ";

absl::string_view View(std::string_view text) {
  return absl::string_view(text.data(), text.size());
}

// The number behind `key` at the head of `line`, which both are taken off.
bool TakeNumber(std::string_view key, std::string_view& line,
                uint64_t& number) {
  if (!line.starts_with(key)) return false;
  line.remove_prefix(key.size());
  const size_t end = std::min(line.find(' '), line.size());
  if (!absl::SimpleAtoi(View(line.substr(0, end)), &number)) return false;
  line.remove_prefix(std::min(end + 1, line.size()));
  return true;
}

}  // namespace

std::string Seal(const StateEnvelope& envelope) {
  std::string text =
      absl::StrCat(View(kMagic), "version=", envelope.version,
                   " readable_by=", envelope.readable_by,
                   " body_bytes=", envelope.body.size(), " crc32=");
  const uint32_t crc = ExtendCrc32(Crc32(text), envelope.body);
  absl::StrAppendFormat(&text, "%08x\n", crc);
  text.append(envelope.body);
  return text;
}

absl::StatusOr<StateEnvelope> Unseal(std::string_view text) {
  if (text.empty()) return absl::DataLossError("the file is empty");
  if (!text.starts_with(kMagic.substr(0, text.size()))) {
    return absl::DataLossError("not a broker's saved state");
  }
  const size_t end = text.find('\n');
  if (end == std::string_view::npos) {
    return absl::DataLossError("the file ends within its first line");
  }
  std::string_view line = text.substr(0, end);
  StateEnvelope envelope;
  envelope.body = text.substr(end + 1);
  line.remove_prefix(kMagic.size());
  uint64_t version, readable_by, body_bytes;
  if (!TakeNumber("version=", line, version) ||
      !TakeNumber("readable_by=", line, readable_by) ||
      !TakeNumber("body_bytes=", line, body_bytes) || version > UINT32_MAX ||
      readable_by > UINT32_MAX) {
    return absl::DataLossError("the first line is damaged");
  }
  if (body_bytes != envelope.body.size()) {
    return absl::DataLossError(
        absl::StrCat("the file is torn: ", envelope.body.size(), " of ",
                     body_bytes, " bytes are there"));
  }
  envelope.version = static_cast<uint32_t>(version);
  envelope.readable_by = static_cast<uint32_t>(readable_by);
  // There is one way to write each line: what differs is damage.
  if (text != Seal(envelope)) {
    return absl::DataLossError("the checksum is not that of the file");
  }
  return envelope;
}

}  // namespace kvbroker
