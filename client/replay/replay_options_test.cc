#include "client/replay/replay_options.h"

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

absl::StatusOr<std::variant<ReplayOptions, HelpText>> Parse(
    std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "kvbroker-replay");
  return ParseReplayOptions(static_cast<int>(arguments.size()),
                            arguments.data());
}

ReplayOptions Parsed(std::vector<const char*> arguments) {
  const auto parsed = Parse(std::move(arguments));
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.ok() ? std::get<ReplayOptions>(*parsed) : ReplayOptions();
}

std::string ErrorOf(std::vector<const char*> arguments) {
  const auto parsed = Parse(std::move(arguments));
  EXPECT_FALSE(parsed.ok());
  return std::string(parsed.status().message());
}

TEST(ReplayOptionsTest, DefaultsAreAnElasticConvOnALlama) {
  const ReplayOptions options = Parsed({});
  EXPECT_EQ(options.name, "replay");
  EXPECT_EQ(options.trace, "builtin:conv");
  EXPECT_EQ(options.seed, kDefaultTraceSeed);
  EXPECT_EQ(options.model.name, "llama-3.1-8b");
  EXPECT_EQ(options.geometry.page_bytes, KiB(256));
  EXPECT_FALSE(options.static_share.has_value());
  EXPECT_DOUBLE_EQ(options.speed.prefill_tokens_per_s, 20'000);
  EXPECT_DOUBLE_EQ(options.speed.decode_tokens_per_s, 30);
}

TEST(ReplayOptionsTest, ReadsHowPagesAreLookedAt) {
  EXPECT_FALSE(Parsed({}).guard);
  EXPECT_FALSE(Parsed({}).check_fresh.has_value());
  EXPECT_TRUE(Parsed({"--guard"}).guard);
  EXPECT_EQ(Parsed({"--check-fresh", "zero"}).check_fresh, FreshRule::kZero);
  EXPECT_EQ(Parsed({"--check-fresh=tenant"}).check_fresh, FreshRule::kTenant);
  EXPECT_TRUE(absl::StrContains(ErrorOf({"--check-fresh", "some"}), "zero"));
  for (const char* flag : {"--guard", "--check-fresh=zero"}) {
    EXPECT_TRUE(absl::StrContains(ErrorOf({"--static-share", "1M", flag}),
                                  "do not go with it"));
  }
}

TEST(ReplayOptionsTest, ReadsEveryFlag) {
  const ReplayOptions options = Parsed({"--name",
                                        "code2",
                                        "--trace",
                                        "c.csv",
                                        "--seed",
                                        "9",
                                        "--origin",
                                        "2023-11-16 18:15:46.68",
                                        "--length",
                                        "1200",
                                        "--shift",
                                        "-600",
                                        "--window",
                                        "300",
                                        "--rate-scale",
                                        "3",
                                        "--prefill",
                                        "1000",
                                        "--decode",
                                        "10",
                                        "--speedup",
                                        "40",
                                        "--until",
                                        "1300",
                                        "--start-at",
                                        "1700000000.5",
                                        "--model",
                                        "qwen3-0.6b",
                                        "--scale",
                                        "256",
                                        "--address",
                                        "/run/x.sock",
                                        "--min",
                                        "1M",
                                        "--max",
                                        "1G",
                                        "--weight",
                                        "2.5",
                                        "--requests",
                                        "r.csv",
                                        "--history",
                                        "h.json",
                                        "--json",
                                        "--status-fd",
                                        "5",
                                        "--print-capacity"});
  EXPECT_EQ(options.name, "code2");
  EXPECT_EQ(options.trace, "c.csv");
  EXPECT_EQ(options.seed, 9u);
  EXPECT_TRUE(options.origin.has_value());
  EXPECT_EQ(options.length_s, 1200);
  EXPECT_EQ(options.shift_s, -600);
  EXPECT_EQ(options.window_s, 300);
  EXPECT_EQ(options.rate_scale, 3);
  EXPECT_EQ(options.speed.prefill_tokens_per_s, 1000);
  EXPECT_EQ(options.speed.decode_tokens_per_s, 10);
  EXPECT_EQ(options.speedup, 40);
  EXPECT_EQ(options.until_s, 1300);
  EXPECT_EQ(options.start_at, absl::FromUnixMillis(1700000000500));
  EXPECT_EQ(options.model.name, "qwen3-0.6b");
  EXPECT_EQ(options.geometry.token_bytes, Bytes(448));
  EXPECT_EQ(options.address, "/run/x.sock");
  EXPECT_EQ(options.min, MiB(1));
  EXPECT_EQ(options.max, GiB(1));
  EXPECT_EQ(options.weight, 2.5);
  EXPECT_EQ(options.requests_file, "r.csv");
  EXPECT_EQ(options.history_file, "h.json");
  EXPECT_TRUE(options.json);
  EXPECT_EQ(options.status_fd, 5);
  EXPECT_TRUE(options.print_capacity);
}

TEST(ReplayOptionsTest, StaticShareIsASize) {
  EXPECT_EQ(Parsed({"--static-share", "18M"}).static_share, MiB(18));
}

TEST(ReplayOptionsTest, HelpIsText) {
  const auto parsed = Parse({"--help"});
  ASSERT_TRUE(parsed.ok());
  const std::string& text = std::get<HelpText>(*parsed).text;
  EXPECT_TRUE(absl::StrContains(text, "--static-share"));
  EXPECT_TRUE(absl::StrContains(text, "TIMESTAMP,ContextTokens"));
}

TEST(ReplayOptionsTest, ErrorsNameTheFlag) {
  const struct {
    std::vector<const char*> arguments;
    const char* error;
  } cases[] = {
      {{"--bogus"}, "--bogus"},
      {{"surplus"}, "surplus"},
      {{"--name"}, "--name"},
      {{"--name", "a b"}, "--name must be 1 to 128 of"},
      {{"--name", "a\"b"}, "--name must be 1 to 128 of"},
      {{"--seed", "-1"}, "--seed"},
      {{"--origin", "noon"}, "not a timestamp"},
      {{"--trace", "builtin:code", "--origin", "2023-11-16 18:15:46"},
       "--origin is for trace files"},
      {{"--shift", "1e9"}, "--shift must be within"},
      {{"--shift", "nan"}, "--shift must be within"},
      {{"--window", "0"}, "--window must be above 0"},
      {{"--until", "-1"}, "--until must be above 0"},
      {{"--length", "inf"}, "--length must be above 0"},
      {{"--rate-scale", "0"}, "--rate-scale must be above 0"},
      {{"--prefill", "0"}, "--prefill must be above 0"},
      {{"--decode", "nan"}, "--decode must be above 0"},
      {{"--speedup", "0"}, "--speedup must be above 0"},
      {{"--speedup", "fast"}, "--speedup"},
      {{"--start-at", "-5"}, "--start-at must be seconds since 1970"},
      {{"--model", "gpt-9"}, "no such model preset: gpt-9"},
      {{"--scale", "500"}, "scale must be a positive divisor"},
      {{"--static-share", "much"}, "--static-share: "},
      {{"--min", "-1"}, "--min: "},
      {{"--max", ""}, "--max"},
      {{"--min", "2G", "--max", "1G"}, "--min is above --max"},
      {{"--weight", "0"}, "--weight must be above 0"},
      {{"--static-share", "1G", "--weight", "2"}, "--static-share needs no"},
      {{"--static-share", "1G", "--address", "/x"}, "--static-share needs no"},
      {{"--static-share", "1G", "--gpu", "0"}, "--static-share needs no"},
      {{"--static-share", "1G", "--backend", "cuda"},
       "--static-share needs no"},
      {{"--backend", "rocm"}, "--backend: "},
      {{"--status-fd", "-1"}, "--status-fd must be an open descriptor"},
  };
  for (const auto& [arguments, error] : cases) {
    EXPECT_TRUE(absl::StrContains(ErrorOf(arguments), error))
        << arguments[0] << ": " << ErrorOf(arguments);
  }
}

TEST(MakeTraceTest, BuiltinTracesAreShiftedAndCut) {
  const Trace whole = *MakeTrace(Parsed({"--trace", "builtin:code"}));
  EXPECT_DOUBLE_EQ(whole.length_s, 1200);
  const Trace cut = *MakeTrace(
      Parsed({"--trace", "builtin:code", "--shift", "600", "--window", "300"}));
  EXPECT_DOUBLE_EQ(cut.length_s, 300);
  const Trace expected = Windowed(Shifted(whole, 600), 300);
  EXPECT_EQ(cut.requests, expected.requests);
}

TEST(MakeTraceTest, RateScaleMultipliesRequests) {
  EXPECT_EQ(MakeTrace(Parsed({"--rate-scale", "3"}))->requests.size(),
            3 * MakeTrace(Parsed({}))->requests.size());
}

TEST(MakeTraceTest, LengthOfABuiltinTrace) {
  const Trace trace = *MakeTrace(Parsed({"--length", "60"}));
  EXPECT_DOUBLE_EQ(trace.length_s, 60);
  EXPECT_LT(trace.requests.back().arrival_s, 60);
}

TEST(MakeTraceTest, UnknownTracesAreErrors) {
  EXPECT_FALSE(MakeTrace(Parsed({"--trace", "builtin:chat"})).ok());
  EXPECT_FALSE(MakeTrace(Parsed({"--trace", "/nowhere.csv"})).ok());
}

}  // namespace
}  // namespace kvbroker::replay
