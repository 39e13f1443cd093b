#include "client/cli/command_line.h"

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvbroker::cli {
namespace {

absl::StatusOr<std::variant<Invocation, Information>> Parse(
    std::vector<std::string> words) {
  std::vector<const char*> argv = {"kvctl"};
  for (const std::string& word : words) argv.push_back(word.c_str());
  return ParseCommandLine(static_cast<int>(argv.size()), argv.data());
}

Invocation ParseVerb(std::vector<std::string> words) {
  auto parsed = Parse(std::move(words));
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  if (!parsed.ok() || !std::holds_alternative<Invocation>(*parsed)) return {};
  return std::get<Invocation>(*parsed);
}

template <typename T>
T ParseAs(std::vector<std::string> words) {
  Command command = ParseVerb(std::move(words)).command;
  EXPECT_TRUE(std::holds_alternative<T>(command));
  return std::holds_alternative<T>(command) ? std::get<T>(command) : T();
}

using Names = std::vector<std::string>;

TEST(CommandLineTest, List) {
  auto list = ParseAs<ListCommand>({"list"});
  EXPECT_EQ(list.names, Names{});
  EXPECT_FALSE(list.json);
  list = ParseAs<ListCommand>({"list", "conv", "--json", "code"});
  EXPECT_EQ(list.names, (Names{"conv", "code"}));
  EXPECT_TRUE(list.json);
}

TEST(CommandLineTest, NamesMayBeVerbs) {
  EXPECT_EQ(ParseAs<ListCommand>({"list", "watch", "limit"}).names,
            (Names{"watch", "limit"}));
  EXPECT_EQ(ParseAs<PolicyCommand>({"limit", "list", "1G"}).change.name,
            "list");
}

TEST(CommandLineTest, Limit) {
  auto limit = ParseAs<PolicyCommand>({"limit", "conv", "512M"});
  EXPECT_EQ(limit.change.name, "conv");
  EXPECT_EQ(limit.change.max, Amount(MiB(512)));
  EXPECT_EQ(limit.change.min, std::nullopt);
  EXPECT_FALSE(limit.change.preset);
  EXPECT_FALSE(limit.wait);
  EXPECT_EQ(limit.timeout, absl::InfiniteDuration());

  limit = ParseAs<PolicyCommand>({"limit", "conv", "0", "--preset", "--wait",
                                  "--timeout", "2.5", "--tenant", "uid:7"});
  EXPECT_EQ(limit.change.max, Amount(Bytes(0)));
  EXPECT_TRUE(limit.change.preset);
  EXPECT_TRUE(limit.wait);
  EXPECT_EQ(limit.timeout, absl::Seconds(2.5));
  EXPECT_EQ(limit.change.tenant, "uid:7");
}

TEST(CommandLineTest, LimitPercent) {
  for (const char* percent : {"12.5", "12.5%"}) {
    auto limit = ParseAs<PolicyCommand>({"limit-percent", "conv", percent});
    EXPECT_EQ(limit.change.max, Amount(Percent{12.5}));
  }
}

TEST(CommandLineTest, Policy) {
  auto policy = ParseAs<PolicyCommand>(
      {"policy", "conv", "--min", "1G", "--max", "50%", "--weight", "2"});
  EXPECT_EQ(policy.change.min, Amount(GiB(1)));
  EXPECT_EQ(policy.change.max, Amount(Percent{50}));
  EXPECT_EQ(policy.change.weight, 2);
  policy = ParseAs<PolicyCommand>({"policy", "conv", "--min=0"});
  EXPECT_EQ(policy.change.min, Amount(Bytes(0)));
  EXPECT_EQ(policy.change.max, std::nullopt);
}

TEST(CommandLineTest, WatchDeleteExplain) {
  auto watch = ParseAs<WatchCommand>({"watch", "-n", "0.5", "conv"});
  EXPECT_EQ(watch.interval, absl::Milliseconds(500));
  EXPECT_EQ(watch.names, Names{"conv"});
  EXPECT_EQ(ParseAs<WatchCommand>({"watch"}).interval, absl::Seconds(1));

  EXPECT_FALSE(ParseAs<DeleteCommand>({"delete", "conv"}).force);
  EXPECT_TRUE(ParseAs<DeleteCommand>({"delete", "--force", "conv"}).force);

  auto explain = ParseAs<ExplainCommand>({"explain", "conv", "--json"});
  EXPECT_EQ(explain.name, "conv");
  EXPECT_TRUE(explain.json);
}

TEST(CommandLineTest, AddressAndGpuBeforeOrAfterTheVerb) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"--address", "/d", "--gpu", "1", "list"},
        {"list", "--address", "/d", "--gpu", "1"}}) {
    Invocation invocation = ParseVerb(words);
    EXPECT_EQ(invocation.address, "/d");
    EXPECT_EQ(invocation.gpu, "1");
  }
}

TEST(CommandLineTest, HelpAndVersionAreAnswers) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"--help"},
        {"limit", "--help"},
        {"--version"}}) {
    auto parsed = Parse(words);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    ASSERT_TRUE(std::holds_alternative<Information>(*parsed));
    EXPECT_FALSE(std::get<Information>(*parsed).text.empty());
    EXPECT_TRUE(std::get<Information>(*parsed).asked_for);
  }
  EXPECT_TRUE(absl::StrContains(
      std::get<Information>(*Parse({"limit", "--help"})).text, "SIZE"));
}

TEST(CommandLineTest, WrongUsageIsAnInvalidArgument) {
  for (const std::vector<std::string>& words : {
           std::vector<std::string>{"limits", "conv", "1G"},
           {"--nonsense"},
           {"list", "--nonsense"},
           {"limit"},
           {"limit", "conv"},
           {"limit", "conv", "much"},
           {"limit", "conv", "-5"},
           {"limit", "conv", "1G", "2G"},
           {"limit", "conv", "1G", "--timeout", "3"},
           {"limit", "conv", "1G", "--wait", "--timeout", "soon"},
           {"limit-percent", "conv", "101"},
           {"limit-percent", "conv", "half"},
           {"policy", "conv"},
           {"policy", "conv", "--preset"},
           {"policy", "conv", "--weight", "0"},
           {"policy", "conv", "--min", "150%"},
           {"policy", "conv", "--min"},
           {"policy", "conv", "--max", ""},
           {"watch", "-n", "0"},
           {"watch", "-n", "x"},
           {"delete"},
           {"explain"},
           {"explain", "a", "b"},
           {"list", "--gpu"},
       }) {
    absl::Status status = Parse(words).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status))
        << testing::PrintToString(words) << " " << status;
    EXPECT_FALSE(status.message().empty());
  }
}

TEST(CommandLineTest, UsageErrorsSayWhatWouldDo) {
  EXPECT_TRUE(absl::StrContains(Parse({"lst"}).status().message(),
                                "unknown verb: \"lst\"; verbs: list, limit"));
  EXPECT_TRUE(absl::StrContains(Parse({"limit", "conv"}).status().message(),
                                "SIZE is required"));
  EXPECT_TRUE(absl::StrContains(Parse({"limit", "conv"}).status().message(),
                                "see: kvctl limit --help"));
}

TEST(CommandLineTest, NoVerbShowsHelpThatNobodyAskedFor) {
  auto parsed = Parse({});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Information& information = std::get<Information>(*parsed);
  EXPECT_FALSE(information.asked_for);
  EXPECT_TRUE(absl::StrContains(information.text, "limit-percent"));
}

}  // namespace
}  // namespace kvbroker::cli
