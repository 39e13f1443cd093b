#include "broker/transport/descriptor_connection.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/clock.h"
#include "broker/base/status_macros.h"
#include "proto/fd_frame.h"
#include "proto/fd_parse.h"

namespace kvbroker {
namespace {

constexpr uint32_t kReadEvents = EPOLLIN | EPOLLRDHUP;
// Packets read before others have their turn.
constexpr int kPacketsPerTurn = 64;
// Where the kernel refuses descriptors for now and will not say when it takes
// them again (ETOOMANYREFS: other sockets of our user hold too many unread
// ones).
constexpr absl::Duration kTryAgain = absl::Milliseconds(10);

// One packet as it came.
struct Received {
  ssize_t size;
  char bytes[kFdPacketRoom];
  // All that came, wanted or not: who does not own them leaks them.
  std::vector<UniqueFd> descriptors;
  bool too_much = false;  // bytes or descriptors were cut off

  std::string_view packet() const { return {bytes, static_cast<size_t>(size)}; }
};

// size -1 and errno where there is none.
Received ReceivePacket(int socket) {
  Received packet;
  iovec data = {.iov_base = packet.bytes, .iov_len = sizeof(packet.bytes)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  packet.size = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (packet.size < 0) return packet;
  packet.too_much = message.msg_flags & (MSG_TRUNC | MSG_CTRUNC);
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    // The padding of one descriptor's space holds a second one.
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      memcpy(&fd, CMSG_DATA(header) + i * sizeof(fd), sizeof(fd));
      packet.descriptors.emplace_back(fd);
    }
  }
  return packet;
}

}  // namespace

absl::Status DescriptorConnection::Start(UniqueFd socket, PeerIdentity peer,
                                         Rendezvous::Place place,
                                         const Options& options) {
  const int fd = socket.get();
  std::shared_ptr<DescriptorConnection> self(new DescriptorConnection(
      std::move(socket), std::move(peer), std::move(place), options));
  // The watch owns the connection until End.
  ASSIGN_OR_RETURN(self->watch_, options.loop->Watch(fd, kReadEvents,
                                                     [self](uint32_t events) {
                                                       self->OnReady(events);
                                                     }));
  self->too_late_ = options.loop->RunAt(
      Clock::Steady().Now() + options.join_within,
      [weak = self->weak_from_this()] {
        std::shared_ptr<DescriptorConnection> connection = weak.lock();
        if (connection == nullptr) return;
        MutexLock lock(&connection->mu_);
        if (connection->state_ == State::kJoined) return;
        connection->CloseLocked(absl::DeadlineExceededError(
            "no session was opened for the descriptor connection in time"));
      });
  return absl::OkStatus();
}

DescriptorConnection::DescriptorConnection(UniqueFd socket, PeerIdentity peer,
                                           Rendezvous::Place place,
                                           const Options& options)
    : options_(options),
      peer_(std::move(peer)),
      place_(std::move(place)),
      socket_(std::move(socket)) {}

DescriptorConnection::~DescriptorConnection() = default;

absl::Status DescriptorConnection::Join(Session session) {
  {
    MutexLock lock(&mu_);
    if (state_ != State::kOffered || !end_.ok()) {
      return absl::AbortedError("the descriptor connection has ended");
    }
    state_ = State::kJoined;
    session_ = std::make_shared<const Session>(std::move(session));
  }
  options_.loop->Cancel(too_late_);
  // The place is the loop's.
  options_.loop->Post(
      [self = shared_from_this()] { self->place_ = Rendezvous::Place(); });
  return absl::OkStatus();
}

void DescriptorConnection::Send(GrantId grant, uint32_t first_handle,
                                std::vector<UniqueFd> descriptors) {
  Frame frame = {grant, first_handle, std::move(descriptors)};
  MutexLock lock(&mu_);
  if (state_ != State::kJoined || !end_.ok()) return;
  Sent outcome = waiting_.empty() ? TrySend(frame) : Sent::kWhenWritable;
  if (outcome == Sent::kYes) return;
  waiting_descriptors_ += frame.descriptors.size();
  if (waiting_descriptors_ > kMaxWaiting) {
    CloseLocked(absl::ResourceExhaustedError(
        absl::StrCat("too many descriptors wait for the peer to read: ",
                     waiting_descriptors_)));
    return;
  }
  const bool first = waiting_.empty();
  waiting_.push_back(std::move(frame));
  if (first) Await(outcome);
}

void DescriptorConnection::Close(const absl::Status& reason) {
  MutexLock lock(&mu_);
  CloseLocked(reason.ok() ? absl::CancelledError() : reason);
}

void DescriptorConnection::CloseLocked(const absl::Status& reason) {
  if (state_ == State::kEnded || !end_.ok()) return;
  end_ = reason;
  // The loop sees the hang-up and does the rest.
  shutdown(socket_.get(), SHUT_RDWR);
}

DescriptorConnection::Sent DescriptorConnection::TrySend(const Frame& frame) {
  KVB_CHECK(frame.descriptors.size() <= KVB_FD_MAX_PER_FRAME);
  const size_t count = frame.descriptors.size();
  kvb_fd_frame packet = {.header = FdHeader(KVB_FD_FRAME),
                         .grant_id = frame.grant.value(),
                         .first_handle = frame.first_handle,
                         .handle_count = static_cast<uint32_t>(count)};
  iovec data = {.iov_base = &packet, .iov_len = sizeof(packet)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * KVB_FD_MAX_PER_FRAME)];
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int) * count);
  int* fds = reinterpret_cast<int*>(CMSG_DATA(header));
  for (size_t i = 0; i < count; ++i) fds[i] = frame.descriptors[i].get();

  ssize_t sent;
  do {
    sent = sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent >= 0) {
    unacknowledged_ += count;
    return Sent::kYes;
  }
  switch (errno) {
    case EAGAIN:
      return Sent::kWhenWritable;
    case ETOOMANYREFS:
    case ENOBUFS:
    case ENOMEM:
      return Sent::kLater;
    default:
      CloseLocked(ErrnoToStatus(errno, "sending descriptors"));
      return Sent::kNever;
  }
}

void DescriptorConnection::Await(Sent outcome) {
  if (outcome == Sent::kWhenWritable) {
    options_.loop->Rewatch(watch_, kReadEvents | EPOLLOUT);
  } else if (outcome == Sent::kLater) {
    options_.loop->RunAt(Clock::Steady().Now() + kTryAgain,
                         [weak = weak_from_this()] {
                           if (auto connection = weak.lock()) {
                             connection->WriteWaiting();
                           }
                         });
  }
}

void DescriptorConnection::WriteWaiting() {
  MutexLock lock(&mu_);
  if (state_ != State::kJoined || !end_.ok()) return;
  while (!waiting_.empty()) {
    const Sent outcome = TrySend(waiting_.front());
    if (outcome != Sent::kYes) {
      options_.loop->Rewatch(watch_, kReadEvents);
      Await(outcome);
      return;
    }
    waiting_descriptors_ -= waiting_.front().descriptors.size();
    waiting_.pop_front();
  }
  options_.loop->Rewatch(watch_, kReadEvents);
}

void DescriptorConnection::OnReady(uint32_t events) {
  // What the peer said before it hung up still counts.
  if (!ReadAll() || events & (EPOLLHUP | EPOLLERR)) {
    End();
    return;
  }
  if (events & EPOLLOUT) WriteWaiting();
}

bool DescriptorConnection::ReadAll() {
  uint32_t acknowledged = 0;
  absl::Status status;
  bool over = false;
  int socket;
  State state;
  {
    MutexLock lock(&mu_);
    socket = socket_.get();  // only this thread closes it
    state = state_;
  }
  for (int i = 0; i < kPacketsPerTurn && status.ok(); ++i) {
    Received packet = ReceivePacket(socket);
    if (packet.size < 0 && (errno == EAGAIN || errno == EINTR)) break;
    if (packet.size <= 0) {
      over = true;
      break;
    }
    if (packet.too_much) {
      status = absl::InvalidArgumentError(
          "malformed packet on the descriptor socket: too long, or with too "
          "many descriptors");
    } else if (state == State::kHello) {
      status = TakeHello(packet.packet(), std::move(packet.descriptors));
      state = State::kOffered;
    } else {
      status =
          TakeAck(packet.packet(), packet.descriptors.size(), acknowledged);
    }
  }
  if (acknowledged != 0) {
    std::shared_ptr<const Session> session;
    {
      MutexLock lock(&mu_);
      session = session_;
    }
    absl::Status received = session->received(acknowledged);
    if (status.ok()) status = received;
  }
  if (!status.ok()) {
    MutexLock lock(&mu_);
    if (end_.ok()) end_ = status;
    return false;
  }
  return !over;
}

absl::Status DescriptorConnection::TakeHello(
    std::string_view packet, std::vector<UniqueFd> descriptors) {
  RETURN_IF_ERROR(ParseHello(packet, descriptors.size()).status());
  if (!peer_.pidfd && !descriptors.empty()) {
    RETURN_IF_ERROR(AdoptPidfd(std::move(descriptors.front()), peer_));
  }
  if (!peer_.pidfd) {
    return absl::FailedPreconditionError(
        "the process cannot be watched: the kernel has no SO_PEERPIDFD, its "
        "pid is not visible from here and its hello brought no pidfd");
  }
  {
    // Before the nonce is out, since Join may come at once.
    MutexLock lock(&mu_);
    if (!end_.ok()) return end_;
    state_ = State::kOffered;
  }
  ASSIGN_OR_RETURN(nonce_, options_.rendezvous->Offer(weak_from_this()));
  kvb_fd_welcome welcome = {.header = FdHeader(KVB_FD_WELCOME),
                            .incarnation = options_.incarnation};
  memcpy(welcome.nonce, nonce_.data(), sizeof(welcome.nonce));
  MutexLock lock(&mu_);
  if (send(socket_.get(), &welcome, sizeof(welcome),
           MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
    return ErrnoToStatus(errno, "answering hello");
  }
  return absl::OkStatus();
}

absl::Status DescriptorConnection::TakeAck(std::string_view packet,
                                           size_t descriptors,
                                           uint32_t& count) {
  ASSIGN_OR_RETURN(kvb_fd_ack ack, ParseAck(packet, descriptors));
  MutexLock lock(&mu_);
  // Before Join nothing was sent, so nothing can be acknowledged.
  if (ack.handle_count > unacknowledged_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "handles were acknowledged that were not sent: ", ack.handle_count,
        " of ", unacknowledged_));
  }
  unacknowledged_ -= ack.handle_count;
  count += ack.handle_count;
  return absl::OkStatus();
}

void DescriptorConnection::End() {
  // The watch may own the last reference.
  std::shared_ptr<DescriptorConnection> self = shared_from_this();
  options_.loop->Unwatch(watch_);
  options_.loop->Cancel(too_late_);
  options_.rendezvous->Withdraw(nonce_);
  place_ = Rendezvous::Place();
  std::shared_ptr<const Session> session;
  absl::Status reason;
  {
    MutexLock lock(&mu_);
    state_ = State::kEnded;
    session = std::exchange(session_, nullptr);
    waiting_.clear();
    socket_.Reset();
    reason = end_;
  }
  if (!reason.ok() && !absl::IsCancelled(reason) && options_.log) {
    options_.log(absl::StrCat("descriptor-connection-ended uid=", peer_.uid,
                              " pid=", peer_.pid, " reason=\"",
                              reason.message(), "\""));
  }
  if (session != nullptr) session->ended();
}

}  // namespace kvbroker
