#include "broker/transport/status_convert.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "proto/convert.h"
#include "proto/kvbroker/v1/admin.pb.h"
#include "proto/kvbroker/v1/types.pb.h"

namespace kvbroker {
namespace {

uint64_t ToWireBytes(Bytes bytes) {
  return static_cast<uint64_t>(std::max<int64_t>(bytes.count(), 0));
}

absl::StatusOr<Bytes> FromWireBytes(const char* field, uint64_t value) {
  if (value > static_cast<uint64_t>(kMaxBytes.count())) {
    return absl::InvalidArgumentError(absl::StrCat(
        field, " must be at most ", kMaxBytes.count(), "; got ", value));
  }
  return Bytes(static_cast<int64_t>(value));
}

}  // namespace

void ToWire(const InstanceStatus& status, v1::InstanceStatus* wire) {
  wire->set_name(status.name);
  wire->set_tenant(status.tenant);
  wire->mutable_pids()->Add(status.pids.begin(), status.pids.end());
  wire->set_min_bytes(ToWireBytes(status.min));
  wire->set_max_bytes(ToWireBytes(status.max));
  wire->set_effective_limit_bytes(ToWireBytes(status.effective_limit));
  wire->set_weight(status.weight);
  wire->set_share_bytes(ToWireBytes(status.share));
  wire->set_held_bytes(ToWireBytes(status.held));
  wire->set_in_use_bytes(ToWireBytes(status.in_use));
  wire->set_cached_bytes(ToWireBytes(status.cached));
  wire->set_idle_bytes(ToWireBytes(status.idle));
  wire->set_waiting_bytes(ToWireBytes(status.waiting));
  wire->set_pressure(status.pressure);
  wire->mutable_labels()->insert(status.labels.begin(), status.labels.end());
  wire->set_grants(status.grants);
  wire->set_refusals(status.refusals);
  wire->set_reclaims(status.reclaims);
  wire->set_preempts(status.preempts);
}

void ToWire(const BrokerStatus& status, v1::BrokerStatus* wire) {
  wire->set_backend(status.backend);
  wire->set_device_uuid(status.device_uuid);
  wire->set_incarnation(status.incarnation);
  wire->set_total_bytes(ToWireBytes(status.total));
  wire->set_capacity_bytes(ToWireBytes(status.capacity));
  wire->set_held_bytes(ToWireBytes(status.held));
  wire->set_stock_bytes(ToWireBytes(status.stock));
  wire->set_sessions(status.sessions);
  wire->set_uptime_seconds(absl::ToDoubleSeconds(status.uptime));
  wire->set_state(!status.device_error.empty() ? "lost"
                  : status.draining            ? "draining"
                                               : "serving");
  wire->set_device_error(status.device_error);
  wire->set_others_bytes(ToWireBytes(status.others));
  wire->set_foreign_bytes(ToWireBytes(status.foreign));
  wire->set_declared_bytes(ToWireBytes(status.declared));
}

void ToWire(const ClaimStatus& status, v1::ClaimStatus* wire) {
  wire->set_sequence(status.sequence.value());
  wire->set_pool_id(status.pool.value());
  wire->set_want_pages(std::max<PageCount>(status.want, 0));
  wire->set_at_least_pages(std::max<PageCount>(status.at_least, 0));
  wire->set_page_bytes(ToWireBytes(status.page_bytes));
  wire->set_waiting_ms(absl::ToDoubleMilliseconds(status.waiting));
  wire->set_state(status.state);
}

void ToWire(const Explanation& explanation, v1::ExplainResponse* wire) {
  ToWire(explanation.instance, wire->mutable_instance());
  for (const std::string& line : explanation.lines) wire->add_lines(line);
  for (const ClaimStatus& claim : explanation.claims) {
    ToWire(claim, wire->add_claims());
  }
}

absl::StatusOr<PolicyChange> FromWire(const v1::SetPolicyRequest& wire) {
  PolicyChange change;
  if (wire.has_min_bytes()) {
    ASSIGN_OR_RETURN(change.min, FromWireBytes("min_bytes", wire.min_bytes()));
  }
  if (wire.has_max_bytes()) {
    ASSIGN_OR_RETURN(change.max, FromWireBytes("max_bytes", wire.max_bytes()));
  }
  if (wire.has_max_percent()) {
    if (wire.has_max_bytes()) {
      return absl::InvalidArgumentError(
          "max_bytes and max_percent exclude each other: give one of them");
    }
    // Written so that NaN fails too.
    if (!(wire.max_percent() > 0 && wire.max_percent() <= 100)) {
      return absl::InvalidArgumentError(
          absl::StrCat("max_percent must be above 0 and at most 100; got ",
                       wire.max_percent()));
    }
    change.max_percent = wire.max_percent();
  }
  if (wire.has_weight()) {
    if (!(wire.weight() > 0 && wire.weight() <= kMaxWeight)) {
      return absl::InvalidArgumentError(
          absl::StrCat("weight must be above 0 and at most ", kMaxWeight,
                       "; got ", wire.weight()));
    }
    change.weight = wire.weight();
  }
  change.preset = wire.preset();
  return change;
}

}  // namespace kvbroker
