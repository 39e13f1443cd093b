#include "client/cli/operands.h"

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvbroker::cli {
namespace {

TEST(ParsePercentTest, TakesNumbersFromNoneToAll) {
  for (auto [text, value] : {std::pair{"50", 50.0},
                             {"12.5", 12.5},
                             {"25%", 25.0},
                             {"25 %", 25.0},
                             {"0", 0.0},
                             {"100", 100.0}}) {
    absl::StatusOr<Percent> percent = ParsePercent(text);
    ASSERT_TRUE(percent.ok()) << percent.status();
    EXPECT_EQ(percent->value, value) << text;
  }
}

TEST(ParsePercentTest, QuotesWhatIsNone) {
  for (const char* text : {"", "%", "abc", "-1", "100.1", "101", "nan", "inf",
                           "1e1", "5%%", "1 2"}) {
    absl::Status status = ParsePercent(text).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_TRUE(
        absl::EndsWith(status.message(), std::string("got \"") + text + "\""))
        << status;
  }
}

TEST(ParseAmountTest, TellsSizesFromPercents) {
  EXPECT_EQ(ParseAmount("2G").value(), Amount(GiB(2)));
  EXPECT_EQ(ParseAmount("1,000").value(), Amount(Bytes(1000)));
  EXPECT_EQ(ParseAmount("25%").value(), Amount(Percent{25}));
  EXPECT_TRUE(absl::IsInvalidArgument(ParseAmount("G").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ParseAmount("250%").status()));
}

TEST(ParseWeightTest, IsAboveZero) {
  EXPECT_EQ(ParseWeight("2.5").value(), 2.5);
  for (const char* text : {"0", "-1", "", "x", "1e9", "2000000"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseWeight(text).status())) << text;
  }
}

TEST(ParseSecondsTest, IsNotBelowTheLeast) {
  EXPECT_EQ(ParseSeconds("0.5", absl::Milliseconds(100)).value(),
            absl::Milliseconds(500));
  for (const char* text : {"0.05", "0", "-3", "soon"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(
        ParseSeconds(text, absl::Milliseconds(100)).status()))
        << text;
  }
}

TEST(ParseExchangeTimeoutTest, ZeroAndBelowMeanNone) {
  EXPECT_EQ(ParseExchangeTimeout("1.5").value(), absl::Milliseconds(1500));
  EXPECT_EQ(ParseExchangeTimeout("0").value(), absl::InfiniteDuration());
  EXPECT_EQ(ParseExchangeTimeout("-1").value(), absl::InfiniteDuration());
  absl::Status status = ParseExchangeTimeout("soon").status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "KVCACHED_IPC_TIMEOUT"));
}

}  // namespace
}  // namespace kvbroker::cli
