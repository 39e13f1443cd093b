#include "client/cli/listing_text.h"

#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "broker/base/bytes.h"
#include "client/cli/fake_admin_client.h"
#include "gtest/gtest.h"

namespace kvbroker::cli {
namespace {

void AddTo(Listing& listing, FakeBroker& broker) {
  listing.answers.push_back(
      {broker.status.device_uuid(), FakeAdminClient(broker).List({}).value()});
}

TEST(ListingToTextTest, ShowsDevicesThenInstances) {
  FakeBroker broker("HOST-0123456789");
  broker.status.set_held_bytes(GiB(3).count());
  v1::InstanceStatus& conv = broker.Add("conv", GiB(2));
  conv.set_in_use_bytes(MiB(512).count());
  conv.set_idle_bytes(MiB(128).count());
  broker.Add("code", GiB(4)).clear_pids();
  Listing listing;
  AddTo(listing, broker);
  EXPECT_EQ(ListingToText(listing, /*color=*/false),
            "HOST-0123456789 (host)  capacity 8 GiB  lent 3 GiB  free 5 GiB\n"
            "NAME  LIMIT     USED     %     IDLE  CACHED  WAITING  GPU         "
            "  PIDS  "
            "TENANT  PRESSURE\n"
            "code  4 GiB      0 B   0 %      0 B     0 B      0 B  "
            "HOST-0123456  -     "
            "uid:0   none\n"
            "conv  2 GiB  512 MiB  25 %  128 MiB     0 B      0 B  "
            "HOST-0123456  4711  "
            "uid:0   none\n");
}

TEST(ListingToTextTest, NoInstanceIsAFriendlyLine) {
  FakeBroker broker("HOST-1");
  Listing listing;
  AddTo(listing, broker);
  EXPECT_EQ(ListingToText(listing, /*color=*/true),
            "HOST-1 (host)  capacity 8 GiB  lent 0 B  free 8 GiB\n"
            "No instances yet: they appear as engines connect.\n");
}

TEST(ListingToTextTest, WhatOthersUseIsNotFree) {
  FakeBroker broker("GPU-1");
  broker.status.set_held_bytes(GiB(3).count());
  broker.status.set_others_bytes(GiB(4).count());
  Listing listing;
  AddTo(listing, broker);
  EXPECT_EQ(ListingToText(listing, /*color=*/false),
            "GPU-1 (host)  capacity 8 GiB  lent 3 GiB  free 1 GiB  others 4 "
            "GiB\n"
            "No instances yet: they appear as engines connect.\n");
}

TEST(ListingToTextTest, PaintsHowFullAnInstanceIs) {
  for (auto [used, painted] : {std::pair{49, "\x1b[32m49 %\x1b[0m"},
                               {50, "\x1b[33m50 %\x1b[0m"},
                               {79, "\x1b[33m79 %\x1b[0m"},
                               {80, "\x1b[31m80 %\x1b[0m"},
                               {150, "\x1b[31m150 %\x1b[0m"}}) {
    FakeBroker broker("HOST-1");
    broker.Add("conv", Bytes(100)).set_in_use_bytes(used);
    Listing listing;
    AddTo(listing, broker);
    EXPECT_TRUE(absl::StrContains(ListingToText(listing, true), painted))
        << ListingToText(listing, true);
    EXPECT_FALSE(absl::StrContains(ListingToText(listing, false), "\x1b"));
  }
}

TEST(ListingToTextTest, ALimitOfZeroHasNoPercent) {
  FakeBroker broker("HOST-1");
  broker.Add("empty", Bytes(0));
  broker.Add("full", Bytes(0)).set_in_use_bytes(1);
  Listing listing;
  AddTo(listing, broker);
  std::string text = ListingToText(listing, /*color=*/true);
  EXPECT_TRUE(absl::StrContains(text, "\x1b[31mover\x1b[0m")) << text;
  EXPECT_FALSE(absl::StrContains(text, "nan")) << text;
}

TEST(ListingToTextTest, ShortUuidsStillTellDevicesApart) {
  FakeBroker first("GPU-aaaaaaaa-0000-1"), second("GPU-aaaaaaaa-0000-2");
  first.Add("conv", GiB(1));
  second.Add("code", GiB(1));
  Listing listing;
  AddTo(listing, first);
  AddTo(listing, second);
  std::string text = ListingToText(listing, /*color=*/false);
  EXPECT_TRUE(absl::StrContains(text, "  GPU-aaaaaaaa-0000-1  4711")) << text;
  EXPECT_TRUE(absl::StrContains(text, "  GPU-aaaaaaaa-0000-2  4711")) << text;
}

TEST(ListingToTextTest, ManyProcessesAreCut) {
  FakeBroker broker("HOST-1");
  v1::InstanceStatus& conv = broker.Add("conv", GiB(1));
  for (int i = 0; i < 4; ++i) conv.add_pids(i);
  Listing listing;
  AddTo(listing, broker);
  EXPECT_TRUE(
      absl::StrContains(ListingToText(listing, false), "  4711,0,1,+2  "));
}

TEST(ListingToTextTest, SaysThatABrokerIsDraining) {
  FakeBroker broker("HOST-1");
  broker.status.set_state("draining");
  Listing listing;
  AddTo(listing, broker);
  EXPECT_TRUE(absl::StrContains(ListingToText(listing, false),
                                "free 8 GiB  draining\n"));
}

TEST(ListingToTextTest, SaysThatTheDeviceIsLostAndWhy) {
  FakeBroker broker("GPU-1");
  broker.status.set_state("lost");
  broker.status.set_device_error("it fell off the bus");
  Listing listing;
  AddTo(listing, broker);
  EXPECT_TRUE(absl::StrContains(ListingToText(listing, false),
                                "free 8 GiB  lost\n  it fell off the bus\n"));
}

TEST(ExplanationToTextTest, ReasonsThenClaims) {
  v1::ExplainResponse explanation;
  explanation.add_lines("conv holds 1 GiB.");
  EXPECT_EQ(ExplanationToText(explanation), "conv holds 1 GiB.\n");
  v1::ClaimStatus& claim = *explanation.add_claims();
  claim.set_pool_id(7);
  claim.set_sequence(12);
  claim.set_want_pages(4);
  claim.set_at_least_pages(1);
  claim.set_page_bytes(MiB(128).count());
  claim.set_waiting_ms(3.25);
  claim.set_state("closing");
  EXPECT_EQ(ExplanationToText(explanation),
            "conv holds 1 GiB.\n"
            "POOL  CLAIM  PAGES  AT LEAST     PAGE  WAITING  STATE\n"
            "   7     12      4         1  128 MiB   3.2 ms  closing\n");
}

}  // namespace
}  // namespace kvbroker::cli
