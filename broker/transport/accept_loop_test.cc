// The accept loop with both kinds of connections, without gRPC and core: this
// test plays their part.
#include "broker/transport/accept_loop.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <future>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "broker/base/clock.h"
#include "broker/base/temp_folder.h"
#include "broker/transport/descriptor_client.h"

namespace kvbroker {
namespace {

UniqueFd ConnectStream(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address),
              sizeof(address)) != 0) {
    fd.Reset();
  }
  return fd;
}

class AcceptLoopTest : public testing::Test {
 protected:
  struct Choice {
    size_t places = 64;
    absl::Duration join_within = absl::Minutes(10);
    std::vector<uint32_t> allow_uids;
    bool use_peer_pidfd = true;
    bool use_pidfd_open = true;
  };

  ~AcceptLoopTest() override {
    loop_->Stop();
    accept_.reset();
    loop_.reset();
  }

  void Start() { Start(Choice()); }
  void Start(const Choice& choice) {
    rendezvous_ = std::make_unique<Rendezvous>(choice.places);
    connections_ = std::make_unique<ConnectionTable>(ConnectionTable::Options{
        .clock = &Clock::Steady(), .first_number = 300, .last_number = 400});
    loop_ = *EventLoop::Create();
    const SocketAccess access = {.anybody = true};
    absl::StatusOr<UnixListener> rpc =
        UnixListener::Bind(RpcPath(), SOCK_STREAM, access);
    absl::StatusOr<UnixListener> descriptors =
        UnixListener::Bind(DescriptorPath(), SOCK_SEQPACKET, access);
    ASSERT_TRUE(rpc.ok() && descriptors.ok())
        << rpc.status() << descriptors.status();
    accept_ = *AcceptLoop::Start(
        {.loop = loop_.get(),
         .connections = connections_.get(),
         .rendezvous = rendezvous_.get(),
         .admission = {.broker_uid = geteuid(), .uids = choice.allow_uids},
         .identify = {.use_peer_pidfd = choice.use_peer_pidfd,
                      .use_pidfd_open = choice.use_pidfd_open},
         .serve_rpc =
             [this](int number) {
               MutexLock lock(&mu_);
               served_.emplace_back(number);
               changed_.SignalAll();
               return absl::OkStatus();
             },
         .rpc_ended =
             [this] {
               MutexLock lock(&mu_);
               ++ended_;
               changed_.SignalAll();
             },
         .incarnation = 77,
         .join_within = choice.join_within,
         .log =
             [this](std::string_view line) {
               MutexLock lock(&mu_);
               lines_.emplace_back(line);
               changed_.SignalAll();
             }},
        *std::move(rpc), *std::move(descriptors));
    loop_->Start();
  }

  std::string RpcPath() const { return folder_ / "a.sock"; }
  std::string DescriptorPath() const { return folder_ / "a.fd.sock"; }

  // Who is behind the connection that was served as the n-th.
  std::shared_ptr<const PeerIdentity> Served(size_t n) {
    MutexLock lock(&mu_);
    while (served_.size() <= n) changed_.Wait(&mu_);
    return connections_->Find("fd:" + std::to_string(served_[n].get()));
  }

  std::string LogLine(size_t n) {
    MutexLock lock(&mu_);
    while (lines_.size() <= n) changed_.Wait(&mu_);
    return lines_[n];
  }

  // Waits until the loop has done what is due.
  void Flush() {
    std::promise<void> done;
    loop_->Post([&] { done.set_value(); });
    done.get_future().wait();
  }

  // This process as a gRPC connection of it would be identified.
  PeerIdentity Myself() {
    size_t n;
    {
      MutexLock lock(&mu_);
      n = served_.size();
    }
    UniqueFd stream = ConnectStream(RpcPath());
    std::shared_ptr<const PeerIdentity> served = Served(n);
    PeerIdentity self;
    self.uid = served->uid;
    self.pid = served->pid;
    self.start_time = served->start_time;
    self.process_inode = served->process_inode;
    self.tenant = served->tenant;
    return self;
  }

  struct Joined {
    std::shared_ptr<DescriptorConnection> connection;
    std::atomic<uint32_t> received = 0;
    std::promise<void> ended;
  };

  // Joins the offered connection, as the session service does.
  std::shared_ptr<Joined> Join(const Nonce& nonce) {
    auto joined = std::make_shared<Joined>();
    auto met = rendezvous_->Meet(nonce, Myself());
    EXPECT_TRUE(met.ok()) << met.status();
    if (!met.ok()) return nullptr;
    joined->connection = *met;
    // Weak: a connection that the test leaves open is not ended.
    std::weak_ptr<Joined> weak = joined;
    absl::Status status =
        joined->connection->Join({.received =
                                      [weak](uint32_t count) {
                                        if (auto joined = weak.lock())
                                          joined->received += count;
                                        return absl::OkStatus();
                                      },
                                  .ended =
                                      [weak] {
                                        if (auto joined = weak.lock())
                                          joined->ended.set_value();
                                      }});
    EXPECT_TRUE(status.ok()) << status;
    return joined;
  }

  // `count` descriptors of one file.
  static std::vector<UniqueFd> SomeDescriptors(int count) {
    std::vector<UniqueFd> descriptors;
    for (int i = 0; i < count; ++i) {
      descriptors.emplace_back(open("/dev/null", O_RDONLY | O_CLOEXEC));
    }
    return descriptors;
  }

  TempFolder folder_;
  std::unique_ptr<Rendezvous> rendezvous_;
  std::unique_ptr<ConnectionTable> connections_;
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<AcceptLoop> accept_;

  Mutex mu_;
  CondVar changed_;
  std::vector<UniqueFd> served_;
  std::vector<std::string> lines_;
  int ended_ = 0;
};

TEST_F(AcceptLoopTest, AnRpcConnectionIsServedUnderItsPeersName) {
  Start();
  UniqueFd client = ConnectStream(RpcPath());
  std::shared_ptr<const PeerIdentity> who = Served(0);
  ASSERT_NE(who, nullptr);
  EXPECT_EQ(who->pid, static_cast<uint32_t>(getpid()));
  EXPECT_EQ(who->uid, getuid());
  client.Reset();
  {
    MutexLock lock(&mu_);
    while (ended_ == 0) changed_.Wait(&mu_);
  }
  EXPECT_EQ(connections_->size(), 0);
}

TEST_F(AcceptLoopTest, HelloIsAnsweredWithANonceThatIsGoodOnce) {
  Start();
  DescriptorClient client(DescriptorPath());
  client.SayHello();
  std::optional<kvb_fd_welcome> welcome = client.ReadWelcome();
  ASSERT_TRUE(welcome);
  EXPECT_EQ(welcome->incarnation, 77);
  Nonce nonce;
  std::memcpy(nonce.data(), welcome->nonce, nonce.size());
  EXPECT_TRUE(rendezvous_->Meet(nonce, Myself()).ok());
  EXPECT_TRUE(absl::IsAborted(rendezvous_->Meet(nonce, Myself()).status()));
}

TEST_F(AcceptLoopTest, AStolenNonceStaysWithItsOwner) {
  Start();
  DescriptorClient client(DescriptorPath());
  std::optional<Nonce> nonce = client.GetNonce();
  ASSERT_TRUE(nonce);
  PeerIdentity thief = Myself();
  thief.uid += 1;
  EXPECT_TRUE(
      absl::IsPermissionDenied(rendezvous_->Meet(*nonce, thief).status()));
  thief = Myself();
  thief.pid += 1;
  thief.process_inode += 1;
  EXPECT_TRUE(
      absl::IsPermissionDenied(rendezvous_->Meet(*nonce, thief).status()));
  EXPECT_NE(Join(*nonce), nullptr);
  Nonce guess{};
  EXPECT_TRUE(absl::IsAborted(rendezvous_->Meet(guess, Myself()).status()));
}

TEST_F(AcceptLoopTest, ANonceEndsWithItsConnection) {
  Start();
  DescriptorClient client(DescriptorPath());
  std::optional<Nonce> nonce = client.GetNonce();
  client.HangUp();
  // Whatever the loop has seen by now: no session comes of it.
  for (;;) {
    Flush();
    auto met = rendezvous_->Meet(*nonce, Myself());
    if (!met.ok()) break;
    Flush();
    auto joined = std::make_shared<Joined>();
    absl::Status status =
        (*met)->Join({.received = [](uint32_t) { return absl::OkStatus(); },
                      .ended = [joined] { joined->ended.set_value(); }});
    if (status.ok()) joined->ended.get_future().wait();
    break;
  }
}

TEST_F(AcceptLoopTest, DescriptorsArriveInOrderAndAreAcknowledged) {
  Start();
  DescriptorClient client(DescriptorPath());
  std::shared_ptr<Joined> joined = Join(*client.GetNonce());
  joined->connection->Send(GrantId(5), 0, SomeDescriptors(253));
  joined->connection->Send(GrantId(5), 253, SomeDescriptors(2));
  std::optional<DescriptorClient::Frame> first = client.ReadFrame();
  std::optional<DescriptorClient::Frame> second = client.ReadFrame();
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->header.grant_id, 5);
  EXPECT_EQ(first->header.handle_count, 253);
  EXPECT_EQ(first->descriptors.size(), 253);
  EXPECT_EQ(second->header.first_handle, 253);
  EXPECT_EQ(second->descriptors.size(), 2);
  client.Ack(GrantId(5), 253);
  client.Ack(GrantId(5), 2);
  client.HangUp();
  joined->ended.get_future().wait();
  EXPECT_EQ(joined->received, 255);
}

TEST_F(AcceptLoopTest, APeerThatDoesNotReadGetsTheRestWhenItDoes) {
  Start();
  DescriptorClient client(DescriptorPath());
  std::shared_ptr<Joined> joined = Join(*client.GetNonce());
  // More packets than the socket takes at once.
  constexpr uint32_t kFrames = 900;
  for (uint32_t i = 0; i < kFrames; ++i) {
    joined->connection->Send(GrantId(1), i, SomeDescriptors(1));
  }
  for (uint32_t i = 0; i < kFrames; ++i) {
    std::optional<DescriptorClient::Frame> frame = client.ReadFrame();
    ASSERT_TRUE(frame) << i;
    ASSERT_EQ(frame->header.first_handle, i);
    ASSERT_EQ(frame->descriptors.size(), 1);
  }
}

TEST_F(AcceptLoopTest, APeerThatNeverReadsIsDroppedWithoutLeaks) {
  Start();
  DescriptorClient client(DescriptorPath());
  std::shared_ptr<Joined> joined = Join(*client.GetNonce());
  std::future<void> ended = joined->ended.get_future();
  size_t sent = 0;
  while (ended.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
    std::vector<UniqueFd> none;
    for (int i = 0; i < 253; ++i) none.emplace_back(dup(client.fd()));
    if (!none.back()) break;  // the machine allows no more
    joined->connection->Send(GrantId(1), 0, std::move(none));
    sent += 253;
    ASSERT_LT(sent, 1000000u);
  }
  joined->connection->Close(absl::OkStatus());
  ended.wait();
  UniqueFd free(open("/dev/null", O_RDONLY));
  EXPECT_TRUE(free);
}

TEST_F(AcceptLoopTest, GarbageEndsTheConnectionAndIsLogged) {
  Start();
  kvb_fd_hello good = {
      .header = {.magic = KVB_FD_MAGIC, .version = 1, .type = KVB_FD_HELLO},
      .pid = 1,
      .reserved = 0};
  auto bytes = [](const auto& packet) {
    return std::string(reinterpret_cast<const char*>(&packet), sizeof(packet));
  };
  std::vector<std::string> packets = {
      "x", std::string(16, '\0'), std::string(63, 'a'), std::string(5000, 'a')};
  kvb_fd_hello bad = good;
  bad.header.version = 2;
  packets.push_back(bytes(bad));
  bad = good;
  bad.header.type = KVB_FD_ACK;
  packets.push_back(bytes(bad));
  bad = good;
  bad.reserved = 1;
  packets.push_back(bytes(bad));
  for (size_t i = 0; i < packets.size(); ++i) {
    DescriptorClient client(DescriptorPath());
    client.SendPacket(packets[i]);
    EXPECT_TRUE(client.WaitForEnd()) << i;
    EXPECT_NE(LogLine(i).find("malformed"), std::string::npos) << LogLine(i);
  }
  // After a good hello: a second one, a descriptor, an ack of nothing.
  kvb_fd_ack ack = {
      .header = {.magic = KVB_FD_MAGIC, .version = 1, .type = KVB_FD_ACK},
      .grant_id = 1,
      .handle_count = 1,
      .reserved = 0};
  for (int kind = 0; kind < 3; ++kind) {
    DescriptorClient client(DescriptorPath());
    ASSERT_TRUE(client.GetNonce());
    if (kind == 0) client.SayHello();
    if (kind == 1) client.SendPacket(bytes(ack), {client.fd()});
    if (kind == 2) client.SendPacket(bytes(ack));
    EXPECT_TRUE(client.WaitForEnd()) << kind;
  }
}

TEST_F(AcceptLoopTest, UnwantedDescriptorsAreClosed) {
  Start();
  const kvb_fd_hello hello = {
      .header = {.magic = KVB_FD_MAGIC, .version = 1, .type = KVB_FD_HELLO},
      .pid = 1,
      .reserved = 0};
  const std::string packet(reinterpret_cast<const char*>(&hello),
                           sizeof(hello));
  for (int count = 1; count <= 4; ++count) {
    int ends[2];
    ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
    UniqueFd read_end(ends[0]), write_end(ends[1]);
    DescriptorClient client(DescriptorPath());
    client.SendPacket(packet, std::vector<int>(count, write_end.get()));
    write_end.Reset();
    client.HangUp();
    // Ends only when nobody holds the other end any more.
    char byte;
    EXPECT_EQ(read(read_end.get(), &byte, 1), 0) << count;
  }
}

TEST_F(AcceptLoopTest, AnAckOfMoreThanWasSentEndsTheConnection) {
  Start();
  DescriptorClient client(DescriptorPath());
  std::shared_ptr<Joined> joined = Join(*client.GetNonce());
  joined->connection->Send(GrantId(1), 0, SomeDescriptors(2));
  client.Ack(GrantId(1), 2);
  client.Ack(GrantId(1), 1);
  joined->ended.get_future().wait();
  EXPECT_EQ(joined->received, 2);
}

TEST_F(AcceptLoopTest, WhoNeverOpensIsDropped) {
  Start({.join_within = absl::Milliseconds(20)});
  DescriptorClient silent(DescriptorPath());
  DescriptorClient greeted(DescriptorPath());
  ASSERT_TRUE(greeted.GetNonce());
  EXPECT_TRUE(silent.WaitForEnd());
  EXPECT_TRUE(greeted.WaitForEnd());
}

TEST_F(AcceptLoopTest, HalfOpenConnectionsOfOneUserAreFew) {
  Start({.places = 2});
  DescriptorClient one(DescriptorPath());
  ASSERT_TRUE(one.GetNonce());
  DescriptorClient two(DescriptorPath());
  std::optional<Nonce> nonce = two.GetNonce();
  ASSERT_TRUE(nonce);
  DescriptorClient three(DescriptorPath());
  EXPECT_TRUE(three.WaitForEnd());
  // A session takes no place.
  ASSERT_NE(Join(*nonce), nullptr);
  Flush();
  DescriptorClient four(DescriptorPath());
  EXPECT_TRUE(four.GetNonce());
}

TEST_F(AcceptLoopTest, OtherUsersAreRefusedUnlessAllowed) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to change users";
  Start({.allow_uids = {4001}});
  for (auto [uid, welcome] : {std::pair(4001, true), std::pair(4002, false)}) {
    pid_t child = fork();
    if (child == 0) {
      if (setresgid(uid, uid, uid) != 0 || setresuid(uid, uid, uid) != 0) {
        _exit(2);
      }
      DescriptorClient client(DescriptorPath());
      UniqueFd stream = ConnectStream(RpcPath());
      if (!client.connected() || !stream) _exit(3);
      const bool greeted = client.GetNonce().has_value();
      // The stream is closed, or stays open without a word.
      char byte;
      if (!greeted && read(stream.get(), &byte, 1) != 0) _exit(4);
      _exit(greeted ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    EXPECT_EQ(WEXITSTATUS(status), welcome ? 0 : 1);
  }
  EXPECT_NE(LogLine(0).find("peer-refused uid=4002"), std::string::npos)
      << LogLine(0);
}

TEST_F(AcceptLoopTest, WithoutTheKernelsHelpThePeersPidfdServes) {
  Start({.use_peer_pidfd = false, .use_pidfd_open = false});
  DescriptorClient without(DescriptorPath());
  EXPECT_FALSE(without.GetNonce(/*with_pidfd=*/false));
  EXPECT_NE(LogLine(0).find("cannot be watched"), std::string::npos)
      << LogLine(0);
  DescriptorClient with(DescriptorPath());
  EXPECT_TRUE(with.GetNonce(/*with_pidfd=*/true));
}

TEST_F(AcceptLoopTest, ADeadAcceptLoopLeavesNoSockets) {
  Start();
  loop_->Stop();
  accept_.reset();
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
}

}  // namespace
}  // namespace kvbroker
