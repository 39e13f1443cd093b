// IndexList: a doubly linked list of elements that live in one array.
//
// The links are members of the elements, so that no operation allocates and
// each takes constant time. An element may have several links and be on one
// list a link; the caller knows which list that is.
//
//   struct Page { IndexLink age; ... };
//   std::vector<Page> pages(100);
//   IndexList<Page, &Page::age> oldest_first;
//   oldest_first.PushBack(pages, 7);
//
// Not thread-safe. The array may move in memory but not be reordered.
#ifndef KVBROKER_CLIENT_BLOCK_INDEX_LIST_H_
#define KVBROKER_CLIENT_BLOCK_INDEX_LIST_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvbroker::client {

inline constexpr uint32_t kNoIndex = UINT32_MAX;

struct IndexLink {
  uint32_t previous = kNoIndex;
  uint32_t next = kNoIndex;
};

template <typename Element, IndexLink Element::*kLink>
class IndexList {
 public:
  using Array = std::vector<Element>;

  // REQUIRES: `index` is on no list of this link.
  void PushBack(Array& array, uint32_t index) {
    array[index].*kLink = {.previous = back_, .next = kNoIndex};
    (back_ == kNoIndex ? front_ : (array[back_].*kLink).next) = index;
    back_ = index;
    ++size_;
  }
  void PushFront(Array& array, uint32_t index) {
    array[index].*kLink = {.previous = kNoIndex, .next = front_};
    (front_ == kNoIndex ? back_ : (array[front_].*kLink).previous) = index;
    front_ = index;
    ++size_;
  }

  // REQUIRES: `index` is on this list.
  void Remove(Array& array, uint32_t index) {
    const uint32_t previous = (array[index].*kLink).previous;
    const uint32_t next = (array[index].*kLink).next;
    (previous == kNoIndex ? front_ : (array[previous].*kLink).next) = next;
    (next == kNoIndex ? back_ : (array[next].*kLink).previous) = previous;
    --size_;
  }

  // REQUIRES: not empty.
  uint32_t PopFront(Array& array) {
    const uint32_t index = front_;
    Remove(array, index);
    return index;
  }

  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }
  // kNoIndex where there is none.
  uint32_t front() const { return front_; }
  uint32_t back() const { return back_; }
  static uint32_t Next(const Array& array, uint32_t index) {
    return (array[index].*kLink).next;
  }

  // Whether links, ends and size agree; walks the list.
  bool IsConsistent(const Array& array) const {
    uint32_t previous = kNoIndex;
    size_t count = 0;
    for (uint32_t i = front_; i != kNoIndex; i = Next(array, i)) {
      if (i >= array.size() || ++count > size_) return false;
      if ((array[i].*kLink).previous != previous) return false;
      previous = i;
    }
    return previous == back_ && count == size_;
  }

 private:
  uint32_t front_ = kNoIndex;
  uint32_t back_ = kNoIndex;
  uint32_t size_ = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_INDEX_LIST_H_
