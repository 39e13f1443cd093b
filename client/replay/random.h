// Random: numbers that are the same for a seed on every machine.
//
// The standard library's distributions differ from one library to the next;
// a generated trace must not. xoshiro256++ seeded by splitmix64, and the few
// transforms that the replay needs.
#ifndef KVBROKER_CLIENT_REPLAY_RANDOM_H_
#define KVBROKER_CLIENT_REPLAY_RANDOM_H_

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

namespace kvbroker::replay {

// Not thread-safe; copyable, a copy repeats the original's numbers.
class Random {
 public:
  explicit Random(uint64_t seed) {
    for (uint64_t& word : state_) word = SplitMix(seed);
  }

  uint64_t Next() {
    const uint64_t result = std::rotl(state_[0] + state_[3], 23) + state_[0];
    const uint64_t shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = std::rotl(state_[3], 45);
    return result;
  }

  // In [0, 1), a multiple of 2^-53.
  double Uniform() {
    return static_cast<double>(Next() >> 11) * (1.0 / (uint64_t{1} << 53));
  }

  // Waiting time of a Poisson process whose events are `mean` apart.
  double Exponential(double mean) { return -mean * std::log1p(-Uniform()); }

  // Mean 0, variance 1, within +-6: a sum of twelve uniforms, which needs no
  // library function and is near enough to a normal where tails do not matter.
  double NearNormal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += Uniform();
    return sum;
  }

 private:
  static uint64_t SplitMix(uint64_t& state) {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  std::array<uint64_t, 4> state_;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_RANDOM_H_
