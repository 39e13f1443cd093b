#include "broker/state/broker_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "broker/state/crc32.h"
#include "broker/state/state_envelope.h"

namespace kvbroker {
namespace {

using ::testing::HasSubstr;

BrokerState Example() {
  BrokerState state;
  state.incarnation = 0xfedcba9876543210;
  state.limits = {
      {.tenant = "uid:1000/pidns:4026531836",
       .name = "chat",
       .min = MiB(512),
       .max = GiB(4),
       .weight = 0.1,
       .revision = 7},
      {.tenant = "",
       .name = "later",
       .max = kMaxBytes,
       .weight = 1e6,
       .unused_since = absl::FromUnixNanos(1700000000123456789)},
  };
  state.sessions = {
      {.tenant = "uid:1000/pidns:4026531836",
       .instance = "chat",
       .member = "r\xc3\xa9plica \"0\"\n",
       .rank = 3,
       .pid = 4711,
       .start_time = 123456,
       .process_inode = std::numeric_limits<uint64_t>::max()},
      {.instance = "chat"},
  };
  return state;
}

// What ParseState says of a whole file with this body.
absl::StatusOr<BrokerState> ParseBody(std::string_view body,
                                      uint32_t version = kStateVersion,
                                      uint32_t readable_by = kStateReadableBy) {
  return ParseState(
      Seal({.version = version, .readable_by = readable_by, .body = body}));
}

std::string BodyOf(const BrokerState& state) {
  return std::string(Unseal(FormatState(state))->body);
}

TEST(BrokerStateTest, WhatWasSavedIsRead) {
  for (const BrokerState& state : {BrokerState(), Example()}) {
    EXPECT_TRUE(CheckState(state).ok()) << CheckState(state);
    absl::StatusOr<BrokerState> read = ParseState(FormatState(state));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(*read, state) << FormatState(state);
  }
}

TEST(BrokerStateTest, TheLargestStateIsRead) {
  BrokerState state;
  for (size_t i = 0; i < kMaxSavedLimits; ++i) {
    state.limits.push_back({.name = absl::StrCat("i", i), .max = MiB(1)});
  }
  state.sessions.assign(kMaxSavedSessions, {.instance = "chat"});
  absl::StatusOr<BrokerState> read = ParseState(FormatState(state));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, state);
}

// The form that files on disks have: to be changed with a new version only.
TEST(BrokerStateTest, TheTextIsForPeople) {
  BrokerState state;
  state.incarnation = 5;
  state.limits = {{.tenant = "uid:0",
                   .name = "a",
                   .min = Bytes(1),
                   .max = Bytes(2),
                   .weight = 0.5,
                   .revision = 9,
                   .unused_since = absl::UnixEpoch() + absl::Seconds(90)}};
  state.sessions = {{.tenant = "uid:0",
                     .instance = "a",
                     .member = "m",
                     .rank = 1,
                     .pid = 2,
                     .start_time = 3,
                     .process_inode = 4}};
  EXPECT_EQ(FormatState(state),
            "kvbroker-state version=1 readable_by=1 body_bytes=269 "
            "crc32=e5f9efb1\n"
            "{\n"
            "\"incarnation\": 5,\n"
            "\"limits\": [\n"
            "  {\"tenant\":\"uid:0\",\"name\":\"a\",\"min\":1,\"max\":2,"
            "\"weight\":0.5,\"revision\":9,"
            "\"unused_since\":\"1970-01-01T00:01:30+00:00\"}\n"
            "],\n"
            "\"sessions\": [\n"
            "  {\"tenant\":\"uid:0\",\"instance\":\"a\",\"member\":\"m\","
            "\"rank\":1,\"pid\":2,\"start_time\":3,\"process_inode\":4}\n"
            "]\n"
            "}\n");
}

TEST(BrokerStateTest, TheChecksumIsTheUsualCrc32) {
  EXPECT_EQ(Crc32(""), 0u);
  EXPECT_EQ(Crc32("123456789"), 0xcbf43926u);
  EXPECT_EQ(ExtendCrc32(Crc32("1234"), "56789"), 0xcbf43926u);
}

// ---- damage ----

TEST(BrokerStateTest, TornAnywhereIsDataLoss) {
  const std::string text = FormatState(Example());
  for (size_t size = 0; size < text.size(); ++size) {
    absl::Status status = ParseState(text.substr(0, size)).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << size << ": " << status;
  }
}

TEST(BrokerStateTest, AnyFlippedBitIsDataLoss) {
  std::string text = FormatState(Example());
  for (size_t bit = 0; bit < text.size() * 8; ++bit) {
    text[bit / 8] ^= static_cast<char>(1 << bit % 8);
    absl::Status status = ParseState(text).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << bit << ": " << status;
    text[bit / 8] ^= static_cast<char>(1 << bit % 8);
  }
}

TEST(BrokerStateTest, BytesBehindTheEndAreDataLoss) {
  EXPECT_TRUE(
      absl::IsDataLoss(ParseState(FormatState(Example()) + "\n").status()));
}

TEST(BrokerStateTest, AnotherFileIsDataLoss) {
  for (const char* text :
       {"{}", "kvbroker-state", "kvbroker-state \n", "kvbroker-statE ",
        "kvbroker-state version=1 readable_by=1 body_bytes=0 crc32=00000000\n",
        "kvbroker-state version=-1 readable_by=1 body_bytes=0 crc32=0\n",
        "kvbroker-state version=4294967297 readable_by=1 body_bytes=0\n"}) {
    absl::Status status = ParseState(text).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << text << ": " << status;
  }
}

// ---- versions ----

TEST(BrokerStateTest, ANewerFormatThatOldReadersUnderstandIsRead) {
  std::string body = absl::StrReplaceAll(
      BodyOf(Example()),
      {{"\"incarnation\"", "\"colour\": {}, \"incarnation\""},
       {"\"revision\"", "\"shade\": [1, 2], \"revision\""}});
  absl::StatusOr<BrokerState> read =
      ParseBody(body, kStateVersion + 1, kStateVersion);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, Example());
}

TEST(BrokerStateTest, ANewerFormatThatTheyDoNotIsRefusedWithWhatToDo) {
  absl::Status status =
      ParseBody("{}", kStateVersion + 1, kStateVersion + 1).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(status.message(), HasSubstr("written by a newer broker"));
  EXPECT_THAT(status.message(), HasSubstr("Start that broker again"));
}

TEST(BrokerStateTest, AFormatOlderThanTheFirstIsRefused) {
  absl::Status status = ParseBody(BodyOf(Example()), 0, 0).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
}

// ---- fields ----

struct WrongField {
  const char* from;
  const char* to;
  const char* named;
};

class WrongFieldTest : public testing::TestWithParam<WrongField> {};

TEST_P(WrongFieldTest, IsNamed) {
  BrokerState state;
  state.limits = {{.tenant = "uid:0", .name = "a", .max = Bytes(2)}};
  state.sessions = {{.tenant = "uid:0", .instance = "b", .member = "m"}};
  const std::string body = BodyOf(state);
  const std::string changed =
      absl::StrReplaceAll(body, {{GetParam().from, GetParam().to}});
  ASSERT_NE(body, changed);
  absl::Status status = ParseBody(changed).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              testing::StartsWith(GetParam().named))
      << changed;
}

INSTANTIATE_TEST_SUITE_P(
    Fields, WrongFieldTest,
    testing::Values(
        WrongField{"{", "[", "the body"}, WrongField{"}", "", "the body"},
        WrongField{"incarnation", "i", "incarnation"},
        WrongField{": 0", ": -1", "incarnation"},
        WrongField{": 0", ": 18446744073709551616", "incarnation"},
        WrongField{": 0", ": 0.0", "incarnation"},
        WrongField{"\"limits\"", "\"l\"", "limits"},
        WrongField{"\"sessions\": [", "\"sessions\": [1,", "sessions[0]"},
        WrongField{"\"min\":0", "\"min\":3", "limits[0].min"},
        WrongField{"\"min\":0", "\"min\":-1", "limits[0].min"},
        WrongField{"\"max\":2", "\"max\":4503599627370497", "limits[0].max"},
        WrongField{"\"max\":2", "\"max\":\"2\"", "limits[0].max"},
        WrongField{"\"max\":2", "\"max\":9223372036854775808", "limits[0].max"},
        WrongField{"\"weight\":1.0", "\"weight\":0", "limits[0].weight"},
        WrongField{"\"weight\":1.0", "\"weight\":1000001", "limits[0].weight"},
        WrongField{"\"weight\":1.0", "\"weight\":null", "limits[0].weight"},
        WrongField{"\"weight\":1.0", "\"weight\":1e999", "the body"},
        WrongField{"\"revision\":1", "\"revision\":true", "limits[0].revision"},
        WrongField{"\"name\":\"a\"", "\"name\":\"\"", "limits[0].name"},
        WrongField{"\"name\":\"a\"", "\"name\":\"a b\"", "limits[0].name"},
        WrongField{"\"revision\":1", "\"revision\":1,\"unused_since\":\"now\"",
                   "limits[0].unused_since"},
        WrongField{"\"revision\":1",
                   "\"revision\":1,\"unused_since\":\"infinite-past\"",
                   "limits[0].unused_since"},
        WrongField{"\"revision\":1",
                   "\"revision\":1,\"unused_since\":"
                   "\"1960-01-01T00:00:00+00:00\"",
                   "limits[0].unused_since"},
        WrongField{"uid:0", "uid:\\n", "limits[0].tenant"},
        WrongField{"\"instance\":\"b\"", "\"instance\":\"/\"",
                   "sessions[0].instance"},
        WrongField{"\"member\":\"m\"", "\"member\":\"\xff\"", "the body"},
        WrongField{"\"rank\":0", "\"rank\":4294967296", "sessions[0].rank"},
        WrongField{"\"pid\":0", "\"pid\":[]", "sessions[0].pid"},
        WrongField{",\"process_inode\":0", "", "sessions[0].process_inode"}));

TEST(BrokerStateTest, WhatCannotBeReadBackIsNamed) {
  const auto check = [](auto change) {
    BrokerState state = Example();
    change(state);
    absl::Status status = CheckState(state);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    // What is formatted all the same does harm to nobody.
    EXPECT_FALSE(ParseState(FormatState(state)).ok());
    return std::string(status.message());
  };
  EXPECT_THAT(check([](auto& s) { s.limits[0].weight = std::nan(""); }),
              HasSubstr("limits[0].weight"));
  EXPECT_THAT(check([](auto& s) { s.limits[1].name = std::string(129, 'x'); }),
              HasSubstr("limits[1].name"));
  EXPECT_THAT(check([](auto& s) { s.limits[1] = s.limits[0]; }),
              HasSubstr("limits[1].name: chat is there twice"));
  EXPECT_THAT(
      check([](auto& s) { s.limits[0].unused_since = absl::InfinitePast(); }),
      HasSubstr("limits[0].unused_since"));
  EXPECT_THAT(check([](auto& s) { s.limits[0].tenant.assign(257, 'x'); }),
              HasSubstr("limits[0].tenant"));
  EXPECT_THAT(check([](auto& s) { s.sessions[1].member.assign(129, 'x'); }),
              HasSubstr("sessions[1].member"));
  EXPECT_THAT(check([](auto& s) { s.limits.resize(kMaxSavedLimits + 1); }),
              HasSubstr("limits: "));
  EXPECT_THAT(check([](auto& s) { s.sessions.resize(kMaxSavedSessions + 1); }),
              HasSubstr("sessions: "));
  BrokerState state;
  state.sessions = {{.instance = "a", .member = "\xff"}};
  EXPECT_THAT(CheckState(state).message(), HasSubstr("sessions[0].member"));
}

}  // namespace
}  // namespace kvbroker
