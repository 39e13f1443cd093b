// BlockPattern: proof that a block belonged to one owner all the time.
//
// Each 64-byte line of a block is filled with who wrote it and where: engine,
// request, the block's ordinal within the request, line, and words that follow
// from these. A line that reads otherwise when the block is given up was
// written by somebody else, or lost.
#ifndef KVBROKER_CLIENT_REPLAY_PATTERN_H_
#define KVBROKER_CLIENT_REPLAY_PATTERN_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace kvbroker::replay {

inline constexpr int64_t kPatternLineBytes = 64;

// Whose block it is.
struct BlockOwner {
  uint64_t engine = 0;   // tells engines of one machine apart
  uint64_t request = 0;  // index in the trace
  uint64_t ordinal = 0;  // of the block within the request's blocks

  friend bool operator==(const BlockOwner&, const BlockOwner&) = default;
};

// An engine id that two processes do not share, even under one name. Its tenant
// can be read off it.
uint64_t MakeEngineId(std::string_view name, int64_t pid, uint32_t tenant = 0);
uint32_t TenantOf(uint64_t engine);

// Lines of memory by what is in them: nothing but zeros; whole lines that an
// engine of the tenant wrote, or one of another; something else.
struct PatternLines {
  int64_t zero = 0, own = 0, foreign = 0, other = 0;
};
PatternLines CountLines(uint32_t tenant, std::span<const std::byte> memory);

// Both: REQUIRES: the block is a whole number of lines.
void WritePattern(const BlockOwner& owner, std::span<std::byte> block);
int64_t CountWrongLines(const BlockOwner& owner,
                        std::span<const std::byte> block);

// For people: the first wrong line, whose it was to be and what is there: all
// zero, another owner's line, or garbage. Empty if no line is wrong.
std::string DescribeFirstWrongLine(const BlockOwner& owner,
                                   std::span<const std::byte> block);

// Writes and checks the blocks of one engine and keeps count. One thread.
class BlockPattern {
 public:
  explicit BlockPattern(uint64_t engine) : engine_(engine) {}

  void Write(uint64_t request, uint64_t ordinal, std::span<std::byte> block);
  void Check(uint64_t request, uint64_t ordinal,
             std::span<const std::byte> block);

  int64_t blocks_written() const { return blocks_written_; }
  int64_t blocks_checked() const { return blocks_checked_; }
  // Wrong lines over all checks, and a description of the first.
  int64_t errors() const { return errors_; }
  const std::string& first_error() const { return first_error_; }

 private:
  const uint64_t engine_;
  int64_t blocks_written_ = 0;
  int64_t blocks_checked_ = 0;
  int64_t errors_ = 0;
  std::string first_error_;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_PATTERN_H_
