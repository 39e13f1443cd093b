#include "proto/convert.h"

#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "proto/kvbroker/v1/session.pb.h"

namespace kvbroker {
namespace {

PoolGeometry SomePool() {
  return {.handle_bytes = MiB(2),
          .handles_per_page = 64,
          .layout = Layout::kPerLayer,
          .max_pages = 1000,
          .label = "kv"};
}

Open SomeOpen() {
  Open open;
  open.feature_bits = 5;
  open.nonce = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0};
  open.instance = "llama";
  open.member = "dp0";
  open.role = Role::kWorker;
  open.rank = 3;
  open.pools = {SomePool()};
  open.declared_peak = GiB(3);
  open.min = GiB(1);
  open.max = Bytes(0);
  open.max_fraction = 0.5;
  open.min_fraction = 0.25;
  open.name_conflict = NameConflict::kError;
  open.weight = 2.5;
  open.labels = {{"model", "llama"}};
  open.resuming = {.incarnation = 77, .session = SessionId(5)};
  return open;
}

Acquire SomeAcquire() {
  return {.sequence = Sequence(7),
          .acked = Sequence(5),
          .pool = PoolId(2),
          .want = 2,
          .at_least = 1,
          .indexes = {PageIndex(4), PageIndex(0)},
          .urgency = Urgency::kRunning,
          .deadline = absl::Milliseconds(1500),
          .replaces = Sequence(6),
          .credit = true};
}

std::vector<PageName> SomePages() {
  return {{PageIndex(0), Generation(1)}, {PageIndex(9), Generation(7)}};
}

std::vector<ClientMessage> EveryClientMessage() {
  return {SomeOpen(),
          SomeAcquire(),
          Cancel{Sequence(4)},
          Mapped{GrantId(8), SomePages()},
          Return{PoolId(2), SomePages()},
          ReclaimAnswer{PoolId(2), Revision(3), SomePages(), 4, "in use", true},
          Report{PoolId(2), 1, 2, 3, 2, absl::Milliseconds(120), Revision(3)},
          Resend{Sequence(7)},
          LimitAck{9},
          Resume{PoolId(2), SomePages(), true},
          MakeRoom{Sequence(6), GiB(20), absl::Seconds(30)}};
}

std::vector<BrokerMessage> EveryBrokerMessage() {
  Opened opened;
  opened.feature_bits = 1;
  opened.incarnation = 77;
  opened.session = SessionId(5);
  opened.instance = "llama";
  opened.backend = "host";
  opened.pools = {PoolId(1), PoolId(2)};
  opened.min = GiB(1);
  opened.max = GiB(2);
  opened.limit_revision = 3;
  opened.capacity = GiB(10);
  opened.slab = std::string("\0slab\xff", 6);
  opened.joined_pids = {11, 0};
  return {opened,
          Granted{Sequence(1), GrantId(2), PoolId(3), SomePages(), 4,
                  absl::Seconds(1)},
          Refused{Sequence(1),
                  absl::StatusCode::kResourceExhausted,
                  "own limit",
                  {{"other", GiB(3), GiB(2), GiB(1), MiB(5)}}},
          Reclaim{PoolId(1), Revision(2), kHoldAny, Tier::kPreempt,
                  absl::Seconds(2)},
          LimitChanged{4, GiB(1), GiB(2)},
          Fenced{"by the operator"},
          RoomMade{Sequence(6)}};
}

TEST(ConvertTest, EveryClientMessageComesBackTheSame) {
  for (const ClientMessage& message : EveryClientMessage()) {
    v1::ClientMessage wire, again;
    ToWire(message, &wire);
    absl::StatusOr<ClientMessage> back = FromWire(wire);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->index(), message.index());
    ToWire(*back, &again);
    EXPECT_EQ(again.DebugString(), wire.DebugString());
  }
}

TEST(ConvertTest, EveryBrokerMessageComesBackTheSame) {
  for (const BrokerMessage& message : EveryBrokerMessage()) {
    v1::BrokerMessage wire, again;
    ToWire(message, &wire);
    absl::StatusOr<BrokerMessage> back = FromWire(wire);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->index(), message.index());
    ToWire(*back, &again);
    EXPECT_EQ(again.DebugString(), wire.DebugString());
  }
}

TEST(ConvertTest, FieldsLandWhereTheyBelong) {
  v1::ClientMessage wire;
  ToWire(ClientMessage(SomeOpen()), &wire);
  absl::StatusOr<ClientMessage> back = FromWire(wire);
  ASSERT_TRUE(back.ok()) << back.status();
  const Open& open = std::get<Open>(*back);
  EXPECT_EQ(open.nonce, SomeOpen().nonce);
  EXPECT_EQ(open.instance, "llama");
  EXPECT_EQ(open.member, "dp0");
  EXPECT_EQ(open.role, Role::kWorker);
  EXPECT_EQ(open.pools[0].page_bytes(), MiB(128));
  EXPECT_EQ(open.min, GiB(1));
  EXPECT_EQ(open.max, Bytes(0)) << "a limit of 0 is not an absent one";
  EXPECT_EQ(open.labels.at("model"), "llama");

  wire.Clear();
  ToWire(ClientMessage(SomeAcquire()), &wire);
  back = FromWire(wire);
  ASSERT_TRUE(back.ok()) << back.status();
  const Acquire& acquire = std::get<Acquire>(*back);
  EXPECT_EQ(acquire.indexes, SomeAcquire().indexes);
  EXPECT_EQ(acquire.urgency, Urgency::kRunning);
  EXPECT_EQ(acquire.deadline, absl::Milliseconds(1500));
}

TEST(ConvertTest, AbsentLimitsStayAbsent) {
  Open open = SomeOpen();
  open.min.reset();
  open.max.reset();
  open.max_fraction.reset();
  open.min_fraction.reset();
  open.weight.reset();
  v1::ClientMessage wire;
  ToWire(ClientMessage(open), &wire);
  absl::StatusOr<ClientMessage> back = FromWire(wire);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_FALSE(std::get<Open>(*back).min || std::get<Open>(*back).max ||
               std::get<Open>(*back).max_fraction ||
               std::get<Open>(*back).min_fraction ||
               std::get<Open>(*back).weight);
}

TEST(ConvertTest, DurationsRoundUpAndStayWithinTheirField) {
  Acquire acquire = SomeAcquire();
  acquire.deadline = absl::Microseconds(1);
  v1::ClientMessage wire;
  ToWire(ClientMessage(acquire), &wire);
  EXPECT_EQ(wire.acquire().deadline_ms(), 1);
  acquire.deadline = absl::InfiniteDuration();
  ToWire(ClientMessage(acquire), &wire);
  EXPECT_EQ(wire.acquire().deadline_ms(), 600000);
  acquire.deadline = -absl::Seconds(1);
  ToWire(ClientMessage(acquire), &wire);
  EXPECT_EQ(wire.acquire().deadline_ms(), 0);
}

TEST(ConvertTest, AMessageWithoutKindIsRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(FromWire(v1::ClientMessage()).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(FromWire(v1::BrokerMessage()).status()));
  v1::ClientMessage unknown;
  // Field 200, a string: a kind of the future.
  ASSERT_TRUE(unknown.ParseFromString(std::string("\xc2\x0c\x01x", 4)));
  EXPECT_TRUE(absl::IsInvalidArgument(FromWire(unknown).status()));
}

struct Damage {
  const char* field;
  std::function<void(v1::ClientMessage&)> apply;
};

// Each damage to an otherwise good message is refused, naming the field.
void ExpectRefused(const ClientMessage& good,
                   const std::vector<Damage>& damages) {
  for (const Damage& damage : damages) {
    v1::ClientMessage wire;
    ToWire(good, &wire);
    ASSERT_TRUE(FromWire(wire).ok());
    damage.apply(wire);
    absl::Status status = FromWire(wire).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << damage.field;
    EXPECT_NE(std::string(status.message()).find(damage.field),
              std::string::npos)
        << status;
  }
}

TEST(ConvertTest, DamagedOpenIsRefusedByField) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  ExpectRefused(
      SomeOpen(),
      {{"open.nonce", [](auto& m) { m.mutable_open()->set_nonce("short"); }},
       {"open.instance",
        [](auto& m) { m.mutable_open()->set_instance(std::string(129, 'a')); }},
       {"open.member",
        [](auto& m) { m.mutable_open()->set_member(std::string(129, 'a')); }},
       {"open.role",
        [](auto& m) {
          m.mutable_open()->set_role(static_cast<v1::Open::Role>(9));
        }},
       {"open.role",
        [](auto& m) {
          m.mutable_open()->set_role(v1::Open::ROLE_UNSPECIFIED);
        }},
       {"open.pools",
        [](auto& m) {
          for (int i = 0; i < kMaxPools; ++i) {
            *m.mutable_open()->add_pools() = m.open().pools(0);
          }
        }},
       {"handle_bytes",
        [](auto& m) {
          m.mutable_open()->mutable_pools(0)->set_handle_bytes(0);
        }},
       {"handle_bytes",
        [](auto& m) {
          m.mutable_open()->mutable_pools(0)->set_handle_bytes(~0ull);
        }},
       {"handles_per_page",
        [](auto& m) {
          m.mutable_open()->mutable_pools(0)->set_handles_per_page(0);
        }},
       {"layout",
        [](auto& m) {
          m.mutable_open()->mutable_pools(0)->set_layout(
              static_cast<v1::Layout>(-1));
        }},
       {"max_pages",
        [](auto& m) {
          m.mutable_open()->mutable_pools(0)->set_max_pages(~0u);
        }},
       {"open.pools",
        [](auto& m) {
          m.mutable_open()->mutable_pools(0)->set_handle_bytes(1ull << 50);
        }},
       {"label",
        [](auto& m) {
          m.mutable_open()->mutable_pools(0)->set_label(std::string(64, 'a'));
        }},
       {"declared_peak",
        [](auto& m) { m.mutable_open()->set_declared_peak_bytes(~0ull); }},
       {"min_bytes", [](auto& m) { m.mutable_open()->set_min_bytes(~0ull); }},
       {"max_bytes",
        [](auto& m) { m.mutable_open()->set_max_bytes((1ull << 52) + 1); }},
       {"max_fraction", [](auto& m) { m.mutable_open()->set_max_fraction(0); }},
       {"max_fraction",
        [nan](auto& m) { m.mutable_open()->set_max_fraction(nan); }},
       {"max_fraction",
        [](auto& m) { m.mutable_open()->set_max_fraction(1.01); }},
       {"min_fraction", [](auto& m) { m.mutable_open()->set_min_fraction(0); }},
       {"min_fraction",
        [nan](auto& m) { m.mutable_open()->set_min_fraction(nan); }},
       {"name_conflict",
        [](auto& m) {
          m.mutable_open()->set_name_conflict(
              static_cast<v1::Open::NameConflict>(3));
        }},
       {"weight", [](auto& m) { m.mutable_open()->set_weight(-1); }},
       {"weight", [nan](auto& m) { m.mutable_open()->set_weight(nan); }},
       {"weight", [](auto& m) { m.mutable_open()->set_weight(1e300); }},
       {"labels",
        [](auto& m) {
          for (int i = 0; i < kMaxLabels; ++i) {
            (*m.mutable_open()->mutable_labels())[std::to_string(i)] = "";
          }
        }},
       {"labels",
        [](auto& m) {
          (*m.mutable_open()->mutable_labels())[std::string(64, 'k')] = "";
        }},
       {"labels", [](auto& m) {
          (*m.mutable_open()->mutable_labels())["k"] = std::string(256, 'v');
        }}});
}

TEST(ConvertTest, DamagedMakeRoomIsRefusedByField) {
  ExpectRefused(
      MakeRoom{Sequence(6), GiB(20), absl::Seconds(30)},
      {{"make_room.sequence",
        [](auto& m) { m.mutable_make_room()->set_sequence(0); }},
       {"make_room.declared_peak_bytes",
        [](auto& m) {
          m.mutable_make_room()->set_declared_peak_bytes(~0ull);
        }},
       {"make_room.deadline_ms", [](auto& m) {
          m.mutable_make_room()->set_deadline_ms(600'001);
        }}});
}

TEST(ConvertTest, DamagedAcquireIsRefusedByField) {
  ExpectRefused(
      SomeAcquire(),
      {{"acquire.sequence",
        [](auto& m) { m.mutable_acquire()->set_sequence(0); }},
       {"acquire.pool_id",
        [](auto& m) { m.mutable_acquire()->set_pool_id(0); }},
       {"want_pages", [](auto& m) { m.mutable_acquire()->set_want_pages(0); }},
       {"want_pages",
        [](auto& m) { m.mutable_acquire()->set_want_pages(65537); }},
       {"at_least",
        [](auto& m) { m.mutable_acquire()->set_at_least_pages(3); }},
       {"at_least",
        [](auto& m) { m.mutable_acquire()->set_at_least_pages(0); }},
       {"indexes", [](auto& m) { m.mutable_acquire()->add_indexes(1); }},
       {"urgency",
        [](auto& m) {
          m.mutable_acquire()->set_urgency(
              static_cast<v1::Acquire::Urgency>(99));
        }},
       {"deadline_ms",
        [](auto& m) { m.mutable_acquire()->set_deadline_ms(600001); }}});
}

TEST(ConvertTest, OversizeListsAndReasonsAreRefused) {
  auto overflow = [](auto* pages) {
    for (int i = 0; i <= kMaxPagesPerMessage; ++i) pages->Add();
  };
  ExpectRefused(Return{PoolId(1), {}},
                {{"return.pages", [&](auto& m) {
                    overflow(m.mutable_return_()->mutable_pages());
                  }}});
  ExpectRefused(Mapped{GrantId(1), {}},
                {{"mapped.failed", [&](auto& m) {
                    overflow(m.mutable_mapped()->mutable_failed());
                  }}});
  ExpectRefused(ReclaimAnswer{.pool = PoolId(1)},
                {{"reclaim_answer.given",
                  [&](auto& m) {
                    overflow(m.mutable_reclaim_answer()->mutable_given());
                  }},
                 {"reclaim_answer.reason", [](auto& m) {
                    m.mutable_reclaim_answer()->set_reason(
                        std::string(kMaxReasonLength + 1, 'x'));
                  }}});
  ExpectRefused(Report{.pool = PoolId(1), .idle = 2},
                {{"report.settled_pages",
                  [](auto& m) { m.mutable_report()->set_settled_pages(3); }}});
}

TEST(ConvertTest, TooLongAReasonIsCutOnItsWayOut) {
  v1::BrokerMessage wire;
  ToWire(BrokerMessage(Fenced{std::string(2 * kMaxReasonLength, 'x')}), &wire);
  EXPECT_TRUE(FromWire(wire).ok());
}

// Whatever the bytes, the answer is a message or a status; what is taken is
// within bounds, so it survives another round.
TEST(ConvertTest, GarbageNeverDoesHarm) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  google::protobuf::LogSilencer silent;
  std::mt19937 random(seed);
  std::vector<std::string> good;
  for (const ClientMessage& message : EveryClientMessage()) {
    v1::ClientMessage wire;
    ToWire(message, &wire);
    good.push_back(wire.SerializeAsString());
  }
  for (int round = 0; round < 50000; ++round) {
    std::string bytes = good[random() % good.size()];
    for (int flips = 1 + random() % 4; flips > 0; --flips) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    v1::ClientMessage wire;
    if (!wire.ParseFromString(bytes)) continue;
    absl::StatusOr<ClientMessage> taken = FromWire(wire);
    if (!taken.ok()) {
      EXPECT_TRUE(absl::IsInvalidArgument(taken.status()));
      continue;
    }
    v1::ClientMessage again;
    ToWire(*taken, &again);
    EXPECT_TRUE(FromWire(again).ok()) << FromWire(again).status();
  }
}

}  // namespace
}  // namespace kvbroker
