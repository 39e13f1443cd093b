#include "broker/device/range_map.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"

namespace kvbroker {

RangeMap::RangeMap(Bytes size) : size_(size) {
  if (size > Bytes(0)) free_[Bytes(0)] = size;
}

RangeMap::End RangeMap::EmptierEnd() const {
  Bytes low, high;
  for (const auto& [bytes, kind] : kinds_) {
    (kind.end == End::kLow ? low : high) += kind.taken;
  }
  return low <= high ? End::kLow : End::kHigh;
}

std::vector<Bytes> RangeMap::Find(Bytes bytes, size_t count,
                                  Bytes limit) const {
  KVB_CHECK(bytes > Bytes(0));
  std::vector<Bytes> found;
  auto kind = kinds_.find(bytes);
  const End end = kind == kinds_.end() ? EmptierEnd() : kind->second.end;
  if (end == End::kLow) {
    for (auto gap = free_.begin(); gap != free_.end() && found.size() < count;
         ++gap) {
      const Bytes last = std::min(gap->second, limit);
      for (Bytes at = bytes * CeilDivide(gap->first, bytes);
           at + bytes <= last && found.size() < count; at += bytes) {
        found.push_back(at);
      }
    }
    return found;
  }
  for (auto gap = free_.rbegin(); gap != free_.rend() && found.size() < count;
       ++gap) {
    const Bytes last = std::min(gap->second, limit);
    for (Bytes at = bytes * (last / bytes) - bytes;
         at >= gap->first && found.size() < count; at -= bytes) {
      found.push_back(at);
    }
  }
  return found;
}

bool RangeMap::Take(Bytes offset, Bytes bytes) {
  auto gap = free_.upper_bound(offset);
  if (bytes <= Bytes(0) || gap == free_.begin()) return false;
  --gap;
  const auto [begin, end] = *gap;
  if (bytes > end - offset) return false;
  auto kind = kinds_.find(bytes);
  if (kind == kinds_.end()) {
    kind = kinds_.emplace(bytes, Kind{.end = EmptierEnd()}).first;
  }
  kind->second.taken += bytes;
  taken_ += bytes;
  ranges_[offset] = bytes;
  free_.erase(gap);
  if (begin < offset) free_[begin] = offset;
  if (offset + bytes < end) free_[offset + bytes] = end;
  return true;
}

void RangeMap::GiveBack(Bytes offset, Bytes bytes) {
  auto range = ranges_.find(offset);
  KVB_CHECK(range != ranges_.end() && range->second == bytes);
  ranges_.erase(range);
  auto kind = kinds_.find(bytes);
  kind->second.taken -= bytes;
  if (kind->second.taken == Bytes(0)) kinds_.erase(kind);
  taken_ -= bytes;
  Bytes begin = offset, end = offset + bytes;
  auto after = free_.lower_bound(offset);
  if (after != free_.end() && after->first == end) {
    end = after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin() && std::prev(after)->second == begin) {
    begin = std::prev(after)->first;
  }
  free_[begin] = end;
}

absl::Status RangeMap::CheckInvariants() const {
  auto broken = [](auto... words) {
    return absl::InternalError(absl::StrCat("range map: ", words...));
  };
  Bytes at, sum;
  bool was_free = false;
  auto gap = free_.begin();
  auto range = ranges_.begin();
  while (at < size_) {
    const bool is_free = gap != free_.end() && gap->first == at;
    if (is_free && was_free) return broken("two gaps meet at ", at.count());
    if (is_free) {
      at = (gap++)->second;
    } else if (range != ranges_.end() && range->first == at) {
      sum += range->second;
      at += (range++)->second;
    } else {
      return broken("nothing begins at ", at.count());
    }
    was_free = is_free;
  }
  if (at != size_ || gap != free_.end() || range != ranges_.end()) {
    return broken("ranges beyond the end, ", size_.count());
  }
  Bytes of_kinds;
  for (const auto& [bytes, kind] : kinds_) of_kinds += kind.taken;
  if (sum != taken_ || of_kinds != taken_) {
    return broken("counts ", taken_.count(), " bytes as taken, they are ",
                  sum.count());
  }
  return absl::OkStatus();
}

}  // namespace kvbroker
