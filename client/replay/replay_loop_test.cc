#include "client/replay/replay_loop.h"

#include <limits>
#include <memory>
#include <vector>

#include "client/replay/static_block_source.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

constexpr Bytes kBlock = Bytes(64);
constexpr SchedulerOptions kOptions = {
    .speed = {.prefill_tokens_per_s = 100, .decode_tokens_per_s = 10}};
const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

// Every sleep lasts as long as was asked, and `oversleep` more.
class FakeReplayClock : public ReplayClock {
 public:
  absl::Time Now() override { return now; }
  bool SleepUntil(absl::Time wake) override {
    EXPECT_LT(wake, absl::InfiniteFuture()) << "would sleep for ever";
    if (wake > now) now = wake + oversleep;
    ++sleeps;
    return now >= stop_at;
  }

  absl::Time now = kStart;
  absl::Duration oversleep;
  absl::Time stop_at = absl::InfiniteFuture();
  int sleeps = 0;
};

class ReplayLoopTest : public testing::Test {
 protected:
  std::unique_ptr<StaticBlockSource> source_ =
      *StaticBlockSource::Create(kBlock * 10, kBlock);
  FakeReplayClock clock_;
  ReplayPace pace_ = {.start = kStart};
  ReplayListener listener_;
};

const std::vector<TraceRequest> kTwo = {{2, 50, 20}, {3, 100, 10}};

TEST_F(ReplayLoopTest, RunsToTheEndInTraceTime) {
  Scheduler scheduler(kOptions, kTwo, *source_, nullptr);
  const ReplayRun run =
      RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_TRUE(scheduler.done());
  EXPECT_FALSE(run.interrupted);
  EXPECT_DOUBLE_EQ(*scheduler.records()[0].end_s, 4.5);
  EXPECT_NEAR(absl::ToDoubleSeconds(run.elapsed), *scheduler.records()[1].end_s,
              1e-6);
}

TEST_F(ReplayLoopTest, SpeedupShortensRealTimeOnly) {
  Scheduler scheduler(kOptions, kTwo, *source_, nullptr);
  pace_.speedup = 40;
  const ReplayRun run =
      RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_DOUBLE_EQ(*scheduler.records()[0].end_s, 4.5);
  EXPECT_NEAR(absl::ToDoubleSeconds(run.elapsed),
              *scheduler.records()[1].end_s / 40, 1e-3);
}

TEST_F(ReplayLoopTest, WaitsForTheStart) {
  Scheduler scheduler(kOptions, kTwo, *source_, nullptr);
  pace_.start = kStart + absl::Seconds(100);
  const ReplayRun run =
      RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_DOUBLE_EQ(*scheduler.records()[0].admitted_s, 2);
  EXPECT_GT(clock_.now, pace_.start);
  EXPECT_LT(run.elapsed, absl::Seconds(10));
}

TEST_F(ReplayLoopTest, ABusyMachineChangesNoTraceTimes) {
  Scheduler punctual(kOptions, kTwo, *source_, nullptr);
  RunReplay(punctual, *source_, pace_, listener_, clock_);
  FakeReplayClock late_clock;
  late_clock.oversleep = absl::Milliseconds(300);
  Scheduler late(kOptions, kTwo, *source_, nullptr);
  const ReplayRun run = RunReplay(late, *source_, pace_, listener_, late_clock);
  for (size_t i = 0; i < kTwo.size(); ++i) {
    EXPECT_EQ(punctual.records()[i].admitted_s, late.records()[i].admitted_s);
    EXPECT_EQ(punctual.records()[i].end_s, late.records()[i].end_s);
  }
  EXPECT_GE(run.late_max, absl::Milliseconds(300));
}

TEST_F(ReplayLoopTest, EndsAtUntilAndFreesAll) {
  Scheduler scheduler(kOptions, kTwo, *source_, nullptr);
  pace_.until_s = 3.5;
  const ReplayRun run =
      RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_FALSE(scheduler.done());
  EXPECT_FALSE(run.interrupted);
  EXPECT_EQ(run.elapsed, absl::Seconds(3.5));
  EXPECT_TRUE(scheduler.records()[0].admitted_s.has_value());
  EXPECT_EQ(source_->Usage().in_use, Bytes(0));
}

TEST_F(ReplayLoopTest, StopsWhenAskedAndFreesAll) {
  Scheduler scheduler(kOptions, kTwo, *source_, nullptr);
  clock_.stop_at = kStart + absl::Seconds(2.5);
  const ReplayRun run =
      RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_TRUE(run.interrupted);
  EXPECT_FALSE(scheduler.done());
  EXPECT_EQ(source_->Usage().in_use, Bytes(0));
}

TEST_F(ReplayLoopTest, StopsBeforeTheStart) {
  Scheduler scheduler(kOptions, kTwo, *source_, nullptr);
  pace_.start = kStart + absl::Seconds(100);
  clock_.stop_at = kStart;
  const ReplayRun run =
      RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_TRUE(run.interrupted);
  EXPECT_FALSE(scheduler.records()[0].admitted_s.has_value());
}

TEST_F(ReplayLoopTest, DoesCloseEventsTogether) {
  std::vector<TraceRequest> requests;
  for (int i = 0; i < 1000; ++i) requests.push_back({i * 1e-6, 1, 0});
  Scheduler scheduler(kOptions, requests, *source_, nullptr);
  RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_LT(clock_.sleeps, 600);
}

TEST_F(ReplayLoopTest, AsksAnElasticPoolWhileRequestsAreThere) {
  Scheduler scheduler(kOptions, {{10, 100, 0}}, *source_, nullptr);
  pace_.poll = absl::Milliseconds(100);
  RunReplay(scheduler, *source_, pace_, listener_, clock_);
  // The start, the arrival, then ten times during the second of its prefill.
  EXPECT_NEAR(clock_.sleeps, 12, 1);
}

TEST_F(ReplayLoopTest, TellsStatusEvery100Milliseconds) {
  std::vector<ReplayStatus> told;
  listener_.on_status = [&](const ReplayStatus& status) {
    told.push_back(status);
  };
  Scheduler scheduler(kOptions, {{0.25, 50, 2}}, *source_, nullptr);
  RunReplay(scheduler, *source_, pace_, listener_, clock_);
  ASSERT_GE(told.size(), 9u);
  EXPECT_EQ(told[0].running, 0);
  EXPECT_DOUBLE_EQ(told[0].t_ms, 0);
  EXPECT_DOUBLE_EQ(told[1].t_ms, 100);
  const ReplayStatus& busy = told[5];
  EXPECT_EQ(busy.running, 1);
  EXPECT_EQ(busy.waiting, 0);
  EXPECT_EQ(busy.load_tokens, 50);
  EXPECT_EQ(busy.usage.in_use, kBlock * 4);
  EXPECT_EQ(busy.usage.held, kBlock * 10);
  EXPECT_EQ(told.back().running, 0);
  EXPECT_EQ(told.back().usage.in_use, Bytes(0));
}

TEST_F(ReplayLoopTest, TellsEachRejectionOnce) {
  std::vector<size_t> told;
  listener_.on_rejection = [&](const Rejection& rejection) {
    told.push_back(rejection.request);
  };
  Scheduler scheduler(kOptions, {{0, 500, 1}, {1, 5, 1}, {2, 500, 1}}, *source_,
                      nullptr);
  RunReplay(scheduler, *source_, pace_, listener_, clock_);
  EXPECT_EQ(told, (std::vector<size_t>{0, 2}));
}

TEST(ReplayStatusTest, IsOneLineOfJson) {
  EXPECT_EQ(StatusToJson({.t_ms = 1234.6,
                          .load_tokens = 5,
                          .waiting = 6,
                          .running = 7,
                          .usage = {Bytes(8), Bytes(9), Bytes(10)}}),
            R"({"t_ms":1235,"load_tokens":5,"waiting":6,"running":7,)"
            R"("in_use_bytes":8,"idle_bytes":9,"held_bytes":10})"
            "\n");
}

}  // namespace
}  // namespace kvbroker::replay
