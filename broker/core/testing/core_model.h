// CoreModel: what must hold of the core whatever engines, operators and devices
// do; with a language of small instructions to make them do it.
//
//   std::vector<Instruction> program = RandomProgram(random, 400);
//   absl::Status status = CoreModel::Run(program, &statistics);
//   if (!status.ok()) std::cerr << ToCpp(Shrink(program));
//
// A program is all there is to a run: no chance, no clock. What ToCpp prints
// pastes into a regression test.
//
// Checked after every instruction:
//   - the core's and the device's own books, and that both agree with what the
//     engines were told (no page with two owners, sums equal the capacity);
//   - nobody grew to more than its `max`;
//   - no order pushes anybody below its `min`;
//   - no claim is left unanswered past its deadline.
// Checked when all cooperate (Op::kCooperate): who is below its share, and
// could have the memory of those above theirs, gets it within patience and
// reclaim deadline.
#ifndef KVBROKER_BROKER_CORE_TESTING_CORE_MODEL_H_
#define KVBROKER_BROKER_CORE_TESTING_CORE_MODEL_H_

#include <array>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/core/core.h"
#include "broker/core/testing/fake_client.h"
#include "broker/core/testing/fake_world.h"

namespace kvbroker {

enum class Op {
  kStart,      // `who` becomes engine `a`, with limits by `b`
  kAsk,        // `who` claims: pool and urgency by `a`, pages by `b`, rest `c`
  kRepeat,     // `who` sends its Acquire `a` before the last again
  kCancel,     // `who` cancels it
  kResend,     // `who` wants its answer again
  kReturn,     // `who` returns `b` pages of pool `a`
  kMark,       // `who` makes `b` pages of pool `a` of use `c`
  kPump,       // `who` does what it was told
  kManners,    // `who` behaves as the bits of `a` say
  kHangUp,     // `who` hangs up
  kDie,        // `who` dies
  kDieMaking,  // `who` dies when the device next makes a handle
  kForeign,    // others use `a` parts of the device
  kRoom,       // `who` asks for room for `a` parts of it, by deadline `c`
  kPolicy,     // an operator sets policy `b` of engine `a`
  kDelete,     // an operator deletes engine `a`, by force where `b` is odd
  kFailCreates,  // the device's next `a` creates fail
  kFailExports,  // its next export fails
  kTick,         // `a` milliseconds pass, and the core does what is due
  kAdvance,      // `a` milliseconds pass, and all do what they are told
  kBulk,         // `a` steps of the work left to the executor are done
  kCooperate,  // all behave, those in the bits of `b` use all they have, those
               // in the bits of `a` ask for more, and time passes until nobody
               // need wait
};

struct Instruction {
  Op op;
  uint32_t who = 0;  // a place for a process, modulo their number
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
};

struct CoreModelVariant {
  // Where the core does its work on handles.
  enum class Bulk { kInline, kOnExecutor };
  // What the device is: with kSlab the broker chooses where pages lie, all
  // engines are of one tenant, and who is below its share may find no place.
  enum class Memory { kHandles, kSlab };

  Bulk bulk = Bulk::kInline;
  Memory memory = Memory::kHandles;
};

class CoreModel {
 public:
  // How often something happened, so that a test can tell that it does.
  struct Statistics {
    int64_t instructions = 0;
    int64_t grants = 0;
    int64_t refusals = 0;
    int64_t orders = 0;
    int64_t preempts = 0;
    int64_t below_share = 0;  // claims that had to be served, and were
    int64_t no_place = 0;     // refused beside free memory in small pieces
  };

  using Variant = CoreModelVariant;

  // OK, or which instruction broke what.
  static absl::Status Run(const std::vector<Instruction>& program,
                          Statistics* statistics = nullptr,
                          Variant variant = {});

 private:
  using Key = std::pair<std::string, std::string>;  // tenant, name

  explicit CoreModel(Variant variant);

  void Do(const Instruction& instruction);
  void Start(const Instruction& instruction);
  void Ask(FakeClient& client, const Instruction& instruction);
  void Policy(const Instruction& instruction);
  // Not OK: somebody waits who need not.
  absl::Status Cooperate(const Instruction& instruction);
  absl::Status Check();
  void Complain(std::string what);

  // Claims that have to be served now, if all cooperate.
  std::vector<std::pair<const FakeClient*, Sequence>> MustBeServed();

  // One of those that may be started.
  const FakeEngine& EngineOf(uint32_t which) const;

  const Variant variant_;
  FakeWorld world_;
  std::array<FakeClient*, 6> processes_{};
  std::map<Key, Bytes> held_;  // after the last instruction
  absl::Status status_;
  int64_t below_share_ = 0;
};

// `length` instructions that keep the core busy.
std::vector<Instruction> RandomProgram(std::mt19937_64& random, int length);

// A program that fails as `program` does, without most of what does not matter.
std::vector<Instruction> Shrink(std::vector<Instruction> program,
                                CoreModel::Variant variant = {});

// As a C++ initializer list.
std::string ToCpp(const std::vector<Instruction>& program);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_TESTING_CORE_MODEL_H_
