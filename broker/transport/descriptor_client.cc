#include "broker/transport/descriptor_client.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>

namespace kvbroker {
namespace {

kvb_fd_header Header(kvb_fd_type type) {
  return {.magic = KVB_FD_MAGIC,
          .version = KVB_FD_VERSION,
          .type = static_cast<uint16_t>(type)};
}

template <typename Packet>
std::string_view AsBytes(const Packet& packet) {
  return {reinterpret_cast<const char*>(&packet), sizeof(packet)};
}

}  // namespace

DescriptorClient::DescriptorClient(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  // A test that would wait for ever fails instead.
  timeval patience = {.tv_sec = 10, .tv_usec = 0};
  setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address),
              sizeof(address)) == 0) {
    socket_ = std::move(fd);
  }
}

void DescriptorClient::SayHello(bool with_pidfd) {
  kvb_fd_hello hello = {.header = Header(KVB_FD_HELLO),
                        .pid = static_cast<uint32_t>(getpid()),
                        .reserved = 0};
  UniqueFd pidfd(
      with_pidfd ? static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)) : -1);
  SendPacket(AsBytes(hello), pidfd ? std::vector{pidfd.get()}
                                   : std::vector<int>());
}

void DescriptorClient::SendPacket(std::string_view bytes,
                                  const std::vector<int>& descriptors) {
  iovec data = {.iov_base = const_cast<char*>(bytes.data()),
                .iov_len = bytes.size()};
  const size_t size = sizeof(int) * descriptors.size();
  std::vector<cmsghdr> control(CMSG_SPACE(size) / sizeof(cmsghdr) + 1);
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(size);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(header), descriptors.data(), size);
  }
  sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
}

void DescriptorClient::Ack(GrantId grant, uint32_t count) {
  kvb_fd_ack ack = {.header = Header(KVB_FD_ACK),
                    .grant_id = grant.value(),
                    .handle_count = count,
                    .reserved = 0};
  SendPacket(AsBytes(ack));
}

std::optional<kvb_fd_welcome> DescriptorClient::ReadWelcome() {
  kvb_fd_welcome welcome;
  if (recv(socket_.get(), &welcome, sizeof(welcome), 0) != sizeof(welcome) ||
      welcome.header.type != KVB_FD_WELCOME) {
    return std::nullopt;
  }
  return welcome;
}

std::optional<Nonce> DescriptorClient::GetNonce(bool with_pidfd) {
  SayHello(with_pidfd);
  std::optional<kvb_fd_welcome> welcome = ReadWelcome();
  if (!welcome) return std::nullopt;
  Nonce nonce;
  std::copy_n(welcome->nonce, nonce.size(), nonce.begin());
  return nonce;
}

std::optional<DescriptorClient::Frame> DescriptorClient::ReadFrame() {
  Frame frame;
  iovec data = {.iov_base = &frame.header, .iov_len = sizeof(frame.header)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * KVB_FD_MAX_PER_FRAME)];
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  if (recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC) !=
      sizeof(frame.header)) {
    return std::nullopt;
  }
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    const int* fds = reinterpret_cast<const int*>(CMSG_DATA(header));
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) frame.descriptors.emplace_back(fds[i]);
  }
  if (frame.header.header.type != KVB_FD_FRAME) return std::nullopt;
  return frame;
}

bool DescriptorClient::WaitForEnd() {
  char bytes[64];
  for (;;) {
    ssize_t size = recv(socket_.get(), bytes, sizeof(bytes), 0);
    if (size == 0) return true;
    if (size < 0) return errno == ECONNRESET;
  }
}

}  // namespace kvbroker
