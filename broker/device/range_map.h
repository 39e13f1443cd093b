// RangeMap: which bytes of a slab are taken, and where there is a place.
//
//   RangeMap map(GiB(8));
//   for (Bytes offset : map.Find(MiB(128), 3, map.size())) {
//     KVB_CHECK(map.Take(offset, MiB(128)));
//   }
//   map.GiveBack(offset, MiB(128));
//
// A range of so many bytes begins at a multiple of them, so that page i of a
// pool lies at i times its page's size. So free bytes may be of no use for a
// size: pages of another one lie among them. To keep that rare, each size grows
// from one end of the slab, two sizes from opposite ones, and takes the free
// places next to its end first.
//
// Not thread-safe.
#ifndef KVBROKER_BROKER_DEVICE_RANGE_MAP_H_
#define KVBROKER_BROKER_DEVICE_RANGE_MAP_H_

#include <cstddef>
#include <map>
#include <vector>

#include "absl/status/status.h"
#include "broker/base/bytes.h"

namespace kvbroker {

class RangeMap {
 public:
  explicit RangeMap(Bytes size);

  // Where ranges of `bytes` could be taken that end by `limit`: up to `count`
  // places, the best first, no two of which overlap. REQUIRES: `bytes` above 0.
  std::vector<Bytes> Find(Bytes bytes, size_t count, Bytes limit) const;
  // False, and nothing happened: not all of the range is free and in the slab.
  bool Take(Bytes offset, Bytes bytes);
  // REQUIRES: was taken as this range.
  void GiveBack(Bytes offset, Bytes bytes);

  Bytes size() const { return size_; }
  Bytes taken() const { return taken_; }

  // Free and taken ranges tile the slab, no two free ones meet, sums agree.
  absl::Status CheckInvariants() const;

 private:
  enum class End { kLow, kHigh };
  // Of one size.
  struct Kind {
    End end = End::kLow;
    Bytes taken;
  };

  // Where a size that has nothing yet would grow from.
  End EmptierEnd() const;

  Bytes size_;
  Bytes taken_;
  std::map<Bytes, Bytes> free_;    // begin to end
  std::map<Bytes, Bytes> ranges_;  // those taken: begin to size
  std::map<Bytes, Kind> kinds_;    // by size; of those that have a range
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_RANGE_MAP_H_
