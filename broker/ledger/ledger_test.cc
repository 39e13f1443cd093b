#include "broker/ledger/ledger.h"

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "broker/device/fake_backend.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

constexpr Bytes kCapacity = MiB(64);
const absl::Time kNow = absl::UnixEpoch();

PoolGeometry Geometry(Bytes handle, uint32_t handles = 1,
                      uint32_t max_pages = 16) {
  return {.handle_bytes = handle,
          .handles_per_page = handles,
          .layout = handles == 1 ? Layout::kContiguous : Layout::kPerLayer,
          .max_pages = max_pages};
}

std::vector<PageIndex> Indexes(std::initializer_list<uint32_t> values) {
  return {values.begin(), values.end()};
}

// A ledger with instance "a" of tenant "t", its session 1, and two pools: 1 of
// one handle a page, 2 of three.
class LedgerTest : public testing::Test {
 protected:
  LedgerTest() {
    ledger_.OpenPool(session_, PoolId(1), Geometry(MiB(2)));
    ledger_.OpenPool(session_, PoolId(2), Geometry(MiB(1), 3));
  }

  ~LedgerTest() override {
    EXPECT_EQ(ledger_.CheckInvariants(), absl::OkStatus());
  }

  std::vector<HandleRef> Make(Bytes size, size_t count) {
    std::vector<HandleRef> handles;
    for (size_t i = 0; i < count; ++i) {
      handles.push_back(std::make_shared<Handle>(*device_.Create(size)));
    }
    return handles;
  }

  LedgerPool& pool(uint64_t id) { return *ledger_.FindPool(PoolId(id)); }

  // A page that its holder maps.
  PageName Lend(LedgerPool& pool, uint32_t index) {
    PageName page = ledger_.Charge(pool, GrantId(1), {PageIndex(index)})[0];
    ledger_.Offer(
        pool, page,
        Make(pool.geometry.handle_bytes, pool.geometry.handles_per_page));
    ledger_.ConfirmMapped(pool, {page});
    return page;
  }

  void Release(std::vector<HandleRef> handles) {
    Bytes bytes = SizeOf(handles);
    handles.clear();
    ledger_.EndRelease(bytes);
  }

  FakeBackend device_{{.total = kCapacity}};
  Ledger ledger_{kCapacity};
  LedgerInstance& instance_ = ledger_.AddInstance("t", "a");
  LedgerSession& session_ =
      ledger_.OpenSession(instance_, SessionId(1), /*pid=*/100);
};

using LedgerDeathTest = LedgerTest;

// ---- instances, sessions, pools --------------------------------------------

TEST_F(LedgerTest, InstanceStartsWithTheWholeCapacityAsItsLimit) {
  LedgerInstance& b = ledger_.AddInstance("t", "b");
  EXPECT_EQ(b.name, "b");
  EXPECT_EQ(b.tenant, "t");
  EXPECT_EQ(b.min, Bytes(0));
  EXPECT_EQ(b.max, kCapacity);
  EXPECT_EQ(b.weight, 1);
}

TEST_F(LedgerTest, AddingAnInstanceAgainGivesTheSameOne) {
  instance_.max = MiB(3);
  EXPECT_EQ(&ledger_.AddInstance("t", "a"), &instance_);
  EXPECT_EQ(instance_.max, MiB(3));
}

TEST_F(LedgerTest, TenantsHaveNamesOfTheirOwn) {
  LedgerInstance& other = ledger_.AddInstance("u", "a");
  EXPECT_NE(&other, &instance_);
  EXPECT_EQ(ledger_.FindInstance({"u", "a"}), &other);
  EXPECT_EQ(ledger_.FindInstance({"u", "b"}), nullptr);
}

TEST_F(LedgerTest, RemovedInstanceIsGoneWithItsCredit) {
  LedgerInstance& b = ledger_.AddInstance("t", "b");
  ledger_.AddCredit(b, MiB(5));
  ledger_.RemoveInstance({"t", "b"});
  EXPECT_EQ(ledger_.FindInstance({"t", "b"}), nullptr);
  EXPECT_EQ(ledger_.credit(), Bytes(0));
}

TEST_F(LedgerDeathTest, InstanceWithSessionsIsNotRemoved) {
  EXPECT_DEATH(ledger_.RemoveInstance({"t", "a"}), "check failed");
}

TEST_F(LedgerTest, SumOfMinsCountsAllInstances) {
  instance_.min = MiB(3);
  ledger_.AddInstance("u", "b").min = MiB(4);
  EXPECT_EQ(ledger_.SumOfMins(), MiB(7));
}

TEST_F(LedgerTest, SessionKnowsItsInstanceAndPools) {
  EXPECT_EQ(ledger_.FindSession(SessionId(1)), &session_);
  EXPECT_EQ(ledger_.FindSession(SessionId(2)), nullptr);
  EXPECT_EQ(session_.tenant, "t");
  EXPECT_EQ(session_.pid, 100);
  EXPECT_EQ(session_.pools, (std::vector{PoolId(1), PoolId(2)}));
  EXPECT_EQ(&ledger_.InstanceOf(session_), &instance_);
  EXPECT_EQ(&ledger_.InstanceOf(pool(2)), &instance_);
  EXPECT_EQ(ledger_.FindPool(PoolId(3)), nullptr);
  EXPECT_EQ(ledger_.session_count(), 1);
}

TEST_F(LedgerTest, InstanceIsEmptySinceItsLastSessionLeft) {
  const absl::Time now = absl::UnixEpoch() + absl::Hours(1);
  ledger_.OpenSession(instance_, SessionId(2), 101);
  ledger_.CloseSession(SessionId(1), now);
  EXPECT_EQ(instance_.empty_since, absl::InfiniteFuture());
  ledger_.CloseSession(SessionId(2), now + absl::Seconds(1));
  EXPECT_EQ(instance_.empty_since, now + absl::Seconds(1));
  ledger_.OpenSession(instance_, SessionId(3), 102);
  EXPECT_EQ(instance_.empty_since, absl::InfiniteFuture());
}

TEST_F(LedgerTest, ClosedSessionGivesUpItsPagesPoolsAndCredit) {
  Lend(pool(1), 0);
  Lend(pool(2), 5);
  ledger_.AddCredit(instance_, MiB(4));
  std::vector<HandleRef> handles =
      ledger_.CloseSession(SessionId(1), absl::UnixEpoch());
  EXPECT_EQ(handles.size(), 4);
  EXPECT_EQ(ledger_.FindSession(SessionId(1)), nullptr);
  EXPECT_EQ(ledger_.FindPool(PoolId(1)), nullptr);
  EXPECT_EQ(ledger_.lent(), Bytes(0));
  EXPECT_EQ(ledger_.credit(), Bytes(0));
  EXPECT_EQ(ledger_.releasing(), MiB(5));
  EXPECT_EQ(instance_.held, Bytes(0));
  Release(std::move(handles));
  EXPECT_EQ(ledger_.free(), kCapacity);
}

TEST_F(LedgerTest, CreditStaysWhileAnotherSessionOfTheInstanceLives) {
  ledger_.OpenSession(instance_, SessionId(2), 101);
  ledger_.AddCredit(instance_, MiB(4));
  ledger_.CloseSession(SessionId(2), absl::UnixEpoch());
  EXPECT_EQ(instance_.credit, MiB(4));
}

// ---- pages -----------------------------------------------------------------

TEST_F(LedgerTest, AbsentIndexesAreTheLowestEmptySlots) {
  ledger_.Charge(pool(1), GrantId(1), Indexes({0, 2}));
  EXPECT_EQ(ledger_.AbsentIndexes(pool(1), 3), Indexes({1, 3, 4}));
  EXPECT_EQ(ledger_.AbsentIndexes(pool(1), 100).size(), 14);
  EXPECT_TRUE(ledger_.AbsentIndexes(pool(1), 0).empty());
}

TEST_F(LedgerTest, PageCountsFromChargeToRemove) {
  std::vector<PageName> pages =
      ledger_.Charge(pool(1), GrantId(7), Indexes({3, 1}));
  EXPECT_EQ(ledger_.lent(), MiB(4));
  EXPECT_EQ(session_.held, MiB(4));
  EXPECT_EQ(instance_.held, MiB(4));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(4));
  EXPECT_EQ(pool(1).held(), 2);
  ASSERT_EQ(pages.size(), 2);
  EXPECT_EQ(pages[0].index, PageIndex(3));
  EXPECT_EQ(ledger_.FindPage(pool(1), pages[0])->state, PageState::kMaking);
  EXPECT_EQ(ledger_.FindPage(pool(1), pages[0])->grant, GrantId(7));
  EXPECT_EQ(ledger_.CheckInvariants(), absl::OkStatus());

  ledger_.Offer(pool(1), pages[0], Make(MiB(2), 1));
  EXPECT_EQ(ledger_.FindPage(pool(1), pages[0])->state, PageState::kOffered);
  ledger_.ConfirmMapped(pool(1), {pages[0]});
  EXPECT_EQ(ledger_.FindPage(pool(1), pages[0])->state, PageState::kMapped);
  EXPECT_EQ(ledger_.lent(), MiB(4));

  std::vector<HandleRef> handles = ledger_.Remove(pool(1), pages[0]);
  EXPECT_EQ(handles.size(), 1);
  EXPECT_EQ(ledger_.FindPage(pool(1), pages[0]), nullptr);
  EXPECT_EQ(ledger_.lent(), MiB(2));
  EXPECT_EQ(ledger_.releasing(), MiB(2));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(4));
  Release(std::move(handles));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(2));
}

TEST_F(LedgerTest, PageBeingMadeStillCountsAfterItLeft) {
  PageName page = ledger_.Charge(pool(2), GrantId(1), Indexes({0}))[0];
  EXPECT_TRUE(ledger_.Remove(pool(2), page).empty());
  EXPECT_EQ(ledger_.lent(), Bytes(0));
  // Its maker may hold that much of the device.
  EXPECT_EQ(ledger_.releasing(), MiB(3));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(3));
  ledger_.EndRelease(MiB(3));
  EXPECT_EQ(ledger_.free(), kCapacity);
}

TEST_F(LedgerTest, GenerationNeverNamesTwoPages) {
  std::set<PageName> names;
  for (int i = 0; i < 5; ++i) {
    PageName page = Lend(pool(1), 4);
    EXPECT_TRUE(names.insert(page).second);
    Release(ledger_.Remove(pool(1), page));
  }
  PageName now = Lend(pool(1), 4);
  for (PageName old : names) {
    EXPECT_EQ(ledger_.FindPage(pool(1), old), nullptr);
  }
  EXPECT_NE(ledger_.FindPage(pool(1), now), nullptr);
}

TEST_F(LedgerTest, ConfirmPassesOverPagesThatLeft) {
  PageName page = ledger_.Charge(pool(1), GrantId(1), Indexes({0}))[0];
  ledger_.Offer(pool(1), page, Make(MiB(2), 1));
  Release(ledger_.Remove(pool(1), page));
  ledger_.ConfirmMapped(pool(1), {page});
  EXPECT_EQ(pool(1).held(), 0);
}

TEST_F(LedgerDeathTest, ChargingMoreThanThereIsIsABug) {
  EXPECT_DEATH(
      {
        LedgerPool& big =
            ledger_.OpenPool(session_, PoolId(9), Geometry(MiB(40)));
        ledger_.Charge(big, GrantId(1), Indexes({0, 1}));
      },
      "check failed");
}

TEST_F(LedgerDeathTest, ChargingATakenOrUnknownSlotIsABug) {
  ledger_.Charge(pool(1), GrantId(1), Indexes({0}));
  EXPECT_DEATH(ledger_.Charge(pool(1), GrantId(2), Indexes({0})),
               "check failed");
  EXPECT_DEATH(ledger_.Charge(pool(1), GrantId(2), Indexes({16})),
               "check failed");
}

TEST_F(LedgerDeathTest, OfferNeedsAllHandlesOfAPageBeingMade) {
  PageName page = ledger_.Charge(pool(2), GrantId(1), Indexes({0}))[0];
  EXPECT_DEATH(ledger_.Offer(pool(2), page, Make(MiB(1), 2)), "check failed");
  ledger_.Offer(pool(2), page, Make(MiB(1), 3));
  EXPECT_DEATH(ledger_.Offer(pool(2), page, Make(MiB(1), 3)), "check failed");
}

TEST_F(LedgerDeathTest, RemoveNeedsThePage) {
  PageName page = Lend(pool(1), 0);
  page.generation = Generation(page.generation.value() + 1);
  EXPECT_DEATH(ledger_.Remove(pool(1), page), "check failed");
}

// ---- credit, stock, release ------------------------------------------------

TEST_F(LedgerTest, CreditIsHeldAndNotFree) {
  ledger_.AddCredit(instance_, MiB(10));
  EXPECT_EQ(instance_.held, MiB(10));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(10));
  ledger_.DropCredit(instance_, MiB(4));
  EXPECT_EQ(instance_.credit, MiB(6));
  EXPECT_EQ(instance_.held, MiB(6));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(6));
}

TEST_F(LedgerDeathTest, CreditIsBoundedByFreeMemoryAndByItself) {
  EXPECT_DEATH(ledger_.AddCredit(instance_, kCapacity + Bytes(1)),
               "check failed");
  ledger_.AddCredit(instance_, MiB(1));
  EXPECT_DEATH(ledger_.DropCredit(instance_, MiB(2)), "check failed");
}

TEST_F(LedgerTest, StockIsKeptByTenantAndSize) {
  PageName page = Lend(pool(2), 0);
  ledger_.AddStock("t", ledger_.Remove(pool(2), page), kNow);
  EXPECT_EQ(ledger_.stock(), MiB(3));
  EXPECT_EQ(ledger_.releasing(), Bytes(0));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(3));

  EXPECT_TRUE(ledger_.TakeStock("u", MiB(1), 3).empty());
  EXPECT_TRUE(ledger_.TakeStock("t", MiB(2), 3).empty());
  std::vector<HandleRef> taken = ledger_.TakeStock("t", MiB(1), 2);
  EXPECT_EQ(taken.size(), 2);
  EXPECT_EQ(ledger_.stock(), MiB(1));
  EXPECT_EQ(ledger_.TakeStock("t", MiB(1), 5).size(), 1);
  EXPECT_TRUE(ledger_.TakeStock("t", MiB(1), 5).empty());
}

TEST_F(LedgerTest, TakenStockCountsAgainWithItsPageOrAsReleasing) {
  PageName page = Lend(pool(1), 0);
  ledger_.AddStock("t", ledger_.Remove(pool(1), page), kNow);
  std::vector<HandleRef> taken = ledger_.TakeStock("t", MiB(2), 1);
  EXPECT_EQ(ledger_.free(), kCapacity);
  ledger_.BeginRelease(SizeOf(taken));
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(2));
  Release(std::move(taken));
  EXPECT_EQ(ledger_.free(), kCapacity);
}

TEST_F(LedgerTest, StockThatCameLastIsTakenFirstAndTheOldestIsTrimmed) {
  EXPECT_EQ(ledger_.oldest_stock(), absl::InfiniteFuture());
  std::vector<const Handle*> handles;
  for (uint32_t i = 0; i < 4; ++i) {
    std::vector<HandleRef> removed = ledger_.Remove(pool(1), Lend(pool(1), i));
    handles.push_back(removed.front().get());
    ledger_.AddStock("t", std::move(removed), kNow + absl::Seconds(i));
  }
  EXPECT_EQ(ledger_.stocked_handles(), 4);
  EXPECT_EQ(ledger_.oldest_stock(), kNow);
  std::vector<HandleRef> taken = ledger_.TakeStock("t", MiB(2), 1);
  EXPECT_EQ(taken.front().get(), handles[3]);
  std::vector<HandleRef> trimmed = ledger_.TrimStock(kNow + absl::Seconds(1));
  ASSERT_EQ(trimmed.size(), 2);
  EXPECT_EQ(trimmed[0].get(), handles[0]);
  EXPECT_EQ(trimmed[1].get(), handles[1]);
  EXPECT_EQ(ledger_.stocked_handles(), 1);
  EXPECT_EQ(ledger_.stock(), MiB(2));
  EXPECT_EQ(ledger_.releasing(), MiB(4));
  EXPECT_EQ(ledger_.oldest_stock(), kNow + absl::Seconds(2));
  ledger_.BeginRelease(SizeOf(taken));
  Release(std::move(taken));
  Release(std::move(trimmed));
  Release(ledger_.TrimStock());
}

TEST_F(LedgerTest, StockOfOthersIsTrimmed) {
  for (uint64_t id : {1, 2}) {
    PageName page = Lend(pool(id), 0);
    ledger_.AddStock("t", ledger_.Remove(pool(id), page), kNow);
  }
  PageName page = Lend(pool(1), 0);
  ledger_.AddStock("u", ledger_.Remove(pool(1), page), kNow);
  std::vector<HandleRef> trimmed =
      ledger_.TrimStockExcept({{"t", MiB(1)}, {"u", MiB(1)}});
  EXPECT_EQ(SizeOf(trimmed), MiB(4));
  EXPECT_EQ(ledger_.StockKeys(), (std::set<Ledger::StockKey>{{"t", MiB(1)}}));
  EXPECT_EQ(ledger_.stock(), MiB(3));
  Release(std::move(trimmed));
  Release(ledger_.TrimStock());
}

TEST_F(LedgerTest, TrimmedStockIsReleasing) {
  for (uint64_t id : {1, 2}) {
    PageName page = Lend(pool(id), 0);
    ledger_.AddStock("t", ledger_.Remove(pool(id), page), kNow);
  }
  std::vector<HandleRef> handles = ledger_.TrimStock();
  EXPECT_EQ(handles.size(), 4);
  EXPECT_EQ(ledger_.stock(), Bytes(0));
  EXPECT_EQ(ledger_.releasing(), MiB(5));
  Release(std::move(handles));
  EXPECT_EQ(ledger_.free(), kCapacity);
}

TEST_F(LedgerDeathTest, NoMoreIsReleasedThanLeft) {
  EXPECT_DEATH(ledger_.EndRelease(Bytes(1)), "check failed");
}

// ---- what CheckInvariants finds --------------------------------------------

class BrokenLedgerTest : public LedgerTest {
 protected:
  ~BrokenLedgerTest() override {
    // Mended, for the base class checks the ledger when it dies.
    mend_();
  }
  void ExpectBroken(absl::string_view what, std::function<void()> mend) {
    mend_ = std::move(mend);
    absl::Status status = ledger_.CheckInvariants();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_NE(status.message().find(what), absl::string_view::npos) << status;
  }
  std::function<void()> mend_;
};

TEST_F(BrokenLedgerTest, HandleInTwoPages) {
  LedgerPage* a = ledger_.FindPage(pool(1), Lend(pool(1), 0));
  LedgerPage* b = ledger_.FindPage(pool(1), Lend(pool(1), 1));
  // Adding a page may have moved the first one.
  a = &pool(1).pages.at(PageIndex(0));
  HandleRef own = std::exchange(b->handles[0], a->handles[0]);
  ExpectBroken("two owners", [=] { b->handles[0] = own; });
}

TEST_F(BrokenLedgerTest, HandleInAPageAndInStock) {
  PageName page = Lend(pool(1), 0);
  HandleRef handle = ledger_.FindPage(pool(1), page)->handles[0];
  ledger_.BeginRelease(MiB(2));
  ledger_.AddStock("t", {handle}, kNow);
  ExpectBroken("stock also lent",
               [this] { ledger_.TakeStock("t", MiB(2), 1); });
}

TEST_F(BrokenLedgerTest, PageWithoutAllItsHandles) {
  LedgerPage* page = ledger_.FindPage(pool(2), Lend(pool(2), 0));
  HandleRef handle = page->handles.back();
  page->handles.pop_back();
  ExpectBroken("page with 2 handles", [=] { page->handles.push_back(handle); });
}

TEST_F(BrokenLedgerTest, PageBeingMadeThatHasHandles) {
  LedgerPage* page = ledger_.FindPage(pool(1), Lend(pool(1), 0));
  page->state = PageState::kMaking;
  ExpectBroken("page with 1 handles",
               [=] { page->state = PageState::kMapped; });
}

TEST_F(BrokenLedgerTest, HandleOfAnotherSize) {
  LedgerPage* page = ledger_.FindPage(pool(1), Lend(pool(1), 0));
  HandleRef own = std::exchange(page->handles[0], Make(MiB(1), 1)[0]);
  ExpectBroken("another size", [=] { page->handles[0] = own; });
}

TEST_F(BrokenLedgerTest, IndexOutOfRange) {
  Lend(pool(1), 0);
  pool(1).geometry.max_pages = 0;
  ExpectBroken("out of range", [this] { pool(1).geometry.max_pages = 16; });
}

TEST_F(BrokenLedgerTest, SessionThatCountsWrong) {
  session_.held += Bytes(1);
  ExpectBroken("session 1 counts", [this] { session_.held -= Bytes(1); });
}

TEST_F(BrokenLedgerTest, InstanceThatCountsWrong) {
  instance_.held += Bytes(1);
  ExpectBroken("instance a counts", [this] { instance_.held -= Bytes(1); });
}

TEST_F(BrokenLedgerTest, CreditThatWasNotSetAside) {
  instance_.credit += Bytes(1);
  instance_.held += Bytes(1);
  ExpectBroken("credit 0 is 1", [this] {
    instance_.credit -= Bytes(1);
    instance_.held -= Bytes(1);
  });
}

TEST_F(BrokenLedgerTest, MoreThanThereIs) {
  ledger_.BeginRelease(kCapacity + Bytes(1));
  ExpectBroken("more lent than there is",
               [this] { ledger_.EndRelease(kCapacity + Bytes(1)); });
}

// ---- against a model -------------------------------------------------------

// The model keeps single figures where the ledger keeps sums.
class LedgerModelTest : public testing::TestWithParam<uint64_t> {
 protected:
  struct ModelPage {
    uint64_t pool = 0;
    PageState state = PageState::kMaking;
    std::vector<const Handle*> handles;
  };
  struct ModelPool {
    uint64_t session = 0;
    PoolGeometry geometry;
  };

  uint64_t Draw(uint64_t below) {
    return std::uniform_int_distribution<uint64_t>(0, below - 1)(random_);
  }

  std::vector<HandleRef> Make(Bytes size, size_t count) {
    std::vector<HandleRef> handles;
    for (size_t i = 0; i < count; ++i) {
      handles.push_back(std::make_shared<Handle>(*device_.Create(size)));
    }
    return handles;
  }

  LedgerPool& PoolOf(uint64_t id) { return *ledger_.FindPool(PoolId(id)); }

  // The handles that a page or session left, to be released or stocked.
  void PutAway(std::vector<HandleRef> handles, const std::string& tenant) {
    if (Draw(2) == 0) {
      for (const HandleRef& handle : handles) {
        stock_.insert({tenant, handle->size()});
      }
      ledger_.AddStock(tenant, std::move(handles), kNow);
    } else {
      for (HandleRef& handle : handles) {
        releasing_.push_back(std::move(handle));
      }
    }
  }

  void ForgetPage(std::map<PageName, ModelPage>& pages, PageName name) {
    if (pages.at(name).state == PageState::kMaking) {
      unmade_ += PoolOf(pages.at(name).pool).geometry.page_bytes();
    }
    pages.erase(name);
  }

  void Step() {
    switch (Draw(11)) {
      case 0: {  // A process comes.
        if (sessions_.size() >= 6) return;
        const std::string tenant = Draw(2) == 0 ? "t" : "u";
        const std::string name = Draw(2) == 0 ? "a" : "b";
        LedgerInstance& instance = ledger_.AddInstance(tenant, name);
        const uint64_t id = ++last_id_;
        LedgerSession& session =
            ledger_.OpenSession(instance, SessionId(id), 1);
        sessions_[id] = {tenant, name};
        for (uint64_t i = 0; i <= Draw(2); ++i) {
          const uint64_t pool = ++last_id_;
          const uint32_t handles = Draw(2) == 0 ? 1 : 3;
          pools_[pool] = {id, Geometry(KiB(4 << Draw(3)), handles, 5)};
          ledger_.OpenPool(session, PoolId(pool), pools_[pool].geometry);
        }
        return;
      }
      case 1: {  // A process goes.
        if (sessions_.empty() || Draw(4) != 0) return;
        auto it = std::next(sessions_.begin(), Draw(sessions_.size()));
        const uint64_t id = it->first;
        const Ledger::InstanceKey key = it->second;
        for (auto& [pool, model] : pools_) {
          if (model.session != id) continue;
          auto& pages = pages_[pool];
          while (!pages.empty()) ForgetPage(pages, pages.begin()->first);
          pages_.erase(pool);
        }
        std::vector<HandleRef> handles =
            ledger_.CloseSession(SessionId(id), absl::UnixEpoch());
        std::erase_if(pools_, [&](auto& p) { return p.second.session == id; });
        sessions_.erase(id);
        bool last = std::none_of(sessions_.begin(), sessions_.end(),
                                 [&](auto& s) { return s.second == key; });
        if (last) credit_.erase(key);
        PutAway(std::move(handles), key.first);
        return;
      }
      case 2:
      case 3: {  // Pages are charged.
        if (pools_.empty()) return;
        auto it = std::next(pools_.begin(), Draw(pools_.size()));
        const Bytes page = it->second.geometry.page_bytes();
        std::vector<PageIndex> indexes =
            ledger_.AbsentIndexes(PoolOf(it->first), 1 + Draw(2));
        if (page * indexes.size() > ledger_.free()) return;
        for (PageName name :
             ledger_.Charge(PoolOf(it->first), GrantId(1), indexes)) {
          ASSERT_TRUE(
              pages_[it->first].emplace(name, ModelPage{it->first}).second);
        }
        return;
      }
      case 4:
      case 5: {  // A page is made, some of it from stock.
        auto [pool, name] = AnyPage(PageState::kMaking);
        if (pool == 0) return;
        const PoolGeometry& geometry = pools_[pool].geometry;
        const std::string tenant = sessions_[pools_[pool].session].first;
        std::vector<HandleRef> handles = ledger_.TakeStock(
            tenant, geometry.handle_bytes, geometry.handles_per_page);
        for (size_t i = 0; i < handles.size(); ++i) {
          auto stocked = stock_.find({tenant, geometry.handle_bytes});
          ASSERT_NE(stocked, stock_.end());
          stock_.erase(stocked);
        }
        for (HandleRef& handle :
             Make(geometry.handle_bytes,
                  geometry.handles_per_page - handles.size())) {
          handles.push_back(std::move(handle));
        }
        ModelPage& page = pages_[pool][name];
        for (const HandleRef& handle : handles) {
          page.handles.push_back(handle.get());
        }
        page.state = PageState::kOffered;
        ledger_.Offer(PoolOf(pool), name, std::move(handles));
        return;
      }
      case 6: {  // A page is mapped.
        auto [pool, name] = AnyPage(PageState::kOffered);
        if (pool == 0) return;
        pages_[pool][name].state = PageState::kMapped;
        ledger_.ConfirmMapped(PoolOf(pool), {name});
        return;
      }
      case 7: {  // A page comes back.
        auto [pool, name] =
            AnyPage(Draw(2) == 0 ? PageState::kMapped
                                 : static_cast<PageState>(Draw(3)));
        if (pool == 0) return;
        std::vector<HandleRef> handles = ledger_.Remove(PoolOf(pool), name);
        ASSERT_EQ(handles.size(), pages_[pool][name].handles.size());
        for (size_t i = 0; i < handles.size(); ++i) {
          ASSERT_EQ(handles[i].get(), pages_[pool][name].handles[i]);
        }
        ASSERT_EQ(ledger_.FindPage(PoolOf(pool), name), nullptr);
        ForgetPage(pages_[pool], name);
        PutAway(std::move(handles), sessions_[pools_[pool].session].first);
        return;
      }
      case 8: {  // The driver has some of it back.
        Bytes bytes = std::exchange(unmade_, Bytes(0)) + SizeOf(releasing_);
        releasing_.clear();
        ledger_.EndRelease(bytes);
        return;
      }
      case 9: {  // Credit comes and goes.
        if (sessions_.empty()) return;
        const auto key =
            std::next(sessions_.begin(), Draw(sessions_.size()))->second;
        LedgerInstance& instance = *ledger_.FindInstance(key);
        if (Draw(2) == 0) {
          Bytes bytes = std::min(ledger_.free(), KiB(Draw(32)));
          ledger_.AddCredit(instance, bytes);
          credit_[key] += bytes;
        } else {
          Bytes bytes = std::min(credit_[key], KiB(Draw(32)));
          ledger_.DropCredit(instance, bytes);
          credit_[key] -= bytes;
        }
        return;
      }
      case 10: {  // Stock goes.
        if (Draw(4) != 0) return;
        for (HandleRef& handle : ledger_.TrimStock()) {
          releasing_.push_back(std::move(handle));
        }
        stock_.clear();
        return;
      }
    }
  }

  std::pair<uint64_t, PageName> AnyPage(PageState state) {
    std::vector<std::pair<uint64_t, PageName>> found;
    for (const auto& [pool, pages] : pages_) {
      for (const auto& [name, page] : pages) {
        if (page.state == state) found.push_back({pool, name});
      }
    }
    if (found.empty()) return {0, {}};
    return found[Draw(found.size())];
  }

  void Compare() {
    ASSERT_EQ(ledger_.CheckInvariants(), absl::OkStatus());
    ASSERT_EQ(device_.CheckInvariants(), absl::OkStatus());
    Bytes lent, stock, credit, making;
    std::map<Ledger::InstanceKey, Bytes> held;
    for (const auto& [pool, pages] : pages_) {
      const Bytes page = pools_[pool].geometry.page_bytes();
      lent += page * pages.size();
      held[sessions_[pools_[pool].session]] += page * pages.size();
      ASSERT_EQ(PoolOf(pool).held(), pages.size());
      for (const auto& [name, model] : pages) {
        const LedgerPage* found = ledger_.FindPage(PoolOf(pool), name);
        ASSERT_NE(found, nullptr);
        ASSERT_EQ(found->state, model.state);
        if (model.state == PageState::kMaking) making += page;
      }
    }
    for (const auto& [tenant, size] : stock_) stock += size;
    for (const auto& [key, bytes] : credit_) {
      credit += bytes;
      held[key] += bytes;
    }
    ASSERT_EQ(ledger_.lent(), lent);
    ASSERT_EQ(ledger_.stock(), stock);
    ASSERT_EQ(ledger_.credit(), credit);
    ASSERT_EQ(ledger_.releasing(), SizeOf(releasing_) + unmade_);
    ASSERT_EQ(ledger_.free() + lent + stock + credit + ledger_.releasing(),
              ledger_.capacity());
    for (const auto& [key, instance] : ledger_.instances()) {
      ASSERT_EQ(instance.held, held[key]);
    }
    // What is not being made is there, on the device too.
    ASSERT_EQ(*device_.UsedBytes(), lent - making + stock + SizeOf(releasing_));
  }

  std::mt19937_64 random_{GetParam()};
  FakeBackend device_{{.total = MiB(1)}};
  Ledger ledger_{KiB(256)};
  std::map<uint64_t, Ledger::InstanceKey> sessions_;
  std::map<uint64_t, ModelPool> pools_;
  std::map<uint64_t, std::map<PageName, ModelPage>> pages_;
  std::map<Ledger::InstanceKey, Bytes> credit_;
  std::multiset<std::pair<std::string, Bytes>> stock_;
  std::vector<HandleRef> releasing_;
  Bytes unmade_;  // of pages that left while they were being made
  uint64_t last_id_ = 0;
};

TEST_P(LedgerModelTest, AgreesWithTheModelAfterEveryStep) {
  for (int i = 0; i < 10'000; ++i) {
    SCOPED_TRACE(testing::Message() << "step " << i);
    Step();
    if (!HasFatalFailure()) Compare();
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, LedgerModelTest,
                         testing::Range<uint64_t>(1, 6));

TEST_F(LedgerTest, WhatOthersNeedIsNotFree) {
  Lend(pool(1), 0);
  EXPECT_EQ(ledger_.free(), kCapacity - MiB(2));
  ledger_.SetOthers(kCapacity - MiB(8));
  EXPECT_EQ(ledger_.lendable(), MiB(8));
  EXPECT_EQ(ledger_.free(), MiB(6));
  EXPECT_EQ(ledger_.overdrawn(), Bytes(0));
  ledger_.SetOthers(kCapacity);
  EXPECT_EQ(ledger_.free(), Bytes(0));
  EXPECT_EQ(ledger_.grantable(), Bytes(0));
  EXPECT_EQ(ledger_.overdrawn(), MiB(2));
  EXPECT_EQ(ledger_.CheckInvariants(), absl::OkStatus());
  ledger_.SetOthers(Bytes(0));
}

TEST_F(LedgerTest, PagesThatAreMadeCountUntilTheyAreOfferedOrGiveUp) {
  PageName offered = ledger_.Charge(pool(1), GrantId(1), Indexes({0}))[0];
  PageName given_up = ledger_.Charge(pool(1), GrantId(2), Indexes({1}))[0];
  EXPECT_EQ(ledger_.making(), MiB(4));
  ledger_.Offer(pool(1), offered, Make(MiB(2), 1));
  EXPECT_EQ(ledger_.making(), MiB(2));
  ledger_.Remove(pool(1), given_up);
  EXPECT_EQ(ledger_.making(), Bytes(0));
  ledger_.EndRelease(MiB(2));
}

TEST_F(LedgerTest, APageThatWasLetGoIsLentAndGoesWithItsHolder) {
  PageName page = Lend(pool(2), 0);
  EXPECT_EQ(ledger_.LetGo(pool(2), page).size(), 3);
  EXPECT_TRUE(ledger_.LetGo(pool(2), page).empty()) << "once";
  EXPECT_EQ(ledger_.lent(), MiB(3));
  EXPECT_EQ(ledger_.CheckInvariants(), absl::OkStatus());
  EXPECT_TRUE(ledger_.Remove(pool(2), page).empty());
  EXPECT_EQ(ledger_.releasing(), Bytes(0));
  EXPECT_EQ(ledger_.free(), kCapacity);
}

}  // namespace
}  // namespace kvbroker
