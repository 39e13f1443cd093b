// Random programs against what must always hold: core_model.h.
//
// KVBROKER_TEST_SEED and KVBROKER_TEST_INSTRUCTIONS choose another run; the
// seed is printed. A failure prints a short program that fails alike: paste it
// into a test below.
#include "broker/core/testing/core_model.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

constexpr int kProgramLength = 400;

uint64_t FromEnvironment(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  uint64_t value = otherwise;
  if (text != nullptr && !absl::SimpleAtoi(text, &value)) {
    ADD_FAILURE() << variable << ": not a number: " << text;
  }
  return value;
}

using Bulk = CoreModel::Variant::Bulk;
using Memory = CoreModel::Variant::Memory;

class CoreModelTest : public testing::TestWithParam<CoreModel::Variant> {};

TEST_P(CoreModelTest, HoldsForRandomPrograms) {
  const uint64_t seed = FromEnvironment("KVBROKER_TEST_SEED", 1);
  const uint64_t instructions =
      FromEnvironment("KVBROKER_TEST_INSTRUCTIONS", 100'000);
  std::cout << "KVBROKER_TEST_SEED=" << seed << "\n";
  std::mt19937_64 random(seed);
  CoreModel::Statistics statistics;
  while (statistics.instructions < static_cast<int64_t>(instructions)) {
    const std::vector<Instruction> program =
        RandomProgram(random, kProgramLength);
    absl::Status status = CoreModel::Run(program, &statistics, GetParam());
    if (status.ok()) continue;
    const std::vector<Instruction> shrunk = Shrink(program, GetParam());
    FAIL() << "seed " << seed << ", after " << statistics.instructions
           << " instructions: " << status << "\nIn short, "
           << CoreModel::Run(shrunk, nullptr, GetParam()) << ":\n"
           << ToCpp(shrunk);
  }
  std::cout << statistics.instructions << " instructions, " << statistics.grants
            << " grants, " << statistics.refusals << " refusals, "
            << statistics.orders << " orders, " << statistics.preempts
            << " preemptions, " << statistics.below_share
            << " claims below their share served, " << statistics.no_place
            << " refused for want of a place\n";
  // It is no use to check what never happens.
  EXPECT_GT(statistics.grants, statistics.instructions / 50);
  EXPECT_GT(statistics.orders, statistics.instructions / 50);
  EXPECT_GT(statistics.refusals, 0);
  EXPECT_GT(statistics.preempts, 0);
  if (GetParam().memory == Memory::kHandles) {
    EXPECT_GT(statistics.below_share, 0);
  } else {
    EXPECT_GT(statistics.no_place, 0);
  }
}

// One process of an instance had credit set aside and another drew on it in the
// same round of decisions: it counted twice, and the instance was asked for
// pages below its `min`.
TEST_P(CoreModelTest, CreditThatIsDrawnOnInItsOwnRoundCountsOnce) {
  const std::vector<Instruction> program = {
      {Op::kStart, 0, 8891, 3755, 9920},
      {Op::kStart, 1, 14879, 15581, 3123},
      {Op::kStart, 2, 13611, 15154, 14697},
      {Op::kPolicy, 1, 9461, 11670, 4002},
      {Op::kStart, 3, 1053, 10389, 2111},
      {Op::kAsk, 3, 1864, 5666, 1775},
      {Op::kCooperate, 4, 13771, 12888, 6309},
      {Op::kStart, 4, 13104, 6999, 4214},
      {Op::kAsk, 1, 8777, 10819, 11202},
      {Op::kCooperate, 1, 6841, 14900, 991},
      {Op::kPolicy, 4, 15137, 5770, 401},
      {Op::kAsk, 2, 4025, 1062, 2747},
      {Op::kPolicy, 0, 7605, 7796, 1342},
      {Op::kAsk, 3, 14883, 5028, 16079},
      {Op::kAsk, 3, 15537, 11165, 11654},
      {Op::kAsk, 4, 7862, 2593, 12655},
      {Op::kCooperate, 1, 3853, 6014, 2324},
      {Op::kDie, 0, 7514, 10910, 1002},
  };
  EXPECT_EQ(CoreModel::Run(program, nullptr, GetParam()), absl::OkStatus());
}

// A process that was told to end goes on, acknowledges what was dropped without
// an answer, and asks it again: it gets none.
TEST_P(CoreModelTest, WhatWasAcknowledgedIsNotAnsweredAgain) {
  const std::vector<Instruction> program = {
      {Op::kStart, 3, 9964, 12357, 8807},
      {Op::kAsk, 3, 2039, 8502, 4764},
      {Op::kAsk, 3, 4368, 5189, 3628},
      {Op::kAsk, 3, 12304, 3365, 10483},
      {Op::kAsk, 3, 13385, 14082, 9699},
      {Op::kAsk, 3, 14524, 2794, 5961},
      {Op::kStart, 1, 9914, 7083, 12138},
      {Op::kAsk, 3, 11992, 12122, 2950},
      {Op::kAsk, 1, 5453, 8230, 2741},
      {Op::kAsk, 1, 12125, 2582, 11677},
      {Op::kDelete, 5, 7877, 2469, 1580},
      {Op::kAsk, 1, 8234, 2895, 3448},
      {Op::kAsk, 1, 12886, 7985, 3813},
      {Op::kAsk, 1, 14302, 3469, 15282},
      {Op::kPump, 1, 12357, 12400, 4238},
      {Op::kAsk, 1, 14514, 5096, 14291},
      {Op::kRepeat, 1, 6305, 5501, 14427},
      {Op::kTick, 3, 2500, 6099, 3646},
      {Op::kAdvance, 0, 0, 5519, 14069},
  };
  EXPECT_EQ(CoreModel::Run(program, nullptr, GetParam()), absl::OkStatus());
}

// A claim was replaced while its pages were being made, which failed: it waited
// on beside the one in its place, and kept memory from it.
TEST_P(CoreModelTest, AClaimThatIsReplacedWhileItIsMadeWaitsNoMore) {
  const std::vector<Instruction> program = {
      {Op::kStart, 5, 2880, 8606, 8195},
      {Op::kAsk, 5, 2437, 5667, 3848},
      {Op::kAsk, 5, 16170, 7304, 13210},
      {Op::kStart, 2, 6224, 5336, 4959},
      {Op::kAsk, 5, 16113, 8513, 16029},
      {Op::kCooperate, 5, 2239, 12364, 3536},
      {Op::kHangUp, 5, 10770, 4279, 8348},
      {Op::kStart, 4, 6507, 8218, 7537},
      {Op::kAsk, 2, 3906, 3668, 7149},
      {Op::kFailCreates, 1, 1877, 1056, 6494},
      {Op::kAsk, 4, 14642, 13903, 6319},
      {Op::kAsk, 4, 7462, 5988, 6131},
      {Op::kAsk, 2, 14037, 1962, 9903},
      {Op::kTick, 4, 300, 10023, 1851},
      {Op::kAdvance, 0, 2500, 10129, 5287},
      {Op::kCooperate, 3, 6648, 1401, 12121},
  };
  EXPECT_EQ(CoreModel::Run(program, nullptr, GetParam()), absl::OkStatus());
}

INSTANTIATE_TEST_SUITE_P(Inline, CoreModelTest,
                         testing::Values(CoreModel::Variant{}));
INSTANTIATE_TEST_SUITE_P(OnExecutor, CoreModelTest,
                         testing::Values(CoreModel::Variant{
                             .bulk = Bulk::kOnExecutor}));
INSTANTIATE_TEST_SUITE_P(
    InASlab, CoreModelTest,
    testing::Values(CoreModel::Variant{.memory = Memory::kSlab},
                    CoreModel::Variant{.bulk = Bulk::kOnExecutor,
                                       .memory = Memory::kSlab}));

}  // namespace
}  // namespace kvbroker
