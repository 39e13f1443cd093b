// Core: the work that is done without the lock: making, exporting and releasing
// handles, telling peers.
#include <algorithm>
#include <iterator>
#include <set>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "broker/core/core.h"
#include "broker/device/device_lost.h"
#include "proto/fd_frame.h"

namespace kvbroker {
namespace {

// How long a claim or a send that the system refused waits before another try.
constexpr absl::Duration kRetry = absl::Milliseconds(20);
// And for each handle beyond some that was made in vain: a large claim that
// cannot be served leaves the device to others meanwhile.
constexpr absl::Duration kRetryPerHandle = absl::Microseconds(100);

}  // namespace

bool Core::IsSmall(size_t handles, size_t& done) const {
  if (!options_.executor) return true;
  done += handles;
  return done <= options_.inline_handles;
}

void Core::Run(Actions actions) {
  size_t done = 0;  // handles made, exported and released by this call
  while (!actions.empty()) {
    Actions next;
    // Before anybody knows of it: what a peer does cannot precede its cause.
    if (!actions.history.empty()) options_.history(actions.history);
    // Words first: those who are asked to give need not wait for the device.
    for (auto& [listener, message] : actions.tell) {
      listener->Tell(std::move(message));
    }
    for (SendHandles& send : actions.send) {
      if (IsSmall(send.handles.size(), done)) {
        Send(std::move(send), next);
        continue;
      }
      options_.executor(
          [this, bulk = std::make_shared<SendHandles>(std::move(send))] {
            Actions rest;
            Send(std::move(*bulk), rest);
            Run(std::move(rest));
          });
    }
    for (MakePages& make : actions.make) {
      if (IsSmall(make.missing(), done)) {
        MakeSome(make, make.missing());
        FinishMake(std::move(make), next);
      } else {
        MakeOnExecutor(std::make_shared<MakePages>(std::move(make)));
      }
    }
    if (!actions.let_go.empty() && !IsSmall(actions.let_go.size(), done)) {
      options_.executor([handles = std::make_shared<std::vector<HandleRef>>(
                             std::move(actions.let_go))] { handles->clear(); });
    }
    actions.let_go.clear();
    if (actions.stock) {
      options_.executor(
          [this, stock = *std::move(actions.stock)] { MakeStock(stock); });
    }
    for (auto& [listener, reason] : actions.close) listener->Close(reason);
    if (!actions.release.empty()) {
      if (IsSmall(actions.release.size(), done)) {
        ReleaseSome(actions.release, actions.release.size(), next);
      } else {
        ReleaseOnExecutor(std::make_shared<std::vector<HandleRef>>(
            std::move(actions.release)));
      }
    }
    for (auto& listener : actions.forgotten) listener->Forgotten();
    for (const std::string& line : actions.log) options_.log(line);
    if (actions.remember) options_.remember(/*wait=*/false);
    if (actions.device_changed) options_.device_changed();
    actions = std::move(next);
  }
  bool wake;
  {
    MutexLock lock(&mu_);
    absl::Time due = NextDue();
    wake = due < promised_;
    if (wake) promised_ = due;
  }
  if (wake) options_.wake();
}

void Core::MakeOnExecutor(std::shared_ptr<MakePages> make) {
  options_.executor([this, make] {
    if (MakeSome(*make, options_.inline_handles)) {
      MakeOnExecutor(make);
      return;
    }
    Actions next;
    FinishMake(std::move(*make), next);
    Run(std::move(next));
  });
}

bool Core::MakeSome(MakePages& make, size_t step) {
  for (; step > 0 && make.missing() > 0; --step) {
    const Bytes size = make.geometry.handle_bytes;
    // With fixed addresses a page has one handle, and none comes from stock.
    absl::StatusOr<kvbroker::Handle> made =
        fixed_addresses_
            ? options_.backend->CreateAt(
                  size * make.pages[make.handles.size()].index.value(), size)
            : options_.backend->Create(size);
    if (!made.ok()) {
      make.failure = made.status();
      return false;
    }
    make.handles.push_back(
        std::make_shared<const kvbroker::Handle>(*std::move(made)));
    ++make.made;
  }
  if (make.missing() == 0) return false;
  // Nobody has a use for the rest once the session has gone.
  MutexLock lock(&mu_);
  auto session = sessions_.find(make.claim.session);
  return session != sessions_.end() && session->second.connected;
}

void Core::ReleaseOnExecutor(std::shared_ptr<std::vector<HandleRef>> handles) {
  options_.executor([this, handles] {
    Actions next;
    ReleaseSome(*handles, options_.inline_handles, next);
    if (!handles->empty()) ReleaseOnExecutor(handles);
    Run(std::move(next));
  });
}

void Core::ReleaseSome(std::vector<HandleRef>& handles, size_t step,
                       Actions& next) {
  Bytes bytes;
  std::vector<std::pair<Bytes, Bytes>> ranges;
  for (; step > 0 && !handles.empty(); --step) {
    bytes += handles.back()->size();
    ranges.emplace_back(handles.back()->offset(), handles.back()->size());
    handles.pop_back();  // the driver call
  }
  MutexLock lock(&mu_);
  ledger_.EndRelease(bytes);
  for (const auto& [offset, size] : ranges) ledger_.FreeRange(offset, size);
  if (auto* event = Record(HistoryEvent::Kind::kReleased, next)) {
    event->bytes = bytes;
  }
  if (!claims_.empty() || !rooms_.empty()) Arbitrate(next);
}

void Core::FinishMake(MakePages make, Actions& next) {
  MutexLock lock(&mu_);
  LedgerPool* pool = ledger_.FindPool(make.claim.pool);
  auto session = sessions_.find(make.claim.session);
  auto take_back = [&](std::string_view why) {
    mu_.AssertHeld();
    for (PageName page : make.pages) ledger_.Remove(*pool, page);
    if (auto* event = Record(HistoryEvent::Kind::kBack, *pool, next)) {
      event->pages = make.pages;
      event->why = why;
    }
  };
  auto give_up = [&] {
    // The pages count as releasing; what was not made has no more to wait for.
    mu_.AssertHeld();
    const Bytes charged =
        make.geometry.page_bytes() * static_cast<int64_t>(make.pages.size());
    const Bytes not_made = charged - SizeOf(make.handles);
    ledger_.EndRelease(not_made);
    const Bytes page = make.geometry.page_bytes();
    const size_t made = make.handles.size() / make.geometry.handles_per_page;
    for (size_t i = made; i < make.pages.size(); ++i) {
      ledger_.FreeRange(page * make.pages[i].index.value(), page);
    }
    auto* event = not_made == Bytes(0)
                      ? nullptr
                      : Record(HistoryEvent::Kind::kReleased, next);
    if (event != nullptr) event->bytes = not_made;
    for (HandleRef& handle : make.handles) {
      next.release.push_back(std::move(handle));
    }
  };
  if (pool == nullptr || session == sessions_.end()) {
    // Its process went meanwhile, and its pages with it.
    give_up();
    Arbitrate(next);
    return;
  }
  const bool cancelled = session->second.making.at(make.claim.sequence);
  session->second.making.erase(make.claim.sequence);
  const LedgerInstance& instance = ledger_.InstanceOf(*pool);
  if (!session->second.connected) {
    // It hung up meanwhile: what it never saw does not stay with it.
    take_back("hung up");
    give_up();
    if (ledger_.FindSession(session->first)->held == Bytes(0)) {
      EraseSession(session->first, "left", next);
    }
    Arbitrate(next);
    return;
  }
  if (!make.failure.ok()) {
    take_back("not made");
    give_up();
    if (IsDeviceLost(make.failure)) LoseDevice(make.failure, next);
    if (!device_error_.ok()) {
      RefuseLost(make.claim, next);
      Arbitrate(next);
      return;
    }
    next.log.push_back(
        absl::StrCat("create-failed session=", make.claim.session.value(),
                     " instance=", instance.name, " pages=", make.pages.size(),
                     " error=\"", make.failure.message(), "\""));
    make.claim.last_error = std::string(make.failure.message());
    const size_t many =
        std::max(make.made, options_.inline_handles) - options_.inline_handles;
    const absl::Duration retry =
        kRetry + kRetryPerHandle * static_cast<int64_t>(many);
    ReleaseStock(next);  // the device, or this process, is short of something
    MeasureSoon(absl::ZeroDuration());
    if (cancelled) {
      Refuse(make.claim, absl::StatusCode::kCancelled, "cancelled", next);
    } else if (make.claim.urgency == Urgency::kSpeculative || draining_) {
      Refuse(make.claim, absl::StatusCode::kUnavailable, make.claim.last_error,
             next);
    } else {
      make.claim.retry_at = Now() + retry;
      make.claim.recheck_at = make.claim.retry_at;
      claims_.push_back(std::move(make.claim));
    }
    Arbitrate(next);  // others may have a use for what it was to get
    return;
  }

  auto handle = make.handles.begin();
  for (PageName page : make.pages) {
    auto end = handle + make.geometry.handles_per_page;
    ledger_.Offer(
        *pool, page,
        {std::make_move_iterator(handle), std::make_move_iterator(end)});
    handle = end;
  }
  Granted granted;
  granted.sequence = make.claim.sequence;
  granted.grant = make.grant;
  granted.pool = make.claim.pool;
  granted.pages = make.pages;
  KeepAnswer(session->second, make.claim.sequence, {.granted = granted});
  Grant grant;
  grant.id = make.grant;
  grant.sequence = make.claim.sequence;
  grant.pool = make.claim.pool;
  grant.pages = make.pages;
  grant.handles_per_page = make.geometry.handles_per_page;
  session->second.unmapped.emplace(make.grant, std::move(grant));
  session->second.to_send.push_back(make.grant);
  next.tell.emplace_back(session->second.listener, std::move(granted));
  next.log.push_back(absl::StrCat(
      "grant id=", make.grant.value(), " session=", make.claim.session.value(),
      " instance=", instance.name, " pool=", make.claim.pool.value(),
      " pages=", make.pages.size(), " bytes=",
      (make.geometry.page_bytes() * static_cast<int64_t>(make.pages.size()))
          .count(),
      " held=", instance.held.count(),
      " waited_us=", absl::ToInt64Microseconds(Now() - make.claim.since)));
  PumpDescriptors(session->second, next);
}

void Core::Send(SendHandles send, Actions& next) {
  {
    MutexLock lock(&mu_);
    auto it = sessions_.find(send.session);
    // Hung up meanwhile: what was not sent by then was taken back.
    if (it == sessions_.end() || !it->second.connected) return;
    auto grant = it->second.unmapped.find(send.grant);
    if (grant != it->second.unmapped.end()) ++grant->second.frames;
  }
  std::vector<UniqueFd> descriptors;
  descriptors.reserve(send.handles.size());
  absl::Status failure;
  for (const HandleRef& handle : send.handles) {
    absl::StatusOr<UniqueFd> exported = options_.backend->Export(*handle);
    if (!exported.ok()) {
      failure = exported.status();
      break;
    }
    descriptors.push_back(*std::move(exported));
  }
  send.handles.clear();
  if (failure.ok()) {
    send.listener->SendDescriptors(send.grant, send.first_handle,
                                   std::move(descriptors));
    return;
  }
  const uint32_t count = static_cast<uint32_t>(descriptors.size());
  if (count > 0) {
    send.listener->SendDescriptors(send.grant, send.first_handle,
                                   std::move(descriptors));
  }
  // Out of descriptors, most likely: the rest goes again a little later. With a
  // lost device, when it is back.
  MutexLock lock(&mu_);
  if (IsDeviceLost(failure)) {
    LoseDevice(failure, next);
    Arbitrate(next);  // nobody gives for claims that are no more
  }
  if (device_error_.ok()) {
    next.log.push_back(absl::StrCat(
        "export-failed session=", send.session.value(),
        " grant=", send.grant.value(), " error=\"", failure.message(), "\""));
    pump_at_ = std::min(pump_at_, Now() + kRetry);
    ReleaseStock(next);
  }
  auto it = sessions_.find(send.session);
  if (it == sessions_.end() || !it->second.connected) return;
  SessionState& session = it->second;
  auto grant = session.unmapped.find(send.grant);
  uint32_t unsent = send.reserved - count;
  // The newest, or with several under way at once others as new.
  for (uint32_t left = unsent; left > 0;) {
    uint32_t& newest = session.exported.back().second;
    const uint32_t gone = std::min(newest, left);
    left -= gone;
    newest -= gone;
    if (newest == 0) session.exported.pop_back();
  }
  session.unacked_descriptors -= unsent;
  unacked_descriptors_ -= unsent;
  if (grant == session.unmapped.end()) return;
  grant->second.next_handle =
      std::min(grant->second.next_handle, send.first_handle + count);
  if (count == 0) --grant->second.frames;
  if (std::find(session.to_send.begin(), session.to_send.end(), send.grant) ==
      session.to_send.end()) {
    session.to_send.push_back(send.grant);
  }
}

void Core::Recycle(const std::string& tenant, std::vector<HandleRef> handles,
                   Actions& actions) {
  if (handles.empty()) return;
  if (fixed_addresses_) {
    // A place that is kept for pages of one size has none for the others.
    absl::c_move(handles, std::back_inserter(actions.release));
    return;
  }
  // A page may pass within a tenant as it is; any other is made anew.
  const std::set<Ledger::StockKey> wanted = WantedStock();
  Bytes room = *options_.max_stock - ledger_.stock();
  size_t places =
      options_.max_stocked_handles -
      std::min(options_.max_stocked_handles, ledger_.stocked_handles());
  const bool warm =
      claims_.empty() && !draining_ && device_error_.ok() && ledger_.overdrawn() == Bytes(0);
  std::vector<HandleRef> stock;
  for (HandleRef& handle : handles) {
    const Bytes size = handle->size();
    bool kept = wanted.contains({tenant, size});
    if (!kept && warm && size <= room && places > 0) {
      kept = true;
      room -= size;
      --places;
    }
    (kept ? stock : actions.release).push_back(std::move(handle));
  }
  ledger_.AddStock(tenant, std::move(stock), Now());
}

void Core::StockUp(const std::string& tenant, Bytes size, size_t granted,
                   Actions& actions) {
  if (!options_.executor || fixed_addresses_ || stocking_ || draining_ ||
      !claims_.empty() || !rooms_.empty() || !device_error_.ok() ||
      options_.charge == CoreOptions::Charge::kEngine) {
    return;
  }
  const size_t there = ledger_.stocked_handles({tenant, size});
  const size_t places =
      options_.max_stocked_handles -
      std::min(options_.max_stocked_handles, ledger_.stocked_handles());
  const Bytes room = std::max(
      std::min(*options_.max_stock - ledger_.stock(), ledger_.free()),
      Bytes(0));
  const size_t count =
      std::min({granted - std::min(granted, there), places,
                static_cast<size_t>(room / size), options_.inline_handles});
  if (count == 0) return;
  stocking_ = true;
  ledger_.BeginStock(size * static_cast<int64_t>(count));
  actions.stock = {tenant, size, count};
}

void Core::MakeStock(const StockHandles& stock) {
  std::vector<HandleRef> handles;
  while (handles.size() < stock.count) {
    absl::StatusOr<kvbroker::Handle> made =
        options_.backend->Create(stock.size);
    if (!made.ok()) break;  // who needs it is told why
    options_.backend->Prepare(*made);
    handles.push_back(
        std::make_shared<const kvbroker::Handle>(*std::move(made)));
  }
  Actions actions;
  {
    MutexLock lock(&mu_);
    stocking_ = false;
    ledger_.EndStock(stock.size * static_cast<int64_t>(stock.count),
                     SizeOf(handles));
    const bool wanted = absl::c_any_of(sessions_, [&](const auto& session) {
      return session.second.peer.tenant == stock.tenant;
    });
    if (wanted) {
      Recycle(stock.tenant, std::move(handles), actions);
    } else {
      actions.release = std::move(handles);
    }
    Arbitrate(actions);
  }
  Run(std::move(actions));
}

std::set<Ledger::StockKey> Core::WantedStock() {
  std::set<Ledger::StockKey> wanted;
  for (const Claim& claim : claims_) {
    wanted.emplace(ledger_.FindSession(claim.session)->tenant,
                   ledger_.FindPool(claim.pool)->geometry.handle_bytes);
  }
  return wanted;
}

bool Core::IsWindowTight() const {
  return unacked_descriptors_ >= options_.descriptor_window / 2;
}

bool Core::MayExport(const SessionState& session) const {
  if (session.unacked_descriptors >= KVB_FD_WINDOW) return false;
  if (!IsWindowTight()) return true;
  // One at least: who acknowledges comes on, however many do not.
  const size_t part = options_.descriptor_window / 2 / sessions_.size();
  return session.unacked_descriptors < std::max<size_t>(part, 1);
}

void Core::CloseWindow(SessionState& session, uint32_t count,
                       Actions& actions) {
  const bool was_tight = IsWindowTight();
  session.unacked_descriptors -= count;
  unacked_descriptors_ -= count;
  for (uint32_t left = count; left > 0;) {
    uint32_t& oldest = session.exported.front().second;
    const uint32_t gone = std::min(oldest, left);
    left -= gone;
    oldest -= gone;
    if (oldest == 0) session.exported.pop_front();
  }
  PumpDescriptors(session, actions);
  // Who has its even part waits for its own peer only.
  if (!was_tight || IsWindowTight()) return;
  for (auto& [id, other] : sessions_) PumpDescriptors(other, actions);
}

void Core::TrimStock(Actions& actions) {
  if (ledger_.stock() == Bytes(0)) return;
  if (claims_.empty()) {
    if (ledger_.stock() > *options_.max_stock ||
        ledger_.stocked_handles() > options_.max_stocked_handles ||
        ledger_.overdrawn() > Bytes(0)) {
      ReleaseStock(actions);
    }
    return;
  }
  absl::c_move(ledger_.TrimStockExcept(WantedStock()),
               std::back_inserter(actions.release));
}

void Core::ReleaseStock(Actions& actions) {
  if (ledger_.stock() == Bytes(0)) return;
  absl::c_move(ledger_.TrimStock(), std::back_inserter(actions.release));
}

void Core::PumpDescriptors(SessionState& session, Actions& actions) {
  if (!session.connected || !device_error_.ok()) return;
  while (!session.to_send.empty()) {
    Grant& grant = session.unmapped.at(session.to_send.front());
    LedgerPool& pool = *ledger_.FindPool(grant.pool);
    SendHandles send;
    while (grant.next_handle < grant.handle_count()) {
      const LedgerPage* page = ledger_.FindPage(
          pool, grant.pages[grant.next_handle / grant.handles_per_page]);
      if (page == nullptr) {
        // Returned before it was sent. A frame names consecutive handles.
        if (!send.handles.empty()) break;
        ++grant.next_handle;
        continue;
      }
      if (send.handles.size() >= KVB_FD_MAX_PER_FRAME || !MayExport(session)) {
        break;
      }
      if (send.handles.empty()) send.first_handle = grant.next_handle;
      send.handles.push_back(
          page->handles[grant.next_handle % grant.handles_per_page]);
      ++grant.next_handle;
      ++session.unacked_descriptors;
      ++unacked_descriptors_;
    }
    const bool done = grant.next_handle == grant.handle_count();
    if (done) {
      grant.sent = true;
      session.to_send.pop_front();
    }
    if (send.handles.empty()) {
      if (done) continue;
      return;  // the window is full
    }
    send.session = session.id;
    send.listener = session.listener;
    send.grant = grant.id;
    send.reserved = static_cast<uint32_t>(send.handles.size());
    session.exported.emplace_back(Now(), send.reserved);
    actions.send.push_back(std::move(send));
  }
}

}  // namespace kvbroker
