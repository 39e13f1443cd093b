#include "broker/core/testing/fake_client.h"

#include <algorithm>
#include <deque>
#include <tuple>
#include <variant>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/mutex.h"
#include "proto/fd_frame.h"

namespace kvbroker {
namespace {

// Stands for a handle that is of no use any more.
constexpr uint64_t kNoToken = 0;

bool operator==(const Granted& a, const Granted& b) {
  return std::tie(a.sequence, a.grant, a.pool, a.pages, a.credit) ==
         std::tie(b.sequence, b.grant, b.pool, b.pages, b.credit);
}

}  // namespace

// Queues, and counts what is lent from the moment the core says so.
class FakeClient::Listener : public SessionListener {
 public:
  struct Descriptors {
    GrantId grant;
    uint32_t first;
    std::vector<UniqueFd> descriptors;
  };
  using Event = std::variant<BrokerMessage, Descriptors, absl::Status>;

  void Tell(BrokerMessage message) override {
    MutexLock lock(&mu_);
    if (auto* granted = std::get_if<Granted>(&message);
        granted != nullptr && grants_.insert(granted->grant).second) {
      for (PageName page : granted->pages) {
        lent_[{granted->pool, page}] = granted->grant;
      }
    }
    if (auto* reclaim = std::get_if<Reclaim>(&message)) {
      Reclaim& latest = orders_[reclaim->pool];
      if (reclaim->revision > latest.revision) latest = *reclaim;
    }
    queue_.push_back(std::move(message));
  }
  void SendDescriptors(GrantId grant, uint32_t first_handle,
                       std::vector<UniqueFd> descriptors) override {
    MutexLock lock(&mu_);
    sent_.insert(grant);
    queue_.push_back(Descriptors{grant, first_handle, std::move(descriptors)});
  }
  // The core has hung up.
  void Close(const absl::Status& reason) override {
    HungUp();
    MutexLock lock(&mu_);
    closed_ = true;
    queue_.push_back(reason);
  }

  std::deque<Event> TakeAll() {
    MutexLock lock(&mu_);
    return std::exchange(queue_, {});
  }
  // Nobody hears of it after a hang-up: the page stays lent.
  void Returned(PoolId pool, PageName page) {
    MutexLock lock(&mu_);
    if (!hung_up_) lent_.erase({pool, page});
  }
  // It has said that it has done with the order.
  void Settled(PoolId pool, Revision revision) {
    MutexLock lock(&mu_);
    Reclaim& latest = orders_[pool];
    if (latest.revision == revision) latest.hold_at_most = kHoldAny;
  }
  // The process is gone.
  void Died() {
    MutexLock lock(&mu_);
    lent_.clear();
  }
  // The client may not have heard of it yet.
  bool closed() {
    MutexLock lock(&mu_);
    return closed_;
  }
  // What was announced without a descriptor does not stay after a hang-up.
  void HungUp() {
    MutexLock lock(&mu_);
    hung_up_ = true;
    std::erase_if(lent_, [&](const auto& page) {
      mu_.AssertHeld();
      return !sent_.contains(page.second);
    });
  }
  std::set<std::pair<PoolId, PageName>> lent() {
    MutexLock lock(&mu_);
    std::set<std::pair<PoolId, PageName>> pages;
    for (const auto& [page, grant] : lent_) pages.insert(page);
    return pages;
  }
  Reclaim order(PoolId pool) {
    MutexLock lock(&mu_);
    return orders_[pool];
  }

 private:
  Mutex mu_;
  std::deque<Event> queue_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  bool hung_up_ ABSL_GUARDED_BY(mu_) = false;
  std::set<GrantId> grants_ ABSL_GUARDED_BY(mu_);
  std::set<GrantId> sent_ ABSL_GUARDED_BY(mu_);  // in part at least
  std::map<std::pair<PoolId, PageName>, GrantId> lent_ ABSL_GUARDED_BY(mu_);
  std::map<PoolId, Reclaim> orders_ ABSL_GUARDED_BY(mu_);  // the latest
};

absl::StatusOr<std::unique_ptr<FakeClient>> FakeClient::Open(
    Core& core, FakeBackend& device, const Clock& clock, const Peer& peer,
    const kvbroker::Open& open) {
  std::unique_ptr<FakeClient> client(
      new FakeClient(core, device, clock, peer, open));
  absl::StatusOr<SessionId> id =
      core.OpenSession(peer, open, client->listener_);
  if (!id.ok()) return id.status();
  client->connected_ = true;
  client->Pump();
  if (client->opened_.session != *id ||
      client->opened_.pools.size() != open.pools.size()) {
    return absl::InternalError("the session was not told Opened first");
  }
  return client;
}

FakeClient::FakeClient(Core& core, FakeBackend& device, const Clock& clock,
                       const Peer& peer, const kvbroker::Open& open)
    : core_(core),
      device_(device),
      clock_(clock),
      peer_(peer),
      listener_(std::make_shared<Listener>()) {
  for (const PoolGeometry& geometry : open.pools) {
    pools_.emplace_back().geometry = geometry;
  }
}

FakeClient::~FakeClient() = default;

bool FakeClient::was_ended() const { return listener_->closed(); }

absl::Status FakeClient::Send(const ClientMessage& message) {
  absl::Status status = core_.Handle(id(), message);
  if (!status.ok() && connected_ && !listener_->closed()) {
    error_ = status;
    HangUp();
  }
  return status;
}

Sequence FakeClient::Ask(Acquire acquire) {
  if (acquire.sequence == Sequence()) {
    acquire.sequence = Sequence(++last_sequence_);
  }
  if (acquire.pool == PoolId()) acquire.pool = pool();
  acquire.want = std::max(acquire.want, acquire.at_least);
  if (acquire.deadline == absl::ZeroDuration()) {
    acquire.deadline = absl::Minutes(1);
  }
  acked_ = std::max(acked_, acquire.acked);
  // What was acknowledged is not answered again, whatever it was.
  if (acquire.sequence > acked_ && granted(acquire.sequence) == nullptr &&
      refused(acquire.sequence) == nullptr) {
    asked_[acquire.sequence] = acquire;
    unanswered_.try_emplace(acquire.sequence, clock_.Now() + acquire.deadline);
    unanswered_.erase(acquire.replaces);
  }
  Send(acquire).IgnoreError();
  return acquire.sequence;
}

Sequence FakeClient::AskRoom(Bytes declared_peak, absl::Duration deadline) {
  const Sequence sequence(++last_sequence_);
  room_asked_ = sequence;
  Send(MakeRoom{sequence, declared_peak, deadline}).IgnoreError();
  return sequence;
}

void FakeClient::Cancel(Sequence sequence) {
  if (unanswered_.contains(sequence)) cancelled_.insert(sequence);
  Send(kvbroker::Cancel{sequence}).IgnoreError();
}

void FakeClient::Resend(Sequence sequence) {
  Send(kvbroker::Resend{sequence}).IgnoreError();
}

void FakeClient::Return(PoolId id, const std::vector<PageName>& names) {
  Pool& pool = PoolOf(id);
  for (PageName name : names) {
    auto page = pool.pages.find(name.index);
    if (page != pool.pages.end() && page->second.name == name) {
      Drop(page->second.tokens);
      pool.pages.erase(page);
    }
    ForgetArriving(pool, name);
    listener_->Returned(id, name);
  }
  pool.changed = true;
  Send(kvbroker::Return{id, names}).IgnoreError();
}

void FakeClient::ForgetArriving(const Pool& pool, PageName name) {
  const uint32_t handles = pool.geometry.handles_per_page;
  for (auto& [grant, arrival] : arriving_) {
    if (!arrival.granted || arrival.granted->pool != pool.id) continue;
    const std::vector<PageName>& pages = arrival.granted->pages;
    const size_t place =
        std::find(pages.begin(), pages.end(), name) - pages.begin();
    if (place == pages.size()) continue;
    for (uint32_t h = 0; h < handles; ++h) {
      Drop({std::exchange(arrival.tokens[place * handles + h], kNoToken)});
    }
  }
}

void FakeClient::Mark(int count, Use use, std::optional<Use> from,
                      size_t which) {
  Pool& pool = pools_[which];
  for (auto& [index, page] : pool.pages) {
    if (count == 0) break;
    if (page.use == use || (from && page.use != *from)) continue;
    page.use = use;
    page.since = clock_.Now();
    pool.changed = true;
    --count;
  }
}

void FakeClient::Report(size_t which) {
  Pool& pool = pools_[which];
  kvbroker::Report report;
  report.pool = pool.id;
  report.in_use = Count(Use::kInUse, which);
  report.cached = Count(Use::kCached, which);
  report.idle = Count(Use::kIdle, which);
  report.revision = pool.revision;
  for (const auto& [index, page] : pool.pages) {
    if (page.use != Use::kIdle) continue;
    const absl::Duration age = clock_.Now() - page.since;
    report.oldest_idle = std::max(report.oldest_idle, age);
    if (age >= absl::Milliseconds(100)) ++report.settled;
  }
  pool.changed = false;
  Send(report).IgnoreError();
}

bool FakeClient::Pump() {
  std::deque<Listener::Event> events = listener_->TakeAll();
  bool busy = !events.empty();
  for (Listener::Event& event : events) {
    if (!connected_) break;
    if (auto* frame = std::get_if<Listener::Descriptors>(&event)) {
      OnDescriptors(frame->grant, frame->first, std::move(frame->descriptors));
    } else if (auto* reason = std::get_if<absl::Status>(&event)) {
      error_ = *reason;
      HangUp();
    } else {
      std::visit([&](auto& message) { On(std::move(message)); },
                 std::get<BrokerMessage>(event));
    }
  }
  for (size_t i = 0; i < pools_.size() && connected_; ++i) {
    if (pools_[i].order) Obey(pools_[i], /*answer=*/false);
    if (!pools_[i].changed || !manners_.reports) continue;
    busy = true;
    Report(i);
  }
  return busy;
}

void FakeClient::On(Opened opened) {
  opened_ = std::move(opened);
  for (size_t i = 0; i < pools_.size() && i < opened_.pools.size(); ++i) {
    pools_[i].id = opened_.pools[i];
  }
}

void FakeClient::On(Granted granted) {
  const Sequence sequence = granted.sequence;
  if (refused_.contains(sequence)) {
    Complain(absl::StrCat("granted after it was refused: ", sequence.value()));
  }
  auto [known, first] = granted_.try_emplace(sequence, granted);
  if (!first) {
    if (!(known->second == granted)) {
      Complain(absl::StrCat("two answers to sequence ", sequence.value()));
    }
    return;
  }
  unanswered_.erase(sequence);
  if (granted.credit > 0) return;
  const Acquire& asked = asked_.at(sequence);
  const PageCount pages = static_cast<PageCount>(granted.pages.size());
  if (granted.pool != asked.pool || pages < asked.at_least ||
      pages > asked.want) {
    Complain(absl::StrCat("granted ", pages, " pages of pool ",
                          granted.pool.value(), " for ", asked.at_least, " to ",
                          asked.want, " of ", asked.pool.value()));
  }
  if (cancelled_.contains(sequence)) {
    done_.insert(granted.grant);
    for (auto& [handle, token] : arriving_[granted.grant].tokens) {
      Drop({token});
    }
    arriving_.erase(granted.grant);
    Return(granted.pool, granted.pages);
    return;
  }
  const GrantId grant = granted.grant;
  arriving_[grant].granted = std::move(granted);
  MapWhatIsComplete(grant);
}

void FakeClient::On(Refused refused) {
  unanswered_.erase(refused.sequence);
  if (room_asked_ == refused.sequence) room_asked_.reset();
  if (granted_.contains(refused.sequence)) {
    Complain(absl::StrCat("refused after a grant: ", refused.sequence.value()));
  }
  refused_.try_emplace(refused.sequence, std::move(refused));
}

void FakeClient::On(Reclaim reclaim) {
  Pool& pool = PoolOf(reclaim.pool);
  orders_.push_back(reclaim);
  // Two threads of the core may tell in either order: the highest counts.
  if (reclaim.revision <= pool.revision) return;
  pool.revision = reclaim.revision;
  pool.order.reset();
  if (reclaim.hold_at_most == kHoldAny) return;
  pool.order = std::move(reclaim);
  Obey(pool, /*answer=*/true);
}

void FakeClient::On(LimitChanged limit) {
  limits_.push_back(limit);
  Send(LimitAck{limit.revision}).IgnoreError();
}

void FakeClient::On(Fenced fenced) {
  fenced_.push_back(std::move(fenced));
  unanswered_.clear();  // nobody answers them any more
}

void FakeClient::OnDescriptors(GrantId grant, uint32_t first,
                               std::vector<UniqueFd> descriptors) {
  const uint32_t count = static_cast<uint32_t>(descriptors.size());
  frames_.push_back({grant, first, count});
  unacknowledged_ += count;
  if (count < 1 || count > KVB_FD_MAX_PER_FRAME) {
    Complain(absl::StrCat("a frame of ", count, " descriptors"));
  }
  if (unacknowledged_ > KVB_FD_WINDOW) {
    Complain(absl::StrCat("the window is overrun: ", unacknowledged_));
  }
  if (manners_.maps && !done_.contains(grant)) {
    Arrival& arrival = arriving_[grant];
    for (uint32_t i = 0; i < count; ++i) {
      absl::StatusOr<uint64_t> token = device_.Import(descriptors[i].get());
      if (!token.ok()) continue;  // given back meanwhile
      if (!arrival.tokens.try_emplace(first + i, *token).second) {
        Drop({*token});
      }
    }
  }
  if (manners_.acknowledges_descriptors) Acknowledge();
  MapWhatIsComplete(grant);
}

void FakeClient::Acknowledge() {
  const uint32_t count = std::exchange(unacknowledged_, 0);
  absl::Status status = core_.DescriptorsReceived(id(), count);
  if (!status.ok()) Complain(std::string(status.message()));
}

void FakeClient::MapWhatIsComplete(GrantId id) {
  auto it = arriving_.find(id);
  if (!manners_.maps || it == arriving_.end() || !it->second.granted) return;
  const Granted& granted = *it->second.granted;
  Pool& pool = PoolOf(granted.pool);
  const uint32_t handles = pool.geometry.handles_per_page;
  if (it->second.tokens.size() < granted.pages.size() * handles) return;
  Mapped mapped{.grant = id};
  const std::set<std::pair<PoolId, PageName>> lent = listener_->lent();
  for (size_t i = 0; i < granted.pages.size(); ++i) {
    Page page{.name = granted.pages[i],
              .use = manners_.arrives_as,
              .since = clock_.Now()};
    for (uint32_t h = 0; h < handles; ++h) {
      page.tokens.push_back(it->second.tokens.at(i * handles + h));
    }
    if (!lent.contains({granted.pool, page.name})) {  // given back meanwhile
      Drop(page.tokens);
      continue;
    }
    if (manners_.fails_to_map > 0) {
      --manners_.fails_to_map;
      Drop(page.tokens);
      listener_->Returned(granted.pool, page.name);
      mapped.failed.push_back(page.name);
      continue;
    }
    for (uint64_t token : page.tokens) {
      if (device_.SizeOf(token) != pool.geometry.handle_bytes) {
        Complain(absl::StrCat("a handle of another size: ", token));
      }
      if (!opened_.slab.empty() &&
          device_.OffsetOf(token) !=
              pool.geometry.page_bytes() * page.name.index.value()) {
        Complain(absl::StrCat("a page that does not lie at its index: ",
                              page.name.index.value()));
      }
    }
    const PageIndex index = page.name.index;
    if (!pool.pages.try_emplace(index, std::move(page)).second) {
      Complain(absl::StrCat("two pages in slot ", index.value()));
    }
  }
  arriving_.erase(it);
  done_.insert(id);
  pool.changed = true;
  Send(mapped).IgnoreError();
}

void FakeClient::Obey(Pool& pool, bool answer) {
  if (!manners_.answers_reclaims || !pool.order) return;
  const Reclaim& order = *pool.order;
  PageCount on_their_way = 0;
  for (const auto& [id, arrival] : arriving_) {
    if (arrival.granted && arrival.granted->pool == pool.id) {
      on_their_way += static_cast<PageCount>(arrival.granted->pages.size());
    }
  }
  PageCount above = static_cast<PageCount>(pool.pages.size()) + on_their_way -
                    order.hold_at_most;
  std::vector<PageName> given;
  auto give = [&](Use use) {
    for (const auto& [index, page] : pool.pages) {
      if (above <= 0) return;
      if (page.use != use) continue;
      given.push_back(page.name);
      --above;
    }
  };
  give(Use::kIdle);
  if (order.tier >= Tier::kCached) give(Use::kCached);
  if (order.tier == Tier::kPreempt && manners_.preempts) give(Use::kInUse);
  if (given.empty() && !answer) return;
  for (PageName name : given) {
    Drop(pool.pages.at(name.index).tokens);
    pool.pages.erase(name.index);
    listener_->Returned(pool.id, name);
    pool.changed = true;
  }
  ReclaimAnswer message{.pool = pool.id, .revision = order.revision};
  message.given = std::move(given);
  message.kept = std::max<PageCount>(above, 0);
  message.final =
      above <= 0 || (order.tier <= Tier::kCached && on_their_way == 0);
  if (above > 0) message.reason = "in use";
  if (message.final) {
    listener_->Settled(pool.id, message.revision);
    pool.order.reset();
  }
  Send(message).IgnoreError();
}

void FakeClient::HangUp() {
  if (!connected_) return;
  connected_ = false;
  unanswered_.clear();
  listener_->HungUp();
  core_.HungUp(id());
}

void FakeClient::Die() {
  if (!alive_) return;
  alive_ = connected_ = false;
  unanswered_.clear();
  Drop(Tokens());
  for (Pool& pool : pools_) pool.pages.clear();
  arriving_.clear();
  listener_->Died();
  core_.ProcessGone(id());
}

void FakeClient::Drop(const std::vector<uint64_t>& tokens) {
  for (uint64_t token : tokens) {
    if (token == kNoToken) continue;
    absl::Status status = device_.Unimport(token);
    if (!status.ok()) Complain(std::string(status.message()));
  }
}

FakeClient::Pool& FakeClient::PoolOf(PoolId id) {
  auto it = std::find_if(pools_.begin(), pools_.end(),
                         [&](const Pool& pool) { return pool.id == id; });
  KVB_CHECK(it != pools_.end());
  return *it;
}

std::vector<PageName> FakeClient::pages(size_t pool) const {
  std::vector<PageName> names;
  for (const auto& [index, page] : pools_[pool].pages) {
    names.push_back(page.name);
  }
  return names;
}

int FakeClient::Count(Use use, size_t pool) const {
  int count = 0;
  for (const auto& [index, page] : pools_[pool].pages) {
    count += page.use == use ? 1 : 0;
  }
  return count;
}

int FakeClient::mapped(size_t pool) const {
  return static_cast<int>(pools_[pool].pages.size());
}

std::vector<uint64_t> FakeClient::Tokens() const {
  std::vector<uint64_t> tokens;
  for (const Pool& pool : pools_) {
    for (const auto& [index, page] : pool.pages) {
      tokens.insert(tokens.end(), page.tokens.begin(), page.tokens.end());
    }
  }
  for (const auto& [id, arrival] : arriving_) {
    for (const auto& [handle, token] : arrival.tokens) {
      if (token != kNoToken) tokens.push_back(token);
    }
  }
  return tokens;
}

const Granted* FakeClient::granted(Sequence sequence) const {
  auto it = granted_.find(sequence);
  return it == granted_.end() ? nullptr : &it->second;
}

const Refused* FakeClient::refused(Sequence sequence) const {
  auto it = refused_.find(sequence);
  return it == refused_.end() ? nullptr : &it->second;
}

const Reclaim* FakeClient::order(size_t pool) const {
  const std::optional<Reclaim>& order = pools_[pool].order;
  return order ? &*order : nullptr;
}

PageCount FakeClient::lent(size_t pool) const {
  const std::set<std::pair<PoolId, PageName>> lent = listener_->lent();
  return std::count_if(lent.begin(), lent.end(), [&](const auto& page) {
    return page.first == pools_[pool].id;
  });
}

std::optional<Reclaim> FakeClient::told_order(size_t pool) const {
  Reclaim order = listener_->order(pools_[pool].id);
  if (order.hold_at_most == kHoldAny) return std::nullopt;
  return order;
}

Bytes FakeClient::lent() const {
  Bytes sum;
  for (const auto& [id, page] : listener_->lent()) {
    for (const Pool& pool : pools_) {
      if (pool.id == id) sum += pool.geometry.page_bytes();
    }
  }
  return sum;
}

}  // namespace kvbroker
