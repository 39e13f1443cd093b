#include "broker/base/bytes.h"

#include "gtest/gtest.h"

namespace kvbroker {
namespace {

TEST(ParseBytesTest, ReadsWhatOperatorsType) {
  const std::pair<const char*, Bytes> cases[] = {
      {"1024", Bytes(1024)}, {"1,000", Bytes(1000)}, {"100_000", Bytes(100000)},
      {"512M", MiB(512)},    {"512MB", MiB(512)},    {"512MiB", MiB(512)},
      {"2g", GiB(2)},        {"2 GB", GiB(2)},       {"1T", GiB(1024)},
      {"0", Bytes(0)},       {"1.5G", MiB(1536)},    {" 7 B ", Bytes(7)},
  };
  for (const auto& [text, bytes] : cases) {
    absl::StatusOr<Bytes> parsed = ParseBytes(text);
    ASSERT_TRUE(parsed.ok()) << text << ": " << parsed.status();
    EXPECT_EQ(*parsed, bytes) << text;
  }
}

TEST(ParseBytesTest, RefusesTheRestAndQuotesIt) {
  for (const char* text :
       {"", "G", "-1G", "1X", "1GG", "1GBx", "abc", "1..2G", ",1", "1,", "inf",
        "nan", "0x10", "99999999T", "9999999999999999999999"}) {
    absl::StatusOr<Bytes> parsed = ParseBytes(text);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument)
        << text;
    EXPECT_NE(parsed.status().message().find(text), absl::string_view::npos)
        << text;
  }
}

TEST(FormatBytesTest, IsForPeople) {
  EXPECT_EQ(FormatBytes(Bytes(0)), "0 B");
  EXPECT_EQ(FormatBytes(Bytes(1023)), "1023 B");
  EXPECT_EQ(FormatBytes(MiB(128)), "128 MiB");
  EXPECT_EQ(FormatBytes(MiB(1536)), "1.5 GiB");
}

TEST(CeilDivideTest, CoversTheAmount) {
  EXPECT_EQ(CeilDivide(MiB(144), MiB(128)), 2);
  EXPECT_EQ(CeilDivide(MiB(128), MiB(128)), 1);
  EXPECT_EQ(CeilDivide(Bytes(0), MiB(128)), 0);
  EXPECT_EQ(CeilDivide(Bytes(-5), MiB(128)), 0);
}

}  // namespace
}  // namespace kvbroker
