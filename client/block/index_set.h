// IndexSet: a set of small integers that knows its least and its greatest.
//
// A bitmap of fixed size: nothing allocates after construction. Insert and
// Erase take constant time, Lowest and Highest look at 64 integers at once. Not
// thread-safe.
#ifndef KVBROKER_CLIENT_BLOCK_INDEX_SET_H_
#define KVBROKER_CLIENT_BLOCK_INDEX_SET_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "client/block/index_list.h"

namespace kvbroker::client {

class IndexSet {
 public:
  // For the integers 0 .. universe - 1; empty.
  explicit IndexSet(size_t universe) : words_((universe + 63) / 64) {}

  // REQUIRES: in the universe and, for Insert, not in the set; for Erase, in
  // it.
  void Insert(uint32_t index) {
    words_[index / 64] |= Bit(index);
    ++size_;
  }
  void Erase(uint32_t index) {
    words_[index / 64] &= ~Bit(index);
    --size_;
  }

  bool Contains(uint32_t index) const {
    return (words_[index / 64] & Bit(index)) != 0;
  }
  size_t size() const { return size_; }

  // kNoIndex where the set is empty.
  uint32_t Lowest() const {
    for (size_t i = 0; i < words_.size(); ++i) {
      if (words_[i] != 0) {
        return static_cast<uint32_t>(i * 64 + std::countr_zero(words_[i]));
      }
    }
    return kNoIndex;
  }
  uint32_t Highest() const {
    for (size_t i = words_.size(); i-- > 0;) {
      if (words_[i] != 0) {
        return static_cast<uint32_t>(i * 64 + 63 - std::countl_zero(words_[i]));
      }
    }
    return kNoIndex;
  }

 private:
  static uint64_t Bit(uint32_t index) { return uint64_t{1} << (index % 64); }

  std::vector<uint64_t> words_;
  size_t size_ = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_INDEX_SET_H_
