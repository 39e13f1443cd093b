#include "broker/ledger/ledger.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "broker/base/check.h"

namespace kvbroker {

Bytes SizeOf(const std::vector<HandleRef>& handles) {
  Bytes sum;
  for (const HandleRef& handle : handles) sum += handle->size();
  return sum;
}

LedgerInstance& Ledger::AddInstance(const std::string& tenant,
                                    const std::string& name) {
  auto [it, added] = instances_.try_emplace(InstanceKey(tenant, name));
  if (added) {
    it->second.tenant = tenant;
    it->second.name = name;
    it->second.max = capacity_;
  }
  return it->second;
}

LedgerInstance* Ledger::FindInstance(const InstanceKey& key) {
  auto it = instances_.find(key);
  return it == instances_.end() ? nullptr : &it->second;
}

void Ledger::RemoveInstance(const InstanceKey& key) {
  auto it = instances_.find(key);
  KVB_CHECK(it != instances_.end() && it->second.sessions.empty());
  DropCredit(it->second, it->second.credit);
  instances_.erase(it);
}

Bytes Ledger::SumOfMins() const {
  Bytes sum;
  for (const auto& [key, instance] : instances_) sum += instance.min;
  return sum;
}

LedgerSession& Ledger::OpenSession(LedgerInstance& instance, SessionId id,
                                   uint32_t pid) {
  LedgerSession& session = sessions_[id];
  session.id = id;
  session.tenant = instance.tenant;
  session.instance = {instance.tenant, instance.name};
  session.pid = pid;
  instance.sessions.push_back(id);
  instance.empty_since = absl::InfiniteFuture();
  return session;
}

LedgerSession* Ledger::FindSession(SessionId id) {
  auto it = sessions_.find(id);
  return it == sessions_.end() ? nullptr : &it->second;
}

LedgerPool& Ledger::OpenPool(LedgerSession& session, PoolId id,
                             const PoolGeometry& geometry) {
  LedgerPool& pool = pools_[id];
  pool.id = id;
  pool.session = session.id;
  pool.geometry = geometry;
  session.pools.push_back(id);
  return pool;
}

LedgerPool* Ledger::FindPool(PoolId id) {
  auto it = pools_.find(id);
  return it == pools_.end() ? nullptr : &it->second;
}

LedgerInstance& Ledger::InstanceOf(const LedgerSession& session) {
  return instances_.at(session.instance);
}

LedgerInstance& Ledger::InstanceOf(const LedgerPool& pool) {
  return InstanceOf(sessions_.at(pool.session));
}

std::vector<HandleRef> Ledger::CloseSession(SessionId id, absl::Time now) {
  std::vector<HandleRef> handles;
  LedgerSession& session = sessions_.at(id);
  for (PoolId pool_id : session.pools) {
    LedgerPool& pool = pools_.at(pool_id);
    std::vector<PageName> names;
    for (const auto& [index, page] : pool.pages) {
      names.push_back({index, page.generation});
    }
    for (PageName name : names) {
      for (HandleRef& handle : Remove(pool, name)) {
        handles.push_back(std::move(handle));
      }
    }
  }
  for (PoolId pool_id : session.pools) pools_.erase(pool_id);
  LedgerInstance& instance = InstanceOf(session);
  std::erase(instance.sessions, id);
  if (instance.sessions.empty()) {
    instance.empty_since = now;
    DropCredit(instance, instance.credit);
  }
  sessions_.erase(id);
  return handles;
}

std::vector<PageIndex> Ledger::AbsentIndexes(const LedgerPool& pool,
                                             PageCount count) const {
  std::vector<PageIndex> indexes;
  if (slab_) {
    const Bytes page = pool.geometry.page_bytes();
    for (Bytes offset : slab_->Find(page, static_cast<size_t>(count),
                                    page * pool.geometry.max_pages)) {
      indexes.push_back(PageIndex(static_cast<uint32_t>(offset / page)));
    }
    return indexes;
  }
  for (uint32_t i = 0; i < pool.geometry.max_pages &&
                       static_cast<PageCount>(indexes.size()) < count;
       ++i) {
    if (!pool.pages.contains(PageIndex(i))) indexes.push_back(PageIndex(i));
  }
  return indexes;
}

void Ledger::Count(LedgerPool& pool, Bytes delta) {
  LedgerSession& session = sessions_.at(pool.session);
  session.held += delta;
  InstanceOf(session).held += delta;
  lent_ += delta;
}

void Ledger::CountAdopted(LedgerPool& pool, Bytes delta) {
  sessions_.at(pool.session).adopted += delta;
  adopted_ += delta;
}

std::vector<PageName> Ledger::Charge(LedgerPool& pool, GrantId grant,
                                     const std::vector<PageIndex>& indexes) {
  std::vector<PageName> names;
  names.reserve(indexes.size());
  for (PageIndex index : indexes) {
    KVB_CHECK(index.value() < pool.geometry.max_pages);
    auto [it, absent] = pool.pages.try_emplace(index);
    KVB_CHECK(absent);
    const Bytes page = pool.geometry.page_bytes();
    KVB_CHECK(!slab_ || slab_->Take(page * index.value(), page));
    pool.last_generation = Generation(pool.last_generation.value() + 1);
    it->second.generation = pool.last_generation;
    it->second.grant = grant;
    names.push_back({index, pool.last_generation});
  }
  const Bytes bytes =
      pool.geometry.page_bytes() * static_cast<int64_t>(names.size());
  Count(pool, bytes);
  making_ += bytes;
  ever_charged_ += bytes;
  KVB_CHECK(overdrawn() == Bytes(0));
  return names;
}

void Ledger::Adopt(LedgerPool& pool, PageName name) {
  KVB_CHECK(name.index.value() < pool.geometry.max_pages);
  KVB_CHECK(name.generation > Generation());
  auto [it, absent] = pool.pages.try_emplace(name.index);
  KVB_CHECK(absent);
  it->second.generation = name.generation;
  it->second.state = PageState::kMapped;
  it->second.adopted = true;
  pool.last_generation = std::max(pool.last_generation, name.generation);
  Count(pool, pool.geometry.page_bytes());
  CountAdopted(pool, pool.geometry.page_bytes());
  ever_charged_ += pool.geometry.page_bytes();
}

void Ledger::Move(LedgerPool& from, LedgerPool& to, PageName name) {
  LedgerPage* page = FindPage(from, name);
  KVB_CHECK(page != nullptr && page->state != PageState::kMaking);
  KVB_CHECK(from.geometry.page_bytes() == to.geometry.page_bytes());
  if (page->adopted) {
    CountAdopted(from, Bytes(0) - from.geometry.page_bytes());
    CountAdopted(to, to.geometry.page_bytes());
  }
  auto [it, absent] = to.pages.try_emplace(name.index, std::move(*page));
  KVB_CHECK(absent && name.index.value() < to.geometry.max_pages);
  it->second.state = PageState::kMapped;
  from.pages.erase(name.index);
  to.last_generation = std::max(to.last_generation, from.last_generation);
  Count(from, Bytes(0) - from.geometry.page_bytes());
  Count(to, to.geometry.page_bytes());
}

void Ledger::Offer(LedgerPool& pool, PageName name,
                   std::vector<HandleRef> handles) {
  LedgerPage* page = FindPage(pool, name);
  KVB_CHECK(page != nullptr && page->state == PageState::kMaking);
  KVB_CHECK(handles.size() == pool.geometry.handles_per_page);
  page->handles = std::move(handles);
  page->state = PageState::kOffered;
  making_ -= pool.geometry.page_bytes();
}

void Ledger::ConfirmMapped(LedgerPool& pool,
                           const std::vector<PageName>& pages) {
  for (PageName name : pages) {
    LedgerPage* page = FindPage(pool, name);
    if (page == nullptr) continue;
    KVB_CHECK(page->state != PageState::kMaking);
    page->state = PageState::kMapped;
  }
}

std::vector<HandleRef> Ledger::LetGo(LedgerPool& pool, PageName name) {
  LedgerPage* page = FindPage(pool, name);
  KVB_CHECK(page != nullptr && page->state == PageState::kMapped);
  if (!page->adopted) {
    page->adopted = true;
    CountAdopted(pool, pool.geometry.page_bytes());
  }
  return std::exchange(page->handles, {});
}

LedgerPage* Ledger::FindPage(LedgerPool& pool, PageName name) {
  auto it = pool.pages.find(name.index);
  if (it == pool.pages.end() || it->second.generation != name.generation) {
    return nullptr;
  }
  return &it->second;
}

std::vector<HandleRef> Ledger::Remove(LedgerPool& pool, PageName name) {
  LedgerPage* page = FindPage(pool, name);
  KVB_CHECK(page != nullptr);
  std::vector<HandleRef> handles = std::move(page->handles);
  const Bytes bytes = pool.geometry.page_bytes();
  if (page->state == PageState::kMaking) making_ -= bytes;
  if (page->adopted) {
    CountAdopted(pool, Bytes(0) - bytes);
  } else {
    releasing_ += bytes;
  }
  ever_taken_ += bytes;
  pool.pages.erase(name.index);
  Count(pool, Bytes(0) - bytes);
  return handles;
}

void Ledger::AddCredit(LedgerInstance& instance, Bytes bytes) {
  instance.credit += bytes;
  instance.held += bytes;
  credit_ += bytes;
  KVB_CHECK(overdrawn() == Bytes(0));
}

void Ledger::DropCredit(LedgerInstance& instance, Bytes bytes) {
  KVB_CHECK(bytes <= instance.credit);
  instance.credit -= bytes;
  instance.held -= bytes;
  credit_ -= bytes;
}

void Ledger::BeginStock(Bytes bytes) {
  KVB_CHECK(bytes <= free());
  stocking_ += bytes;
  ever_charged_ += bytes;
}

void Ledger::EndStock(Bytes bytes, Bytes made) {
  KVB_CHECK(made <= bytes && bytes <= stocking_);
  stocking_ -= bytes;
  releasing_ += made;
}

void Ledger::AddStock(const std::string& tenant, std::vector<HandleRef> handles,
                      absl::Time now) {
  for (HandleRef& handle : handles) {
    const Bytes size = handle->size();
    releasing_ -= size;
    stock_ += size;
    ++stocked_handles_;
    stocked_[{tenant, size}].push_back({std::move(handle), now});
  }
}

std::vector<HandleRef> Ledger::TakeStock(const std::string& tenant,
                                         Bytes handle_bytes, size_t count) {
  std::vector<HandleRef> taken;
  auto it = stocked_.find({tenant, handle_bytes});
  if (it == stocked_.end()) return taken;
  Stock& stock = it->second;
  while (taken.size() < count && !stock.empty()) {
    taken.push_back(std::move(stock.back().handle));
    stock.pop_back();
    stock_ -= handle_bytes;
    ever_taken_ += handle_bytes;
    --stocked_handles_;
  }
  if (stock.empty()) stocked_.erase(it);
  return taken;
}

std::vector<HandleRef> Ledger::TrimStock(absl::Time until) {
  std::vector<HandleRef> trimmed;
  for (auto& [key, stock] : stocked_) {
    while (!stock.empty() && stock.front().since <= until) {
      trimmed.push_back(std::move(stock.front().handle));
      stock.pop_front();
    }
  }
  CountTrimmed(trimmed);
  return trimmed;
}

std::vector<HandleRef> Ledger::TrimStockExcept(const std::set<StockKey>& kept) {
  std::vector<HandleRef> trimmed;
  for (auto& [key, stock] : stocked_) {
    if (kept.contains(key)) continue;
    for (Stocked& stocked : stock) trimmed.push_back(std::move(stocked.handle));
    stock.clear();
  }
  CountTrimmed(trimmed);
  return trimmed;
}

void Ledger::CountTrimmed(const std::vector<HandleRef>& trimmed) {
  const Bytes bytes = SizeOf(trimmed);
  releasing_ += bytes;
  stock_ -= bytes;
  ever_taken_ += bytes;
  stocked_handles_ -= trimmed.size();
  std::erase_if(stocked_,
                [](const auto& entry) { return entry.second.empty(); });
}

size_t Ledger::stocked_handles(const StockKey& key) const {
  auto it = stocked_.find(key);
  return it == stocked_.end() ? 0 : it->second.size();
}

std::set<Ledger::StockKey> Ledger::StockKeys() const {
  std::set<StockKey> keys;
  for (const auto& [key, stock] : stocked_) keys.insert(key);
  return keys;
}

absl::Time Ledger::oldest_stock() const {
  absl::Time oldest = absl::InfiniteFuture();
  for (const auto& [key, stock] : stocked_) {
    oldest = std::min(oldest, stock.front().since);
  }
  return oldest;
}

void Ledger::SetOthers(Bytes bytes) {
  KVB_CHECK(bytes >= Bytes(0) && bytes <= capacity_);
  others_ = bytes;
}

void Ledger::BeginRelease(Bytes bytes) { releasing_ += bytes; }

void Ledger::EndRelease(Bytes bytes) {
  KVB_CHECK(bytes <= releasing_);
  releasing_ -= bytes;
}

void Ledger::FreeRange(Bytes offset, Bytes bytes) {
  if (slab_) slab_->GiveBack(offset, bytes);
}

absl::Status Ledger::CheckInvariants() const {
  auto broken = [](auto... words) {
    return absl::InternalError(absl::StrCat("ledger: ", words...));
  };
  absl::flat_hash_set<const Handle*> seen;
  Bytes lent, adopted, making, credit, stock;
  for (const auto& [id, pool] : pools_) {
    auto session = sessions_.find(pool.session);
    if (session == sessions_.end()) {
      return broken("pool without session ", id.value());
    }
    for (const auto& [index, page] : pool.pages) {
      const size_t expected = page.state == PageState::kMaking || page.adopted
                                  ? 0
                                  : pool.geometry.handles_per_page;
      if (page.adopted) adopted += pool.geometry.page_bytes();
      if (page.state == PageState::kMaking) making += pool.geometry.page_bytes();
      if (page.generation > pool.last_generation) {
        return broken("generation above the last, pool ", id.value(), " index ",
                      index.value());
      }
      if (page.handles.size() != expected) {
        return broken("page with ", page.handles.size(), " handles, pool ",
                      id.value(), " index ", index.value());
      }
      for (const HandleRef& handle : page.handles) {
        if (!seen.insert(handle.get()).second) {
          return broken("handle with two owners, pool ", id.value(), " index ",
                        index.value());
        }
        if (handle->size() != pool.geometry.handle_bytes) {
          return broken("handle of another size, pool ", id.value());
        }
      }
      if (index.value() >= pool.geometry.max_pages) {
        return broken("index out of range, pool ", id.value());
      }
    }
    lent += pool.geometry.page_bytes() * pool.held();
  }
  for (const auto& [id, session] : sessions_) {
    Bytes held, of_adopted;
    for (PoolId pool_id : session.pools) {
      const LedgerPool& pool = pools_.at(pool_id);
      held += pool.geometry.page_bytes() * pool.held();
      for (const auto& [index, page] : pool.pages) {
        if (page.adopted) of_adopted += pool.geometry.page_bytes();
      }
    }
    if (of_adopted != session.adopted) {
      return broken("session ", id.value(), " counts ",
                    session.adopted.count(), " bytes as adopted, they are ",
                    of_adopted.count());
    }
    if (held != session.held) {
      return broken("session ", id.value(), " counts ", session.held.count(),
                    " bytes, its pages are ", held.count());
    }
  }
  for (const auto& [key, instance] : instances_) {
    Bytes held = instance.credit;
    for (SessionId id : instance.sessions) held += sessions_.at(id).held;
    if (held != instance.held) {
      return broken("instance ", instance.name, " counts ",
                    instance.held.count(), " bytes, its sessions hold ",
                    held.count());
    }
    credit += instance.credit;
  }
  size_t stocked_handles = 0;
  for (const auto& [key, entries] : stocked_) {
    if (entries.empty()) return broken("empty stock is kept");
    for (const auto& [handle, since] : entries) {
      if (!seen.insert(handle.get()).second) return broken("stock also lent");
      if (handle->size() != key.second) return broken("stock of another size");
      stock += handle->size();
      ++stocked_handles;
    }
  }
  if (stocked_handles != stocked_handles_) {
    return broken("stock has ", stocked_handles, " handles, counted are ",
                  stocked_handles_);
  }
  if (lent != lent_ || adopted != adopted_ || making != making_ ||
      credit != credit_ || stock != stock_) {
    return broken("sums: lent ", lent_.count(), " is ", lent.count(),
                  ", adopted ", adopted_.count(), " is ", adopted.count(),
                  ", making ", making_.count(), " is ", making.count(),
                  ", credit ", credit_.count(), " is ", credit.count(),
                  ", stock ", stock_.count(), " is ", stock.count());
  }
  if (overdrawn() > adopted_ + others_ || releasing_ < Bytes(0)) {
    return broken("more lent than there is: overdrawn ", overdrawn().count(),
                  ", adopted ", adopted_.count(), ", releasing ",
                  releasing_.count());
  }
  if (!slab_) return absl::OkStatus();
  if (slab_->taken() != lent_ + releasing_) {
    return broken("of the slab ", slab_->taken().count(),
                  " bytes are taken, lent are ", lent_.count(), ", releasing ",
                  releasing_.count());
  }
  if (absl::Status status = slab_->CheckInvariants(); !status.ok()) {
    return status;
  }
  return absl::OkStatus();
}

}  // namespace kvbroker
