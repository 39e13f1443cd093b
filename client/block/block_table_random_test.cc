// Random instructions, run on a BlockTable and on a BlockTableModel side by
// side and compared after each.
//
// A failure is shrunk, then printed as a call of Replay that pastes below the
// last test of this file. KVBROKER_SEED=n repeats a run;
// KVBROKER_INSTRUCTIONS=n makes it longer.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/block/block_table.h"
#include "client/block/block_table_model.h"
#include "gtest/gtest.h"

namespace kvbroker::client {

void PrintTo(const BlockGeometry& geometry, std::ostream* os) {
  *os << "pages of " << geometry.page_bytes.count() << " and blocks of "
      << geometry.block_bytes.count() << " bytes";
}

namespace {

using Blocks = std::vector<BlockId>;

enum Op {
  kTakeAbsent,     // count
  kTakeAbsentAt,   // page
  kBack,           // which
  kAbandon,        // which
  kAlloc,          // count
  kAllocAt,        // which, count
  kAllocAtWrongly,  // which, kind of mistake
  kFree,           // which, count
  kCache,          // which, count
  kTouch,          // which, count
  kUncache,        // which, count
  kTrimCached,     // keep
  kDrain,          // count
  kFreeWrongly,    // which, kind of mistake
  kBackWrongly,    // page
  kTick,           // seconds
  kCompleteStep,   // how many steps behind the last
  kTakeClosed,     // count
  kTakeIdle,       // count
  kTakeIdleSince,  // seconds ago, keep
  kTakeCached,     // count
  kClose,          // count, tier
  kVacate,         // count
  kReopen,         // count
  kReturned,       // which
  kKeepBacked,     // which
  kOps
};

constexpr const char* kOpNames[] = {
    "kTakeAbsent",  "kTakeAbsentAt",  "kBack",         "kAbandon",
    "kAlloc",       "kAllocAt",       "kAllocAtWrongly",
    "kFree",        "kCache",         "kTouch",
    "kUncache",     "kTrimCached",    "kDrain",        "kFreeWrongly",
    "kBackWrongly", "kTick",          "kCompleteStep", "kTakeClosed",
    "kTakeIdle",    "kTakeIdleSince", "kTakeCached",   "kClose",
    "kVacate",      "kReopen",        "kReturned",     "kKeepBacked"};
static_assert(std::size(kOpNames) == kOps);

// `a` and `b` mean what the op's comment says; "which" counts from the first
// that is in the right state, around the end. So any list of instructions runs.
struct Instruction {
  Op op;
  uint32_t a = 0;
  uint32_t b = 0;
};

std::string AsCode(const BlockGeometry& geometry,
                   const std::vector<Instruction>& instructions) {
  std::string code = absl::StrCat(
      "TEST(BlockTableRegressionTest, NameMe) {\n  EXPECT_EQ(Replay(Geometry(",
      geometry.page_bytes.count(), ", ", geometry.block_bytes.count(), ", ",
      geometry.max_pages, ", ", geometry.reserve_null_block ? "true" : "false",
      ", ", geometry.max_blocks, "), {\n");
  for (const Instruction& it : instructions) {
    absl::StrAppend(&code, "      {", kOpNames[it.op], ", ", it.a, ", ", it.b,
                    "},\n");
  }
  return code + "  }), \"\");\n}\n";
}

class SideBySide {
 public:
  explicit SideBySide(const BlockGeometry& geometry)
      : table_(*BlockTable::Create(geometry)), model_(geometry) {}

  // "" or what the table did wrong.
  std::string Run(const Instruction& it) {
    std::string wrong = Do(it);
    if (wrong.empty()) wrong = model_.Compare(table_);
    if (wrong.empty()) {
      const absl::Status broken = table_.CheckInvariants();
      if (!broken.ok()) wrong = broken.ToString();
    }
    return wrong;
  }

 private:
  std::string Do(const Instruction& it) {
    switch (it.op) {
      case kTakeAbsent:
        return SamePages(it.a, &BlockTable::TakeAbsent,
                         model_.TakeAbsent(it.a));
      case kTakeAbsentAt:
        return Same(table_.TakeAbsentAt(PageIndex(it.a)).ok(),
                    model_.TakeAbsentAt(it.a));
      case kBack: {
        const auto page = Which(model_.PagesIn(PageState::kRequested), it.a);
        return Same(table_.Back(PageIndex(page), Generation(1)).ok(),
                    model_.Back(page));
      }
      case kAbandon: {
        const auto page = Which(model_.PagesIn(PageState::kRequested), it.a);
        return Same(table_.Abandon(PageIndex(page)).ok(), model_.Abandon(page));
      }
      case kAlloc: {
        Blocks blocks(it.a);
        const bool ok = table_.Alloc(absl::MakeSpan(blocks));
        return model_.Alloc(it.a, ok, blocks);
      }
      case kAllocAt: {
        const Blocks blocks = Some(BlockState::kFree, it);
        return Same(table_.AllocAt(blocks).ok(), model_.AllocAt(blocks));
      }
      case kAllocAtWrongly: {
        Blocks blocks = Some(BlockState::kFree, {kAllocAt, it.a, 3});
        const Blocks mistakes = {
            blocks.empty() ? -7 : blocks.front(),
            -1,
            table_.geometry().block_ids(),
            Which(model_.BlocksIn(BlockState::kUsed), it.a),
            Which(model_.BlocksIn(BlockState::kCached), it.a),
            Which(model_.BlocksIn(BlockState::kUnbacked), it.a)};
        blocks.push_back(mistakes[it.b % mistakes.size()]);
        return Same(table_.AllocAt(blocks).ok(), model_.AllocAt(blocks));
      }
      case kFree: {
        const Blocks blocks = Some(BlockState::kUsed, it);
        const StepId step = NextStep(it);
        return Same(table_.Free(blocks, step).ok(), model_.Free(blocks, step));
      }
      case kCache: {
        const Blocks blocks = Some(BlockState::kUsed, it);
        const StepId step = NextStep(it);
        for (BlockId block : blocks) Remember(block);
        return Same(table_.Cache(blocks, step).ok(),
                    model_.Cache(blocks, step));
      }
      case kTouch: {
        Blocks blocks;
        std::vector<BlockGeneration> generations;
        for (uint32_t i = 0; i < it.b && !remembered_.empty(); ++i) {
          const BlockRemoval& known =
              remembered_[(it.a + i) % remembered_.size()];
          blocks.push_back(known.block);
          generations.push_back(known.generation);
        }
        return Same(table_.Touch(blocks, generations),
                    model_.Touch(blocks, generations));
      }
      case kUncache: {
        const Blocks blocks = Some(BlockState::kCached, it);
        return Same(table_.Uncache(blocks).ok(), model_.Uncache(blocks));
      }
      case kTrimCached:
        return Same(table_.TrimCached(it.a), model_.TrimCached(it.a));
      case kDrain: {
        std::vector<BlockRemoval> removals(it.a);
        removals.resize(table_.DrainRemovals(absl::MakeSpan(removals)));
        return Same(removals, model_.DrainRemovals(it.a));
      }
      case kFreeWrongly: {
        Blocks blocks = Some(BlockState::kUsed, {kFree, it.a, 3});
        const Blocks mistakes = {
            blocks.empty() ? -7 : blocks.front(),
            -1,
            table_.geometry().block_ids(),
            Which(model_.BlocksIn(BlockState::kFree), it.a),
            Which(model_.BlocksIn(BlockState::kCached), it.a),
            Which(model_.BlocksIn(BlockState::kUnbacked), it.a)};
        blocks.push_back(mistakes[it.b % mistakes.size()]);
        if (it.b % 2 == 0) {
          return Same(table_.Free(blocks, step_).ok(),
                      model_.Free(blocks, step_));
        }
        return Same(table_.Cache(blocks, step_).ok(),
                    model_.Cache(blocks, step_));
      }
      case kBackWrongly: {
        const uint32_t page = it.a % (table_.geometry().max_pages + 1);
        return Same(table_.KeepBacked(PageIndex(page)).ok(),
                    model_.KeepBacked(page));
      }
      case kTick:
        now_ += absl::Seconds(it.a);
        table_.SetNow(now_);
        model_.SetNow(now_);
        return "";
      case kCompleteStep: {
        const StepId step = step_ > it.a ? step_ - it.a : 0;
        table_.CompleteStep(step);
        model_.CompleteStep(step);
        return "";
      }
      case kTakeClosed:
        return SamePages(it.a, &BlockTable::TakeClosed,
                         model_.TakeClosed(it.a));
      case kTakeIdle:
        return SamePages(it.a, &BlockTable::TakeIdle, model_.TakeIdle(it.a));
      case kTakeIdleSince: {
        const absl::Time since = now_ - absl::Seconds(it.a);
        std::vector<PageIndex> pages(3);
        pages.resize(table_.TakeIdleSince(since, it.b, absl::MakeSpan(pages)));
        return Same(pages, Indexes(model_.TakeIdleSince(since, it.b, 3)));
      }
      case kTakeCached:
        return SamePages(it.a, &BlockTable::TakeCached,
                         model_.TakeCached(it.a));
      case kClose: {
        const auto dearest = static_cast<PageTier>(it.b % 3);
        const size_t answer = table_.Close(it.a, dearest);
        return model_.Close(it.a, dearest, answer, table_);
      }
      case kVacate: {
        const size_t answer = table_.Vacate(it.a);
        return model_.Vacate(it.a, answer, table_);
      }
      case kReopen: {
        const size_t answer = table_.Reopen(it.a);
        return model_.Reopen(it.a, answer, table_);
      }
      case kReturned: {
        const auto page = Which(model_.PagesIn(PageState::kReturning), it.a);
        return Same(table_.Returned(PageIndex(page)).ok(),
                    model_.Returned(page));
      }
      case kKeepBacked: {
        const auto page = Which(model_.PagesIn(PageState::kReturning), it.a);
        return Same(table_.KeepBacked(PageIndex(page)).ok(),
                    model_.KeepBacked(page));
      }
      case kOps:
        break;
    }
    return "no such instruction";
  }

  // Mostly the next one; now and then one that is late.
  StepId NextStep(const Instruction& it) {
    ++step_;
    return it.a % 4 == 0 ? step_ / 2 : step_;
  }

  template <typename T>
  static std::string Same(const T& actual, const T& expected) {
    return actual == expected ? "" : "answer differs from the model's";
  }
  static std::vector<PageIndex> Indexes(const std::vector<uint32_t>& pages) {
    std::vector<PageIndex> indexes;
    for (uint32_t page : pages) indexes.push_back(PageIndex(page));
    return indexes;
  }
  std::string SamePages(size_t count,
                        size_t (BlockTable::*take)(absl::Span<PageIndex>),
                        const std::vector<uint32_t>& expected) {
    std::vector<PageIndex> pages(count);
    pages.resize((table_.*take)(absl::MakeSpan(pages)));
    return Same(pages, Indexes(expected));
  }

  // One past the end where there is none, which no call accepts.
  template <typename T>
  static T Which(const std::vector<T>& of, uint32_t which) {
    return of.empty() ? static_cast<T>(1 << 20) : of[which % of.size()];
  }
  Blocks Some(BlockState state, const Instruction& it) const {
    const Blocks all = model_.BlocksIn(state);
    Blocks some;
    for (uint32_t i = 0; i < it.b && i < all.size(); ++i) {
      // Odd starts go downwards, as engines free a request's tail first.
      const uint32_t n = it.a % 2 == 0 ? it.a + i : it.a + it.b - 1 - i;
      some.push_back(all[n % all.size()]);
    }
    return some;
  }
  // What an engine's map of contents knows, stale or not.
  void Remember(BlockId block) {
    if (remembered_.size() == 16) remembered_.erase(remembered_.begin());
    remembered_.push_back(
        {.block = block, .generation = table_.generation(block)});
  }

  BlockTable table_;
  BlockTableModel model_;
  StepId step_ = 0;
  absl::Time now_ = absl::UnixEpoch();
  std::vector<BlockRemoval> remembered_;
};

BlockGeometry Geometry(int64_t page_bytes, int64_t block_bytes,
                       uint32_t max_pages, bool reserve_null_block,
                       uint32_t max_blocks = 0) {
  return {.page_bytes = Bytes(page_bytes),
          .block_bytes = Bytes(block_bytes),
          .max_pages = max_pages,
          .max_blocks = max_blocks,
          .reserve_null_block = reserve_null_block};
}

// "" or what the first instruction that went wrong did.
std::string Replay(const BlockGeometry& geometry,
                   const std::vector<Instruction>& instructions) {
  SideBySide both(geometry);
  for (const Instruction& it : instructions) {
    std::string wrong = both.Run(it);
    if (!wrong.empty()) return absl::StrCat(kOpNames[it.op], ": ", wrong);
  }
  return "";
}

// Leaves out whatever the failure does not need, halves first.
std::vector<Instruction> Shrink(const BlockGeometry& geometry,
                                std::vector<Instruction> failing) {
  for (size_t chunk = failing.size() / 2; chunk > 0; chunk /= 2) {
    for (size_t i = 0; i + chunk <= failing.size();) {
      std::vector<Instruction> fewer = failing;
      fewer.erase(fewer.begin() + i, fewer.begin() + i + chunk);
      if (Replay(geometry, fewer).empty()) {
        i += chunk;
      } else {
        failing = std::move(fewer);
      }
    }
  }
  return failing;
}

uint32_t FromEnvironment(const char* name, uint32_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr
             ? otherwise
             : static_cast<uint32_t>(std::strtoul(text, nullptr, 10));
}

class BlockTableRandomTest : public ::testing::TestWithParam<BlockGeometry> {};

// Growth, shrinking and churn take turns, so that tables are empty, full of
// used and full of cached blocks at times.
std::vector<Instruction> RandomInstructions(std::mt19937& random,
                                            size_t count) {
  const auto below = [&random](uint32_t n) {
    return static_cast<uint32_t>(random() % n);
  };
  std::vector<double> weights(kOps, 1.0);
  weights[kReturned] = weights[kBack] = weights[kCompleteStep] = 3.0;
  for (Op op : {kTakeAbsent, kAlloc, kFree, kCache, kTouch, kTakeIdle,
                kTakeCached, kClose, kVacate, kReopen}) {
    weights[op] = 0.2 + below(6);
  }
  std::discrete_distribution<int> ops(weights.begin(), weights.end());
  const uint32_t batch = 1 + below(random() % 4 == 0 ? 40 : 8);
  std::vector<Instruction> instructions;
  for (size_t i = 0; i < count; ++i) {
    const Op op = static_cast<Op>(ops(random));
    Instruction it{op, below(batch + 1), below(batch + 1)};
    if (op == kFree || op == kCache || op == kUncache || op == kTouch ||
        op == kFreeWrongly || op == kBackWrongly || op == kTakeAbsentAt ||
        op == kAllocAt || op == kAllocAtWrongly) {
      it.a = below(op == kTakeAbsentAt ? 16 : 64);
    }
    instructions.push_back(it);
  }
  return instructions;
}

TEST_P(BlockTableRandomTest, BehavesAsTheModel) {
  constexpr size_t kInstructionsARun = 250;
  const uint32_t seed =
      FromEnvironment("KVBROKER_SEED", std::random_device()());
  const uint32_t instructions =
      FromEnvironment("KVBROKER_INSTRUCTIONS", 40'000);
  std::cout << "KVBROKER_SEED=" << seed << std::endl;
  std::mt19937 random(seed);
  for (size_t done = 0; done < instructions; done += kInstructionsARun) {
    std::vector<Instruction> run =
        RandomInstructions(random, kInstructionsARun);
    const std::string wrong = Replay(GetParam(), run);
    if (wrong.empty()) continue;
    run = Shrink(GetParam(), run);
    FAIL() << Replay(GetParam(), run) << "\nKVBROKER_SEED=" << seed << "\n"
           << AsCode(GetParam(), run);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Geometries, BlockTableRandomTest,
    ::testing::Values(Geometry(64, 16, 6, false),  // 4 blocks a page
                      Geometry(64, 16, 6, true),
                      Geometry(40, 16, 7,
                               true),  // every second page's straddle
                      Geometry(70, 15, 5, false),  // straddles of all offsets
                      Geometry(18, 15, 9, true),   // pages that hold no block
                      Geometry(16, 16, 12, true),  // a block is a page
                      // ends within a page, and pages without a block
                      Geometry(64, 16, 6, true, 14),
                      Geometry(90, 1, 2, false)),  // more than 64 a page
    [](const auto& info) {
      const BlockGeometry& geometry = info.param;
      return absl::StrCat("Page", geometry.page_bytes.count(), "Block",
                          geometry.block_bytes.count(),
                          geometry.reserve_null_block ? "NullBlock" : "",
                          geometry.max_blocks > 0 ? "Cut" : "");
    });

}  // namespace
}  // namespace kvbroker::client
