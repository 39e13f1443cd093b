// Peers that break every rule, on the real sockets of a whole broker, while a
// well-behaved neighbour in a process of its own takes and returns a page again
// and again. Whatever they do: each of its rounds ends soon, nothing of others
// changes, and the broker is as it was when they are gone.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "broker/base/temp_folder.h"
#include "broker/server/composition.h"
#include "broker/server/test_peer.h"
#include "broker/server/test_session.h"
#include "proto/fd_frame.h"

namespace kvbroker {
namespace {

// AddressSanitizer makes all slower and keeps what was freed.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kSlower = 5;
#else
constexpr int64_t kSlower = 1;
#endif

// Far above what a round takes, far below what a stall would be.
constexpr int64_t kStallMicros = 2'000'000 * kSlower;

bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

struct Descriptors {
  size_t pages = 0;  // memory that the broker holds, or is exporting
  size_t others = 0;
};

Descriptors CountDescriptors() {
  Descriptors count;
  for (const auto& entry :
       std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;  // closed by another thread meanwhile
    const std::string target = std::filesystem::read_symlink(entry, gone);
    (Has(target, "/memfd:kvbroker-page") ? count.pages : count.others) += 1;
  }
  return count;
}

// Without pages: those of the neighbour come and go.
size_t OpenDescriptors() { return CountDescriptors().others; }

int64_t ResidentKiB() {
  FILE* status = fopen("/proc/self/status", "r");
  char line[256];
  long long kib = 0;
  while (fgets(line, sizeof(line), status) != nullptr) {
    if (sscanf(line, "VmRSS: %lld kB", &kib) == 1) break;
  }
  fclose(status);
  return kib;
}

class HostileTest : public testing::Test {
 protected:
  HostileTest() {
    config_.backend = "host";
    config_.device_uuid = "HOST-test";
    config_.capacity.bytes = MiB(64);
    config_.socket_dir = folder_ / "sockets";
    config_.lock_dir = folder_ / "locks";
    config_.log_file = folder_ / "log";
    config_.state_dir = "none";
    // Else anybody may say that it holds pages of an earlier broker.
    config_.resume_grace = absl::ZeroDuration();
  }

  void Start(BrokerOptions options = {}) {
    options.log_to_stderr = false;
    absl::StatusOr<std::unique_ptr<RunningBroker>> broker =
        RunningBroker::Start(config_, std::move(options));
    ASSERT_TRUE(broker.ok()) << broker.status();
    broker_ = *std::move(broker);
    neighbour_ = std::make_unique<TestPeer>(address(), "serve");
    ASSERT_EQ(neighbour_->Line(), "serving");
  }

  // The neighbour was served all the time, and the books are right.
  void ExpectNobodyWasHurt() {
    neighbour_->CloseInput();
    const std::string line = neighbour_->Line();
    long long rounds = 0, worst = 0;
    ASSERT_EQ(sscanf(line.c_str(), "%lld %lld", &rounds, &worst), 2) << line;
    printf("the neighbour: %lld rounds, the worst took %.3f ms\n", rounds,
           static_cast<double>(worst) / 1000);
    EXPECT_GE(rounds, 10);
    EXPECT_LT(worst, kStallMicros);
    neighbour_.reset();
    EXPECT_EQ(broker_->core().CheckInvariants(), absl::OkStatus());
  }

  std::string Log() {
    broker_.reset();  // writes all of it
    std::string text;
    UniqueFd fd(open(config_.log_file.c_str(), O_RDONLY));
    char bytes[4096];
    for (ssize_t size; (size = read(fd.get(), bytes, sizeof(bytes))) > 0;) {
      text.append(bytes, size);
    }
    return text;
  }

  const client::BrokerAddress& address() { return broker_->address(); }
  uint32_t Sessions() { return broker_->core().Snapshot().broker.sessions; }
  Bytes HeldBy(const std::string& name) {
    for (const InstanceStatus& i : broker_->core().Snapshot().instances) {
      if (i.name == name) return i.held;
    }
    return Bytes(0);
  }

  // Once the neighbour has left, and what was kept for it has decayed.
  void ExpectNoPageIsLeft() {
    WaitUntil([] { return CountDescriptors().pages == 0; });
  }

  // Waits for what comes in its own time; the test's time-out is the limit.
  template <typename Condition>
  void WaitUntil(Condition condition) {
    while (!condition()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  UniqueFd ConnectRpc() {
    sockaddr_un to = {};
    to.sun_family = AF_UNIX;
    address().rpc_path.copy(to.sun_path, sizeof(to.sun_path) - 1);
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    timeval patience = {.tv_sec = 1};
    setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&to), sizeof(to)) !=
        0) {
      fd.Reset();
    }
    return fd;
  }

  // Until all is written or the broker takes no more.
  static void WriteAll(const UniqueFd& fd, std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t size =
          send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (size <= 0) return;
      bytes.remove_prefix(size);
    }
  }

  TempFolder folder_;
  BrokerConfig config_;
  std::unique_ptr<RunningBroker> broker_;
  std::unique_ptr<TestPeer> neighbour_;
};

// ---- who ------------------------------------------------------------------

TEST_F(HostileTest, AUserWhoIsNotAdmittedGetsNothing) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to change users";
  config_.allow_uids = {4001};
  Start();
  for (const char* command : {"list", "hold", "delete", "limit"}) {
    TestPeer stranger(address(), command, "1", 4002);
    EXPECT_TRUE(Has(stranger.Line(), "UNAVAILABLE")) << command;
  }
  ExpectNobodyWasHurt();
  EXPECT_TRUE(Has(Log(), "peer-refused uid=4002"));
}

TEST_F(HostileTest, AnotherTenantSeesAndChangesNothingOfOthers) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to change users";
  config_.allow_uids = {4001};
  Start();
  TestSession victim(address());
  ASSERT_TRUE(victim.Begin("victim").ok());
  ASSERT_TRUE(victim.Acquire(2).ok());
  auto said = [&](const std::string& command, const std::string& argument) {
    return TestPeer(address(), command, argument, 4001).Line();
  };
  EXPECT_EQ(said("list", ""), "OK ");
  for (const char* command : {"limit", "delete", "explain"}) {
    const std::string line = said(command, "victim");
    EXPECT_TRUE(Has(line, "PERMISSION_DENIED") || Has(line, "NOT_FOUND"))
        << command << ": " << line;
    // Not even who else there is.
    EXPECT_FALSE(Has(said(command, "nobody"), "victim")) << command;
  }
  EXPECT_EQ(HeldBy("victim"), victim.page_bytes() * 2);
  EXPECT_TRUE(victim.Acquire(1).ok());
  ExpectNobodyWasHurt();
}

TEST_F(HostileTest, ANonceIsGoodOnceAndForItsOwnerOnly) {
  Start();
  TestSession owner(address());
  const Nonce nonce = *owner.descriptors().GetNonce();
  const std::string hex = absl::BytesToHexString(absl::string_view(
      reinterpret_cast<const char*>(nonce.data()), nonce.size()));
  // Of the same user, but another process.
  EXPECT_TRUE(
      Has(TestPeer(address(), "steal", hex).Line(), "PERMISSION_DENIED"));
  ASSERT_TRUE(owner.OpenWith(nonce, "owner").ok()) << "still the owner's";
  EXPECT_TRUE(Has(TestPeer(address(), "steal", hex).Line(), "ABORTED"));
  for (int i = 0; i < 50; ++i) {
    TestSession replay(address());
    EXPECT_TRUE(absl::IsAborted(replay.OpenWith(nonce, "replay")));
    Nonce guess = nonce;
    guess[i % guess.size()] ^= 1 << i % 8;
    TestSession guesser(address());
    EXPECT_TRUE(absl::IsAborted(guesser.OpenWith(guess, "guess")));
  }
  // Twice on one connection: the second Open is garbage to the first session.
  owner.Send(TestSession::OpenOf(nonce, "owner"));
  EXPECT_TRUE(absl::IsInvalidArgument(owner.ReadToTheEnd()));
  ExpectNobodyWasHurt();
}

// ---- forged ids -----------------------------------------------------------

TEST_F(HostileTest, ForgedIdsEndTheForgersSessionAndChangeNothing) {
  Start();
  TestSession victim(address());
  ASSERT_TRUE(victim.Begin("victim").ok());
  ASSERT_TRUE(victim.Acquire(3).ok());
  const Granted lent = victim.last_granted();
  const Bytes held = victim.page_bytes() * 3;

  const std::vector<ClientMessage> of_another = {
      Acquire{
          .sequence = Sequence(1), .pool = lent.pool, .want = 1, .at_least = 1},
      Return{lent.pool, lent.pages},
      ReclaimAnswer{.pool = lent.pool, .given = lent.pages, .final = true},
      Report{.pool = lent.pool, .idle = 3, .settled = 3},
      Resume{.pool = lent.pool, .pages = lent.pages, .last = true},
      Return{PoolId(0), lent.pages},
      Return{PoolId(~uint64_t{0}), lent.pages},
  };
  for (const ClientMessage& message : of_another) {
    TestSession forger(address());
    ASSERT_TRUE(forger.Begin("forger").ok());
    forger.Send(message);
    absl::Status end = forger.ReadToTheEnd();
    EXPECT_TRUE(absl::IsPermissionDenied(end) ||
                absl::IsFailedPrecondition(end) || absl::IsInvalidArgument(end))
        << message.index() << ": " << end;
    EXPECT_EQ(HeldBy("victim"), held) << message.index();
  }
  // What means nothing here is passed over.
  {
    TestSession forger(address());
    ASSERT_TRUE(forger.Begin("forger").ok());
    const PoolId pool = forger.pool();
    forger.Send(Mapped{.grant = lent.grant, .failed = lent.pages});
    forger.Send(Resend{lent.sequence});
    forger.Send(Cancel{lent.sequence});
    forger.Send(Return{pool, lent.pages});
    ASSERT_TRUE(forger.Acquire(2).ok());
    const Granted own = forger.last_granted();
    std::vector<PageName> pages;
    for (PageName page : own.pages) {
      pages.push_back({page.index, Generation(page.generation.value() - 1)});
      pages.push_back({page.index, Generation(page.generation.value() + 1)});
    }
    pages.push_back({PageIndex(0xffffffff), Generation(0xffffffff)});
    forger.Send(Return{pool, pages});
    forger.Send(ReclaimAnswer{.pool = pool,
                              .revision = Revision(77),
                              .given = pages,
                              .kept = -1,
                              .final = true});
    forger.Send(Report{.pool = pool,
                       .in_use = 1 << 30,
                       .cached = 1 << 30,
                       .idle = 1 << 30,
                       .settled = 1 << 30,
                       .revision = Revision(99)});
    ASSERT_TRUE(forger.Acquire(1).ok());
    EXPECT_EQ(HeldBy("forger"), forger.page_bytes() * 3);
    forger.Send(Return{pool, own.pages});
    forger.Send(Return{pool, own.pages});  // twice
    ASSERT_TRUE(forger.Acquire(1).ok());
    EXPECT_EQ(HeldBy("forger"), forger.page_bytes() * 2);
  }
  // To go on from another process's session.
  TestPeer resumer(
      address(), "resume",
      absl::StrCat(victim.opened().incarnation, " ", victim.id().value()));
  const std::string line = resumer.Line();
  EXPECT_TRUE(Has(line, "PERMISSION_DENIED") &&
              Has(line, "not a session of this process"))
      << line;
  // Of an earlier broker that never was.
  TestPeer adopter(address(), "resume", absl::StrCat("1 ", 1));
  EXPECT_TRUE(Has(adopter.Line(), "the broker did not lend page"));
  EXPECT_EQ(HeldBy("victim"), held);
  EXPECT_TRUE(victim.Acquire(1).ok());
  ExpectNobodyWasHurt();
}

// ---- garbage ----------------------------------------------------------------

TEST_F(HostileTest, GarbageOnTheDescriptorSocketLeaksNoDescriptor) {
  Start();
  {
    TestSession warm(address());
    ASSERT_TRUE(warm.Begin("warm").ok());
  }
  WaitUntil([&] { return Sessions() == 1; });
  const size_t before = OpenDescriptors();
  std::mt19937 random(1);
  kvb_fd_hello hello = {.header = {KVB_FD_MAGIC, KVB_FD_VERSION, KVB_FD_HELLO},
                        .pid = static_cast<uint32_t>(getpid())};
  auto bytes_of = [](const auto& packet, size_t cut = 0) {
    return std::string(reinterpret_cast<const char*>(&packet),
                       sizeof(packet) - cut);
  };
  auto sends = [&](const std::vector<std::string>& packets,
                   size_t descriptors) {
    DescriptorClient client(address().descriptor_path);
    ASSERT_TRUE(client.connected());
    for (const std::string& packet : packets) {
      client.SendPacket(packet, std::vector<int>(descriptors, 0));
    }
    EXPECT_TRUE(client.WaitForEnd());
  };
  for (int i = 0; i < 100; ++i) {
    std::string noise(1 + random() % 300, '\0');
    for (char& c : noise) c = static_cast<char>(random());
    sends({noise}, i % 3);
  }
  sends({bytes_of(hello, 1)}, 0);
  sends({bytes_of(hello) + "x"}, 1);
  kvb_fd_hello wrong = hello;
  wrong.header.magic ^= 1;
  sends({bytes_of(wrong)}, 1);
  wrong = hello;
  wrong.header.version ^= 1;
  sends({bytes_of(wrong)}, 1);
  // A hello twice, an ack of nothing, before and in a session; a descriptor
  // where none belongs.
  sends({bytes_of(hello), bytes_of(hello)}, 0);
  kvb_fd_ack ack = {.header = {KVB_FD_MAGIC, KVB_FD_VERSION, KVB_FD_ACK},
                    .grant_id = 1,
                    .handle_count = 1};
  sends({bytes_of(hello), bytes_of(ack)}, 0);
  for (size_t descriptors : {0, 1}) {
    TestSession session(address());
    ASSERT_TRUE(session.Begin("acks").ok());
    session.descriptors().SendPacket(bytes_of(ack),
                                     std::vector<int>(descriptors, 0));
    EXPECT_TRUE(absl::IsUnavailable(session.ReadToTheEnd()));
  }
  // More descriptors than anybody has a use for, in one packet.
  for (size_t many : {2, 3, 253}) sends({bytes_of(hello)}, many);
  WaitUntil([&] { return OpenDescriptors() <= before; });
  ExpectNobodyWasHurt();
  ExpectNoPageIsLeft();
}

TEST_F(HostileTest, GarbageAndFloodsOnTheRpcSocketLeakNoDescriptor) {
  Start();
  const size_t before = OpenDescriptors();
  const std::string preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
  const std::string settings("\0\0\0\x04\0\0\0\0\0", 9);
  const std::string ping("\0\0\x08\x06\0\0\0\0\0abcdefgh", 17);
  const std::string reset("\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08", 13);
  auto times = [](const std::string& text, int count) {
    std::string all;
    for (int i = 0; i < count; ++i) all += text;
    return all;
  };
  std::mt19937 random(1);
  std::string noise(1 << 20, '\0');
  for (char& c : noise) c = static_cast<char>(random());
  const std::vector<std::string> attacks = {
      noise,
      preface.substr(0, 10),
      preface + noise,
      preface + settings + times(ping, 50'000),
      preface + times(settings, 50'000),
      preface + settings + times(reset, 50'000),
      // A frame of 16 MiB that never comes.
      preface + settings + std::string("\xff\xff\xff\0\0\0\0\0\x01", 9),
      "GET / HTTP/1.1\r\nHost: kvbroker\r\n\r\n",
  };
  {
    std::vector<UniqueFd> open;
    std::vector<std::thread> threads;
    {
      for (const std::string& attack : attacks) {
        open.push_back(ConnectRpc());
        ASSERT_TRUE(open.back());
        threads.emplace_back([fd = open.back().get(), &attack] {
          UniqueFd borrowed(fcntl(fd, F_DUPFD_CLOEXEC, 3));
          WriteAll(borrowed, attack);
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE(TestAdmin(address()).List().ok());
  }
  WaitUntil([&] { return OpenDescriptors() <= before; });
  ExpectNobodyWasHurt();
  ExpectNoPageIsLeft();
}

// ---- who does not read ------------------------------------------------------

TEST_F(HostileTest, SessionsThatNeverAcknowledgeShutNobodyOut) {
  BrokerOptions options;
  options.descriptor_window = 256;
  options.acknowledge_within = absl::Seconds(2);
  Start(std::move(options));
  std::vector<std::unique_ptr<TestSession>> hogs;
  for (int i = 0; i < 8; ++i) {
    hogs.push_back(std::make_unique<TestSession>(address()));
    ASSERT_TRUE(hogs.back()->Begin(absl::StrCat("hog", i)).ok());
    ASSERT_TRUE(hogs.back()->SendAcquire(40));
  }
  // A newcomer is served, too: less than its part is under way at a time.
  TestSession late(address());
  ASSERT_TRUE(late.Begin("late").ok());
  EXPECT_TRUE(late.Acquire(60).ok());
  int ended = 0;
  for (auto& hog : hogs) {
    absl::Status end = hog->ReadToTheEnd();
    ended +=
        absl::IsDeadlineExceeded(end) && Has(end.ToString(), "acknowledge");
    if (ended > 0) break;
  }
  EXPECT_GT(ended, 0) << "those who hold up others are ended";
  EXPECT_TRUE(late.Acquire(10).ok());
  ExpectNobodyWasHurt();
  hogs.clear();
  EXPECT_TRUE(Has(Log(), "unread session="));
}

TEST_F(HostileTest, AStreamThatIsNotReadIsBoundedInBytes) {
  BrokerOptions options;
  options.max_waiting = 1'000'000;
  options.max_waiting_bytes = 256 << 10;
  Start(std::move(options));
  TestPeer slow(address(), "slow");
  EXPECT_EQ(slow.Line(), "dropped");
  ExpectNobodyWasHurt();
  EXPECT_TRUE(Has(Log(), "the peer does not read"));
}

// ---- floods -----------------------------------------------------------------

TEST_F(HostileTest, FloodsOfConnectionsStayWithinTheUsersQuota) {
  config_.allow_uids = {4001};
  config_.quotas.connections = 100;
  config_.quotas.half_open = 16;
  Start();
  const int64_t before_kib = ResidentKiB();
  const size_t before = OpenDescriptors();
  {
    std::vector<UniqueFd> held;
    std::vector<DescriptorClient> half_open;
    int welcome = 0;
    for (int i = 0; i < 2000; ++i) {
      held.push_back(ConnectRpc());
      DescriptorClient client(address().descriptor_path);
      client.SayHello();
      if (half_open.size() < 200) half_open.push_back(std::move(client));
    }
    for (DescriptorClient& client : half_open) {
      welcome += client.ReadWelcome().has_value();
    }
    EXPECT_LE(welcome, 16);
    // Another user has places of its own.
    if (getuid() == 0) {
      TestPeer other(address(), "hold", "1", 4001);
      EXPECT_EQ(other.Line(), "held");
    }
  }
  WaitUntil([&] { return OpenDescriptors() <= before + 8; });
  const int64_t grown = ResidentKiB() - before_kib;
  printf("4,000 connections: %lld KiB more\n", static_cast<long long>(grown));
  EXPECT_LT(grown, (100 << 10) * kSlower);
  ExpectNobodyWasHurt();
  ExpectNoPageIsLeft();
  const std::string log = Log();
  EXPECT_TRUE(Has(log, "raise quota.connections"));
  EXPECT_TRUE(Has(log, "raise quota.half_open"));
}

TEST_F(HostileTest, FloodsOfSessionsAndInstancesStayWithinTheQuotas) {
  config_.allow_uids = {4001};
  config_.quotas.sessions = 12;
  config_.quotas.instances = 6;
  Start();
  const int64_t before_kib = ResidentKiB();
  std::vector<std::unique_ptr<TestSession>> sessions;
  int no_session = 0, no_instance = 0;
  for (int i = 0; i < 1000; ++i) {
    auto session = sessions.empty()
                       ? std::make_unique<TestSession>(address())
                       : std::make_unique<TestSession>(*sessions[0]);
    std::optional<Nonce> nonce = session->descriptors().GetNonce();
    if (!nonce) continue;  // too many half open at this moment
    Open open =
        TestSession::OpenOf(*nonce, absl::StrCat("flood", i % 2 == 0 ? i : 0));
    for (int label = 0; label < 32; ++label) {
      open.labels[absl::StrCat("label", i, "_", label)] = std::string(255, 'x');
    }
    absl::Status status = session->OpenWith(open);
    no_session += Has(status.ToString(), "raise quota.sessions");
    no_instance += Has(status.ToString(), "raise quota.instances");
    if (status.ok()) sessions.push_back(std::move(session));
  }
  EXPECT_EQ(sessions.size(), 11) << "and the neighbour";
  EXPECT_GT(no_session, 0);
  EXPECT_GT(no_instance, 0);
  if (getuid() == 0) {
    TestPeer other(address(), "hold", "1", 4001);
    EXPECT_EQ(other.Line(), "held");
  }
  const int64_t grown = ResidentKiB() - before_kib;
  printf("1,000 sessions tried: %lld KiB more\n",
         static_cast<long long>(grown));
  EXPECT_LT(grown, (100 << 10) * kSlower);
  sessions.clear();
  WaitUntil([&] { return Sessions() <= 2; });
  ExpectNobodyWasHurt();
}

TEST_F(HostileTest, FloodsOfRequestsEndTheSessionOrAreServed) {
  Start();
  {
    // More claims that wait than are allowed.
    TestSession holder(address());
    ASSERT_TRUE(holder.Begin("holder").ok());
    ASSERT_TRUE(holder.Acquire(300).ok());
    TestSession greedy(address());
    ASSERT_TRUE(greedy.Begin("greedy").ok());
    for (int i = 0; i < 1000 && greedy.SendAcquire(300); ++i) {
    }
    absl::Status end = greedy.ReadToTheEnd();
    EXPECT_TRUE(absl::IsResourceExhausted(end)) << end;
    EXPECT_TRUE(Has(end.ToString(), "64 unanswered")) << end;
  }
  {
    TestSession busy(address());
    ASSERT_TRUE(busy.Begin("busy").ok());
    for (int i = 0; i < 20'000; ++i) {
      ASSERT_TRUE(busy.Send(Report{.pool = busy.pool()}));
      ASSERT_TRUE(busy.Send(Resend{Sequence(i + 1)}));
    }
    EXPECT_TRUE(busy.Acquire(1).ok());
  }
  ExpectNobodyWasHurt();
}

// ---- sizes ------------------------------------------------------------------

TEST_F(HostileTest, ListsAreServedAtTheLimitAndRefusedAboveIt) {
  Start();
  const PageName largest = {PageIndex(0xffffffff), Generation(0xffffffff)};
  auto end_of = [&](auto make) {
    TestSession session(address());
    EXPECT_TRUE(session.Begin("large").ok());
    session.Send(make(session.pool()));
    return session.Acquire(1).status();
  };
  auto a_return = [&](size_t pages) {
    return [=](PoolId pool) {
      return Return{pool, std::vector<PageName>(pages, largest)};
    };
  };
  EXPECT_EQ(end_of(a_return(65536)), absl::OkStatus());
  EXPECT_TRUE(absl::IsInvalidArgument(end_of(a_return(65537))));
  // Not even read.
  EXPECT_TRUE(absl::IsResourceExhausted(end_of(a_return(200'000))));
  auto acquire = [](size_t indexes) {
    return [=](PoolId pool) {
      Acquire message{.sequence = Sequence(1'000'000),
                      .pool = pool,
                      .want = static_cast<PageCount>(indexes),
                      .at_least = 1,
                      .urgency = Urgency::kSpeculative};
      for (size_t i = 0; i < indexes; ++i) {
        message.indexes.push_back(PageIndex(i));
      }
      return message;
    };
  };
  EXPECT_TRUE(absl::IsInvalidArgument(end_of(acquire(65537))));
  auto resume = [&](size_t pages) {
    return [=](PoolId pool) {
      return Resume{.pool = pool,
                    .pages = std::vector<PageName>(pages, largest)};
    };
  };
  EXPECT_TRUE(absl::IsFailedPrecondition(end_of(resume(65536))));
  EXPECT_TRUE(absl::IsInvalidArgument(end_of(resume(65537))));
  ExpectNobodyWasHurt();
}

// ---- bulk -------------------------------------------------------------------

TEST_F(HostileTest, ManySmallHandlesAndTheirOwnersDeathStallNobody) {
  config_.capacity.bytes = MiB(512);
  Start();
  // Each is a descriptor of the broker.
  const int pages =
      static_cast<int>(std::min<long>(65536, sysconf(_SC_OPEN_MAX) / 2));
  printf("%d pages\n", pages);
  for (int round = 0; round < 2; ++round) {
    TestPeer bulk(address(), "bulk", absl::StrCat(pages));
    ASSERT_EQ(bulk.Line(), "held");
    EXPECT_EQ(HeldBy("bulk"), KiB(4) * pages);
    bulk.Kill();
    WaitUntil([&] { return HeldBy("bulk") == Bytes(0); });
  }
  ExpectNobodyWasHurt();
}

// ---- coming and going -------------------------------------------------------

TEST_F(HostileTest, ComingAndGoingLeavesNothingBehind) {
  Start();
  TestSession first(address());
  ASSERT_TRUE(first.Begin("first").ok());
  size_t before = 0;
  int64_t before_kib = 0;
  for (int i = 0; i < 10'000; ++i) {
    if (i == 100) {
      WaitUntil([&] { return Sessions() == 2; });
      before = OpenDescriptors();
      before_kib = ResidentKiB();
    }
    TestSession session(first);
    absl::Status begun = session.Begin("visitor");
    ASSERT_TRUE(begun.ok()) << i << ": " << begun;
  }
  WaitUntil([&] { return Sessions() == 2; });
  // Descriptors of this process, the broker's among them: each watch of a
  // process has one.
  WaitUntil([&] { return OpenDescriptors() <= before + 10; });
  const int64_t grown = ResidentKiB() - before_kib;
  printf("10,000 sessions one after the other: %lld KiB more\n",
         static_cast<long long>(grown));
  EXPECT_LT(grown, (50 << 10) * kSlower);
  ExpectNobodyWasHurt();
  ExpectNoPageIsLeft();
}

TEST_F(HostileTest, WhoHasLeftKeepsTheBrokerFromNothing) {
  config_.idle_exit = absl::Milliseconds(1);
  std::atomic<int> idle = 0;
  BrokerOptions options;
  options.idle = [&] { ++idle; };
  Start(std::move(options));
  int before;
  {
    TestSession visitor(address());
    ASSERT_TRUE(visitor.Begin("visitor").ok());
    ExpectNobodyWasHurt();
    before = idle;
  }
  // Its process, which is this one, lives on.
  WaitUntil([&] { return idle > before; });
  broker_.reset();  // calls `idle`
}

}  // namespace
}  // namespace kvbroker
