// The core on a device with fixed addresses: one slab, for engines of one
// tenant and of whatever page sizes.
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "broker/core/core.h"
#include "broker/core/testing/fake_client.h"
#include "broker/core/testing/fake_world.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using Use = FakeClient::Use;

FakeWorld::Options Slab(Bytes size) {
  return {.capacity = size, .fixed_addresses = true};
}

std::vector<uint32_t> Indexes(const FakeClient& client, size_t pool = 0) {
  std::vector<uint32_t> indexes;
  for (PageName page : client.pages(pool))
    indexes.push_back(page.index.value());
  return indexes;
}

TEST(SlabTest, TheBrokerChoosesWherePagesLie) {
  FakeWorld world(Slab(MiB(12)));
  FakeClient& small = world.Start({.name = "small", .handle = MiB(1)});
  FakeClient& large = world.Start({.name = "large", .handle = MiB(2)});
  EXPECT_FALSE(small.opened().slab.empty());
  EXPECT_EQ(small.opened().capacity, MiB(12));
  small.Ask({.at_least = 3});
  large.Ask({.at_least = 2});
  world.Settle();
  EXPECT_EQ(Indexes(small), (std::vector<uint32_t>{0, 1, 2}));
  EXPECT_EQ(Indexes(large), (std::vector<uint32_t>{4, 5})) << "from the end";
  EXPECT_EQ(world.Check(), absl::OkStatus());
  small.Return(small.pool(), {small.pages()[1]});
  small.Ask({.at_least = 2});
  world.Settle();
  EXPECT_EQ(Indexes(small), (std::vector<uint32_t>{0, 1, 2, 3}));
  EXPECT_EQ(world.Check(), absl::OkStatus());
}

TEST(SlabTest, WhoChoosesIndexesIsRefused) {
  FakeWorld world(Slab(MiB(8)));
  FakeClient& client = world.Start({.name = "a"});
  client.Ask({.at_least = 1, .indexes = {PageIndex(0)}});
  EXPECT_EQ(client.error().code(), absl::StatusCode::kInvalidArgument);
}

TEST(SlabTest, APoolWithFewSlotsIsServedWithinThem) {
  FakeWorld world(Slab(MiB(8)));
  FakeClient& wide = world.Start({.name = "wide"});
  FakeClient& narrow = world.Start({.name = "narrow", .max_pages = 2});
  wide.Ask({.at_least = 1});
  world.Settle();
  narrow.Ask({.at_least = 1});
  world.Settle();
  EXPECT_EQ(Indexes(narrow), (std::vector<uint32_t>{1}));
  // Its other slot is another's; there is no more for it, free as the rest is.
  const Sequence waiting =
      narrow.Ask({.at_least = 1, .deadline = absl::Seconds(1)});
  world.Settle();
  EXPECT_EQ(narrow.granted(waiting), nullptr);
  wide.Return(wide.pool(), wide.pages());
  world.Settle();
  EXPECT_NE(narrow.granted(waiting), nullptr);
  EXPECT_EQ(Indexes(narrow), (std::vector<uint32_t>{0, 1}));
}

// Free memory in pieces between another size's pages.
class FragmentedTest : public testing::Test {
 protected:
  FragmentedTest() : world_(Slab(MiB(8))) {
    small_ = &world_.Start({.name = "small", .handle = MiB(1)});
    large_ = &world_.Start({.name = "large", .handle = MiB(2)});
    small_->Ask({.at_least = 8});
    world_.Settle();
    const std::vector<PageName> pages = small_->pages();
    small_->Return(small_->pool(), {pages[1], pages[3], pages[5], pages[7]});
    world_.Settle();
  }

  FakeWorld world_;
  FakeClient* small_;
  FakeClient* large_;
};

TEST_F(FragmentedTest, AClaimWithoutAPlaceWaitsAndIsToldWhy) {
  const Sequence waiting =
      large_->Ask({.at_least = 2, .deadline = absl::Milliseconds(500)});
  world_.Settle();
  EXPECT_EQ(large_->granted(waiting), nullptr);
  EXPECT_EQ(large_->refused(waiting), nullptr);
  small_->manners().answers_reclaims = false;
  world_.Advance(absl::Seconds(1));
  ASSERT_NE(large_->refused(waiting), nullptr);
  EXPECT_TRUE(absl::StrContains(
      large_->refused(waiting)->reason,
      "free, but in pieces too small for a page of 2 MiB: 4 MiB"))
      << large_->refused(waiting)->reason;
}

TEST_F(FragmentedTest, OneThatMapsAheadIsRefusedAtOnce) {
  const Sequence ahead =
      large_->Ask({.at_least = 1, .urgency = Urgency::kSpeculative});
  world_.Settle();
  EXPECT_NE(large_->refused(ahead), nullptr);
}

TEST_F(FragmentedTest, IdlePagesAreAskedForUntilThereIsAPlace) {
  small_->Mark(1, Use::kIdle);  // that at 0
  world_.Advance(absl::Milliseconds(200));
  const Sequence waiting = large_->Ask({.at_least = 1});
  world_.Settle();
  ASSERT_NE(large_->granted(waiting), nullptr);
  EXPECT_EQ(Indexes(*large_), (std::vector<uint32_t>{0}));
  EXPECT_EQ(world_.Check(), absl::OkStatus());
}

TEST_F(FragmentedTest, PagesThatFitAreGrantedBesideOneThatDoesNot) {
  large_->Ask({.at_least = 1, .deadline = absl::Seconds(60)});
  world_.Settle();
  const Sequence fits = small_->Ask({.at_least = 1});
  world_.Advance(absl::Seconds(70));
  EXPECT_NE(small_->granted(fits), nullptr);
  EXPECT_EQ(world_.Check(), absl::OkStatus());
}

TEST(SlabTest, WhatComesBackIsMadeAnewForTheNext) {
  FakeWorld world(Slab(MiB(8)));
  FakeClient& a = world.Start({.name = "a"});
  FakeClient& b = world.Start({.name = "b"});
  a.Ask({.at_least = 4});
  world.Settle();
  const std::vector<uint64_t> before = a.Tokens();
  a.Return(a.pool(), a.pages());
  world.Settle();
  EXPECT_EQ(world.device().live_handles(), 0) << "no stock";
  b.Ask({.at_least = 4});
  world.Settle();
  for (uint64_t token : b.Tokens()) {
    EXPECT_EQ(std::count(before.begin(), before.end(), token), 0);
  }
}

TEST(SlabTest, ADeadEnginesLeasesAreFreeAtOnce) {
  FakeWorld world(Slab(MiB(8)));
  FakeClient& a = world.Start({.name = "a"});
  FakeClient& b = world.Start({.name = "b", .handle = MiB(2)});
  a.Ask({.at_least = 8});
  world.Settle();
  const Sequence waiting = b.Ask({.at_least = 4});
  world.Settle();
  EXPECT_EQ(b.granted(waiting), nullptr);
  a.Die();
  world.Settle();
  EXPECT_NE(b.granted(waiting), nullptr);
  EXPECT_EQ(world.Check(), absl::OkStatus());
}

TEST(SlabTest, AFailedMakeLeavesNoPlaceTaken) {
  FakeWorld world(Slab(MiB(8)));
  FakeClient& a = world.Start({.name = "a"});
  world.faults().SetPlan(FaultInjectingBackend::Call::kCreate, {.calls = {3}});
  const Sequence waiting = a.Ask({.at_least = 8});
  world.Settle();
  EXPECT_EQ(a.granted(waiting), nullptr);
  EXPECT_EQ(world.Check(), absl::OkStatus());
  world.Advance(absl::Milliseconds(100));
  EXPECT_NE(a.granted(waiting), nullptr);
  EXPECT_EQ(world.Check(), absl::OkStatus());
}

TEST(SlabTest, PerLayerPoolsAreRefusedWithWhatToSet) {
  FakeWorld world(Slab(MiB(8)));
  absl::Status status =
      world.TryStart({.name = "a", .handles_per_page = 4}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(status.message(),
                                "set KVCACHED_CONTIGUOUS_LAYOUT=true"))
      << status;
}

TEST(SlabTest, TheFirstTenantIsTheOnlyOne) {
  FakeWorld world(Slab(MiB(8)));
  FakeClient& first = world.Start({.name = "a", .tenant = "uid:1"});
  absl::Status status =
      world.TryStart({.name = "b", .tenant = "uid:2"}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(absl::StrContains(status.message(), "for one tenant")) << status;
  EXPECT_TRUE(world.TryStart({.name = "b", .tenant = "uid:1"}).ok());
  // A process that has left may have the slab open still.
  first.Die();
  EXPECT_FALSE(world.TryStart({.name = "c", .tenant = "uid:2"}).ok());
}

TEST(SlabTest, AClientThatKnowsNoSlabIsRefused) {
  FakeWorld world(Slab(MiB(8)));
  Open open = FakeWorld::OpenOf({.name = "a"});
  open.feature_bits &= ~kFeatureSlab;
  absl::Status status =
      world.TryStart(Peer{.tenant = "t", .uid = 1, .pid = 9}, open).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(absl::StrContains(status.message(), "too old for")) << status;
}

TEST(SlabTest, NothingOutlivesASession) {
  FakeWorld::Options options = Slab(MiB(8));
  options.remembered.sessions.push_back(
      {.peer = {.tenant = "uid:1", .uid = 1, .pid = 7}, .instance = "before"});
  options.remembered.hold = options.remembered.incomplete = true;
  FakeWorld world(options);
  // It waits for nobody of before,
  FakeClient& a = world.Start({.name = "a", .pid = 7});
  EXPECT_EQ(a.opened().feature_bits & kFeatureResume, 0u);
  const Sequence asked = a.Ask({.at_least = 1});
  world.Settle();
  EXPECT_NE(a.granted(asked), nullptr);
  // takes nobody back,
  Open open = FakeWorld::OpenOf({.name = "before"});
  for (uint64_t incarnation : {1, 2}) {
    open.resuming = Resuming{incarnation, a.id()};
    EXPECT_EQ(world.TryStart(a.peer(), open).status().code(),
              absl::StatusCode::kFailedPrecondition);
  }
  // and leaves nobody to wait for.
  EXPECT_TRUE(world.core().Remember().sessions.empty());
}

TEST(SlabTest, OptionsThatDoNotGoWithItAreRefused) {
  FakeBackend device({.total = MiB(8), .fixed_addresses = true});
  FakeClock clock;
  CoreOptions options;
  options.backend = &device;
  options.clock = &clock;
  options.capacity = MiB(8);
  EXPECT_TRUE(Core::Create(options).ok());
  options.charge = CoreOptions::Charge::kEngine;
  EXPECT_EQ(Core::Create(options).status().code(),
            absl::StatusCode::kInvalidArgument);
  options.charge = CoreOptions::Charge::kBroker;
  options.capacity = MiB(4);
  EXPECT_EQ(Core::Create(options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvbroker
