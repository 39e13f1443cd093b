// IndexStack: a stack of elements that live in one array, linked as IndexList's
// are and through the same kind of member. Cheaper where only the top moves.
//
// Not thread-safe; nothing allocates.
#ifndef KVBROKER_CLIENT_BLOCK_INDEX_STACK_H_
#define KVBROKER_CLIENT_BLOCK_INDEX_STACK_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "client/block/index_list.h"

namespace kvbroker::client {

template <typename Element, IndexLink Element::*kLink>
class IndexStack {
 public:
  using Array = std::vector<Element>;

  // REQUIRES: `index` is on no stack or list of this link.
  void Push(Array& array, uint32_t index) {
    (array[index].*kLink).next = top_;
    top_ = index;
    ++size_;
  }
  // REQUIRES: not empty.
  uint32_t Pop(Array& array) {
    const uint32_t index = top_;
    top_ = (array[index].*kLink).next;
    --size_;
    return index;
  }

  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }
  // kNoIndex where there is none.
  uint32_t top() const { return top_; }
  static uint32_t Next(const Array& array, uint32_t index) {
    return (array[index].*kLink).next;
  }

 private:
  uint32_t top_ = kNoIndex;
  uint32_t size_ = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_INDEX_STACK_H_
