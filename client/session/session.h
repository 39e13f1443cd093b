// Session: one process's conversation with one broker.
//
//   SessionOptions options;
//   options.instance = "llama";
//   options.pools.push_back({.geometry = ..., .block_bytes = ...});
//   ASSIGN_OR_RETURN(auto session, Session::Open(address, std::move(options)));
//   Pool& pool = session->pool(0);
//
// A worker thread of its own does everything that takes a while: it maps what
// is granted, answers reclaims, and reports; see Pool.
//
// When the broker goes away the engine runs on with what is mapped; blocks on
// mapped pages come and go as before, nothing grows, `health` says so. The
// worker connects again as soon as there is a broker, and tells it what is
// held:
//
//   OPENING --Opened--> OPEN --disconnected--> AWAY --connected, Open--+
//                        ^                      ^  \                   |
//                        |                      +---+ nobody there     v
//                        +--- Opened; Resume, page by page ------ RESUMING
//
// Where the broker's memory is one slab (Opened.slab), it ends with its broker:
// the session stays away, `health` says to restart the process, and its pools
// hand out no more blocks.
//
// A broker's word is not taken for more than it can be. Pages that were not
// asked for are not mapped, and it is told that they failed. What makes no
// sense at all (Opened twice or not of these pools, descriptors beyond their
// grant, grants without end that are never whole) ends the conversation as if
// the broker were gone.
//
// Threads: safe. Destroy it before the process ends, with the engine's threads
// out of its pools: it unmaps and returns everything.
#ifndef KVBROKER_CLIENT_SESSION_SESSION_H_
#define KVBROKER_CLIENT_SESSION_SESSION_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/clock.h"
#include "broker/base/mutex.h"
#include "client/session/broker_link.h"
#include "client/session/pool.h"
#include "proto/messages.h"

namespace kvbroker::client {

struct SessionOptions {
  std::string instance;
  std::string member;
  std::map<std::string, std::string> labels;
  Bytes declared_peak;
  // In force unless an operator has set others.
  std::optional<Bytes> min;
  std::optional<Bytes> max;
  std::optional<double> min_fraction;
  std::optional<double> max_fraction;
  std::optional<double> weight;
  // Where another live process of the tenant has the name.
  NameConflict name_conflict = NameConflict::kJoin;
  std::vector<PoolOptions> pools;
  absl::Duration open_timeout = absl::Seconds(10);
  // The operator ended this session. By default: says so on stderr and ends the
  // process with status 86.
  std::function<void(const std::string& reason)> on_fenced;
  // The kind of memory that the mappers map ("host", "cuda", "cuda_ipc"): a
  // broker that lends another one is refused. Empty: any.
  std::string backend;
  // Puts something around each pool's mapper, in the order of `pools`, such as
  // a recorder of what is mapped. None: nothing.
  std::function<std::unique_ptr<Mapper>(std::unique_ptr<Mapper>)> wrap_mapper;
};

class Session : public PoolSession, public LinkListener {
 public:
  using MapperFactory = std::function<absl::StatusOr<std::unique_ptr<Mapper>>(
      const PoolGeometry&)>;

  // A session without a link or a thread: for tests, which Attach one and call
  // RunOnce themselves, and for what makes the real ones (open_session.h).
  static absl::StatusOr<std::unique_ptr<Session>> Create(
      SessionOptions options, const MapperFactory& make_mapper, Clock& clock);
  ~Session() override;

  // Says Open over `link`. Once.
  void Attach(std::unique_ptr<BrokerLink> link, const Nonce& nonce);
  // How the worker connects again; without it a session ends with its link. The
  // link's listener is this session; it is gone before another one is made.
  // Before Attach.
  struct Connection {
    std::unique_ptr<BrokerLink> link;
    Nonce nonce{};
  };
  using Connector = std::function<absl::StatusOr<Connection>()>;
  void ReconnectWith(Connector connect);
  // Starts the worker thread.
  void Start();
  // OK once the broker has said Opened; its refusal, or DEADLINE_EXCEEDED.
  absl::Status WaitUntilOpen();
  // Does what is due, as the worker does; says when to call again.
  absl::Time RunOnce();
  // Unmaps and returns everything, waits up to a second for running work that
  // keeps pages and for what the broker was asked and has not answered, and
  // leaves. The pools are dead. Idempotent.
  void Close();
  // Its first half, for those without a thread: RunOnce until `left`, then
  // Close.
  void BeginClose();
  bool left();

  Pool& pool(size_t i) { return *pools_[i]; }
  size_t pool_count() const { return pools_.size(); }
  // What the broker said at the open, the name in force among it; the limits
  // are those of now.
  Opened opened();
  // Whether the instance's limit is `max`, within `timeout`: the broker tells of
  // what somebody sets.
  bool AwaitMax(Bytes max, absl::Duration timeout);
  // Between the two no page comes or goes, and nothing that the broker says is
  // heard; Pause waits for what is under way. For the capture of a graph, which
  // page work would break. Whatever waits for memory meanwhile waits in vain, up to
  // its own time. Nests; Close ends it. Not from a callback.
  void Pause();
  void Unpause();
  // OK while the session is open, else why it is not. It may come back where it
  // is UNAVAILABLE.
  absl::Status health();

  // What the process needs of the device at its peak besides the pools is
  // `declared_peak` from now on. Waits until the memory is there, whoever has to
  // give it. UNAVAILABLE: it is not within `timeout` (10 minutes at most), and who
  // holds it; or there is no broker at present. Either way the broker keeps it
  // free when it comes. FAILED_PRECONDITION: somebody waits in it already.
  // UNIMPLEMENTED: the broker is too old.
  absl::Status MakeRoom(Bytes declared_peak, absl::Duration timeout);

  // ---- PoolSession ----
  Sequence NextSequence() override;
  void Send(ClientMessage message) override;
  void Wake() override;

  // ---- LinkListener ----
  void OnMessage(BrokerMessage message) override;
  void OnDescriptors(GrantId grant, uint32_t first_handle,
                     std::vector<UniqueFd> descriptors) override;
  void OnDisconnected(absl::Status why) override;

 private:
  struct Descriptors {
    GrantId grant;
    uint32_t first_handle = 0;
    std::vector<UniqueFd> descriptors;
  };
  struct Disconnected {
    absl::Status why;
  };
  using Event = std::variant<BrokerMessage, Descriptors, Disconnected>;

  // A grant whose message and descriptors have not all come.
  struct Incoming {
    std::optional<Granted> granted;
    std::map<uint64_t, UniqueFd> descriptors;  // by ordinal
    absl::Time since;
    Sequence asked_by;  // the last one when its first part came
  };

  Session(SessionOptions options, Clock& clock);

  void SendOpen(const Nonce& nonce, const std::optional<Resuming>& resuming);

  void Queue(Event event);
  // On a thread of the link, after Queue: does the work where nobody is at it and
  // none of it is the worker's own; wakes the worker else.
  void WorkHere();
  // Whether what it leads to keeps the link.
  static bool IsForAnyThread(const Event& event);
  // Ends the worker's sleep at `due` at the latest.
  void WorkBy(absl::Time due) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Left() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WorkerLoop();
  // ---- on the worker ----
  void Process(BrokerMessage message);
  void Process(Descriptors descriptors);
  void Process(const Disconnected& disconnected);
  void Process(const Opened& opened);
  // Says what all pools hold.
  void SayResume();
  // Nothing that the link has said or says is heard any more.
  void DropLink();
  // Where the session is away: tries to come back when it is time. Says when to
  // call again.
  absl::Time Reconnect();
  // Health says why the session is away, and why the last attempt failed.
  void SayWhyAway(const absl::Status& attempt);
  // When it is time.
  absl::Time PauseBeforeReconnect();
  // Null where the broker was broken with over it.
  Incoming* IncomingOf(GrantId grant);
  void DeliverIfComplete(GrantId grant);
  absl::Time AskForMissing();
  // True where it is the answer to MakeRoom.
  bool AnswerRoom(Sequence sequence, absl::Status answer);
  // The answer has arrived, with all that belongs to it.
  void Answered(Sequence sequence);
  // Of the questions up to `last`.
  std::vector<Sequence> Unanswered(Sequence last);
  Pool* FindPool(PoolId id);
  // No broker that this process can use: the session stays without one.
  void LeaveAlone(absl::Status why);
  // The broker did what no broker does: it is not listened to any more.
  void BreakOff(std::string_view what);

  const SessionOptions options_;
  Clock& clock_;
  std::vector<std::unique_ptr<Pool>> pools_;
  Connector connect_;
  std::thread worker_;

  // Held by whoever works; before the pools' locks.
  Mutex work_mu_;
  // Of whoever works.
  std::map<PoolId, Pool*> pool_by_id_;
  std::map<GrantId, Incoming> incoming_;
  std::deque<GrantId> delivered_;  // lately: what comes again is dropped
  int paused_ = 0;
  uint64_t limit_revision_ = 0;
  // AWAY, and since when RESUMING waits for Opened.
  bool away_ = false;
  absl::Status away_why_;
  absl::Time try_at_ = absl::InfinitePast();
  absl::Time away_since_ = absl::InfinitePast();
  absl::Time opened_at_ = absl::InfinitePast();
  absl::Time open_by_ = absl::InfiniteFuture();

  // Sending does not block. Before mu_ and after the pools' locks.
  Mutex link_mu_;
  std::unique_ptr<BrokerLink> link_ ABSL_GUARDED_BY(link_mu_);

  std::atomic<bool> woken_ = false;
  Mutex mu_;
  CondVar changed_;
  std::deque<Event> events_ ABSL_GUARDED_BY(mu_);
  absl::Time due_ ABSL_GUARDED_BY(mu_);  // the worker sleeps until then
  bool started_ ABSL_GUARDED_BY(mu_) = false;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;
  bool pools_left_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  bool working_ ABSL_GUARDED_BY(mu_) = false;  // the worker is in RunOnce
  std::optional<Opened> opened_ ABSL_GUARDED_BY(mu_);
  absl::Status health_ ABSL_GUARDED_BY(mu_);
  // What Open says of it, and the MakeRoom under way.
  Bytes declared_peak_ ABSL_GUARDED_BY(mu_);
  struct RoomAsked {
    Sequence sequence;
    std::optional<absl::Status> answer;
  };
  std::optional<RoomAsked> room_ ABSL_GUARDED_BY(mu_);
  uint64_t last_sequence_ ABSL_GUARDED_BY(mu_) = 0;
  std::set<Sequence> unanswered_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_SESSION_H_
