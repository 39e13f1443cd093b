#include "broker/transport/status_convert.h"

#include <limits>

#include <gtest/gtest.h>

#include "proto/kvbroker/v1/admin.pb.h"
#include "proto/kvbroker/v1/types.pb.h"

namespace kvbroker {
namespace {

TEST(StatusConvertTest, AnInstanceIsShownWhole) {
  InstanceStatus status;
  status.name = "llama";
  status.tenant = "uid:1/pidns:2";
  status.pids = {10, 11};
  status.min = Bytes(1);
  status.max = Bytes(2);
  status.effective_limit = Bytes(3);
  status.weight = 1.5;
  status.share = Bytes(4);
  status.held = Bytes(5);
  status.in_use = Bytes(6);
  status.cached = Bytes(7);
  status.idle = Bytes(8);
  status.waiting = Bytes(-9);
  status.pressure = "draining";
  status.labels = {{"model", "x"}};
  status.grants = 10;
  status.refusals = 11;
  status.reclaims = 12;
  status.preempts = 13;
  v1::InstanceStatus wire;
  ToWire(status, &wire);
  EXPECT_EQ(wire.name(), "llama");
  EXPECT_EQ(wire.tenant(), "uid:1/pidns:2");
  EXPECT_EQ(wire.pids(1), 11);
  EXPECT_EQ(wire.min_bytes(), 1);
  EXPECT_EQ(wire.max_bytes(), 2);
  EXPECT_EQ(wire.effective_limit_bytes(), 3);
  EXPECT_EQ(wire.weight(), 1.5);
  EXPECT_EQ(wire.share_bytes(), 4);
  EXPECT_EQ(wire.held_bytes(), 5);
  EXPECT_EQ(wire.in_use_bytes(), 6);
  EXPECT_EQ(wire.cached_bytes(), 7);
  EXPECT_EQ(wire.idle_bytes(), 8);
  EXPECT_EQ(wire.waiting_bytes(), 0) << "never below";
  EXPECT_EQ(wire.pressure(), "draining");
  EXPECT_EQ(wire.labels().at("model"), "x");
  EXPECT_EQ(wire.grants(), 10);
  EXPECT_EQ(wire.refusals(), 11);
  EXPECT_EQ(wire.reclaims(), 12);
  EXPECT_EQ(wire.preempts(), 13);
}

TEST(StatusConvertTest, TheBrokerIsShown) {
  BrokerStatus status;
  status.backend = "host";
  status.device_uuid = "HOST-1";
  status.incarnation = 7;
  status.total = Bytes(4);
  status.capacity = Bytes(3);
  status.held = Bytes(2);
  status.stock = Bytes(1);
  status.sessions = 5;
  status.uptime = absl::Milliseconds(1500);
  v1::BrokerStatus wire;
  ToWire(status, &wire);
  EXPECT_EQ(wire.device_uuid(), "HOST-1");
  EXPECT_EQ(wire.total_bytes(), 4);
  EXPECT_EQ(wire.capacity_bytes(), 3);
  EXPECT_EQ(wire.held_bytes(), 2);
  EXPECT_EQ(wire.stock_bytes(), 1);
  EXPECT_EQ(wire.sessions(), 5);
  EXPECT_EQ(wire.uptime_seconds(), 1.5);
  EXPECT_EQ(wire.state(), "serving");
  status.draining = true;
  ToWire(status, &wire);
  EXPECT_EQ(wire.state(), "draining");
}

TEST(StatusConvertTest, AnExplanationIsShown) {
  Explanation explanation;
  explanation.instance.name = "llama";
  explanation.lines = {"because"};
  explanation.claims = {{.sequence = Sequence(3),
                         .pool = PoolId(4),
                         .want = 5,
                         .at_least = 2,
                         .page_bytes = MiB(1),
                         .waiting = absl::Milliseconds(12),
                         .state = "closing"}};
  v1::ExplainResponse wire;
  ToWire(explanation, &wire);
  EXPECT_EQ(wire.instance().name(), "llama");
  EXPECT_EQ(wire.lines(0), "because");
  EXPECT_EQ(wire.claims(0).sequence(), 3);
  EXPECT_EQ(wire.claims(0).want_pages(), 5);
  EXPECT_EQ(wire.claims(0).waiting_ms(), 12);
  EXPECT_EQ(wire.claims(0).state(), "closing");
}

TEST(StatusConvertTest, AChangeKeepsWhatIsAbsentAbsent) {
  v1::SetPolicyRequest wire;
  absl::StatusOr<PolicyChange> change = FromWire(wire);
  ASSERT_TRUE(change.ok());
  EXPECT_FALSE(change->min || change->max || change->max_percent ||
               change->weight || change->preset);
  wire.set_max_bytes(0);
  wire.set_preset(true);
  change = FromWire(wire);
  EXPECT_EQ(change->max, Bytes(0)) << "a limit of 0 is one";
  EXPECT_TRUE(change->preset);
}

TEST(StatusConvertTest, AMalformedChangeIsRefused) {
  auto refused = [](auto set) {
    v1::SetPolicyRequest wire;
    set(wire);
    return absl::IsInvalidArgument(FromWire(wire).status());
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(refused([](auto& w) { w.set_min_bytes(~0ull); }));
  EXPECT_TRUE(refused([](auto& w) { w.set_max_bytes(~0ull); }));
  EXPECT_TRUE(refused([](auto& w) { w.set_max_percent(0); }));
  EXPECT_TRUE(refused([](auto& w) { w.set_max_percent(100.5); }));
  EXPECT_TRUE(refused([&](auto& w) { w.set_max_percent(nan); }));
  EXPECT_TRUE(refused([](auto& w) { w.set_weight(0); }));
  EXPECT_TRUE(refused([&](auto& w) { w.set_weight(nan); }));
  EXPECT_TRUE(refused([](auto& w) {
    w.set_max_bytes(1);
    w.set_max_percent(1);
  }));
}

}  // namespace
}  // namespace kvbroker
