#include "client/replay/replay_summary.h"

#include <unistd.h>

#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/match.h"
#include "client/replay/static_block_source.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

constexpr SchedulerOptions kOptions = {
    .speed = {.prefill_tokens_per_s = 100, .decode_tokens_per_s = 10}};

TEST(ReplaySummaryTest, SumsUpARun) {
  const auto source = *StaticBlockSource::Create(Bytes(640), Bytes(64));
  BlockPattern pattern(1);
  // The second waits for the first, the third never fits, the last never comes.
  Scheduler scheduler(kOptions,
                      {{0, 100, 10}, {1, 100, 10}, {2, 1000, 1}, {99, 1, 1}},
                      *source, &pattern);
  for (double due = 0; due < 50;) due = scheduler.Step(due);
  const ReplaySummary summary = Summarize(scheduler, pattern);
  EXPECT_EQ(summary.requests, 4);
  EXPECT_EQ(summary.rejected, 1);
  EXPECT_EQ(summary.unfinished, 1);
  EXPECT_DOUBLE_EQ(summary.wait_max_ms, 1000);
  EXPECT_DOUBLE_EQ(summary.wait_p99_ms, 1000);
  EXPECT_DOUBLE_EQ(summary.wait_mean_ms, 500);
  EXPECT_EQ(summary.preemptions, 0);
  EXPECT_EQ(summary.integrity_errors, 0);
  EXPECT_EQ(summary.blocks_written, 14);
}

TEST(ReplaySummaryTest, NothingAdmittedIsNoWait) {
  const auto source = *StaticBlockSource::Create(Bytes(640), Bytes(64));
  BlockPattern pattern(1);
  Scheduler scheduler(kOptions, {}, *source, &pattern);
  EXPECT_EQ(Summarize(scheduler, pattern).wait_p99_ms, 0);
}

TEST(ReplaySummaryTest, JsonIsOneObjectOnOneLine) {
  EXPECT_EQ(SummaryToJson({.name = "conv",
                           .mode = "static",
                           .requests = 1,
                           .rejected = 2,
                           .unfinished = 3,
                           .wait_p99_ms = 4.5,
                           .wait_mean_ms = 5.25,
                           .wait_max_ms = 6,
                           .preemptions = 7,
                           .integrity_errors = 8,
                           .blocks_written = 9,
                           .late_max_ms = 10,
                           .seconds = 11}),
            R"({"name":"conv","mode":"static","requests":1,"rejected":2,)"
            R"("unfinished":3,"wait_p99_ms":4.500,"wait_mean_ms":5.250,)"
            R"("wait_max_ms":6.000,"preemptions":7,"integrity_errors":8,)"
            R"("blocks_written":9,"late_max_ms":10.000,"seconds":11.000})"
            "\n");
}

TEST(ReplaySummaryTest, JsonSaysWhatWasInPagesWhereItWasLookedAt) {
  EXPECT_TRUE(absl::EndsWith(
      SummaryToJson({.name = "conv",
                     .mode = "elastic",
                     .fresh = FreshCounts{.pages = 1,
                                          .zero_pages = 2,
                                          .own_pages = 3,
                                          .foreign_patterns = 4,
                                          .garbage = 5,
                                          .errors = 6}}),
      R"("seconds":0.000,"fresh_pages":1,"fresh_zero_pages":2,)"
      R"("fresh_own_tenant_pages":3,"foreign_patterns":4,)"
      R"("fresh_garbage_lines":5,"fresh_errors":6})"
      "\n"));
}

TEST(ReplaySummaryTest, TextNamesTheEngine) {
  EXPECT_TRUE(absl::StartsWith(
      SummaryToText({.name = "conv", .mode = "static", .requests = 12}),
      "conv (static): 12 requests"));
}

TEST(RequestsCsvTest, OneLineARequestEmptyWhereNothingHappened) {
  EXPECT_EQ(RequestsToCsv({{.arrival_s = 1,
                            .admitted_s = 1.5,
                            .first_token_s = 2,
                            .end_s = 3,
                            .preemptions = 4},
                           {.arrival_s = 2, .rejected = true},
                           {.arrival_s = 3}}),
            "arrival_ms,wait_ms,first_token_ms,end_ms,preemptions,outcome\n"
            "1000.000,500.000,2000.000,3000.000,4,done\n"
            "2000.000,,,,0,rejected\n"
            "3000.000,,,,0,unfinished\n");
}

TEST(WriteFileTest, WritesAll) {
  const std::string path = testing::TempDir() + "/replay_summary_test.csv";
  ASSERT_TRUE(WriteFile(path, "a\nb\n").ok());
  std::ifstream file(path);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(file), {}), "a\nb\n");
  unlink(path.c_str());
}

TEST(WriteFileTest, SaysWhatFailed) {
  EXPECT_TRUE(absl::StrContains(WriteFile("/nowhere/r.csv", "a").message(),
                                "/nowhere/r.csv"));
  EXPECT_FALSE(WriteFile("/dev/full", "a").ok());
}

}  // namespace
}  // namespace kvbroker::replay
