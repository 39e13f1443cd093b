#include "broker/server/state_keeper.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// A disk that fails when told to, and the broker that has something to keep.
struct World {
  StateKeeper::Options Options() {
    StateKeeper::Options options;
    options.state = [this] {
      MutexLock lock(&mu);
      return BrokerState{.incarnation = current};
    };
    options.save = [this](const BrokerState& state) -> absl::Status {
      MutexLock lock(&mu);
      ++attempts;
      changed.SignalAll();
      while (stuck) changed.Wait(&mu);
      if (full) return absl::ResourceExhaustedError("disk full");
      saved.push_back(state.incarnation);
      return absl::OkStatus();
    };
    options.log = [this](std::string_view line) {
      MutexLock lock(&mu);
      log.emplace_back(line);
    };
    options.first_retry = options.last_retry = absl::Milliseconds(1);
    return options;
  }
  template <typename Change>
  void Set(Change change) {
    MutexLock lock(&mu);
    change();
    changed.SignalAll();
  }
  template <typename Condition>
  void Await(Condition condition) {
    MutexLock lock(&mu);
    while (!condition()) changed.Wait(&mu);
  }

  Mutex mu;
  CondVar changed;
  uint64_t current = 1;
  bool full = false, stuck = false;
  int attempts = 0;
  std::vector<uint64_t> saved;
  std::vector<std::string> log;
};

constexpr absl::Duration kGuard = absl::Seconds(30);

TEST(StateKeeperTest, WhatChangedIsWrittenWhenWaitReturns) {
  World world;
  StateKeeper keeper(world.Options());
  EXPECT_TRUE(keeper.Wait(kGuard)) << "there is nothing to write";
  EXPECT_THAT(world.saved, IsEmpty());
  keeper.Changed();
  EXPECT_TRUE(keeper.Wait(kGuard));
  world.Set([&] { world.current = 2; });
  keeper.Changed();
  EXPECT_TRUE(keeper.Wait(kGuard));
  EXPECT_THAT(world.saved, ElementsAre(1, 2));
}

TEST(StateKeeperTest, ChangesThatComeMeanwhileAreWrittenTogether) {
  World world;
  world.stuck = true;
  StateKeeper keeper(world.Options());
  keeper.Changed();
  world.Await([&] { return world.attempts == 1; });
  for (uint64_t i = 2; i <= 50; ++i) {
    world.Set([&] { world.current = i; });
    keeper.Changed();
  }
  EXPECT_FALSE(keeper.Wait(absl::ZeroDuration()));
  world.Set([&] { world.stuck = false; });
  EXPECT_TRUE(keeper.Wait(kGuard));
  EXPECT_THAT(world.saved, ElementsAre(1, 50));
}

TEST(StateKeeperTest, AFullDiskIsSaidOnceTriedAgainAndItsEndSaidToo) {
  World world;
  world.full = true;
  StateKeeper keeper(world.Options());
  keeper.Changed();
  EXPECT_FALSE(keeper.Wait(kGuard));
  world.Await([&] { return world.attempts >= 4; });
  {
    MutexLock lock(&world.mu);
    ASSERT_THAT(world.log, SizeIs(1));
    EXPECT_THAT(world.log[0], HasSubstr("disk full"));
  }
  world.Set([&] { world.full = false; });
  keeper.Changed();
  EXPECT_TRUE(keeper.Wait(kGuard));
  MutexLock lock(&world.mu);
  EXPECT_THAT(world.log, SizeIs(2));
  EXPECT_FALSE(world.saved.empty());
}

TEST(StateKeeperTest, WhatIsLeftIsWrittenAtTheEnd) {
  World world;
  world.stuck = true;
  {
    StateKeeper keeper(world.Options());
    keeper.Changed();
    world.Await([&] { return world.attempts == 1; });
    world.Set([&] { world.current = 7; });
    keeper.Changed();
    world.Set([&] { world.stuck = false; });
  }
  EXPECT_EQ(world.saved.back(), 7u);
}

}  // namespace
}  // namespace kvbroker
