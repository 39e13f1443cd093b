#include "client/session/grpc_link.h"

#include <errno.h>
#include <grpcpp/grpcpp.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <algorithm>
#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/mutex.h"
#include "broker/base/status_macros.h"
#include "proto/convert.h"
#include "proto/fd_frame.h"
#include "proto/fd_parse.h"
#include "proto/kvbroker/v1/session.grpc.pb.h"

namespace kvbroker::client {
namespace {

// What an engine has open, and what may arrive at once.
constexpr int kDescriptorRoom = 4096;

// Who lends memory can read it: this user, root, or whose directory it is.
absl::Status CheckPeer(int socket, const std::string& path) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    return ErrnoToStatus(errno, "SO_PEERCRED");
  }
  struct stat info;
  const std::string directory = path.substr(0, path.rfind('/') + 1);
  const bool owns_directory =
      stat(directory.empty() ? "." : directory.c_str(), &info) == 0 &&
      info.st_uid == peer.uid;
  if (peer.uid == geteuid() || peer.uid == 0 || owns_directory) {
    return absl::OkStatus();
  }
  return absl::PermissionDeniedError(absl::StrCat(
      "who serves the broker's socket is neither this user, nor root, nor the "
      "owner of its directory; uid: ",
      peer.uid, ", socket: ", path));
}

absl::StatusOr<UniqueFd> ConnectSocket(const std::string& path,
                                       absl::Duration timeout) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  if (path.size() >= sizeof(name.sun_path)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the socket's path is too long: ", path));
  }
  memcpy(name.sun_path, path.data(), path.size());
  UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!socket) return ErrnoToStatus(errno, "socket");
  timeval wait = absl::ToTimeval(timeout);
  setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
  setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
  if (connect(socket.get(), reinterpret_cast<sockaddr*>(&name), sizeof(name)) !=
      0) {
    return ErrnoToStatus(errno,
                         absl::StrCat("connecting to the broker at ", path));
  }
  RETURN_IF_ERROR(CheckPeer(socket.get(), path));
  return socket;
}

// Room for one frame's descriptors as ancillary data.
union Ancillary {
  cmsghdr align;
  char bytes[CMSG_SPACE(sizeof(int) * KVB_FD_MAX_PER_FRAME)];
};

absl::Status SayHello(int socket) {
  kvb_fd_hello hello{};
  hello.header = FdHeader(KVB_FD_HELLO);
  hello.pid = static_cast<uint32_t>(getpid());
  iovec data{&hello, sizeof(hello)};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  Ancillary ancillary{};
  UniqueFd self(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  if (self) {
    message.msg_control = ancillary.bytes;
    message.msg_controllen = CMSG_SPACE(sizeof(int));
    cmsghdr* control = CMSG_FIRSTHDR(&message);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(sizeof(int));
    int fd = self.get();
    memcpy(CMSG_DATA(control), &fd, sizeof(fd));
  }
  while (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) {
    if (errno == EINTR) continue;
    // Too many descriptors of this user are under way. Most brokers do not need
    // this one: the kernel tells them who is there.
    if (errno == ETOOMANYREFS && message.msg_controllen != 0) {
      message.msg_control = nullptr;
      message.msg_controllen = 0;
      continue;
    }
    return ErrnoToStatus(errno, "saying hello to the broker");
  }
  return absl::OkStatus();
}

absl::StatusOr<Nonce> AwaitWelcome(int socket) {
  char packet[kFdPacketRoom];
  ssize_t size;
  do {
    size = recv(socket, packet, sizeof(packet), 0);
  } while (size < 0 && errno == EINTR);
  if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    return absl::DeadlineExceededError("the broker did not answer a hello");
  }
  if (size < 0) return ErrnoToStatus(errno, "waiting for the broker's welcome");
  if (size == 0) {
    return absl::PermissionDeniedError(
        "the broker closed the connection: it does not admit this user "
        "(its log says why)");
  }
  absl::StatusOr<kvb_fd_welcome> welcome =
      ParseWelcome({packet, static_cast<size_t>(size)}, 0);
  if (!welcome.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the socket is not a broker's of this version: ",
                     welcome.status().message()));
  }
  Nonce nonce;
  static_assert(sizeof(nonce) == sizeof(welcome->nonce));
  memcpy(nonce.data(), welcome->nonce, sizeof(welcome->nonce));
  return nonce;
}

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      status.error_message());
}

grpc::ChannelArguments ChannelArguments() {
  grpc::ChannelArguments arguments;
  // Shared ones remember that an earlier broker went away, and fail for a
  // while.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return arguments;
}

}  // namespace

// The gRPC stream: one write under way, the rest queued; reads as they come.
class GrpcLink::Stream
    : public grpc::ClientBidiReactor<v1::ClientMessage, v1::BrokerMessage> {
 public:
  Stream(const std::string& path, LinkListener& listener)
      : listener_(listener),
        stub_(v1::Broker::NewStub(grpc::CreateCustomChannel(
            absl::StrCat("unix:", path), grpc::InsecureChannelCredentials(),
            ChannelArguments()))) {
    context_.set_wait_for_ready(false);
    stub_->async()->Attach(&context_, this);
    AddHold();  // StartWrite is also called from outside of the reactions
    StartRead(&incoming_);
    StartCall();
  }

  // Ends the call and waits until gRPC has let go.
  ~Stream() override {
    {
      MutexLock lock(&mu_);
      closing_ = true;
      if (!failed_ && !writing_) StartWritesDone();
    }
    LetGo();
    MutexLock lock(&mu_);
    absl::Time patience = absl::Now() + absl::Seconds(2);
    while (!done_) {
      if (!done_cv_.WaitWithDeadline(&mu_, patience)) continue;
      context_.TryCancel();
      patience = absl::InfiniteFuture();
    }
  }

  void Send(ClientMessage message) {
    v1::ClientMessage encoded;
    ToWire(message, &encoded);
    MutexLock lock(&mu_);
    if (failed_ || closing_) return;
    if (writing_) {
      queue_.push_back(std::move(encoded));
      return;
    }
    writing_ = true;
    outgoing_ = std::move(encoded);
    StartWrite(&outgoing_);
  }

  void OnWriteDone(bool ok) override {
    MutexLock lock(&mu_);
    if (!ok) {
      failed_ = true;
      queue_.clear();
    }
    if (queue_.empty()) {
      writing_ = false;
      if (closing_ && !failed_) StartWritesDone();
      return;
    }
    outgoing_ = std::move(queue_.front());
    queue_.pop_front();
    StartWrite(&outgoing_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      // The broker has ended the call; OnDone says why.
      {
        MutexLock lock(&mu_);
        failed_ = true;
      }
      LetGo();
      return;
    }
    absl::StatusOr<BrokerMessage> message = FromWire(incoming_);
    if (message.ok()) listener_.OnMessage(*std::move(message));
    StartRead(&incoming_);
  }

  void OnDone(const grpc::Status& status) override {
    listener_.OnDisconnected(FromGrpc(status));
    MutexLock lock(&mu_);
    failed_ = true;
    done_ = true;
    done_cv_.SignalAll();
  }

 private:
  // OnDone may come. REQUIRES: Send starts no more writes.
  void LetGo() {
    {
      MutexLock lock(&mu_);
      if (std::exchange(let_go_, true)) return;
    }
    RemoveHold();
  }

  LinkListener& listener_;
  std::unique_ptr<v1::Broker::Stub> stub_;
  grpc::ClientContext context_;
  v1::BrokerMessage incoming_;
  Mutex mu_;
  CondVar done_cv_;
  v1::ClientMessage outgoing_;  // while writing_
  std::deque<v1::ClientMessage> queue_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;
  bool failed_ ABSL_GUARDED_BY(mu_) = false;
  bool let_go_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
};

absl::StatusOr<std::unique_ptr<GrpcLink>> GrpcLink::Connect(
    const BrokerAddress& address, LinkListener& listener,
    absl::Duration timeout) {
  GrowDescriptorTable(kDescriptorRoom);
  ASSIGN_OR_RETURN(UniqueFd socket,
                   ConnectSocket(address.descriptor_path, timeout));
  RETURN_IF_ERROR(SayHello(socket.get()));
  ASSIGN_OR_RETURN(Nonce nonce, AwaitWelcome(socket.get()));
  timeval forever{};
  setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof(forever));
  setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &forever, sizeof(forever));
  std::unique_ptr<GrpcLink> link(
      new GrpcLink(listener, std::move(socket), nonce));
  link->stream_ = std::make_unique<Stream>(address.rpc_path, listener);
  link->receiver_ =
      std::thread([raw = link.get()] { raw->ReceiveDescriptors(); });
  return link;
}

GrpcLink::GrpcLink(LinkListener& listener, UniqueFd socket, const Nonce& nonce)
    : listener_(listener), socket_(std::move(socket)), nonce_(nonce) {}

GrpcLink::~GrpcLink() {
  // The stream first: what was sent before (the last Return) is still
  // delivered.
  stream_.reset();
  shutdown(socket_.get(), SHUT_RDWR);
  if (receiver_.joinable()) receiver_.join();
}

void GrpcLink::Send(ClientMessage message) {
  stream_->Send(std::move(message));
}

void GrpcLink::AcknowledgeDescriptors(GrantId grant, uint32_t count) {
  kvb_fd_ack ack{};
  ack.header = FdHeader(KVB_FD_ACK);
  ack.grant_id = grant.value();
  ack.handle_count = count + owed_.exchange(0);
  ssize_t sent;
  do {
    sent = send(socket_.get(), &ack, sizeof(ack), MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  // The kernel is short of memory, or the broker is gone, which the stream
  // tells. The broker only counts, whichever grant is named.
  if (sent < 0) owed_ += ack.handle_count;
}

void GrpcLink::ReceiveDescriptors() {
  while (true) {
    char packet[kFdPacketRoom];
    iovec data{packet, sizeof(packet)};
    Ancillary ancillary;
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = ancillary.bytes;
    message.msg_controllen = sizeof(ancillary.bytes);
    ssize_t size = recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (size < 0 && errno == EINTR) continue;
    if (size <= 0) {
      // The broker is gone, which the stream tells; or this process is out of
      // memory. Then the broker must not believe that anybody still reads: it
      // ends the session with the connection, and the session is resumed.
      shutdown(socket_.get(), SHUT_RDWR);
      return;
    }
    std::vector<UniqueFd> descriptors;
    for (cmsghdr* control = CMSG_FIRSTHDR(&message); control != nullptr;
         control = CMSG_NXTHDR(&message, control)) {
      if (control->cmsg_level != SOL_SOCKET ||
          control->cmsg_type != SCM_RIGHTS) {
        continue;
      }
      size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      const unsigned char* at = CMSG_DATA(control);
      for (size_t i = 0; i < count; ++i, at += sizeof(int)) {
        int fd;
        memcpy(&fd, at, sizeof(fd));
        descriptors.emplace_back(fd);
      }
    }
    absl::StatusOr<kvb_fd_frame> frame =
        ParseFrame({packet, static_cast<size_t>(size)}, descriptors.size());
    if (!frame.ok()) {
      // Nothing that follows can be believed. The broker, if it is one, ends
      // the session with the connection, and the stream tells.
      shutdown(socket_.get(), SHUT_RDWR);
      return;
    }
    const GrantId grant(frame->grant_id);
    if (descriptors.size() != frame->handle_count) {
      // This process ran out of descriptors. Open the window again; the missing
      // ones come with the Resend.
      AcknowledgeDescriptors(grant, frame->handle_count);
      continue;
    }
    listener_.OnDescriptors(grant, frame->first_handle, std::move(descriptors));
  }
}

}  // namespace kvbroker::client
