#include "client/block/page_shelves.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"

namespace kvbroker::client {

PageShelves::PageShelves(uint32_t max_pages, uint32_t max_blocks_per_page)
    : entries_(max_pages),
      buckets_(max_blocks_per_page + 1),
      filled_buckets_(max_blocks_per_page + 1),
      quotas_(max_blocks_per_page + 1) {
  picked_.reserve(max_pages);
}

void PageShelves::Add(uint32_t page, Contents contents) {
  KVB_CHECK(!entries_[page].present);
  entries_[page].present = true;
  entries_[page].contents = contents;
  Enter(page, OpenTier(contents));
  MoveToBucket(page, BucketFor(entries_[page].tier, contents));
}

void PageShelves::Remove(uint32_t page) {
  KVB_CHECK(entries_[page].present);
  MoveToBucket(page, kNoIndex);
  shelf(entries_[page].tier).Remove(entries_, page);
  entries_[page].contents = {};
  entries_[page].present = false;
}

void PageShelves::Refile(uint32_t page) {
  const Entry& entry = entries_[page];
  PageTier tier = entry.tier;
  if (IsOpen(tier)) {
    tier = OpenTier(entry.contents);
  } else if (entry.contents.used == 0) {
    tier = PageTier::kClosed;
  }
  MoveTo(page, tier);
}

void PageShelves::Close(uint32_t page) {
  const Entry& entry = entries_[page];
  KVB_CHECK(IsOpen(entry.tier) && entry.contents.cached == 0);
  MoveTo(page,
         entry.contents.used == 0 ? PageTier::kClosed : PageTier::kClosing);
}

void PageShelves::Vacate(uint32_t page) {
  KVB_CHECK(entries_[page].tier == PageTier::kClosing);
  MoveTo(page, PageTier::kVacating);
}

void PageShelves::Open(uint32_t page) {
  KVB_CHECK(!IsOpen(entries_[page].tier));
  MoveTo(page, OpenTier(entries_[page].contents));
}

uint32_t PageShelves::FullestWithFree() const {
  const uint32_t bucket = filled_buckets_.Highest();
  return bucket != kNoIndex ? buckets_[bucket].back()
                            : shelf(PageTier::kIdle).back();
}

const std::vector<uint32_t>& PageShelves::Pick(
    std::initializer_list<PageTier> tiers, Prefer prefer, size_t count) {
  const auto for_each_page = [&](auto&& visit) {
    for (PageTier tier : tiers) {
      for (uint32_t page = First(tier); page != kNoIndex; page = Next(page)) {
        if (!entries_[page].contents.pinned) visit(page);
      }
    }
  };

  // How many pages there are with so many used blocks, then how many of them to
  // pick: a sort by counting, which needs no memory of its own.
  std::fill(quotas_.begin(), quotas_.end(), 0);
  for_each_page([&](uint32_t page) { ++quotas_[contents(page).used]; });
  size_t left = count;
  const auto ration = [&left](size_t& quota) {
    quota = std::min(quota, left);
    left -= quota;
  };
  if (prefer == Prefer::kFewestUsed) {
    std::for_each(quotas_.begin(), quotas_.end(), ration);
  } else {
    std::for_each(quotas_.rbegin(), quotas_.rend(), ration);
  }

  picked_.clear();
  for_each_page([&](uint32_t page) {
    size_t& quota = quotas_[contents(page).used];
    if (quota == 0) return;
    --quota;
    picked_.push_back(page);
  });
  return picked_;
}

PageTier PageShelves::OpenTier(const Contents& contents) {
  if (contents.used > 0) return PageTier::kInUse;
  return contents.cached > 0 ? PageTier::kCached : PageTier::kIdle;
}

uint32_t PageShelves::BucketFor(PageTier tier, const Contents& contents) {
  const bool wanted = (tier == PageTier::kInUse || tier == PageTier::kCached) &&
                      contents.free > 0;
  return wanted ? contents.used : kNoIndex;
}

void PageShelves::MoveTo(uint32_t page, PageTier tier) {
  Entry& entry = entries_[page];
  if (entry.tier != tier) {
    shelf(entry.tier).Remove(entries_, page);
    Enter(page, tier);
  }
  MoveToBucket(page, BucketFor(tier, entry.contents));
}

void PageShelves::Enter(uint32_t page, PageTier tier) {
  Entry& entry = entries_[page];
  entry.tier = tier;
  if (tier == PageTier::kIdle) entry.idle_since = now_;
  shelf(tier).PushBack(entries_, page);
}

void PageShelves::MoveToBucket(uint32_t page, uint32_t bucket) {
  Entry& entry = entries_[page];
  if (entry.bucket == bucket) return;
  if (entry.bucket != kNoIndex) {
    BucketList& old = buckets_[entry.bucket];
    old.Remove(entries_, page);
    if (old.empty()) filled_buckets_.Erase(entry.bucket);
  }
  if (bucket != kNoIndex) {
    if (buckets_[bucket].empty()) filled_buckets_.Insert(bucket);
    buckets_[bucket].PushBack(entries_, page);
  }
  entry.bucket = bucket;
}

absl::Status PageShelves::CheckInvariants() const {
  const auto broken = [](const auto&... what) {
    return absl::InternalError(absl::StrCat("Page shelves: ", what...));
  };
  size_t present = 0;
  for (const Entry& entry : entries_) present += entry.present;

  size_t shelved = 0;
  for (int i = 0; i < kPageTiers; ++i) {
    const PageTier tier = static_cast<PageTier>(i);
    if (!shelf(tier).IsConsistent(entries_)) {
      return broken("links are torn; tier: ", Name(tier));
    }
    shelved += size(tier);
    absl::Time last_idle_since = absl::InfinitePast();
    for (uint32_t page = First(tier); page != kNoIndex; page = Next(page)) {
      const Entry& entry = entries_[page];
      if (!entry.present || entry.tier != tier) {
        return broken("page is on another tier's shelf; page: ", page,
                      ", tier: ", Name(entry.tier), ", shelf: ", Name(tier));
      }
      const Contents& contents = entry.contents;
      bool fits = tier == OpenTier(contents);
      if (!IsOpen(tier)) {
        fits = contents.cached == 0 && !contents.pinned &&
               (contents.used == 0) == (tier == PageTier::kClosed);
      }
      if (!fits) {
        return broken("contents do not fit the tier; page: ", page,
                      ", tier: ", Name(tier), ", free: ", contents.free,
                      ", used: ", contents.used, ", cached: ", contents.cached);
      }
      if (entry.bucket != BucketFor(tier, contents)) {
        return broken("page is in the wrong bucket; page: ", page,
                      ", bucket: ", entry.bucket);
      }
      if (tier == PageTier::kIdle) {
        if (entry.idle_since < last_idle_since || entry.idle_since > now_) {
          return broken("idle pages are not in order of age; page: ", page);
        }
        last_idle_since = entry.idle_since;
      }
    }
  }
  if (shelved != present) {
    return broken("pages are on no shelf; pages: ", present,
                  ", on shelves: ", shelved);
  }

  size_t wanting_bucket = 0;
  for (const Entry& entry : entries_) {
    wanting_bucket += entry.present && entry.bucket != kNoIndex;
  }
  size_t bucketed = 0;
  size_t filled = 0;
  for (uint32_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    const BucketList& list = buckets_[bucket];
    if (!list.IsConsistent(entries_)) {
      return broken("links are torn; bucket: ", bucket);
    }
    bucketed += list.size();
    filled += !list.empty();
    if (filled_buckets_.Contains(bucket) == list.empty()) {
      return broken("bucket's mark is wrong; bucket: ", bucket);
    }
    for (uint32_t page = list.front(); page != kNoIndex;
         page = BucketList::Next(entries_, page)) {
      if (entries_[page].bucket != bucket) {
        return broken("page is in another bucket's list; page: ", page,
                      ", bucket: ", bucket);
      }
    }
  }
  if (bucketed != wanting_bucket || filled != filled_buckets_.size()) {
    return broken("buckets hold the wrong pages; pages: ", bucketed,
                  ", of: ", wanting_bucket);
  }
  return absl::OkStatus();
}

}  // namespace kvbroker::client
