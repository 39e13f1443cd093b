// PageShelves: the backed pages of a BlockTable, sorted for its choices: by
// tier, in the order of arrival there, and open ones by how full they are.
//
//   shelves.Add(7, {.free = 64});
//   shelves.contents(7) = {.free = 63, .used = 1};
//   shelves.Refile(7);                        // IDLE -> IN USE
//   uint32_t page = shelves.FullestWithFree();
//
// Knows how many blocks of each kind a page holds, not which. Not thread-safe.
// Nothing allocates after construction; all but Pick take constant time.
// Invariant, between a change of contents and Refile excepted: every page's
// tier is the one that its contents ask for, and closing ones hold nothing
// cached.
#ifndef KVBROKER_CLIENT_BLOCK_PAGE_SHELVES_H_
#define KVBROKER_CLIENT_BLOCK_PAGE_SHELVES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/block/block_types.h"
#include "client/block/index_list.h"
#include "client/block/index_set.h"

namespace kvbroker::client {

class PageShelves {
 public:
  struct Contents {
    uint32_t free = 0;
    uint32_t used = 0;  // with the null block
    uint32_t cached = 0;
    bool pinned = false;  // holds the null block: never picked
  };

  PageShelves(uint32_t max_pages, uint32_t max_blocks_per_page);

  // REQUIRES for all: `page` is on the shelves, but for Add, where it is not.

  void Add(uint32_t page, Contents contents);  // as an open page
  void Remove(uint32_t page);

  Contents& contents(uint32_t page) { return entries_[page].contents; }
  const Contents& contents(uint32_t page) const {
    return entries_[page].contents;
  }
  // Puts the page where its changed contents belong.
  void Refile(uint32_t page);

  void Close(uint32_t page);   // from an open tier; REQUIRES nothing cached
  void Vacate(uint32_t page);  // from CLOSING
  void Open(uint32_t page);    // from CLOSING, VACATING or CLOSED

  // Pages that become idle from now on are stamped with it; never goes back.
  void SetNow(absl::Time now) { now_ = now > now_ ? now : now_; }

  PageTier tier(uint32_t page) const { return entries_[page].tier; }
  // REQUIRES: idle.
  absl::Time idle_since(uint32_t page) const {
    return entries_[page].idle_since;
  }
  static bool IsOpen(PageTier tier) { return tier <= PageTier::kInUse; }

  size_t size(PageTier tier) const { return shelf(tier).size(); }
  // Walks a tier from the page that came first; kNoIndex ends it.
  uint32_t First(PageTier tier) const { return shelf(tier).front(); }
  uint32_t Next(uint32_t page) const { return TierList::Next(entries_, page); }

  // The open page with a free block that has most used blocks; of idle ones
  // that which became idle last. kNoIndex: no open page has a free block.
  uint32_t FullestWithFree() const;

  // Up to `count` pages of these tiers, those with the fewest (or most) used
  // blocks, in no order. Valid until the next Pick; looks at all their pages.
  enum class Prefer { kFewestUsed, kMostUsed };
  const std::vector<uint32_t>& Pick(std::initializer_list<PageTier> tiers,
                                    Prefer prefer, size_t count);

  absl::Status CheckInvariants() const;

 private:
  struct Entry {
    IndexLink tier_link;
    IndexLink bucket_link;  // on buckets_[bucket], unless that is kNoIndex
    Contents contents;
    uint32_t bucket = kNoIndex;
    PageTier tier = PageTier::kIdle;
    bool present = false;
    absl::Time idle_since;
  };
  using TierList = IndexList<Entry, &Entry::tier_link>;
  using BucketList = IndexList<Entry, &Entry::bucket_link>;

  TierList& shelf(PageTier tier) { return tiers_[static_cast<int>(tier)]; }
  const TierList& shelf(PageTier tier) const {
    return tiers_[static_cast<int>(tier)];
  }
  // What the contents of an open page ask for.
  static PageTier OpenTier(const Contents& contents);
  static uint32_t BucketFor(PageTier tier, const Contents& contents);
  void MoveTo(uint32_t page, PageTier tier);
  void Enter(uint32_t page, PageTier tier);
  void MoveToBucket(uint32_t page, uint32_t bucket);

  std::vector<Entry> entries_;
  std::array<TierList, kPageTiers> tiers_;
  // By used blocks: open pages with a free block, but for idle ones.
  std::vector<BucketList> buckets_;
  IndexSet filled_buckets_;
  absl::Time now_ = absl::InfinitePast();

  std::vector<size_t> quotas_;    // scratch of Pick
  std::vector<uint32_t> picked_;  // its answer
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_BLOCK_PAGE_SHELVES_H_
