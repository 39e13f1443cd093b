#include "client/replay/trace.h"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/replay/random.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

constexpr char kHeader[] = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

Trace Parsed(const std::string& text) {
  absl::StatusOr<Trace> trace = ParseTrace(text, "t.csv");
  EXPECT_TRUE(trace.ok()) << trace.status();
  return trace.ok() ? *trace : Trace();
}

std::string ErrorOf(const std::string& text) {
  const absl::StatusOr<Trace> trace = ParseTrace(text, "t.csv");
  EXPECT_FALSE(trace.ok()) << text;
  return trace.ok() ? "" : std::string(trace.status().message());
}

std::vector<double> Arrivals(const Trace& trace) {
  std::vector<double> arrivals;
  for (const TraceRequest& request : trace.requests) {
    arrivals.push_back(request.arrival_s);
  }
  return arrivals;
}

TEST(TraceTest, DatesCountFromTheEarliestRow) {
  const Trace trace =
      Parsed(absl::StrCat(kHeader,
                          "2023-11-16 18:17:03.9799600,4808,10\n"
                          "2023-11-16 18:17:04.0799601,110,0\n"));
  ASSERT_EQ(trace.requests.size(), 2u);
  EXPECT_EQ(trace.requests[0], (TraceRequest{0, 4808, 10}));
  EXPECT_NEAR(trace.requests[1].arrival_s, 0.1000001, 1e-9);
  EXPECT_EQ(trace.requests[1].generated_tokens, 0);
}

TEST(TraceTest, OriginKeepsTheDistanceBetweenTraces) {
  const absl::StatusOr<Trace> trace =
      ParseTrace("2023-11-16 18:17:03.5,1,1\n", "t.csv",
                 *ParseTimestamp("2023-11-16 18:15:46.5"));
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_DOUBLE_EQ(trace->requests[0].arrival_s, 77);
  EXPECT_DOUBLE_EQ(trace->length_s, 120);
}

TEST(TraceTest, OriginAfterTheFirstRowIsAnError) {
  const absl::StatusOr<Trace> trace =
      ParseTrace("2023-11-16 18:17:03.5,1,1\n", "t.csv",
                 *ParseTimestamp("2023-11-16 18:17:04"));
  ASSERT_FALSE(trace.ok());
  EXPECT_TRUE(absl::StrContains(trace.status().message(), "before the origin"))
      << trace.status();
}

TEST(TraceTest, SecondsCountFromZero) {
  const Trace trace = Parsed("5,1,2\n7.25,3,4\n");
  EXPECT_EQ(Arrivals(trace), (std::vector<double>{5, 7.25}));
}

TEST(TraceTest, LengthIsTheSpanUpToAWholeMinute) {
  EXPECT_DOUBLE_EQ(Parsed("0,1,1\n1199.3,1,1\n").length_s, 1200);
  EXPECT_DOUBLE_EQ(Parsed("0,1,1\n").length_s, 60);
  // The last request lies within the trace, never on its end.
  EXPECT_DOUBLE_EQ(Parsed("60,1,1\n").length_s, 120);
}

TEST(TraceTest, AcceptsWhatExportersWrite) {
  for (const char* text :
       {"2024-05-10 00:00:00.009930+00:00,1,1\n", "2024-05-10T00:00:00Z,1,1\n",
        "2024-05-10T00:00:00,1,1",
        "timestamp,contexttokens,generatedtokens\r\n"
        "2024-05-10 00:00:00,1,1\r\n\r\n",
        "\xef\xbb\xbfTIMESTAMP,ContextTokens,GeneratedTokens\n0,1,1\n",
        "\n\n 0 , 1 , 1 \n"}) {
    EXPECT_EQ(Parsed(text).requests.size(), 1u) << text;
  }
}

TEST(TraceTest, SortsByArrival) {
  EXPECT_EQ(Arrivals(Parsed("3,1,1\n1,1,1\n2,1,1\n")),
            (std::vector<double>{1, 2, 3}));
}

TEST(TraceTest, ErrorsNameFileLineAndFault) {
  const struct {
    std::string text;
    const char* error;
  } cases[] = {
      {"", "trace has no requests: t.csv"},
      {kHeader, "trace has no requests: t.csv"},
      {"hello\n", "t.csv:1: expected the header TIMESTAMP,"},
      {absl::StrCat(kHeader, "0,1,1\n0,1\n"), "t.csv:3: expected 3 fields"},
      {"0,1,1,1\n", "t.csv:1: expected 3 fields"},
      {"0,1,1\n\nnow,1,1\n", "t.csv:3: TIMESTAMP is neither"},
      {"0,1,1\n-1,1,1\n", "t.csv:2: TIMESTAMP is neither"},
      {"0,1,1\n0x10,1,1\n", "t.csv:2: TIMESTAMP is neither"},
      {"0,1,1\n1e5,1,1\n", "t.csv:2: TIMESTAMP is neither"},
      {"2023-13-16 18:17:03,1,1\n", "t.csv:1: TIMESTAMP is neither"},
      {"0,0,1\n", "ContextTokens is not a whole number from 1"},
      {"0,1.5,1\n", "ContextTokens is not a whole number from 1"},
      {"0,99999999999999999999,1\n", "ContextTokens is not a whole number"},
      {"0,16777217,1\n", "from 1 to 16777216: \"16777217\""},
      {"0,1,-1\n", "GeneratedTokens is not a whole number from 0"},
      {"0,1,\n", "GeneratedTokens is not a whole number from 0"},
      {"0,1,1\n2023-11-16 18:17:03,1,1\n",
       "t.csv:2: TIMESTAMP is a date where"},
      {"2023-11-16 18:17:03,1,1\n0,1,1\n", "t.csv:2: TIMESTAMP is in seconds"},
      {"0,1,1\n9999999999,1,1\n", "trace is too long: t.csv"},
      {std::string(5000, '7'), "t.csv:1: line is longer than 1024 bytes"},
      {std::string("0,1,1\n0,\0001,1\n", 13), "\"\\x00\\x31\""},
  };
  for (const auto& [text, error] : cases) {
    EXPECT_TRUE(absl::StrContains(ErrorOf(text), error)) << ErrorOf(text);
  }
}

TEST(TraceTest, GarbageNeverCrashes) {
  const std::string good = absl::StrCat(
      kHeader, "2023-11-16 18:17:03.9799600,4808,10\n12.5,1,1\n9e99,1,1\n");
  Random random(7);
  for (int i = 0; i < 20'000; ++i) {
    std::string text = good;
    const int edits = 1 + static_cast<int>(random.Next() % 8);
    for (int k = 0; k < edits && !text.empty(); ++k) {
      const size_t at = random.Next() % text.size();
      switch (random.Next() % 3) {
        case 0:
          text[at] = static_cast<char>(random.Next());
          break;
        case 1:
          text.erase(at, random.Next() % 10);
          break;
        default:
          text.insert(at, text.substr(random.Next() % text.size(), 9));
      }
    }
    const absl::StatusOr<Trace> trace = ParseTrace(text, "t.csv");
    if (!trace.ok()) continue;
    for (const TraceRequest& request : trace->requests) {
      ASSERT_GE(request.arrival_s, 0) << text;
      ASSERT_LT(request.arrival_s, trace->length_s) << text;
    }
  }
}

TEST(TraceTest, ReadsFiles) {
  std::string path = testing::TempDir() + "/traceXXXXXX";
  close(mkstemp(path.data()));
  std::ofstream(path) << kHeader << "0,5,6\n";
  const absl::StatusOr<Trace> trace = ReadTraceFile(path);
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->requests[0], (TraceRequest{0, 5, 6}));
  unlink(path.c_str());
}

TEST(TraceTest, MissingFileAndFolderAreNamed) {
  for (const char* path : {"/nowhere/trace.csv", "/tmp"}) {
    const absl::StatusOr<Trace> trace = ReadTraceFile(path);
    ASSERT_FALSE(trace.ok());
    EXPECT_TRUE(absl::StrContains(trace.status().message(), path))
        << trace.status();
  }
}

TEST(TraceTest, ShiftWrapsAroundTheLength) {
  const Trace trace = {.requests = {{10, 1, 1}, {70, 2, 2}, {110, 3, 3}},
                       .length_s = 120};
  EXPECT_EQ(Arrivals(Shifted(trace, 60)), (std::vector<double>{10, 50, 70}));
  EXPECT_EQ(Shifted(trace, 60).requests[0].prompt_tokens, 2);
  EXPECT_EQ(Arrivals(Shifted(trace, -20)), (std::vector<double>{50, 90, 110}));
  EXPECT_EQ(Arrivals(Shifted(trace, 1210)), (std::vector<double>{0, 20, 80}));
}

TEST(TraceTest, ShiftByALittleStaysWithinTheLength) {
  const Trace trace = {.requests = {{0, 1, 1}}, .length_s = 120};
  EXPECT_LT(Shifted(trace, -1e-300).requests[0].arrival_s, 120);
}

TEST(TraceTest, WindowKeepsWhatArrivesBefore) {
  const Trace trace = {.requests = {{10, 1, 1}, {70, 2, 2}, {110, 3, 3}},
                       .length_s = 120};
  EXPECT_EQ(Arrivals(Windowed(trace, 70)), (std::vector<double>{10}));
  EXPECT_DOUBLE_EQ(Windowed(trace, 70).length_s, 70);
  EXPECT_DOUBLE_EQ(Windowed(trace, 500).length_s, 120);
}

TEST(TraceTest, LengthMustCoverTheTrace) {
  const Trace trace = {.requests = {{10, 1, 1}}, .length_s = 60};
  EXPECT_DOUBLE_EQ(WithLength(trace, 1200)->length_s, 1200);
  EXPECT_FALSE(WithLength(trace, 10).ok());
  EXPECT_FALSE(WithLength(trace, std::nan("")).ok());
  EXPECT_FALSE(WithLength(trace, INFINITY).ok());
}

TEST(TraceTest, RateScaleRepeatsRequestsNearTheirTimes) {
  Trace trace = {.length_s = 1200};
  for (int i = 0; i < 1000; ++i) trace.requests.push_back({500, 1 + i, 1});
  const Trace scaled = *RateScaled(trace, 3, 1);
  EXPECT_EQ(scaled.requests.size(), 3000u);
  EXPECT_TRUE(std::is_sorted(
      scaled.requests.begin(), scaled.requests.end(),
      [](const auto& a, const auto& b) { return a.arrival_s < b.arrival_s; }));
  for (const TraceRequest& request : scaled.requests) {
    EXPECT_NEAR(request.arrival_s, 500, kRateScaleJitterSeconds);
  }
  // The originals are still there.
  EXPECT_GE(std::count_if(scaled.requests.begin(), scaled.requests.end(),
                          [](const auto& r) { return r.arrival_s == 500; }),
            1000);
}

TEST(TraceTest, RateScaleFractionsGoByChance) {
  Trace trace = {.length_s = 1200};
  for (int i = 0; i < 10'000; ++i) trace.requests.push_back({0.1 * i, 1, 1});
  EXPECT_NEAR(RateScaled(trace, 1.5, 1)->requests.size(), 15'000, 300);
  EXPECT_NEAR(RateScaled(trace, 0.25, 1)->requests.size(), 2'500, 200);
  EXPECT_EQ(Arrivals(*RateScaled(trace, 1.5, 1)),
            Arrivals(*RateScaled(trace, 1.5, 1)));
}

TEST(TraceTest, RateScaleIsBounded) {
  const Trace trace = {.requests = {{0, 1, 1}}, .length_s = 60};
  for (double factor : {0.0, -1.0, 1001.0, std::nan("")}) {
    EXPECT_FALSE(RateScaled(trace, factor, 1).ok()) << factor;
  }
}

}  // namespace
}  // namespace kvbroker::replay
