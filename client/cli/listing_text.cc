#include "client/cli/listing_text.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "broker/base/bytes.h"
#include "client/cli/table.h"

namespace kvbroker::cli {
namespace {

std::string Size(uint64_t bytes) {
  return FormatBytes(Bytes(static_cast<int64_t>(bytes)));
}

// As much of each uuid as tells the devices apart, and never less than a person
// would know a GPU by: "GPU-1a2b3c4d".
size_t UuidWidth(const Listing& listing) {
  constexpr size_t kLeast = 12;
  size_t width = kLeast;
  const auto& answers = listing.answers;
  for (size_t i = 0; i < answers.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const std::string& a = answers[i].device_uuid;
      const std::string& b = answers[j].device_uuid;
      size_t common =
          std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()),
                        b.begin())
              .first -
          a.begin();
      width = std::max(width, common + 1);
    }
  }
  return width;
}

std::string DeviceLine(const Listing::Answer& answer) {
  const v1::BrokerStatus& broker = answer.response.broker();
  Bytes capacity(static_cast<int64_t>(broker.capacity_bytes()));
  Bytes lent(static_cast<int64_t>(broker.held_bytes()));
  Bytes others(static_cast<int64_t>(broker.others_bytes()));
  std::string line = absl::StrCat(
      answer.device_uuid, " (", broker.backend(), ")  capacity ",
      FormatBytes(capacity), "  lent ", FormatBytes(lent), "  free ",
      FormatBytes(std::max(Bytes(0), capacity - others - lent)));
  if (others > Bytes(0)) {
    absl::StrAppend(&line, "  others ", FormatBytes(others));
  }
  if (!broker.state().empty() && broker.state() != "serving") {
    absl::StrAppend(&line, "  ", broker.state());
  }
  if (!broker.device_error().empty()) {
    absl::StrAppend(&line, "\n  ", broker.device_error());
  }
  return line + "\n";
}

Table::Cell UsedPercent(const v1::InstanceStatus& instance) {
  uint64_t used = instance.in_use_bytes();
  uint64_t limit = instance.max_bytes();
  if (limit == 0) {
    // Nothing is allowed: whatever is used is too much, and no percent of it.
    return used == 0 ? Table::Cell("-") : Table::Cell("over", Color::kRed);
  }
  double percent =
      100.0 * static_cast<double>(used) / static_cast<double>(limit);
  Color color = percent < 50   ? Color::kGreen
                : percent < 80 ? Color::kYellow
                               : Color::kRed;
  return Table::Cell(absl::StrFormat("%.0f %%", percent), color);
}

std::string Pids(const v1::InstanceStatus& instance) {
  constexpr int kShown = 3;
  std::vector<uint32_t> shown(
      instance.pids().begin(),
      instance.pids().begin() + std::min(kShown, instance.pids_size()));
  std::string text = shown.empty() ? "-" : absl::StrJoin(shown, ",");
  if (instance.pids_size() > kShown) {
    absl::StrAppend(&text, ",+", instance.pids_size() - kShown);
  }
  return text;
}

std::string ClaimsTable(const v1::ExplainResponse& explanation) {
  Table table({{"POOL", Align::kRight},
               {"CLAIM", Align::kRight},
               {"PAGES", Align::kRight},
               {"AT LEAST", Align::kRight},
               {"PAGE", Align::kRight},
               {"WAITING", Align::kRight},
               {"STATE"}});
  for (const v1::ClaimStatus& claim : explanation.claims()) {
    table.AddRow(
        {absl::StrCat(claim.pool_id()), absl::StrCat(claim.sequence()),
         absl::StrCat(claim.want_pages()), absl::StrCat(claim.at_least_pages()),
         Size(claim.page_bytes()),
         absl::StrFormat("%.1f ms", claim.waiting_ms()), claim.state()});
  }
  return table.Render(/*color=*/false);
}

}  // namespace

std::string BytesInWords(uint64_t bytes) {
  return absl::StrCat(Size(bytes), " (", bytes, " bytes)");
}

std::string ListingToText(const Listing& listing, bool color) {
  Table table({{"NAME"},
               {"LIMIT", Align::kRight},
               {"USED", Align::kRight},
               {"%", Align::kRight},
               {"IDLE", Align::kRight},
               {"CACHED", Align::kRight},
               {"WAITING", Align::kRight},
               {"GPU"},
               {"PIDS"},
               {"TENANT"},
               {"PRESSURE"}});
  const size_t uuid_width = UuidWidth(listing);
  std::string text;
  bool any = false;
  for (const Listing::Answer& answer : listing.answers) {
    text += DeviceLine(answer);
    for (const v1::InstanceStatus& instance : answer.response.instances()) {
      any = true;
      table.AddRow({instance.name(), Size(instance.max_bytes()),
                    Size(instance.in_use_bytes()), UsedPercent(instance),
                    Size(instance.idle_bytes()), Size(instance.cached_bytes()),
                    Size(instance.waiting_bytes()),
                    answer.device_uuid.substr(0, uuid_width), Pids(instance),
                    instance.tenant(), instance.pressure()});
    }
  }
  return text + (any ? table.Render(color)
                     : "No instances yet: they appear as engines connect.\n");
}

std::string ExplanationToText(const v1::ExplainResponse& explanation) {
  std::string text;
  for (const std::string& line : explanation.lines()) {
    absl::StrAppend(&text, line, "\n");
  }
  if (explanation.claims_size() > 0) text += ClaimsTable(explanation);
  return text;
}

}  // namespace kvbroker::cli
