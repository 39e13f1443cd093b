// What the core keeps of sessions, pools and instances beside the ledger: their
// conversation with the broker, not their memory.
#ifndef KVBROKER_BROKER_CORE_SESSION_STATE_H_
#define KVBROKER_BROKER_CORE_SESSION_STATE_H_

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "broker/base/ids.h"
#include "broker/core/listener.h"
#include "broker/core/peer.h"
#include "proto/messages.h"

namespace kvbroker {

// Pages lent by one Acquire, until the peer says that they are mapped.
struct Grant {
  GrantId id;
  Sequence sequence;
  PoolId pool;
  std::vector<PageName> pages;
  uint32_t handles_per_page = 1;
  // Handles [0, next_handle) have been handed to the listener.
  uint32_t next_handle = 0;
  // Frames handed over so far: while there is none, nobody can map a page.
  uint32_t frames = 0;
  bool sent = false;    // all handles, once at least: a Resend starts again
  size_t returned = 0;  // of `pages`, before the peer said that it maps them

  uint32_t handle_count() const {
    return static_cast<uint32_t>(pages.size()) * handles_per_page;
  }
};

// The answer to one Acquire, kept so that the same sequence gets it again.
struct Answer {
  std::optional<Refused> refused;  // else granted
  Granted granted;

  // Of memory, about.
  size_t size() const {
    size_t bytes = sizeof(Answer) + granted.pages.size() * sizeof(PageName);
    if (!refused) return bytes;
    bytes += refused->reason.size();
    for (const Holder& holder : refused->holders) {
      bytes += sizeof(Holder) + holder.instance.size();
    }
    return bytes;
  }
};

// A session that was opened to resume, until the last Resume.
struct Resumption {
  // Sessions of the same process whose pages it takes over; of those that are
  // no more only the number is left.
  std::vector<SessionId> sources;
  // Pages of an earlier broker may be listed.
  bool may_adopt = false;
  PageCount pages = 0;
  Bytes adopted;
};

// A MakeRoom that has not been answered.
struct Room {
  SessionId session;
  Sequence sequence;
  absl::Time since;
  absl::Time deadline;
};

//   RESUMING --last Resume--> CONNECTED --HungUp--> GONE QUIET --> erased
//                                |  when its process is gone, or goes on in
//                                |  another session           ^
//                                +---------ProcessGone--------+
struct SessionState {
  SessionId id;
  Peer peer;
  std::string member;
  uint32_t rank = 0;
  // What the process needs of the device besides pages.
  Bytes declared_peak;
  std::shared_ptr<SessionListener> listener;
  bool connected = true;
  std::optional<Resumption> resumption;
  // Told to end; gets nothing more.
  bool fenced = false;
  // Was told Opened; nothing else may come before it.
  bool opened = false;
  // Past the deadline of an order; any answer ends it.
  bool ignoring = false;

  std::map<Sequence, Answer> answers;
  size_t answers_size = 0;  // of all together
  // Being granted: the answer waits for the backend. True: cancelled meanwhile.
  std::map<Sequence, bool> making;
  Sequence acked;
  std::map<GrantId, Grant> unmapped;  // offered, not yet acknowledged as mapped
  std::deque<GrantId> to_send;        // with descriptors still to hand over
  uint32_t unacked_descriptors = 0;
  // The same, by when they were exported, oldest first.
  std::deque<std::pair<absl::Time, uint32_t>> exported;
};

// The order in force and the last report.
struct PoolState {
  Revision revision;  // of the last order sent
  PageCount hold_at_most = kHoldAny;
  Tier tier = Tier::kIdle;
  absl::Time order_deadline = absl::InfiniteFuture();
  // The peer has done what it will do for the order.
  bool settled_order = true;
  // Answers on end that gave nothing of what its report had promised, and until
  // when its reports are not believed for it.
  int empty_answers = 0;
  absl::Time disbelieved_until = absl::InfinitePast();
  // Heard of it (an answer, a return) since the order's deadline was set.
  bool answered = true;

  Report report;
  absl::Time reported_at = absl::InfinitePast();

  bool ordered() const { return hold_at_most != kHoldAny; }
};

struct InstanceState {
  absl::Time held_off_until = absl::InfinitePast();
  // Since when it holds more than its `max`; infinite future: it does not.
  absl::Time above_limit_since = absl::InfiniteFuture();
  // Credit lapses all at once; each new credit moves the time.
  absl::Time credit_until = absl::InfiniteFuture();
  uint64_t grants = 0, refusals = 0, reclaims = 0, preempts = 0;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_SESSION_STATE_H_
