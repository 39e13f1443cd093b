// Actions: what a call has decided under the lock and does after it.
#ifndef KVBROKER_BROKER_CORE_ACTIONS_H_
#define KVBROKER_BROKER_CORE_ACTIONS_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "broker/base/ids.h"
#include "broker/core/claim.h"
#include "broker/core/history.h"
#include "broker/core/listener.h"
#include "broker/ledger/ledger.h"
#include "proto/messages.h"

namespace kvbroker {

// Pages charged to a pool whose handles must be made.
struct MakePages {
  Claim claim;  // goes back into the queue where the backend fails
  GrantId grant;
  std::vector<PageName> pages;
  PoolGeometry geometry;
  std::vector<HandleRef> handles;  // from stock; the rest is created
  size_t made = 0;                 // created so far
  absl::Status failure;            // of the backend

  size_t missing() const {
    return pages.size() * geometry.handles_per_page - handles.size();
  }
};

// Handles to export and hand to a listener.
struct SendHandles {
  SessionId session;
  std::shared_ptr<SessionListener> listener;
  GrantId grant;
  uint32_t first_handle = 0;
  uint32_t reserved = 0;  // of the windows: as many as `handles` was made with
  std::vector<HandleRef> handles;
};

// Handles to make for the stock.
struct StockHandles {
  std::string tenant;
  Bytes size;  // of each
  size_t count = 0;
};

struct Actions {
  std::vector<std::pair<std::shared_ptr<SessionListener>, BrokerMessage>> tell;
  std::vector<std::pair<std::shared_ptr<SessionListener>, absl::Status>> close;
  std::vector<std::shared_ptr<SessionListener>> forgotten;
  std::vector<MakePages> make;
  std::vector<SendHandles> send;
  std::optional<StockHandles> stock;
  std::vector<HandleRef> release;
  // As release, of pages that stay lent.
  std::vector<HandleRef> let_go;
  std::vector<std::string> log;
  bool remember = false;  // CoreOptions.remember is to be called
  bool device_changed = false;  // likewise
  std::vector<HistoryEvent> history;

  bool empty() const {
    return tell.empty() && close.empty() && make.empty() && send.empty() &&
           !stock && release.empty() && let_go.empty() && forgotten.empty() &&
           log.empty() && !remember && !device_changed && history.empty();
  }
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_ACTIONS_H_
