// FuzzInput: a fuzzer's bytes, taken off one by one. When they are all taken,
// what follows is zero: every input is a program of some length.
#ifndef KVBROKER_TESTS_FUZZ_FUZZ_INPUT_H_
#define KVBROKER_TESTS_FUZZ_FUZZ_INPUT_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvbroker::testing {

class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size)
      : rest_(reinterpret_cast<const char*>(data), size) {}

  bool empty() const { return rest_.empty(); }

  uint8_t Byte() {
    if (rest_.empty()) return 0;
    const uint8_t byte = static_cast<uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    return byte;
  }
  bool Flip() { return Byte() & 1; }
  // 0 .. below - 1. REQUIRES: below > 0.
  uint32_t Below(uint32_t below) { return Byte() % below; }

  // Small numbers mostly; now and then one at an edge of its type, or any.
  uint64_t Number() {
    const uint8_t kind = Byte();
    if (kind < 192) return kind % 32;
    if (kind < 224) return (uint64_t{1} << (kind % 64)) - Below(3);
    uint64_t number = 0;
    for (int i = 0; i < 8; ++i) number = number << 8 | Byte();
    return number;
  }

  std::string_view Take(size_t size) {
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  std::string_view TakeAll() { return Take(rest_.size()); }
  // Up to the next `end`, which is taken and left out, or all.
  std::string_view TakeUntil(char end) {
    const std::string_view taken =
        Take(std::min(rest_.find(end), rest_.size()));
    rest_.remove_prefix(std::min<size_t>(1, rest_.size()));
    return taken;
  }

 private:
  std::string_view rest_;
};

}  // namespace kvbroker::testing

#endif  // KVBROKER_TESTS_FUZZ_FUZZ_INPUT_H_
