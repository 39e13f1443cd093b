#include "broker/transport/session_service.h"

#include <sys/epoll.h>

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/mutex.h"
#include "broker/base/status_macros.h"
#include "broker/transport/descriptor_connection.h"
#include "broker/transport/grpc_status.h"
#include "broker/transport/peer_identity.h"
#include "proto/convert.h"
#include "proto/kvbroker/v1/session.grpc.pb.h"

namespace kvbroker {
namespace {

// One stream. gRPC owns it by `self_` until OnDone, the core as a listener
// until the session is forgotten.
//
// gRPC allows one write at a time, and nothing after Finish; after OnDone the
// call is no more. So what is about to touch the call takes a hold of it under
// the lock, acts without the lock, and Finish waits until nobody holds on.
class AttachStream final
    : public grpc::ServerBidiReactor<v1::ClientMessage, v1::BrokerMessage>,
      public SessionListener,
      public std::enable_shared_from_this<AttachStream> {
 public:
  static AttachStream* Start(
      std::shared_ptr<const SessionServiceOptions> options,
      grpc::CallbackServerContext* context) {
    auto stream = std::make_shared<AttachStream>(std::move(options), context);
    stream->self_ = stream;
    if (stream->who_ == nullptr) {
      stream->End(absl::UnauthenticatedError(
          "the connection is not one that the broker accepted"));
    } else {
      stream->StartRead(&stream->request_);
    }
    return stream.get();
  }

  // Use Start.
  AttachStream(std::shared_ptr<const SessionServiceOptions> options,
               grpc::CallbackServerContext* context)
      : options_(std::move(options)),
        core_(options_->core),
        context_(context),
        who_(options_->connections->Find(context->peer())) {}

  // ---- SessionListener ----

  void Tell(BrokerMessage message) override {
    v1::BrokerMessage wire;
    ToWire(message, &wire);
    const size_t size = wire.SpaceUsedLong();
    bool overflow = false;
    size_t messages, bytes;
    {
      MutexLock lock(&mu_);
      if (ending_) return;
      messages = outbox_.size();
      bytes = waiting_bytes_;
      // A message of its own is never too large.
      overflow = messages >= options_->max_waiting ||
                 (messages > 0 && bytes + size > options_->max_waiting_bytes);
      if (!overflow) {
        outbox_.push_back({std::move(wire), size});
        waiting_bytes_ += size;
      }
    }
    if (overflow) {
      absl::Status slow = absl::ResourceExhaustedError(absl::StrCat(
          "the peer does not read: messages that wait for it: ", messages,
          ", bytes: ", bytes));
      LogEnd(slow);
      Abort(slow);
    } else {
      Proceed();
    }
  }

  void SendDescriptors(GrantId grant, uint32_t first_handle,
                       std::vector<UniqueFd> descriptors) override {
    std::shared_ptr<DescriptorConnection> connection;
    {
      MutexLock lock(&mu_);
      if (ending_) return;
      connection = descriptors_;
    }
    if (connection != nullptr) {
      connection->Send(grant, first_handle, std::move(descriptors));
    }
  }

  void Close(const absl::Status& reason) override {
    // First: the end of the other connection would give a reason of its own.
    End(reason);
    CloseDescriptors();
  }

  void Forgotten() override {
    EventLoop::WatchId watch;
    bool counted;
    {
      MutexLock lock(&mu_);
      forgotten_ = true;
      watch = exit_watch_;
      counted = std::exchange(counted_, false);
    }
    if (!counted) return;
    options_->loop->Unwatch(watch);
    options_->count_session(-1);
  }

  // ---- gRPC ----

  void OnReadDone(bool ok) override {
    if (!ok) {
      End(absl::OkStatus());
      HangUp();
      return;
    }
    {
      MutexLock lock(&mu_);
      if (ending_) return;
    }
    absl::Status taken = Take();
    if (!taken.ok()) {
      LogEnd(taken);
      // First: the end of the other connection would give a reason of its own.
      End(taken);
      HangUp();
      return;
    }
    StartRead(&request_);
  }

  void OnWriteDone(bool ok) override {
    {
      MutexLock lock(&mu_);
      --holds_;
      writing_ = false;
      waiting_bytes_ -= outbox_.front().size;
      outbox_.pop_front();
      // The read that is under way sees the end of the stream as well.
      if (!ok) {
        outbox_.clear();
        waiting_bytes_ = 0;
      }
    }
    Proceed();
  }

  void OnDone() override {
    HangUp();  // whatever ended the call
    // May be the last reference.
    std::shared_ptr<AttachStream> self = std::move(self_);
  }

  // ---- the session's other ends ----

  // Tells the core, once, and lets go of the descriptor connection.
  void HangUp() {
    SessionId session;
    {
      MutexLock lock(&mu_);
      if (hung_up_) return;
      hung_up_ = true;
      session = session_;
    }
    // Without a session yet, TakeOpen tells the core.
    if (session != SessionId()) core_->HungUp(session);
    CloseDescriptors();
  }

  // Ends the stream without a care for what is yet to be written.
  void Abort(const absl::Status& reason) {
    {
      MutexLock lock(&mu_);
      if (finished_) return;
      if (!ending_) end_ = reason;
      ending_ = true;
      // All but the one that gRPC is writing.
      const size_t keep = writing_ ? 1 : 0;
      while (outbox_.size() > keep) {
        waiting_bytes_ -= outbox_.back().size;
        outbox_.pop_back();
      }
      ++holds_;
    }
    context_->TryCancel();
    {
      MutexLock lock(&mu_);
      --holds_;
    }
    Proceed();
  }

  // Ends the stream with `reason` once all that was told before is written.
  void End(const absl::Status& reason) {
    {
      MutexLock lock(&mu_);
      if (ending_) return;
      ending_ = true;
      end_ = reason;
    }
    Proceed();
  }

 private:
  // What the watch of a process and the opening of its session tell each other.
  struct ProcessExit {
    Mutex mu;
    SessionId session ABSL_GUARDED_BY(mu);
    bool seen ABSL_GUARDED_BY(mu) = false;
  };

  struct Waiting {
    v1::BrokerMessage message;
    size_t size;  // in memory
  };

  // Whatever may be done next on the call.
  void Proceed() {
    const v1::BrokerMessage* message = nullptr;
    grpc::WriteOptions options;
    absl::Status end;
    {
      MutexLock lock(&mu_);
      if (holds_ != 0 || finished_) return;
      if (!outbox_.empty()) {
        // A deque's elements stay where they are while others are added.
        message = &outbox_.front().message;
        writing_ = true;
        ++holds_;
        // More follows at once: one system call for all of them.
        if (outbox_.size() > 1) options.set_buffer_hint();
      } else if (ending_) {
        finished_ = true;
        end = end_;
      } else {
        return;
      }
    }
    if (message != nullptr) {
      StartWrite(message, options);
    } else {
      Finish(ToGrpcStatus(end));
    }
  }

  absl::Status Take() {
    SessionId session;
    {
      MutexLock lock(&mu_);
      session = session_;
    }
    ASSIGN_OR_RETURN(ClientMessage message, FromWire(request_));
    if (session != SessionId()) {
      if (std::holds_alternative<Open>(message)) {
        return absl::InvalidArgumentError("the session is open already");
      }
      return core_->Handle(session, message);
    }
    const Open* open = std::get_if<Open>(&message);
    if (open == nullptr) {
      return absl::InvalidArgumentError(
          "the first message of a session must be Open");
    }
    return TakeOpen(*open);
  }

  absl::Status TakeOpen(const Open& open) {
    options_->count_opening(+1);
    absl::Status status = Begin(open);
    options_->count_opening(-1);
    return status;
  }

  absl::Status Begin(const Open& open) {
    ASSIGN_OR_RETURN(std::shared_ptr<DescriptorConnection> connection,
                     options_->rendezvous->Meet(open.nonce, *who_));
    const PeerIdentity& peer = connection->peer();
    std::weak_ptr<AttachStream> weak = weak_from_this();
    RETURN_IF_ERROR(connection->Join({
        .received = [weak](uint32_t count) -> absl::Status {
          std::shared_ptr<AttachStream> stream = weak.lock();
          if (stream == nullptr) return absl::OkStatus();
          return stream->core_->DescriptorsReceived(stream->session(), count);
        },
        .ended =
            [weak] {
              std::shared_ptr<AttachStream> stream = weak.lock();
              if (stream == nullptr) return;
              stream->End(absl::UnavailableError(
                  "the session's descriptor connection has ended"));
              stream->HangUp();
            },
    }));
    {
      MutexLock lock(&mu_);
      descriptors_ = connection;
    }
    // Watched before there is a session: one whose end nobody would tell us of
    // must not be. The connection keeps the pidfd open.
    auto exit = std::make_shared<ProcessExit>();
    absl::StatusOr<EventLoop::WatchId> watch = options_->loop->WatchOnce(
        peer.pidfd.get(), EPOLLIN,
        [core = core_, connection, weak, exit](uint32_t) {
          SessionId session;
          {
            MutexLock lock(&exit->mu);
            exit->seen = true;
            session = exit->session;
          }
          if (session != SessionId()) core->ProcessGone(session);
          connection->Close(absl::OkStatus());
          if (auto stream = weak.lock()) {
            stream->Abort(absl::UnavailableError("the process has exited"));
          }
        });
    if (!watch.ok()) {
      return absl::UnavailableError(absl::StrCat(
          "the process cannot be watched for now: ", watch.status().message()));
    }
    absl::StatusOr<SessionId> session =
        core_->OpenSession({.tenant = peer.tenant,
                            .uid = peer.uid,
                            .pid = peer.pid,
                            .start_time = peer.start_time,
                            .process_inode = peer.process_inode},
                           open, shared_from_this());
    // Its end, and that of the descriptor connection, are OnReadDone's.
    if (!session.ok()) {
      options_->loop->Unwatch(*watch);
      return session.status();
    }
    bool hung_up;
    {
      MutexLock lock(&mu_);
      session_ = *session;
      hung_up = hung_up_;
    }
    if (hung_up) core_->HungUp(*session);
    bool forgotten;
    {
      MutexLock lock(&mu_);
      exit_watch_ = *watch;
      forgotten = forgotten_;
      counted_ = !forgotten;
    }
    if (forgotten) {
      options_->loop->Unwatch(*watch);
    } else {
      options_->count_session(+1);
    }
    // Last: it may take the session's count back.
    bool exited;
    {
      MutexLock lock(&exit->mu);
      exit->session = *session;
      exited = exit->seen;
    }
    if (exited) core_->ProcessGone(*session);
    return absl::OkStatus();
  }

  void CloseDescriptors() {
    std::shared_ptr<DescriptorConnection> connection;
    {
      MutexLock lock(&mu_);
      connection = std::exchange(descriptors_, nullptr);
    }
    if (connection != nullptr) connection->Close(absl::OkStatus());
  }

  void LogEnd(const absl::Status& reason) {
    options_->log(absl::StrCat("session-ended session=", session().value(),
                               " uid=", who_->uid, " pid=", who_->pid,
                               " reason=\"", reason.message(), "\""));
  }

  SessionId session() {
    MutexLock lock(&mu_);
    return session_;
  }

  const std::shared_ptr<const SessionServiceOptions> options_;
  Core* const core_;
  grpc::CallbackServerContext* const context_;  // until OnDone
  const std::shared_ptr<const PeerIdentity> who_;
  std::shared_ptr<AttachStream> self_;  // gRPC's reference
  v1::ClientMessage request_;           // of the read that is under way

  Mutex mu_;
  SessionId session_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<DescriptorConnection> descriptors_ ABSL_GUARDED_BY(mu_);
  bool hung_up_ ABSL_GUARDED_BY(mu_) = false;
  // Of the process's pidfd, until the core has forgotten the session.
  EventLoop::WatchId exit_watch_ ABSL_GUARDED_BY(mu_);
  bool counted_ ABSL_GUARDED_BY(mu_) = false;
  bool forgotten_ ABSL_GUARDED_BY(mu_) = false;
  // The front one is being written while `writing_`.
  std::deque<Waiting> outbox_ ABSL_GUARDED_BY(mu_);
  size_t waiting_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // of all in the outbox
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  int holds_ ABSL_GUARDED_BY(mu_) = 0;
  // Nothing more is told; then Finish is called, with `end_`.
  bool ending_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status end_ ABSL_GUARDED_BY(mu_);
};

class SessionService final : public v1::Broker::CallbackService {
 public:
  explicit SessionService(SessionServiceOptions options)
      : options_(
            std::make_shared<const SessionServiceOptions>(std::move(options))) {
  }

  grpc::ServerBidiReactor<v1::ClientMessage, v1::BrokerMessage>* Attach(
      grpc::CallbackServerContext* context) override {
    return AttachStream::Start(options_, context);
  }

 private:
  const std::shared_ptr<const SessionServiceOptions> options_;
};

}  // namespace

std::shared_ptr<grpc::Service> MakeSessionService(
    SessionServiceOptions options) {
  return std::make_shared<SessionService>(std::move(options));
}

}  // namespace kvbroker
