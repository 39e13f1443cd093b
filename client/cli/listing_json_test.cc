#include "client/cli/listing_json.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "broker/base/bytes.h"
#include "client/cli/fake_admin_client.h"
#include "gtest/gtest.h"

namespace kvbroker::cli {
namespace {

using nlohmann::json;

Listing ListingOf(FakeBroker& broker) {
  Listing listing;
  listing.answers.push_back(
      {broker.status.device_uuid(), FakeAdminClient(broker).List({}).value()});
  return listing;
}

TEST(ListingToJsonTest, HasEveryFigureToTheByte) {
  FakeBroker broker("HOST-1");
  v1::InstanceStatus& conv = broker.Add("conv", Bytes(0));
  conv.set_max_bytes(536870913);
  conv.set_effective_limit_bytes(536870912);
  conv.set_min_bytes(1);
  conv.set_share_bytes(2);
  conv.set_held_bytes(10);
  conv.set_in_use_bytes(3);
  conv.set_cached_bytes(4);
  conv.set_idle_bytes(5);
  conv.set_waiting_bytes(6);
  conv.set_weight(1.5);
  conv.set_grants(7);
  conv.set_refusals(8);
  conv.set_reclaims(9);
  conv.set_preempts(10);
  (*conv.mutable_labels())["model"] = "llama";
  EXPECT_EQ(
      json::parse(ListingToJson(ListingOf(broker), JsonLayout::kIndented)),
      json::parse(R"([{
              "ipc": "conv", "tenant": "uid:0", "gpu": "HOST-1", "pids": [4711],
              "limit_bytes": 536870913, "effective_limit_bytes": 536870912,
              "used_bytes": 3, "min_bytes": 1, "share_bytes": 2,
              "held_bytes": 10, "cached_bytes": 4, "idle_bytes": 5,
              "waiting_bytes": 6, "weight": 1.5, "pressure": "none",
              "labels": {"model": "llama"},
              "counters": {"grants": 7, "refusals": 8, "reclaims": 9,
                           "preempts": 10},
              "backend": "host", "backend_reason": "no GPU found",
              "broker_state": "serving", "device_error": ""}])"));
}

TEST(BrokersToJsonTest, HasEveryFieldByItsName) {
  FakeBroker broker("GPU-1");
  broker.status.set_version("1.2");
  broker.status.set_backend_reason("asked for");
  broker.status.set_incarnation(18446744073709551615u);
  broker.status.set_pid(4712);
  broker.status.set_stock_bytes(3);
  broker.status.set_uptime_seconds(1.5);
  broker.status.set_others_bytes(4);
  broker.status.set_device_error("it fell off the bus");
  const json array =
      json::parse(BrokersToJson(ListingOf(broker), JsonLayout::kLine));
  ASSERT_EQ(array.size(), 1u);
  const json& object = array[0];
  const google::protobuf::Descriptor& fields = *v1::BrokerStatus::descriptor();
  for (int i = 0; i < fields.field_count(); ++i) {
    EXPECT_TRUE(object.contains(fields.field(i)->name()))
        << fields.field(i)->name();
  }
  EXPECT_EQ(object.size(), static_cast<size_t>(fields.field_count()));
  EXPECT_EQ(object["version"], "1.2");
  EXPECT_EQ(object["backend_reason"], "asked for");
  EXPECT_EQ(object["device_uuid"], "GPU-1");
  EXPECT_EQ(object["incarnation"], 18446744073709551615u);
  EXPECT_EQ(object["pid"], 4712);
  EXPECT_EQ(object["stock_bytes"], 3);
  EXPECT_EQ(object["uptime_seconds"], 1.5);
  EXPECT_EQ(object["others_bytes"], 4);
  EXPECT_EQ(object["device_error"], "it fell off the bus");
}

TEST(ListingToJsonTest, SaysThatTheDeviceIsLost) {
  FakeBroker broker("GPU-1");
  broker.Add("conv", GiB(1));
  broker.status.set_state("lost");
  broker.status.set_device_error("it fell off the bus");
  json object = json::parse(
      ListingToJson(ListingOf(broker), JsonLayout::kLine))[0];
  EXPECT_EQ(object["broker_state"], "lost");
  EXPECT_EQ(object["device_error"], "it fell off the bus");
}

TEST(ListingToJsonTest, LargeFiguresStayWhole) {
  FakeBroker broker("HOST-1");
  broker.Add("conv", kMaxBytes);
  json array = json::parse(ListingToJson(ListingOf(broker), JsonLayout::kLine));
  EXPECT_EQ(array[0]["limit_bytes"].get<uint64_t>(), uint64_t{1} << 52);
}

TEST(ListingToJsonTest, NoInstanceIsAnEmptyArray) {
  FakeBroker broker("HOST-1");
  EXPECT_EQ(ListingToJson(ListingOf(broker), JsonLayout::kIndented), "[]\n");
}

TEST(ListingToJsonTest, ALineIsOneLine) {
  FakeBroker broker("HOST-1");
  broker.Add("conv", GiB(1));
  broker.Add("code", GiB(1));
  std::string text = ListingToJson(ListingOf(broker), JsonLayout::kLine);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_EQ(text.back(), '\n');
}

TEST(ListingToJsonTest, BytesThatAreNotUtf8AreReplaced) {
  FakeBroker broker("HOST-1");
  broker.Add("conv", GiB(1)).set_pressure("\xff");
  EXPECT_TRUE(
      json::accept(ListingToJson(ListingOf(broker), JsonLayout::kLine)));
}

TEST(ExplanationsToJsonTest, OneObjectAGpu) {
  v1::ExplainResponse response;
  response.mutable_instance()->set_name("conv");
  response.add_lines("because");
  response.add_claims()->set_state("queued");
  json array = json::parse(
      ExplanationsToJson({{"GPU-1", response}, {"GPU-2", response}}));
  ASSERT_EQ(array.size(), 2u);
  EXPECT_EQ(array[0]["ipc"], "conv");
  EXPECT_EQ(array[0]["gpu"], "GPU-1");
  EXPECT_EQ(array[1]["gpu"], "GPU-2");
  EXPECT_EQ(array[0]["lines"], json({"because"}));
  EXPECT_EQ(array[0]["claims"][0]["state"], "queued");
}

}  // namespace
}  // namespace kvbroker::cli
