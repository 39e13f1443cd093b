#include "client/replay/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/replay/random.h"
#include "client/replay/recorded_traces.h"
#include "client/replay/static_block_source.h"
#include "client/replay/trace_generator.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr Bytes kBlock = Bytes(64);

// 100 prompt tokens or 10 generated ones a second.
constexpr SchedulerOptions kOptions = {
    .speed = {.prefill_tokens_per_s = 100, .decode_tokens_per_s = 10}};

// A pool of a fixed size that does as the test says and notes what it was
// asked.
class ScriptedSource : public BlockSource {
 public:
  explicit ScriptedSource(int64_t blocks)
      : BlockSource(kBlock),
        pool_(*StaticBlockSource::Create(kBlock * blocks, kBlock)) {}

  void StepBegin() override { in_step_ = true; }
  void StepEnd() override { in_step_ = false; }
  bool Alloc(int64_t blocks, Urgency urgency,
             std::vector<BlockId>* out) override {
    EXPECT_TRUE(in_step_);
    asked.push_back(urgency);
    const size_t before = out->size();
    if (refuse || !pool_->Alloc(blocks, urgency, out)) return false;
    allocated.insert(allocated.end(), out->begin() + before, out->end());
    return true;
  }
  void Free(std::span<const BlockId> blocks) override {
    for (BlockId block : blocks) {
      std::erase(to_vacate, block);
      EXPECT_EQ(std::erase(allocated, block), 1u) << "double free";
    }
    pool_->Free(blocks);
  }
  std::span<const BlockId> BlocksToVacate() override { return to_vacate; }
  int64_t CapacityBlocks() const override {
    return capacity.value_or(pool_->CapacityBlocks());
  }
  BlockUsage Usage() const override { return pool_->Usage(); }
  std::span<std::byte> BeginWrite(BlockId block) override {
    return pool_->BeginWrite(block);
  }
  std::span<const std::byte> Read(BlockId block) override {
    return pool_->Read(block);
  }

  bool refuse = false;              // no block for anybody
  std::optional<int64_t> capacity;  // another than there are blocks
  std::vector<BlockId> to_vacate;   // until freed
  std::vector<Urgency> asked;
  std::vector<BlockId> allocated;  // now

 private:
  const std::unique_ptr<StaticBlockSource> pool_;
  bool in_step_ = false;
};

// Steps until nothing is due up to `until_s`.
double StepUntil(Scheduler& scheduler, double until_s, double due_s = 0) {
  while (due_s <= until_s) {
    due_s = scheduler.Step(due_s);
    EXPECT_TRUE(scheduler.CheckInvariants().ok())
        << scheduler.CheckInvariants();
    if (scheduler.done()) break;
  }
  return due_s;
}

TEST(SchedulerTest, RequestRunsAtTheEnginesSpeed) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{2, 50, 20}}, source, nullptr);
  EXPECT_EQ(scheduler.Step(0), 2);
  StepUntil(scheduler, kNever, 2);
  ASSERT_TRUE(scheduler.done());
  const RequestRecord& record = scheduler.records()[0];
  EXPECT_DOUBLE_EQ(record.arrival_s, 2);
  EXPECT_DOUBLE_EQ(*record.admitted_s, 2);
  EXPECT_DOUBLE_EQ(*record.first_token_s, 2.6);  // 0.5 s prefill, 0.1 s a token
  EXPECT_DOUBLE_EQ(*record.end_s, 4.5);
  EXPECT_EQ(record.preemptions, 0);
  EXPECT_TRUE(source.allocated.empty());
  EXPECT_EQ(scheduler.Step(100), kNever);
}

TEST(SchedulerTest, TakesABlockMoreWheneverItsBlocksAreFull) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{0, 30, 40}}, source, nullptr);
  EXPECT_DOUBLE_EQ(scheduler.Step(0), 0.5);  // full after 2 tokens
  EXPECT_EQ(source.allocated.size(), 2u);    // for 31 tokens
  EXPECT_DOUBLE_EQ(scheduler.Step(0.5), 2.1);
  EXPECT_EQ(source.allocated.size(), 3u);
  EXPECT_DOUBLE_EQ(scheduler.Step(2.1), 3.7);
  EXPECT_EQ(source.allocated.size(), 4u);
  EXPECT_DOUBLE_EQ(scheduler.Step(3.7), 4.3);
  EXPECT_EQ(source.allocated.size(), 5u);
  EXPECT_EQ(source.asked,
            (std::vector<Urgency>{Urgency::kWaiting, Urgency::kRunning,
                                  Urgency::kRunning, Urgency::kRunning}));
  scheduler.Step(4.3);
  EXPECT_TRUE(scheduler.done());
}

TEST(SchedulerTest, PromptThatFillsItsBlocksGetsOneForTheNextToken) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{0, 32, 1}}, source, nullptr);
  scheduler.Step(0);
  EXPECT_EQ(source.allocated.size(), 3u);
}

TEST(SchedulerTest, RequestThatGeneratesNothingEndsWithItsPrefill) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{0, 50, 0}}, source, nullptr);
  StepUntil(scheduler, kNever);
  EXPECT_DOUBLE_EQ(*scheduler.records()[0].end_s, 0.5);
  EXPECT_FALSE(scheduler.records()[0].first_token_s.has_value());
}

TEST(SchedulerTest, NobodyOvertakesTheFirstInTheQueue) {
  ScriptedSource source(10);
  // The second needs seven blocks while the first holds four; the third one.
  Scheduler scheduler(kOptions, {{0, 60, 3}, {0.1, 100, 3}, {0.2, 10, 3}},
                      source, nullptr);
  StepUntil(scheduler, kNever);
  const auto& records = scheduler.records();
  EXPECT_DOUBLE_EQ(*records[0].end_s, 0.9);
  EXPECT_DOUBLE_EQ(*records[1].admitted_s, 0.9);
  EXPECT_DOUBLE_EQ(*records[2].admitted_s, 0.9);
}

TEST(SchedulerTest, WaitingMakesAStepDueATokenLater) {
  ScriptedSource source(10);
  source.refuse = true;
  Scheduler scheduler(kOptions, {{0, 10, 3}}, source, nullptr);
  EXPECT_DOUBLE_EQ(scheduler.Step(0), 0.1);
  EXPECT_DOUBLE_EQ(scheduler.Step(0.1), 0.2);
  source.refuse = false;
  scheduler.Step(0.2);
  EXPECT_DOUBLE_EQ(*scheduler.records()[0].admitted_s, 0.2);
}

TEST(SchedulerTest, MissPreemptsTheYoungest) {
  ScriptedSource source(4);
  // Two blocks each. The older needs a third at 0.5 s, when the younger has
  // generated for 0.29 s: two tokens.
  Scheduler scheduler(kOptions, {{0, 30, 20}, {0.01, 20, 10}}, source, nullptr);
  StepUntil(scheduler, 0.55);
  EXPECT_EQ(scheduler.running(), 1);
  EXPECT_EQ(scheduler.waiting(), 1);
  EXPECT_EQ(scheduler.records()[0].preemptions, 0);
  EXPECT_EQ(scheduler.records()[1].preemptions, 1);
  StepUntil(scheduler, kNever, 0.6);
  const auto& records = scheduler.records();
  EXPECT_DOUBLE_EQ(*records[0].end_s, 2.3);
  // Only the first admission counts as the end of the wait.
  EXPECT_DOUBLE_EQ(*records[1].admitted_s, 0.01);
  EXPECT_DOUBLE_EQ(*records[1].first_token_s, 0.31);
  // Admitted again at 2.3, it recomputes 22 tokens and generates the other 8.
  EXPECT_DOUBLE_EQ(*records[1].end_s, 2.3 + 0.22 + 0.8);
  EXPECT_EQ(scheduler.preemptions(), 1);
}

TEST(SchedulerTest, YoungestPreemptsItself) {
  ScriptedSource source(4);
  // The younger one needs its third block at 0.41 s, before the older one does.
  Scheduler scheduler(kOptions, {{0, 16, 16}, {0.01, 30, 20}}, source, nullptr);
  StepUntil(scheduler, kNever);
  EXPECT_EQ(scheduler.records()[0].preemptions, 0);
  EXPECT_EQ(scheduler.records()[1].preemptions, 1);
  EXPECT_TRUE(scheduler.done());
}

TEST(SchedulerTest, PreemptedGoesBeforeThoseThatWait) {
  ScriptedSource source(4);
  Scheduler scheduler(kOptions, {{0, 30, 20}, {0.01, 20, 10}, {0.02, 20, 10}},
                      source, nullptr);
  StepUntil(scheduler, kNever);
  const auto& records = scheduler.records();
  EXPECT_EQ(records[1].preemptions, 1);
  EXPECT_EQ(records[2].preemptions, 0);
  EXPECT_GE(*records[2].admitted_s, 2.3);
  EXPECT_LT(*records[1].end_s, *records[2].end_s);
}

TEST(SchedulerTest, WhatNeverFitsIsRejectedAndCounted) {
  ScriptedSource source(4);
  Scheduler scheduler(kOptions, {{0, 30, 100}, {1, 30, 3}}, source, nullptr);
  StepUntil(scheduler, kNever);
  EXPECT_TRUE(scheduler.done());
  EXPECT_TRUE(scheduler.records()[0].rejected);
  EXPECT_FALSE(scheduler.records()[0].admitted_s.has_value());
  EXPECT_TRUE(scheduler.records()[1].end_s.has_value());
  ASSERT_EQ(scheduler.rejections().size(), 1u);
  EXPECT_EQ(scheduler.rejections()[0].request, 0u);
  EXPECT_EQ(scheduler.rejections()[0].needed_blocks, 9);
  EXPECT_EQ(scheduler.rejections()[0].capacity_blocks, 4);
}

TEST(SchedulerTest, WhatJustFitsIsServed) {
  ScriptedSource source(4);
  Scheduler scheduler(kOptions, {{0, 30, 34}, {0, 64, 0}}, source, nullptr);
  StepUntil(scheduler, kNever);
  EXPECT_FALSE(scheduler.records()[0].rejected);
  // 64 tokens and room for the next are five blocks.
  EXPECT_TRUE(scheduler.records()[1].rejected);
}

TEST(SchedulerTest, CapacityIsThatOfTheMoment) {
  ScriptedSource source(10);
  source.refuse = true;
  Scheduler scheduler(kOptions, {{0, 50, 3}}, source, nullptr);
  scheduler.Step(0);
  EXPECT_EQ(scheduler.waiting(), 1);
  source.capacity = 2;  // an operator lowered the limit
  scheduler.Step(0.1);
  EXPECT_TRUE(scheduler.done());
  EXPECT_EQ(scheduler.rejections()[0].capacity_blocks, 2);
}

TEST(SchedulerTest, VacatesByPreemptingTheYoungestOwnerFirst) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{0, 10, 50}, {0.1, 10, 50}, {0.2, 10, 50}},
                      source, nullptr);
  StepUntil(scheduler, 0.2);
  ASSERT_EQ(source.allocated.size(), 3u);
  source.refuse = true;
  source.to_vacate = {source.allocated[0], source.allocated[1]};
  scheduler.Step(0.25);
  EXPECT_TRUE(source.to_vacate.empty());
  EXPECT_EQ(scheduler.records()[0].preemptions, 1);
  EXPECT_EQ(scheduler.records()[1].preemptions, 1);
  EXPECT_EQ(scheduler.records()[2].preemptions, 0);
  // Back in the order in which they came.
  source.refuse = false;
  StepUntil(scheduler, kNever, 0.35);
  EXPECT_LT(*scheduler.records()[0].end_s, *scheduler.records()[1].end_s);
}

TEST(SchedulerTest, VacatingKeepsWhatWasGenerated) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{0, 10, 5}}, source, nullptr);
  scheduler.Step(0);
  source.to_vacate = source.allocated;
  scheduler.Step(0.46);  // 0.1 s of prefill, then three tokens
  EXPECT_EQ(scheduler.records()[0].preemptions, 1);
  // Nothing else ran, so it was admitted again at once.
  StepUntil(scheduler, kNever, 0.46);
  EXPECT_DOUBLE_EQ(*scheduler.records()[0].end_s, 0.46 + 0.13 + 0.2);
}

TEST(SchedulerTest, BlocksToVacateThatNobodyOwnsAreIgnored) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{0, 10, 50}}, source, nullptr);
  source.to_vacate = {9, 7};
  StepUntil(scheduler, 1);
  EXPECT_EQ(scheduler.preemptions(), 0);
}

TEST(SchedulerTest, AStepThatPreemptedAdmitsNobody) {
  ScriptedSource source(10);
  Scheduler scheduler(kOptions, {{0, 10, 50}, {0.1, 10, 50}, {0.3, 10, 50}},
                      source, nullptr);
  StepUntil(scheduler, 0.2);
  source.to_vacate = {source.allocated[1]};
  EXPECT_DOUBLE_EQ(scheduler.Step(0.3), 0.4);
  EXPECT_EQ(scheduler.waiting(), 2);
  scheduler.Step(0.4);
  EXPECT_EQ(scheduler.waiting(), 0);
}

TEST(SchedulerTest, LateStepsDelayAdmissionsOnly) {
  ScriptedSource source(100);
  Scheduler scheduler(kOptions, {{0, 30, 40}, {1, 10, 3}}, source, nullptr);
  scheduler.Step(0);
  scheduler.Step(3);
  EXPECT_DOUBLE_EQ(*scheduler.records()[1].admitted_s, 3);
  EXPECT_DOUBLE_EQ(scheduler.Step(3.5), 3.7);
  scheduler.Step(9);
  EXPECT_TRUE(scheduler.done());
  EXPECT_DOUBLE_EQ(*scheduler.records()[0].end_s, 4.3);
  EXPECT_DOUBLE_EQ(*scheduler.records()[1].end_s, 3.4);
}

TEST(SchedulerTest, TellsTokensOfRunningRequests) {
  ScriptedSource source(100);
  Scheduler scheduler(kOptions, {{0, 30, 40}, {1, 10, 3}}, source, nullptr);
  EXPECT_EQ(scheduler.LoadTokens(0), 0);
  StepUntil(scheduler, 1);
  EXPECT_EQ(scheduler.LoadTokens(1), 30 + 7 + 10);
  StepUntil(scheduler, kNever, 1.4);
  EXPECT_EQ(scheduler.LoadTokens(100), 0);
}

TEST(SchedulerTest, AbandonFreesWhatRuns) {
  ScriptedSource source(100);
  BlockPattern pattern(1);
  Scheduler scheduler(kOptions, {{0, 30, 40}, {0, 10, 3}, {1, 10, 3}}, source,
                      &pattern);
  scheduler.Step(0);
  scheduler.Abandon();
  EXPECT_TRUE(source.allocated.empty());
  EXPECT_EQ(scheduler.running(), 0);
  EXPECT_EQ(pattern.blocks_checked(), pattern.blocks_written());
  EXPECT_FALSE(scheduler.done());
  EXPECT_FALSE(scheduler.records()[0].end_s.has_value());
}

TEST(SchedulerTest, DestructionFreesWhatRuns) {
  ScriptedSource source(100);
  {
    Scheduler scheduler(kOptions, {{0, 30, 40}}, source, nullptr);
    scheduler.Step(0);
    EXPECT_FALSE(source.allocated.empty());
  }
  EXPECT_TRUE(source.allocated.empty());
}

TEST(SchedulerTest, EveryBlockIsWrittenAndChecked) {
  ScriptedSource source(4);
  BlockPattern pattern(1);
  Scheduler scheduler(kOptions, {{0, 30, 20}, {0.01, 20, 10}}, source,
                      &pattern);
  StepUntil(scheduler, kNever);
  EXPECT_EQ(pattern.blocks_written(), 2 + 2 + 1 + 1 + 2);
  EXPECT_EQ(pattern.blocks_checked(), pattern.blocks_written());
  EXPECT_EQ(pattern.errors(), 0);
}

TEST(SchedulerTest, ABlockThatSomebodyElseWroteIsFound) {
  ScriptedSource source(4);
  BlockPattern pattern(1);
  Scheduler scheduler(kOptions, {{0, 30, 20}}, source, &pattern);
  scheduler.Step(0);
  source.BeginWrite(source.allocated[1])[13] ^= std::byte{1};
  StepUntil(scheduler, kNever, 0.5);
  EXPECT_EQ(pattern.errors(), 1);
}

TEST(SchedulerTest, ManyShareOnePoolInVirtualTime) {
  ScriptedSource source(6);
  Scheduler a(kOptions, {{0, 30, 20}, {0.5, 30, 20}}, source, nullptr);
  Scheduler b(kOptions, {{0.2, 30, 20}, {0.7, 30, 20}}, source, nullptr);
  double a_due = 0, b_due = 0;
  int steps = 0;
  while ((!a.done() || !b.done()) && ++steps < 1000) {
    if (a_due <= b_due) {
      a_due = a.Step(a_due);
    } else {
      b_due = b.Step(b_due);
    }
    ASSERT_TRUE(a.CheckInvariants().ok() && b.CheckInvariants().ok());
  }
  EXPECT_TRUE(a.done() && b.done());
  EXPECT_TRUE(source.allocated.empty());
}

TEST(SchedulerTest, RandomRunsKeepTheInvariants) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random(seed);
    std::vector<TraceRequest> requests;
    double arrival = 0;
    for (int i = 0; i < 60; ++i) {
      arrival += random.Exponential(0.3);
      requests.push_back({arrival,
                          1 + static_cast<int64_t>(random.Next() % 200),
                          static_cast<int64_t>(random.Next() % 80)});
    }
    ScriptedSource source(20);
    BlockPattern pattern(seed);
    Scheduler scheduler(kOptions, requests, source, &pattern);
    double due = 0;
    for (int step = 0; !scheduler.done() && step < 200'000; ++step) {
      due = scheduler.Step(due);
      ASSERT_TRUE(scheduler.CheckInvariants().ok())
          << scheduler.CheckInvariants();
      if (!std::isfinite(due)) break;
      if (random.Uniform() < 0.1) due += random.Exponential(0.5);  // late
      source.refuse = random.Uniform() < 0.1;
      if (random.Uniform() < 0.02 && !source.allocated.empty()) {
        source.to_vacate = {
            source.allocated[random.Next() % source.allocated.size()]};
      }
    }
    EXPECT_TRUE(scheduler.done());
    EXPECT_TRUE(source.allocated.empty());
    EXPECT_EQ(pattern.errors(), 0);
    for (const RequestRecord& record : scheduler.records()) {
      if (record.rejected) continue;
      ASSERT_TRUE(record.end_s.has_value());
      EXPECT_GE(*record.admitted_s, record.arrival_s);
      EXPECT_GE(*record.end_s, record.first_token_s.value_or(0));
    }
  }
}

// ---- Whole traces on a fixed share ------------------------------------------

struct Outcome {
  double wait_p99_ms = 0;
  double wait_mean_ms = 0;
  int64_t preemptions = 0;
};

Outcome RunOnFixedShare(const Trace& trace, int64_t tokens) {
  const auto source =
      *StaticBlockSource::Create(kBlock * (tokens / kBlockTokens), kBlock);
  Scheduler scheduler({}, trace.requests, *source, nullptr);
  double due = 0;
  while (!scheduler.done()) due = scheduler.Step(due);
  std::vector<double> waits;
  double sum = 0;
  for (const RequestRecord& record : scheduler.records()) {
    waits.push_back((*record.admitted_s - record.arrival_s) * 1000);
    sum += waits.back();
  }
  std::sort(waits.begin(), waits.end());
  return {.wait_p99_ms = waits[waits.size() * 99 / 100],
          .wait_mean_ms = sum / static_cast<double>(waits.size()),
          .preemptions = scheduler.preemptions()};
}

// A third of 2.4 times what `conv` has in flight 99 % of the time.
int64_t EvenShareTokens(const Trace& conv) {
  return static_cast<int64_t>(
      2.4 / 3 * static_cast<double>(MeasureTokensInFlight(conv, {}).p99));
}

TEST(StaticSplitTest, RecordedTracesAgreeWithAnIndependentSimulation) {
  const std::optional<RecordedTraces> traces = LoadRecordedTraces();
  if (!traces.has_value()) GTEST_SKIP() << kNoRecordedTraces;
  const int64_t share = EvenShareTokens(traces->conv);
  const Outcome conv = RunOnFixedShare(traces->conv, share);
  EXPECT_NEAR(conv.wait_p99_ms, 2'038, 100);
  EXPECT_NEAR(conv.wait_mean_ms, 64, 5);
  EXPECT_NEAR(static_cast<double>(conv.preemptions), 95, 15);
  for (const Trace& trace : {traces->code, Shifted(traces->code, 600)}) {
    const Outcome code = RunOnFixedShare(trace, share);
    EXPECT_NEAR(code.wait_p99_ms, 2'369, 100);
    EXPECT_NEAR(code.wait_mean_ms, 141, 10);
    EXPECT_LE(code.preemptions, 10);
  }
}

TEST(StaticSplitTest, DefaultTracesSufferAsTheRecordedOnesDo) {
  const Trace conv = MakeConvTrace(kDefaultTraceSeed);
  const Trace code = MakeCodeTrace(kDefaultTraceSeed);
  const int64_t share = EvenShareTokens(conv);
  for (const Trace& trace : {conv, code, Shifted(code, 600)}) {
    const Outcome outcome = RunOnFixedShare(trace, share);
    EXPECT_GT(outcome.wait_p99_ms, 1'500);
    EXPECT_LT(outcome.wait_p99_ms, 4'000);
  }
}

TEST(StaticSplitTest, OnePoolForAllServesTheDefaultTracesWithoutWaits) {
  const Trace conv = MakeConvTrace(kDefaultTraceSeed);
  const Trace code = MakeCodeTrace(kDefaultTraceSeed);
  Trace all = conv;
  for (const Trace& trace : {code, Shifted(code, 600)}) {
    all.requests.insert(all.requests.end(), trace.requests.begin(),
                        trace.requests.end());
  }
  std::stable_sort(all.requests.begin(), all.requests.end(),
                   [](const TraceRequest& a, const TraceRequest& b) {
                     return a.arrival_s < b.arrival_s;
                   });
  EXPECT_LT(RunOnFixedShare(all, 3 * EvenShareTokens(conv)).wait_p99_ms, 100);
}

}  // namespace
}  // namespace kvbroker::replay
