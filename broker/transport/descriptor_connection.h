// DescriptorConnection: the broker's end of one descriptor socket.
//
// It speaks proto/fd_frame.h: takes the hello, answers with a nonce, and once
// the session on the gRPC stream has joined it, sends frames of descriptors and
// takes acks.
//
//            hello            Join                 peer or we end it
//   kHello --------> kOffered -----> kJoined ------------------+
//     |                 |                                      v
//     +-----------------+--- garbage, hang-up, too late --> kEnded
//
// Send is called from whatever thread grants, and writes from there: a hop to
// the loop's thread would cost more than the call. Only where the socket is
// full do frames wait for the loop, in order, at most kMaxWaiting descriptors,
// which the core's window keeps from being reached. Descriptors are closed as
// soon as they are sent.
//
// Threads: what says so is called on the loop's thread; the rest is safe from
// any. The session's callbacks come on the loop's thread, without a lock.
// Ownership: lives until it has ended and nobody refers to it any more; loop
// and rendezvous outlive it.
#ifndef KVBROKER_BROKER_TRANSPORT_DESCRIPTOR_CONNECTION_H_
#define KVBROKER_BROKER_TRANSPORT_DESCRIPTOR_CONNECTION_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "broker/base/ids.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/transport/event_loop.h"
#include "broker/transport/peer_identity.h"
#include "broker/transport/rendezvous.h"

namespace kvbroker {

class DescriptorConnection
    : public std::enable_shared_from_this<DescriptorConnection> {
 public:
  static constexpr size_t kMaxWaiting = 4096;

  struct Options {
    EventLoop* loop = nullptr;
    Rendezvous* rendezvous = nullptr;
    uint64_t incarnation = 0;
    // From the accept to Open; who takes longer is dropped.
    absl::Duration join_within = absl::Seconds(10);
    // One line, said when a peer misbehaves.
    std::function<void(std::string_view line)> log;
  };

  // What the session is told.
  struct Session {
    // The peer holds that many more descriptors; a failure ends the connection.
    std::function<absl::Status(uint32_t count)> received;
    // The last call.
    std::function<void()> ended;
  };

  // Begins to read. On the loop's thread.
  static absl::Status Start(UniqueFd socket, PeerIdentity peer,
                            Rendezvous::Place place, const Options& options);
  ~DescriptorConnection();

  // Does not change once the connection was offered at the rendezvous.
  const PeerIdentity& peer() const { return peer_; }

  // Who found it at the rendezvous takes it. ABORTED: it has ended meanwhile,
  // and `session` is not called.
  absl::Status Join(Session session);

  // As SessionListener::SendDescriptors. Dropped before Join and after the end.
  void Send(GrantId grant, uint32_t first_handle,
            std::vector<UniqueFd> descriptors);

  // Ends it soon, with a log line unless `reason` is OK.
  void Close(const absl::Status& reason);

 private:
  enum class State { kHello, kOffered, kJoined, kEnded };
  struct Frame {
    GrantId grant;
    uint32_t first_handle;
    std::vector<UniqueFd> descriptors;
  };
  enum class Sent { kYes, kWhenWritable, kLater, kNever };

  DescriptorConnection(UniqueFd socket, PeerIdentity peer,
                       Rendezvous::Place place, const Options& options);

  // ---- on the loop's thread ----
  void OnReady(uint32_t events);
  // False where the connection is over; `end_` says why.
  bool ReadAll();
  // `descriptors`: a pidfd, or none.
  absl::Status TakeHello(std::string_view packet,
                         std::vector<UniqueFd> descriptors);
  // Adds what the peer acknowledged to `count`.
  absl::Status TakeAck(std::string_view packet, size_t descriptors,
                       uint32_t& count);
  void WriteWaiting();
  void End();

  // ---- under mu_ ----
  Sent TrySend(const Frame& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Await(Sent outcome) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CloseLocked(const absl::Status& reason)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  PeerIdentity peer_;
  Rendezvous::Place place_;  // the loop's, until joined or ended
  EventLoop::WatchId watch_;
  EventLoop::TimerId too_late_;
  Nonce nonce_{};

  Mutex mu_;
  State state_ ABSL_GUARDED_BY(mu_) = State::kHello;
  // Closed by End alone, on the loop's thread.
  UniqueFd socket_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const Session> session_ ABSL_GUARDED_BY(mu_);
  std::deque<Frame> waiting_ ABSL_GUARDED_BY(mu_);
  size_t waiting_descriptors_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t unacknowledged_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status end_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_DESCRIPTOR_CONNECTION_H_
