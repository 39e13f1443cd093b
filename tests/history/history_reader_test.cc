#include "tests/history/history_reader.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/temp_folder.h"
#include "broker/telemetry/history_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using Kind = HistoryEvent::Kind;

HistoryEvent BrokerEvent(Kind kind, uint64_t number, int64_t nanos) {
  HistoryEvent event;
  event.kind = kind;
  event.number = number;
  event.at = absl::FromUnixNanos(nanos);
  return event;
}

// An event with every field set that is written for its kind.
HistoryEvent Full(Kind kind) {
  HistoryEvent event = BrokerEvent(kind, 17, 1234567890123456789);
  event.lent = Bytes(1);
  event.credit = Bytes(2);
  event.stock = Bytes(3);
  event.releasing = Bytes(4);
  const bool of_instance = kind != Kind::kStart && kind != Kind::kHangUp &&
                           kind != Kind::kReleased && kind != Kind::kDrain;
  if (of_instance) {
    event.tenant = "uid:1/\"pidns\"\n\\";
    event.instance = "chat";
  }
  event.held = Bytes(5);
  event.instance_credit = Bytes(6);
  event.min = Bytes(7);
  event.max = Bytes(8);
  event.incarnation = UINT64_MAX;
  event.capacity = Bytes(int64_t{1} << 50);
  event.session = SessionId(9);
  event.pid = 10;
  event.pools = {{PoolId(11), Bytes(12)}, {PoolId(13), Bytes(14)}};
  event.pool = PoolId(15);
  event.grant = GrantId(16);
  event.pages = {{PageIndex(0), Generation(18)},
                 {PageIndex(1), Generation(19)}};
  event.from = PoolId(23);
  event.drawn = Bytes(20);
  event.bytes = Bytes(21);
  event.hold_at_most = kHoldAny;
  event.tier = Tier::kPreempt;
  event.for_others = Bytes(22);
  event.why = "because";
  return event;
}

TEST(HistoryReaderTest, BrokersLinesReadBackToTheSame) {
  for (Kind kind :
       {Kind::kStart, Kind::kOpen, Kind::kLimits, Kind::kGrant, Kind::kBack,
        Kind::kResume, Kind::kCredit, Kind::kOrder, Kind::kRefuse,
        Kind::kHangUp, Kind::kGone, Kind::kReleased, Kind::kDrain}) {
    const std::string text = ToJsonLine(Full(kind));
    const absl::StatusOr<HistoryLine> line =
        ParseHistoryLine(std::string_view(text).substr(0, text.size() - 1));
    ASSERT_TRUE(line.ok()) << line.status() << "\n" << text;
    EXPECT_EQ(ToJsonLine(std::get<HistoryEvent>(*line->event)), text);
  }
}

TEST(HistoryReaderTest, ProcessesLinesReadBackToTheSame) {
  client::MappingEvent map = {.kind = client::MappingEvent::Kind::kMap,
                              .at = absl::FromUnixNanos(5),
                              .pid = 7,
                              .pool = 1,
                              .page = PageIndex(3),
                              .memory = {{1, 0xabc}, {0xffffffffffffffff, 2}}};
  client::MappingEvent pool = {.kind = client::MappingEvent::Kind::kPool,
                               .at = absl::FromUnixNanos(6),
                               .pid = 7,
                               .instance = "chat"};
  for (const client::MappingEvent& event : {map, pool}) {
    const std::string text = ToJsonLine(event);
    const absl::StatusOr<HistoryLine> line = ParseHistoryLine(text);
    ASSERT_TRUE(line.ok()) << line.status() << "\n" << text;
    EXPECT_EQ(ToJsonLine(std::get<client::MappingEvent>(*line->event)), text);
  }
}

TEST(HistoryReaderTest, WhatIsNotAnEventIsRefused) {
  for (const char* text :
       {"", "{", "[]", "{}", "17", R"({"event":"feast","at":1})",
        R"({"event":"exited","at":"now","pid":1})", R"({"event":"exited"})",
        R"({"event":"map","at":1,"pid":1,"pool":0,"page":1,"memory":["x"]})",
        R"({"event":"map","at":1,"pid":1,"pool":0,"page":1,"memory":[3]})",
        R"({"event":"drain","number":1,"at":1})"}) {
    EXPECT_EQ(ParseHistoryLine(text).status().code(),
              absl::StatusCode::kInvalidArgument)
        << text;
  }
}

TEST(HistoryReaderTest, FilesAreMergedByTimeAndTheBrokersByNumber) {
  // Two batches have changed places in the file, at one moment of the clock.
  const std::vector<HistoryFileText> files = {
      {"broker", ToJsonLine(BrokerEvent(Kind::kStart, 1, 10)) +
                     ToJsonLine(BrokerEvent(Kind::kHangUp, 3, 30)) +
                     ToJsonLine(BrokerEvent(Kind::kReleased, 2, 30)) +
                     ToJsonLine(BrokerEvent(Kind::kStart, 1, 50))},
      {"test", "{\"event\":\"exited\",\"at\":20,\"pid\":1}\n"}};
  const auto lines = ReadHistory(files);
  ASSERT_TRUE(lines.ok()) << lines.status();
  std::vector<std::string> order;
  for (const HistoryLine& line : *lines) {
    order.push_back(absl::StrCat(line.file, ":", line.number));
  }
  EXPECT_THAT(order, ElementsAre("0:1", "1:1", "0:3", "0:2", "0:4"));
}

TEST(HistoryReaderTest, ATornLineIsToleratedWhereItsWriterDied) {
  const std::string start = ToJsonLine(BrokerEvent(Kind::kStart, 1, 10));
  const std::string drain = ToJsonLine(BrokerEvent(Kind::kDrain, 2, 20));
  EXPECT_TRUE(ReadHistory({{"f", start + "{\"event\":\"dra"}}).ok());
  EXPECT_TRUE(ReadHistory({{"f", start + "{\"event\":\"dra\n" + start}}).ok());
  const absl::Status status =
      ReadHistory({{"f", start + "{\"event\":\"dra\n" + drain}}).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("f line 2"));
}

TEST(HistoryReaderTest, ABrokerGoesOnInTheFileOfOneThatWasKilled) {
  const TempFolder folder;
  const std::string path = folder / "history";
  for (int life = 0; life < 2; ++life) {
    auto file = HistoryFile::Create(path, [](std::string_view) {});
    ASSERT_TRUE(file.ok()) << file.status();
    (*file)->Write({BrokerEvent(Kind::kStart, 1, 10 + life),
                    BrokerEvent(Kind::kHangUp, 2, 20 + life)});
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 7);
  }
  std::ifstream stream(path);
  const std::vector<HistoryFileText> files = {
      {path, std::string(std::istreambuf_iterator<char>(stream),
                         std::istreambuf_iterator<char>())}};
  const auto lines = ReadHistory(files);
  ASSERT_TRUE(lines.ok()) << lines.status();
  EXPECT_THAT(*lines, SizeIs(2));  // both starts
}

TEST(HistoryReaderTest, AFileThatCannotBeOpenedIsNamed) {
  const absl::Status status =
      HistoryFile::Create("/nowhere/history", [](std::string_view) {}).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/history"));
}

TEST(HistoryReaderTest, AWriteThatFailsEndsTheFileAndIsToldOnce) {
  int told = 0;
  auto file =
      HistoryFile::Create("/dev/full", [&](std::string_view) { ++told; });
  ASSERT_TRUE(file.ok()) << file.status();
  (*file)->Write({BrokerEvent(Kind::kStart, 1, 1)});
  (*file)->Write({BrokerEvent(Kind::kDrain, 2, 2)});
  EXPECT_EQ(told, 1);
}

TEST(HistoryReaderTest, CheckedAsTheyHappened) {
  const std::string start = ToJsonLine(BrokerEvent(Kind::kStart, 1, 10));
  const std::string drain = ToJsonLine(BrokerEvent(Kind::kDrain, 2, 20));
  const std::vector<HistoryFileText> files = {{"f", start + drain}};
  HistoryChecker checker;
  CheckHistory(*ReadHistory(files), checker);
  EXPECT_THAT(checker.violations(), IsEmpty());
  EXPECT_EQ(checker.statistics().events, 2);
}

}  // namespace
}  // namespace kvbroker
