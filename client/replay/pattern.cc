#include "client/replay/pattern.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace kvbroker::replay {
namespace {

constexpr int kWords = kPatternLineBytes / sizeof(uint64_t);
using Line = std::array<uint64_t, kWords>;

// Words 0 to 3 say who, the rest follow from them by odd factors, so that a
// line half overwritten by another owner's shows.
Line LineOf(const BlockOwner& owner, uint64_t line) {
  const uint64_t key = (owner.engine ^ owner.request * 0x9e3779b97f4a7c15 ^
                        owner.ordinal * 0xc2b2ae3d27d4eb4f) +
                       line * 0x165667b19e3779f9;
  return {owner.engine, owner.request, owner.ordinal, line,
          key,          ~key,          key * 3,       key * 5};
}

Line ReadLine(std::span<const std::byte> block, uint64_t line) {
  Line words;
  std::memcpy(words.data(), block.data() + line * kPatternLineBytes,
              kPatternLineBytes);
  return words;
}

std::string DescribeOwner(const BlockOwner& owner) {
  return absl::StrCat("engine ", absl::Hex(owner.engine), " request ",
                      owner.request, " block ", owner.ordinal);
}

}  // namespace

uint64_t MakeEngineId(std::string_view name, int64_t pid, uint32_t tenant) {
  // FNV-1a over the name, then the process id.
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&hash](uint8_t byte) {
    hash = (hash ^ byte) * 0x100000001b3;
  };
  for (char c : name) add(static_cast<uint8_t>(c));
  for (int shift = 0; shift < 64; shift += 8) {
    add(static_cast<uint8_t>(pid >> shift));
  }
  return hash << 32 | tenant;
}

uint32_t TenantOf(uint64_t engine) { return static_cast<uint32_t>(engine); }

PatternLines CountLines(uint32_t tenant, std::span<const std::byte> memory) {
  PatternLines lines;
  const uint64_t count = memory.size() / kPatternLineBytes;
  for (uint64_t line = 0; line < count; ++line) {
    const Line found = ReadLine(memory, line);
    if (found == Line{}) {
      ++lines.zero;
    } else if (found != LineOf({found[0], found[1], found[2]}, found[3])) {
      ++lines.other;
    } else {
      ++(TenantOf(found[0]) == tenant ? lines.own : lines.foreign);
    }
  }
  return lines;
}

void WritePattern(const BlockOwner& owner, std::span<std::byte> block) {
  const uint64_t lines = block.size() / kPatternLineBytes;
  for (uint64_t line = 0; line < lines; ++line) {
    const Line words = LineOf(owner, line);
    std::memcpy(block.data() + line * kPatternLineBytes, words.data(),
                kPatternLineBytes);
  }
}

int64_t CountWrongLines(const BlockOwner& owner,
                        std::span<const std::byte> block) {
  const uint64_t lines = block.size() / kPatternLineBytes;
  int64_t wrong = 0;
  for (uint64_t line = 0; line < lines; ++line) {
    const Line expected = LineOf(owner, line);
    if (std::memcmp(expected.data(), block.data() + line * kPatternLineBytes,
                    kPatternLineBytes) != 0) {
      ++wrong;
    }
  }
  return wrong;
}

std::string DescribeFirstWrongLine(const BlockOwner& owner,
                                   std::span<const std::byte> block) {
  const uint64_t lines = block.size() / kPatternLineBytes;
  for (uint64_t line = 0; line < lines; ++line) {
    const Line found = ReadLine(block, line);
    if (found == LineOf(owner, line)) continue;
    const BlockOwner writer = {
        .engine = found[0], .request = found[1], .ordinal = found[2]};
    std::string what = "garbage";
    if (std::all_of(found.begin(), found.end(),
                    [](uint64_t word) { return word == 0; })) {
      what = "all zero";
    } else if (found == LineOf(writer, found[3])) {
      what = absl::StrCat("line ", found[3], " of ", DescribeOwner(writer));
    }
    return absl::StrCat("line ", line, " of ", DescribeOwner(owner),
                        " reads as ", what);
  }
  return "";
}

void BlockPattern::Write(uint64_t request, uint64_t ordinal,
                         std::span<std::byte> block) {
  WritePattern({engine_, request, ordinal}, block);
  ++blocks_written_;
}

void BlockPattern::Check(uint64_t request, uint64_t ordinal,
                         std::span<const std::byte> block) {
  const BlockOwner owner = {engine_, request, ordinal};
  ++blocks_checked_;
  const int64_t wrong = CountWrongLines(owner, block);
  if (wrong == 0) return;
  if (errors_ == 0) first_error_ = DescribeFirstWrongLine(owner, block);
  errors_ += wrong;
}

}  // namespace kvbroker::replay
