// Bytes: a number of bytes that cannot be mistaken for a number of pages.
//
// Signed, so that "capacity minus held" may go below zero and be tested for it.
// Arithmetic is that of int64_t; overflow is the caller's bug (inputs from
// peers are bounded by `kMaxBytes` where they enter).
#ifndef KVBROKER_BROKER_BASE_BYTES_H_
#define KVBROKER_BROKER_BASE_BYTES_H_

#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace kvbroker {

class Bytes {
 public:
  constexpr Bytes() = default;
  constexpr explicit Bytes(int64_t count) : count_(count) {}

  constexpr int64_t count() const { return count_; }

  friend constexpr auto operator<=>(Bytes, Bytes) = default;
  friend constexpr Bytes operator+(Bytes a, Bytes b) {
    return Bytes(a.count_ + b.count_);
  }
  friend constexpr Bytes operator-(Bytes a, Bytes b) {
    return Bytes(a.count_ - b.count_);
  }
  friend constexpr Bytes operator*(Bytes a, int64_t n) {
    return Bytes(a.count_ * n);
  }
  // How many whole `b` fit into `a`. REQUIRES: b > 0.
  friend constexpr int64_t operator/(Bytes a, Bytes b) {
    return a.count_ / b.count_;
  }
  constexpr Bytes& operator+=(Bytes b) { return *this = *this + b; }
  constexpr Bytes& operator-=(Bytes b) { return *this = *this - b; }

 private:
  int64_t count_ = 0;
};

constexpr Bytes KiB(int64_t n) { return Bytes(n << 10); }
constexpr Bytes MiB(int64_t n) { return Bytes(n << 20); }
constexpr Bytes GiB(int64_t n) { return Bytes(n << 30); }

// Larger than any device; what a peer may claim at most in one figure.
inline constexpr Bytes kMaxBytes = Bytes(int64_t{1} << 52);

// The smallest number of `unit` that covers `amount`. REQUIRES: unit > 0.
constexpr int64_t CeilDivide(Bytes amount, Bytes unit) {
  if (amount <= Bytes(0)) return 0;
  return (amount.count() + unit.count() - 1) / unit.count();
}

// "512 MiB", "1.5 GiB", "17 B": at most one decimal, for people.
std::string FormatBytes(Bytes bytes);

// Reads what operators type: `512M`, `512MB`, `512MiB`, `2G`, `1T`, `1,000`,
// `100_000`, `1024` (bytes). Every suffix is 1024-based. Fails with
// InvalidArgument that quotes the text and says what is allowed.
absl::StatusOr<Bytes> ParseBytes(std::string_view text);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_BASE_BYTES_H_
