#include "proto/convert.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "proto/kvbroker/v1/session.pb.h"
#include "proto/kvbroker/v1/types.pb.h"

namespace kvbroker {
namespace {

// Enums go across as their number: the wire's only has an UNSPECIFIED more.
static_assert(int{v1::LAYOUT_CONTIGUOUS} == int(Layout::kContiguous) &&
              int{v1::LAYOUT_PER_LAYER} == int(Layout::kPerLayer));
static_assert(int{v1::TIER_IDLE} == int(Tier::kIdle) &&
              int{v1::TIER_CACHED} == int(Tier::kCached) &&
              int{v1::TIER_CLOSING} == int(Tier::kClosing) &&
              int{v1::TIER_PREEMPT} == int(Tier::kPreempt));
static_assert(int{v1::Open::ROLE_ENGINE} == int(Role::kEngine) &&
              int{v1::Open::ROLE_WORKER} == int(Role::kWorker));
static_assert(int{v1::Acquire::URGENCY_SPECULATIVE} ==
                  int(Urgency::kSpeculative) &&
              int{v1::Acquire::URGENCY_WAITING} == int(Urgency::kWaiting) &&
              int{v1::Acquire::URGENCY_RUNNING} == int(Urgency::kRunning));

static_assert(int{v1::Open::NAME_CONFLICT_JOIN} == int(NameConflict::kJoin) &&
              int{v1::Open::NAME_CONFLICT_SUFFIX} ==
                  int(NameConflict::kSuffix) &&
              int{v1::Open::NAME_CONFLICT_ERROR} == int(NameConflict::kError));

// ---- to the wire ----

uint64_t ToWireBytes(Bytes bytes) {
  return static_cast<uint64_t>(std::max<int64_t>(bytes.count(), 0));
}

uint32_t ToWireCount(PageCount count) {
  return static_cast<uint32_t>(
      std::clamp<PageCount>(count, 0, std::numeric_limits<uint32_t>::max()));
}

uint32_t ToWireMillis(absl::Duration duration, absl::Duration most) {
  duration = std::clamp(duration, absl::ZeroDuration(), most);
  return static_cast<uint32_t>(
      absl::ToInt64Milliseconds(absl::Ceil(duration, absl::Milliseconds(1))));
}

constexpr absl::Duration kMaxMillis =
    absl::Milliseconds(std::numeric_limits<uint32_t>::max());

template <typename WirePages>
void ToWirePages(const std::vector<PageName>& pages, WirePages* wire) {
  wire->Reserve(static_cast<int>(pages.size()));
  for (const PageName& page : pages) {
    v1::PageName* out = wire->Add();
    out->set_index(page.index.value());
    out->set_generation(page.generation.value());
  }
}

void Put(const Open& open, v1::ClientMessage* wire) {
  v1::Open* out = wire->mutable_open();
  out->set_protocol_version(open.protocol_version);
  out->set_feature_bits(open.feature_bits);
  out->set_nonce(open.nonce.data(), open.nonce.size());
  out->set_instance(open.instance);
  out->set_member(open.member);
  out->set_role(static_cast<v1::Open::Role>(open.role));
  out->set_rank(open.rank);
  for (const PoolGeometry& pool : open.pools) {
    v1::PoolGeometry* geometry = out->add_pools();
    geometry->set_handle_bytes(ToWireBytes(pool.handle_bytes));
    geometry->set_handles_per_page(pool.handles_per_page);
    geometry->set_layout(static_cast<v1::Layout>(pool.layout));
    geometry->set_max_pages(pool.max_pages);
    geometry->set_label(pool.label);
  }
  out->set_declared_peak_bytes(ToWireBytes(open.declared_peak));
  if (open.min) out->set_min_bytes(ToWireBytes(*open.min));
  if (open.max) out->set_max_bytes(ToWireBytes(*open.max));
  if (open.max_fraction) out->set_max_fraction(*open.max_fraction);
  if (open.min_fraction) out->set_min_fraction(*open.min_fraction);
  if (open.weight) out->set_weight(*open.weight);
  out->set_name_conflict(
      static_cast<v1::Open::NameConflict>(open.name_conflict));
  out->mutable_labels()->insert(open.labels.begin(), open.labels.end());
  if (open.resuming) {
    out->mutable_resuming()->set_incarnation(open.resuming->incarnation);
    out->mutable_resuming()->set_session_id(open.resuming->session.value());
  }
}

void Put(const Acquire& acquire, v1::ClientMessage* wire) {
  v1::Acquire* out = wire->mutable_acquire();
  out->set_sequence(acquire.sequence.value());
  out->set_acked(acquire.acked.value());
  out->set_pool_id(acquire.pool.value());
  out->set_want_pages(ToWireCount(acquire.want));
  out->set_at_least_pages(ToWireCount(acquire.at_least));
  out->mutable_indexes()->Reserve(static_cast<int>(acquire.indexes.size()));
  for (PageIndex index : acquire.indexes) out->add_indexes(index.value());
  out->set_urgency(static_cast<v1::Acquire::Urgency>(acquire.urgency));
  out->set_deadline_ms(ToWireMillis(acquire.deadline, kMaxDeadline));
  out->set_replaces(acquire.replaces.value());
  out->set_credit(acquire.credit);
}

void Put(const Cancel& cancel, v1::ClientMessage* wire) {
  wire->mutable_cancel()->set_sequence(cancel.sequence.value());
}

void Put(const Mapped& mapped, v1::ClientMessage* wire) {
  v1::Mapped* out = wire->mutable_mapped();
  out->set_grant_id(mapped.grant.value());
  ToWirePages(mapped.failed, out->mutable_failed());
}

void Put(const Return& returned, v1::ClientMessage* wire) {
  v1::Return* out = wire->mutable_return_();
  out->set_pool_id(returned.pool.value());
  ToWirePages(returned.pages, out->mutable_pages());
}

void Put(const ReclaimAnswer& answer, v1::ClientMessage* wire) {
  v1::ReclaimAnswer* out = wire->mutable_reclaim_answer();
  out->set_pool_id(answer.pool.value());
  out->set_revision(answer.revision.value());
  ToWirePages(answer.given, out->mutable_given());
  out->set_kept_pages(ToWireCount(answer.kept));
  out->set_reason(answer.reason.substr(0, kMaxReasonLength));
  out->set_final(answer.final);
}

void Put(const Report& report, v1::ClientMessage* wire) {
  v1::Report* out = wire->mutable_report();
  out->set_pool_id(report.pool.value());
  out->set_in_use_pages(ToWireCount(report.in_use));
  out->set_cached_pages(ToWireCount(report.cached));
  out->set_idle_pages(ToWireCount(report.idle));
  out->set_settled_pages(ToWireCount(report.settled));
  out->set_oldest_idle_ms(ToWireMillis(report.oldest_idle, kMaxMillis));
  out->set_revision(report.revision.value());
}

void Put(const Resend& resend, v1::ClientMessage* wire) {
  wire->mutable_resend()->set_sequence(resend.sequence.value());
}

void Put(const LimitAck& ack, v1::ClientMessage* wire) {
  wire->mutable_limit_ack()->set_revision(ack.revision);
}

void Put(const Resume& resume, v1::ClientMessage* wire) {
  v1::Resume* out = wire->mutable_resume();
  out->set_pool_id(resume.pool.value());
  ToWirePages(resume.pages, out->mutable_pages());
  out->set_last(resume.last);
}

void Put(const MakeRoom& room, v1::ClientMessage* wire) {
  v1::MakeRoom* out = wire->mutable_make_room();
  out->set_sequence(room.sequence.value());
  out->set_declared_peak_bytes(ToWireBytes(room.declared_peak));
  out->set_deadline_ms(ToWireMillis(room.deadline, kMaxDeadline));
}

void Put(const RoomMade& made, v1::BrokerMessage* wire) {
  wire->mutable_room_made()->set_sequence(made.sequence.value());
}

void Put(const Opened& opened, v1::BrokerMessage* wire) {
  v1::Opened* out = wire->mutable_opened();
  out->set_protocol_version(opened.protocol_version);
  out->set_feature_bits(opened.feature_bits);
  out->set_incarnation(opened.incarnation);
  out->set_session_id(opened.session.value());
  out->set_instance(opened.instance);
  out->set_backend(opened.backend);
  for (PoolId pool : opened.pools) out->add_pool_ids(pool.value());
  out->set_min_bytes(ToWireBytes(opened.min));
  out->set_max_bytes(ToWireBytes(opened.max));
  out->set_limit_revision(opened.limit_revision);
  out->set_capacity_bytes(ToWireBytes(opened.capacity));
  out->set_slab(opened.slab);
  out->mutable_joined_pids()->Add(opened.joined_pids.begin(),
                                  opened.joined_pids.end());
}

void Put(const Granted& granted, v1::BrokerMessage* wire) {
  v1::Granted* out = wire->mutable_granted();
  out->set_sequence(granted.sequence.value());
  out->set_grant_id(granted.grant.value());
  out->set_pool_id(granted.pool.value());
  ToWirePages(granted.pages, out->mutable_pages());
  out->set_credit_pages(ToWireCount(granted.credit));
  out->set_credit_ms(ToWireMillis(granted.credit_for, kMaxMillis));
}

void Put(const Refused& refused, v1::BrokerMessage* wire) {
  v1::Refused* out = wire->mutable_refused();
  out->set_sequence(refused.sequence.value());
  out->set_code(static_cast<uint32_t>(refused.code));
  out->set_reason(refused.reason.substr(0, kMaxReasonLength));
  for (const Holder& holder : refused.holders) {
    v1::Holder* entry = out->add_holders();
    entry->set_instance(holder.instance);
    entry->set_held_bytes(ToWireBytes(holder.held));
    entry->set_idle_bytes(ToWireBytes(holder.idle));
    entry->set_cached_bytes(ToWireBytes(holder.cached));
    entry->set_share_bytes(ToWireBytes(holder.share));
  }
}

void Put(const Reclaim& reclaim, v1::BrokerMessage* wire) {
  v1::Reclaim* out = wire->mutable_reclaim();
  out->set_pool_id(reclaim.pool.value());
  out->set_revision(reclaim.revision.value());
  out->set_hold_at_most_pages(ToWireCount(reclaim.hold_at_most));
  out->set_tier(static_cast<v1::Tier>(reclaim.tier));
  out->set_deadline_ms(ToWireMillis(reclaim.deadline, kMaxMillis));
}

void Put(const LimitChanged& changed, v1::BrokerMessage* wire) {
  v1::LimitChanged* out = wire->mutable_limit_changed();
  out->set_revision(changed.revision);
  out->set_min_bytes(ToWireBytes(changed.min));
  out->set_max_bytes(ToWireBytes(changed.max));
}

void Put(const Fenced& fenced, v1::BrokerMessage* wire) {
  wire->mutable_fenced()->set_reason(fenced.reason.substr(0, kMaxReasonLength));
}

// ---- from the wire ----

template <typename Value>
absl::Status FieldError(const char* field, absl::string_view allowed,
                        const Value& value) {
  return absl::InvalidArgumentError(absl::StrCat(
      "malformed message: ", field, " must be ", allowed, "; got ", value));
}

absl::Status CheckRange(const char* field, uint64_t value, uint64_t least,
                        uint64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return FieldError(field, absl::StrCat(least, " to ", most), value);
}

absl::Status CheckSize(const char* field, size_t size, size_t most) {
  if (size <= most) return absl::OkStatus();
  return FieldError(field, absl::StrCat("at most ", most, " long"), size);
}

absl::StatusOr<Bytes> FromWireBytes(const char* field, uint64_t value) {
  if (value > static_cast<uint64_t>(kMaxBytes.count())) {
    return FieldError(field, absl::StrCat("at most ", kMaxBytes.count()),
                      value);
  }
  return Bytes(static_cast<int64_t>(value));
}

// Ids count from 1: 0 on the wire is a field left out.
template <typename SomeId>
absl::StatusOr<SomeId> FromWireId(const char* field, uint64_t value) {
  if (value == 0) return FieldError(field, "set", value);
  return SomeId(value);
}

// `valid` is the generated X_IsValid.
template <typename Enum, typename WireEnum>
absl::StatusOr<Enum> FromWireEnum(const char* field, WireEnum value,
                                  bool (*valid)(int)) {
  if (static_cast<int>(value) == 0 || !valid(static_cast<int>(value))) {
    return FieldError(field, "a known value", static_cast<int>(value));
  }
  return static_cast<Enum>(value);
}

absl::StatusOr<double> FromWireFraction(const char* field, double value) {
  // Written so that NaN fails too.
  if (value > 0 && value <= 1) return value;
  return FieldError(field, "above 0 and at most 1", value);
}

template <typename WirePages>
absl::StatusOr<std::vector<PageName>> FromWirePages(const char* field,
                                                    const WirePages& wire) {
  RETURN_IF_ERROR(CheckSize(field, wire.size(), kMaxPagesPerMessage));
  std::vector<PageName> pages;
  pages.reserve(wire.size());
  for (const v1::PageName& page : wire) {
    pages.push_back({PageIndex(page.index()), Generation(page.generation())});
  }
  return pages;
}

absl::StatusOr<PoolGeometry> Take(const v1::PoolGeometry& wire) {
  PoolGeometry pool;
  ASSIGN_OR_RETURN(pool.handle_bytes, FromWireBytes("open.pools.handle_bytes",
                                                    wire.handle_bytes()));
  if (pool.handle_bytes == Bytes(0)) {
    return FieldError("open.pools.handle_bytes", "positive", 0);
  }
  RETURN_IF_ERROR(CheckRange("open.pools.handles_per_page",
                             wire.handles_per_page(), 1, kMaxHandlesPerPage));
  pool.handles_per_page = wire.handles_per_page();
  ASSIGN_OR_RETURN(pool.layout,
                   FromWireEnum<Layout>("open.pools.layout", wire.layout(),
                                        v1::Layout_IsValid));
  RETURN_IF_ERROR(CheckRange("open.pools.max_pages", wire.max_pages(), 1,
                             kMaxPagesPerPool));
  pool.max_pages = wire.max_pages();
  RETURN_IF_ERROR(
      CheckSize("open.pools.label", wire.label().size(), kMaxLabelKeyLength));
  pool.label = wire.label();
  // Divided, since the products may not fit.
  if (pool.handle_bytes.count() >
      kMaxBytes.count() / pool.handles_per_page / pool.max_pages) {
    return FieldError(
        "open.pools",
        absl::StrCat("at most ", kMaxBytes.count(), " bytes of addresses"),
        absl::StrCat(pool.handle_bytes.count(), " x ", pool.handles_per_page,
                     " x ", pool.max_pages));
  }
  return pool;
}

absl::StatusOr<ClientMessage> Take(const v1::Open& wire) {
  Open open;
  open.protocol_version = wire.protocol_version();
  open.feature_bits = wire.feature_bits();
  if (wire.nonce().size() != open.nonce.size()) {
    return FieldError("open.nonce", "16 bytes", wire.nonce().size());
  }
  std::copy(wire.nonce().begin(), wire.nonce().end(), open.nonce.begin());
  RETURN_IF_ERROR(
      CheckSize("open.instance", wire.instance().size(), kMaxNameLength));
  open.instance = wire.instance();
  RETURN_IF_ERROR(
      CheckSize("open.member", wire.member().size(), kMaxNameLength));
  open.member = wire.member();
  ASSIGN_OR_RETURN(open.role, FromWireEnum<Role>("open.role", wire.role(),
                                                 v1::Open::Role_IsValid));
  open.rank = wire.rank();
  RETURN_IF_ERROR(CheckSize("open.pools", wire.pools_size(), kMaxPools));
  for (const v1::PoolGeometry& pool : wire.pools()) {
    ASSIGN_OR_RETURN(open.pools.emplace_back(), Take(pool));
  }
  ASSIGN_OR_RETURN(
      open.declared_peak,
      FromWireBytes("open.declared_peak_bytes", wire.declared_peak_bytes()));
  if (wire.has_min_bytes()) {
    ASSIGN_OR_RETURN(open.min,
                     FromWireBytes("open.min_bytes", wire.min_bytes()));
  }
  if (wire.has_max_bytes()) {
    ASSIGN_OR_RETURN(open.max,
                     FromWireBytes("open.max_bytes", wire.max_bytes()));
  }
  if (wire.has_max_fraction()) {
    ASSIGN_OR_RETURN(open.max_fraction, FromWireFraction("open.max_fraction",
                                                         wire.max_fraction()));
  }
  if (wire.has_min_fraction()) {
    ASSIGN_OR_RETURN(open.min_fraction, FromWireFraction("open.min_fraction",
                                                         wire.min_fraction()));
  }
  if (!v1::Open::NameConflict_IsValid(wire.name_conflict())) {
    return FieldError("open.name_conflict", "a known value",
                      static_cast<int>(wire.name_conflict()));
  }
  open.name_conflict = static_cast<NameConflict>(wire.name_conflict());
  if (wire.has_weight()) {
    if (!(wire.weight() > 0 && wire.weight() <= kMaxWeight)) {
      return FieldError("open.weight",
                        absl::StrCat("above 0 and at most ", kMaxWeight),
                        wire.weight());
    }
    open.weight = wire.weight();
  }
  RETURN_IF_ERROR(CheckSize("open.labels", wire.labels_size(), kMaxLabels));
  for (const auto& [key, value] : wire.labels()) {
    RETURN_IF_ERROR(
        CheckSize("open.labels (key)", key.size(), kMaxLabelKeyLength));
    RETURN_IF_ERROR(
        CheckSize("open.labels (value)", value.size(), kMaxLabelValueLength));
    open.labels.emplace(key, value);
  }
  if (wire.has_resuming()) {
    Resuming& resuming = open.resuming.emplace();
    resuming.incarnation = wire.resuming().incarnation();
    ASSIGN_OR_RETURN(resuming.session,
                     FromWireId<SessionId>("open.resuming.session_id",
                                           wire.resuming().session_id()));
  }
  return open;
}

absl::StatusOr<ClientMessage> Take(const v1::Acquire& wire) {
  Acquire acquire;
  ASSIGN_OR_RETURN(acquire.sequence,
                   FromWireId<Sequence>("acquire.sequence", wire.sequence()));
  acquire.acked = Sequence(wire.acked());
  ASSIGN_OR_RETURN(acquire.pool,
                   FromWireId<PoolId>("acquire.pool_id", wire.pool_id()));
  RETURN_IF_ERROR(CheckRange("acquire.want_pages", wire.want_pages(), 1,
                             kMaxPagesPerMessage));
  acquire.want = wire.want_pages();
  RETURN_IF_ERROR(CheckRange("acquire.at_least_pages", wire.at_least_pages(), 1,
                             wire.want_pages()));
  acquire.at_least = wire.at_least_pages();
  if (wire.indexes_size() != 0 &&
      static_cast<uint32_t>(wire.indexes_size()) != wire.want_pages()) {
    return FieldError(
        "acquire.indexes",
        absl::StrCat("empty or want_pages long (", wire.want_pages(), ")"),
        wire.indexes_size());
  }
  acquire.indexes.reserve(wire.indexes_size());
  for (uint32_t index : wire.indexes()) acquire.indexes.emplace_back(index);
  ASSIGN_OR_RETURN(acquire.urgency,
                   FromWireEnum<Urgency>("acquire.urgency", wire.urgency(),
                                         v1::Acquire::Urgency_IsValid));
  RETURN_IF_ERROR(CheckRange("acquire.deadline_ms", wire.deadline_ms(), 0,
                             absl::ToInt64Milliseconds(kMaxDeadline)));
  acquire.deadline = absl::Milliseconds(wire.deadline_ms());
  acquire.replaces = Sequence(wire.replaces());
  acquire.credit = wire.credit();
  return acquire;
}

absl::StatusOr<ClientMessage> Take(const v1::Cancel& wire) {
  Cancel cancel;
  ASSIGN_OR_RETURN(cancel.sequence,
                   FromWireId<Sequence>("cancel.sequence", wire.sequence()));
  return cancel;
}

absl::StatusOr<ClientMessage> Take(const v1::Mapped& wire) {
  Mapped mapped;
  ASSIGN_OR_RETURN(mapped.grant,
                   FromWireId<GrantId>("mapped.grant_id", wire.grant_id()));
  ASSIGN_OR_RETURN(mapped.failed,
                   FromWirePages("mapped.failed", wire.failed()));
  return mapped;
}

absl::StatusOr<ClientMessage> Take(const v1::Return& wire) {
  Return returned;
  ASSIGN_OR_RETURN(returned.pool,
                   FromWireId<PoolId>("return.pool_id", wire.pool_id()));
  ASSIGN_OR_RETURN(returned.pages, FromWirePages("return.pages", wire.pages()));
  return returned;
}

absl::StatusOr<ClientMessage> Take(const v1::ReclaimAnswer& wire) {
  ReclaimAnswer answer;
  ASSIGN_OR_RETURN(answer.pool, FromWireId<PoolId>("reclaim_answer.pool_id",
                                                   wire.pool_id()));
  answer.revision = Revision(wire.revision());
  ASSIGN_OR_RETURN(answer.given,
                   FromWirePages("reclaim_answer.given", wire.given()));
  answer.kept = wire.kept_pages();
  RETURN_IF_ERROR(CheckSize("reclaim_answer.reason", wire.reason().size(),
                            kMaxReasonLength));
  answer.reason = wire.reason();
  answer.final = wire.final();
  return answer;
}

absl::StatusOr<ClientMessage> Take(const v1::Report& wire) {
  Report report;
  ASSIGN_OR_RETURN(report.pool,
                   FromWireId<PoolId>("report.pool_id", wire.pool_id()));
  report.in_use = wire.in_use_pages();
  report.cached = wire.cached_pages();
  report.idle = wire.idle_pages();
  report.settled = wire.settled_pages();
  RETURN_IF_ERROR(CheckRange("report.settled_pages", wire.settled_pages(), 0,
                             wire.idle_pages()));
  report.oldest_idle = absl::Milliseconds(wire.oldest_idle_ms());
  report.revision = Revision(wire.revision());
  return report;
}

absl::StatusOr<ClientMessage> Take(const v1::Resend& wire) {
  Resend resend;
  ASSIGN_OR_RETURN(resend.sequence,
                   FromWireId<Sequence>("resend.sequence", wire.sequence()));
  return resend;
}

absl::StatusOr<ClientMessage> Take(const v1::Resume& wire) {
  Resume resume;
  ASSIGN_OR_RETURN(resume.pool,
                   FromWireId<PoolId>("resume.pool_id", wire.pool_id()));
  ASSIGN_OR_RETURN(resume.pages, FromWirePages("resume.pages", wire.pages()));
  resume.last = wire.last();
  return resume;
}

absl::StatusOr<ClientMessage> Take(const v1::MakeRoom& wire) {
  MakeRoom room;
  ASSIGN_OR_RETURN(room.sequence, FromWireId<Sequence>("make_room.sequence",
                                                       wire.sequence()));
  ASSIGN_OR_RETURN(room.declared_peak,
                   FromWireBytes("make_room.declared_peak_bytes",
                                 wire.declared_peak_bytes()));
  RETURN_IF_ERROR(CheckRange("make_room.deadline_ms", wire.deadline_ms(), 0,
                             absl::ToInt64Milliseconds(kMaxDeadline)));
  room.deadline = absl::Milliseconds(wire.deadline_ms());
  return room;
}

absl::StatusOr<BrokerMessage> Take(const v1::Opened& wire) {
  Opened opened;
  opened.protocol_version = wire.protocol_version();
  opened.feature_bits = wire.feature_bits();
  opened.incarnation = wire.incarnation();
  ASSIGN_OR_RETURN(opened.session, FromWireId<SessionId>("opened.session_id",
                                                         wire.session_id()));
  RETURN_IF_ERROR(
      CheckSize("opened.instance", wire.instance().size(), kMaxNameLength));
  opened.instance = wire.instance();
  RETURN_IF_ERROR(
      CheckSize("opened.backend", wire.backend().size(), kMaxNameLength));
  opened.backend = wire.backend();
  RETURN_IF_ERROR(
      CheckSize("opened.pool_ids", wire.pool_ids_size(), kMaxPools));
  for (uint64_t pool : wire.pool_ids()) {
    ASSIGN_OR_RETURN(opened.pools.emplace_back(),
                     FromWireId<PoolId>("opened.pool_ids", pool));
  }
  ASSIGN_OR_RETURN(opened.min,
                   FromWireBytes("opened.min_bytes", wire.min_bytes()));
  ASSIGN_OR_RETURN(opened.max,
                   FromWireBytes("opened.max_bytes", wire.max_bytes()));
  opened.limit_revision = wire.limit_revision();
  ASSIGN_OR_RETURN(opened.capacity, FromWireBytes("opened.capacity_bytes",
                                                  wire.capacity_bytes()));
  RETURN_IF_ERROR(CheckSize("opened.slab", wire.slab().size(), kMaxSlabSize));
  opened.slab = wire.slab();
  RETURN_IF_ERROR(CheckSize("opened.joined_pids", wire.joined_pids_size(),
                            kMaxJoinedPids));
  opened.joined_pids.assign(wire.joined_pids().begin(),
                            wire.joined_pids().end());
  return opened;
}

absl::StatusOr<BrokerMessage> Take(const v1::Granted& wire) {
  Granted granted;
  ASSIGN_OR_RETURN(granted.sequence,
                   FromWireId<Sequence>("granted.sequence", wire.sequence()));
  granted.grant = GrantId(wire.grant_id());
  ASSIGN_OR_RETURN(granted.pool,
                   FromWireId<PoolId>("granted.pool_id", wire.pool_id()));
  ASSIGN_OR_RETURN(granted.pages, FromWirePages("granted.pages", wire.pages()));
  granted.credit = wire.credit_pages();
  granted.credit_for = absl::Milliseconds(wire.credit_ms());
  return granted;
}

absl::StatusOr<BrokerMessage> Take(const v1::Refused& wire) {
  Refused refused;
  ASSIGN_OR_RETURN(refused.sequence,
                   FromWireId<Sequence>("refused.sequence", wire.sequence()));
  RETURN_IF_ERROR(
      CheckRange("refused.code", wire.code(), 1,
                 static_cast<uint64_t>(absl::StatusCode::kUnauthenticated)));
  refused.code = static_cast<absl::StatusCode>(wire.code());
  RETURN_IF_ERROR(
      CheckSize("refused.reason", wire.reason().size(), kMaxReasonLength));
  refused.reason = wire.reason();
  RETURN_IF_ERROR(
      CheckSize("refused.holders", wire.holders_size(), kMaxHolders));
  for (const v1::Holder& entry : wire.holders()) {
    Holder& holder = refused.holders.emplace_back();
    RETURN_IF_ERROR(CheckSize("refused.holders.instance",
                              entry.instance().size(), kMaxNameLength));
    holder.instance = entry.instance();
    ASSIGN_OR_RETURN(holder.held, FromWireBytes("refused.holders.held_bytes",
                                                entry.held_bytes()));
    ASSIGN_OR_RETURN(holder.idle, FromWireBytes("refused.holders.idle_bytes",
                                                entry.idle_bytes()));
    ASSIGN_OR_RETURN(
        holder.cached,
        FromWireBytes("refused.holders.cached_bytes", entry.cached_bytes()));
    ASSIGN_OR_RETURN(holder.share, FromWireBytes("refused.holders.share_bytes",
                                                 entry.share_bytes()));
  }
  return refused;
}

absl::StatusOr<BrokerMessage> Take(const v1::Reclaim& wire) {
  Reclaim reclaim;
  ASSIGN_OR_RETURN(reclaim.pool,
                   FromWireId<PoolId>("reclaim.pool_id", wire.pool_id()));
  reclaim.revision = Revision(wire.revision());
  reclaim.hold_at_most = wire.hold_at_most_pages();
  ASSIGN_OR_RETURN(reclaim.tier, FromWireEnum<Tier>("reclaim.tier", wire.tier(),
                                                    v1::Tier_IsValid));
  reclaim.deadline = absl::Milliseconds(wire.deadline_ms());
  return reclaim;
}

absl::StatusOr<BrokerMessage> Take(const v1::LimitChanged& wire) {
  LimitChanged changed;
  changed.revision = wire.revision();
  ASSIGN_OR_RETURN(changed.min,
                   FromWireBytes("limit_changed.min_bytes", wire.min_bytes()));
  ASSIGN_OR_RETURN(changed.max,
                   FromWireBytes("limit_changed.max_bytes", wire.max_bytes()));
  return changed;
}

absl::StatusOr<BrokerMessage> Take(const v1::Fenced& wire) {
  RETURN_IF_ERROR(
      CheckSize("fenced.reason", wire.reason().size(), kMaxReasonLength));
  return Fenced{.reason = wire.reason()};
}

absl::Status NoKind() {
  return absl::InvalidArgumentError(
      "malformed message: it has none of the kinds known here");
}

}  // namespace

void ToWire(const ClientMessage& message, v1::ClientMessage* wire) {
  std::visit([wire](const auto& kind) { Put(kind, wire); }, message);
}

void ToWire(const BrokerMessage& message, v1::BrokerMessage* wire) {
  std::visit([wire](const auto& kind) { Put(kind, wire); }, message);
}

absl::StatusOr<ClientMessage> FromWire(const v1::ClientMessage& wire) {
  switch (wire.kind_case()) {
    case v1::ClientMessage::kOpen:
      return Take(wire.open());
    case v1::ClientMessage::kAcquire:
      return Take(wire.acquire());
    case v1::ClientMessage::kCancel:
      return Take(wire.cancel());
    case v1::ClientMessage::kMapped:
      return Take(wire.mapped());
    case v1::ClientMessage::kReturn:
      return Take(wire.return_());
    case v1::ClientMessage::kReclaimAnswer:
      return Take(wire.reclaim_answer());
    case v1::ClientMessage::kReport:
      return Take(wire.report());
    case v1::ClientMessage::kResend:
      return Take(wire.resend());
    case v1::ClientMessage::kLimitAck:
      return LimitAck{.revision = wire.limit_ack().revision()};
    case v1::ClientMessage::kResume:
      return Take(wire.resume());
    case v1::ClientMessage::kMakeRoom:
      return Take(wire.make_room());
    case v1::ClientMessage::KIND_NOT_SET:
      break;
  }
  return NoKind();
}

absl::StatusOr<BrokerMessage> FromWire(const v1::BrokerMessage& wire) {
  switch (wire.kind_case()) {
    case v1::BrokerMessage::kOpened:
      return Take(wire.opened());
    case v1::BrokerMessage::kGranted:
      return Take(wire.granted());
    case v1::BrokerMessage::kRefused:
      return Take(wire.refused());
    case v1::BrokerMessage::kReclaim:
      return Take(wire.reclaim());
    case v1::BrokerMessage::kLimitChanged:
      return Take(wire.limit_changed());
    case v1::BrokerMessage::kFenced:
      return Take(wire.fenced());
    case v1::BrokerMessage::kRoomMade:
      return RoomMade{.sequence = Sequence(wire.room_made().sequence())};
    case v1::BrokerMessage::KIND_NOT_SET:
      break;
  }
  return NoKind();
}

}  // namespace kvbroker
