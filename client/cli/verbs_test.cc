#include "client/cli/verbs.h"

#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "broker/base/bytes.h"
#include "client/cli/fake_admin_client.h"
#include "gtest/gtest.h"

namespace kvbroker::cli {
namespace {

// Two GPUs with a broker each; tests that need one GPU pass over the second.
class VerbsTest : public testing::Test {
 protected:
  int Run(const Command& command, std::vector<FakeBroker*> brokers) {
    std::vector<std::unique_ptr<AdminClient>> clients;
    for (FakeBroker* broker : brokers) {
      clients.push_back(std::make_unique<FakeAdminClient>(*broker));
    }
    Fleet fleet(std::move(clients));
    out_.str("");
    err_.str("");
    Console console = {.out = out_, .err = err_, .redraw = redraw_};
    Pacing pacing = {.clock = clock_, .sleep = [this](absl::Duration duration) {
                       clock_.Advance(duration);
                       return --sleeps_left_ > 0;
                     }};
    return RunCommand(command, fleet, console, pacing);
  }
  int RunOnOne(const Command& command) { return Run(command, {&first_}); }
  int RunOnBoth(const Command& command) {
    return Run(command, {&first_, &second_});
  }

  static PolicyCommand Limit(const std::string& name, Amount amount) {
    return {.change = {.name = name, .max = amount}};
  }

  bool Printed(const std::string& part) {
    return absl::StrContains(out_.str(), part);
  }
  bool Complained(const std::string& part) {
    return absl::StrContains(err_.str(), part);
  }

  FakeBroker first_{"GPU-1"}, second_{"GPU-2"};
  FakeClock clock_;
  int sleeps_left_ = 1000;
  bool redraw_ = false;
  std::ostringstream out_, err_;
};

TEST_F(VerbsTest, ListShowsAllBrokers) {
  first_.Add("conv", GiB(1));
  second_.Add("code", GiB(1));
  EXPECT_EQ(RunOnBoth(ListCommand{}), kExitDone);
  EXPECT_TRUE(Printed("conv") && Printed("code")) << out_.str();
  EXPECT_EQ(err_.str(), "");

  EXPECT_EQ(RunOnBoth(ListCommand{.json = true}), kExitDone);
  auto array = nlohmann::json::parse(out_.str());
  ASSERT_EQ(array.size(), 2u);
  EXPECT_EQ(array[0]["gpu"], "GPU-1");
  EXPECT_EQ(array[1]["ipc"], "code");
}

TEST_F(VerbsTest, ListTakesNamesThatDifferentBrokersKnow) {
  first_.Add("conv", GiB(1));
  first_.Add("chat", GiB(1));
  second_.Add("code", GiB(1));
  EXPECT_EQ(RunOnBoth(ListCommand{.names = {"conv", "code"}}), kExitDone);
  EXPECT_TRUE(Printed("conv") && Printed("code") && !Printed("chat"))
      << out_.str();
}

TEST_F(VerbsTest, UnknownNamesFailAndListThoseThatExist) {
  first_.Add("conv", GiB(1));
  second_.Add("code", GiB(1));
  for (const Command& command :
       {Command(ListCommand{.names = {"conv", "chat"}}),
        Command(WatchCommand{.names = {"chat"}}),
        Command(Limit("chat", GiB(1))), Command(Limit("chat", Percent{5})),
        Command(DeleteCommand{.name = "chat"}),
        Command(ExplainCommand{.name = "chat"})}) {
    EXPECT_EQ(RunOnBoth(command), kExitFailed);
    EXPECT_EQ(out_.str(), "");
    EXPECT_TRUE(absl::StartsWith(
        err_.str(),
        "kvctl: no such instance: \"chat\"; instances: code, conv\n"))
        << err_.str();
  }
}

TEST_F(VerbsTest, UnknownNameWhereThereIsNoInstance) {
  EXPECT_EQ(RunOnOne(ExplainCommand{.name = "chat"}), kExitFailed);
  EXPECT_TRUE(Complained("there is none at all: \"chat\"")) << err_.str();
}

TEST_F(VerbsTest, LimitPrintsWordsAndBytes) {
  first_.Add("conv", GiB(1));
  EXPECT_EQ(RunOnOne(Limit("conv", MiB(512))), kExitDone);
  EXPECT_EQ(out_.str(), "conv: limit 512 MiB (536870912 bytes)\n");
  EXPECT_EQ(err_.str(), "");
}

TEST_F(VerbsTest, LimitOfZeroIsALimit) {
  first_.Add("conv", GiB(1));
  EXPECT_EQ(RunOnOne(Limit("conv", Bytes(0))), kExitDone);
  EXPECT_TRUE(first_.policies_set.back().has_max_bytes());
  EXPECT_EQ(first_.instances["conv"].max_bytes(), 0u);

  first_.Add("conv", GiB(1));
  EXPECT_EQ(RunOnOne(Limit("conv", Percent{0})), kExitDone);
  EXPECT_TRUE(first_.policies_set.back().has_max_bytes());
  EXPECT_EQ(first_.instances["conv"].max_bytes(), 0u);
}

TEST_F(VerbsTest, LimitAboveCapacitySaysWhatIsInEffect) {
  first_.Add("conv", GiB(1));
  EXPECT_EQ(RunOnOne(Limit("conv", GiB(1024))), kExitDone);
  EXPECT_EQ(out_.str(),
            "conv: limit 1 TiB (1099511627776 bytes), in effect 8 GiB "
            "(8589934592 bytes)\n");
}

TEST_F(VerbsTest, LimitGoesOnlyToTheBrokersThatKnowTheName) {
  first_.Add("conv", GiB(1));
  second_.Add("code", GiB(1));
  EXPECT_EQ(RunOnBoth(Limit("code", GiB(2))), kExitDone);
  EXPECT_TRUE(first_.policies_set.empty());
  EXPECT_EQ(second_.instances["code"].max_bytes(), GiB(2).count());
  EXPECT_EQ(out_.str(), "code: limit 2 GiB (2147483648 bytes)\n");
}

TEST_F(VerbsTest, LimitOfAnInstanceOnSeveralGpusNamesThem) {
  first_.Add("conv", GiB(1));
  second_.Add("conv", GiB(1));
  EXPECT_EQ(RunOnBoth(Limit("conv", MiB(1))), kExitDone);
  EXPECT_EQ(out_.str(),
            "conv on GPU-1: limit 1 MiB (1048576 bytes)\n"
            "conv on GPU-2: limit 1 MiB (1048576 bytes)\n");
}

TEST_F(VerbsTest, PercentsAreOfEachGpusOwnMemory) {
  first_.status.set_total_bytes(1000);
  second_.status.set_total_bytes(2000);
  first_.Add("conv", GiB(1));
  second_.Add("conv", GiB(1));
  PolicyCommand policy = Limit("conv", Percent{50});
  policy.change.min = Percent{10};
  EXPECT_EQ(RunOnBoth(policy), kExitDone);
  EXPECT_EQ(first_.instances["conv"].max_bytes(), 500u);
  EXPECT_EQ(first_.instances["conv"].min_bytes(), 100u);
  EXPECT_EQ(second_.instances["conv"].max_bytes(), 1000u);
  EXPECT_EQ(second_.instances["conv"].min_bytes(), 200u);
}

TEST_F(VerbsTest, PolicyChangesOnlyWhatIsGiven) {
  v1::InstanceStatus& conv = first_.Add("conv", GiB(1));
  conv.set_min_bytes(7);
  PolicyCommand policy = {.change = {.name = "conv", .weight = 2.5}};
  EXPECT_EQ(RunOnOne(policy), kExitDone);
  EXPECT_EQ(out_.str(), "conv: weight 2.5\n");
  EXPECT_EQ(conv.min_bytes(), 7u);
  EXPECT_EQ(conv.max_bytes(), GiB(1).count());

  policy.change.min = MiB(1);
  policy.change.max = MiB(2);
  EXPECT_EQ(RunOnOne(policy), kExitDone);
  EXPECT_EQ(out_.str(),
            "conv: min 1 MiB (1048576 bytes); limit 2 MiB (2097152 bytes); "
            "weight 2.5\n");
}

TEST_F(VerbsTest, PresetReachesNamesThatDoNotExistYet) {
  PolicyCommand limit = Limit("later", GiB(1));
  EXPECT_EQ(RunOnBoth(limit), kExitFailed);
  EXPECT_TRUE(
      Complained("kvctl: to set it before the engine starts, add "
                 "--preset\n"))
      << err_.str();
  limit.change.preset = true;
  EXPECT_EQ(RunOnBoth(limit), kExitDone);
  EXPECT_EQ(first_.instances["later"].max_bytes(), GiB(1).count());
  EXPECT_EQ(second_.instances["later"].max_bytes(), GiB(1).count());
}

TEST_F(VerbsTest, LimitBelowWhatIsHeldReturnsOnAcceptance) {
  first_.Add("conv", GiB(2)).set_held_bytes(GiB(2).count());
  EXPECT_EQ(RunOnOne(Limit("conv", GiB(1))), kExitDone);
  EXPECT_TRUE(Printed("conv: draining, still holds 2 GiB (2147483648 bytes)\n"))
      << out_.str();
}

TEST_F(VerbsTest, WaitReturnsOnceDrained) {
  v1::InstanceStatus& conv = first_.Add("conv", GiB(2));
  conv.set_held_bytes(GiB(2).count());
  int lists = 0;
  first_.before_list = [&] {
    if (++lists == 4) conv.set_held_bytes(GiB(1).count());
  };
  PolicyCommand limit = Limit("conv", GiB(1));
  limit.wait = true;
  EXPECT_EQ(RunOnOne(limit), kExitDone);
  EXPECT_EQ(lists, 4);
  EXPECT_EQ(err_.str(), "");
}

TEST_F(VerbsTest, WaitIsOverWhenTheInstanceIsGone) {
  first_.Add("conv", GiB(2)).set_held_bytes(GiB(2).count());
  first_.before_list = [&] { first_.instances.clear(); };
  PolicyCommand limit = Limit("conv", GiB(1));
  limit.wait = true;
  EXPECT_EQ(RunOnOne(limit), kExitDone);
}

TEST_F(VerbsTest, WaitFailsAtItsTimeout) {
  first_.Add("conv", GiB(2)).set_held_bytes(GiB(2).count());
  PolicyCommand limit = Limit("conv", GiB(1));
  limit.wait = true;
  limit.timeout = absl::Seconds(2);
  absl::Time start = clock_.Now();
  EXPECT_EQ(RunOnOne(limit), kExitFailed);
  EXPECT_EQ(clock_.Now() - start, absl::Seconds(2));
  EXPECT_TRUE(
      Complained("not drained within 2s: conv holds 2 GiB (2147483648 "
                 "bytes) above its limit 1 GiB"))
      << err_.str();
  EXPECT_TRUE(Printed("conv: limit 1 GiB"));
}

TEST_F(VerbsTest, WaitLooksAtTheInstanceOfTheTenantOnly) {
  first_.Add("conv", GiB(2));
  v1::InstanceStatus& other = first_.Add("other", GiB(1));
  other.set_name("conv");
  other.set_tenant("uid:7");
  other.set_held_bytes(GiB(2).count());
  PolicyCommand limit = Limit("conv", GiB(1));
  limit.wait = true;
  EXPECT_EQ(RunOnOne(limit), kExitDone);
}

TEST_F(VerbsTest, DeleteForgetsAndForceEnds) {
  first_.Add("dead", GiB(1)).clear_pids();
  first_.Add("live", GiB(1));
  EXPECT_EQ(RunOnOne(DeleteCommand{.name = "dead"}), kExitDone);
  EXPECT_EQ(out_.str(), "dead: forgotten\n");

  EXPECT_EQ(RunOnOne(DeleteCommand{.name = "live"}), kExitFailed);
  EXPECT_EQ(err_.str(),
            "kvctl: the instance has live processes: live\n"
            "kvctl: to end its processes, add --force\n");

  EXPECT_EQ(RunOnOne(DeleteCommand{.name = "live", .force = true}), kExitDone);
  EXPECT_EQ(out_.str(), "live: told to end: pid 4711\n");
}

TEST_F(VerbsTest, ExplainPrintsEachGpusReasons) {
  first_.Add("conv", GiB(1));
  first_.explanations["conv"] = {"It holds nothing."};
  EXPECT_EQ(RunOnBoth(ExplainCommand{.name = "conv"}), kExitDone);
  EXPECT_EQ(out_.str(), "It holds nothing.\n");

  second_.Add("conv", GiB(1));
  second_.explanations["conv"] = {"It waits."};
  EXPECT_EQ(RunOnBoth(ExplainCommand{.name = "conv"}), kExitDone);
  EXPECT_EQ(out_.str(), "On GPU-1:\nIt holds nothing.\nOn GPU-2:\nIt waits.\n");

  EXPECT_EQ(RunOnBoth(ExplainCommand{.name = "conv", .json = true}), kExitDone);
  EXPECT_EQ(nlohmann::json::parse(out_.str())[1]["lines"][0], "It waits.");
}

TEST_F(VerbsTest, ABrokerThatIsGoneIsAWarningWhileAnotherAnswers) {
  first_.failure = absl::UnavailableError("no broker listens at /d/GPU-1.sock");
  second_.Add("conv", GiB(1));
  for (const Command& command :
       {Command(ListCommand{}), Command(Limit("conv", MiB(1)))}) {
    EXPECT_EQ(RunOnBoth(command), kExitDone);
    EXPECT_TRUE(Printed("conv"));
    EXPECT_EQ(err_.str(),
              "kvctl: warning: no broker listens at /d/GPU-1.sock\n");
  }
  EXPECT_EQ(RunOnOne(ListCommand{}), kExitFailed);
  EXPECT_TRUE(absl::StartsWith(
      err_.str(),
      "kvctl: no broker listens at /d/GPU-1.sock\nkvctl: start one "
      "(kvbrokerd --help)"))
      << err_.str();
}

TEST_F(VerbsTest, AnUnknownNameMayBelongToABrokerThatIsGone) {
  first_.failure = absl::UnavailableError("no broker listens at /d/GPU-1.sock");
  EXPECT_EQ(RunOnBoth(Limit("conv", MiB(1))), kExitFailed);
  EXPECT_TRUE(Complained("\"conv\"; and no broker listens at /d/GPU-1.sock"))
      << err_.str();
}

TEST_F(VerbsTest, ARefusalOfOneBrokerFailsTheVerb) {
  first_.failure = absl::ResourceExhaustedError("sum of min above capacity");
  second_.Add("conv", GiB(1));
  EXPECT_EQ(RunOnBoth(Limit("conv", MiB(1))), kExitFailed);
  EXPECT_TRUE(Printed("conv: limit 1 MiB"));
  EXPECT_EQ(err_.str(), "kvctl: sum of min above capacity\n");
}

TEST_F(VerbsTest, AnArgumentThatTheBrokerRefusesIsUsage) {
  first_.failure = absl::InvalidArgumentError("min_bytes is above max_bytes");
  EXPECT_EQ(RunOnOne(Limit("conv", MiB(1))), kExitUsage);
  EXPECT_EQ(err_.str(), "kvctl: min_bytes is above max_bytes\n");
}

TEST_F(VerbsTest, WatchPrintsBlocksUntilStopped) {
  first_.Add("conv", GiB(1));
  sleeps_left_ = 3;
  absl::Time start = clock_.Now();
  EXPECT_EQ(RunOnOne(WatchCommand{.interval = absl::Seconds(5)}), kExitDone);
  EXPECT_EQ(clock_.Now() - start, absl::Seconds(15));
  std::string text = out_.str();
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  size_t blocks = 1;
  for (size_t at = 0; (at = text.find("\n\n", at)) != std::string::npos; ++at) {
    ++blocks;
  }
  EXPECT_EQ(blocks, 3u) << text;
}

TEST_F(VerbsTest, WatchDrawsOverItselfOnATerminal) {
  first_.Add("conv", GiB(1));
  redraw_ = true;
  sleeps_left_ = 2;
  EXPECT_EQ(RunOnOne(WatchCommand{}), kExitDone);
  EXPECT_TRUE(absl::StartsWith(out_.str(), "\x1b[2J\x1b[HGPU-1")) << out_.str();
  EXPECT_TRUE(Printed("\x1b[J\x1b[HGPU-1")) << out_.str();
}

TEST_F(VerbsTest, WatchInJsonIsALineARound) {
  sleeps_left_ = 2;
  EXPECT_EQ(RunOnOne(WatchCommand{.json = true}), kExitDone);
  EXPECT_EQ(out_.str(), "[]\n[]\n");
}

TEST_F(VerbsTest, WatchOutlivesARestartOfTheBroker) {
  first_.Add("conv", GiB(1));
  int lists = 0;
  first_.before_list = [&] {
    first_.failure = ++lists == 2 ? absl::UnavailableError("no broker listens")
                                  : absl::OkStatus();
  };
  sleeps_left_ = 3;
  EXPECT_EQ(RunOnOne(WatchCommand{}), kExitDone);
  EXPECT_EQ(lists, 3);
  EXPECT_TRUE(Complained("kvctl: no broker listens\n")) << err_.str();
}

TEST_F(VerbsTest, WatchFailsWhereItCannotBegin) {
  first_.failure = absl::UnavailableError("no broker listens");
  EXPECT_EQ(RunOnOne(WatchCommand{}), kExitFailed);
}

}  // namespace
}  // namespace kvbroker::cli
