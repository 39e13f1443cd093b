// Sessions with their workers, engines with threads of their own, and a core
// that anybody calls: for ThreadSanitizer, and for what only threads show.
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/base/mutex.h"
#include "broker/core/core.h"
#include "broker/device/fake_backend.h"
#include "client/session/session.h"
#include "gtest/gtest.h"
#include "tests/harness/null_mapper.h"

namespace kvbroker::client {
namespace {

constexpr Bytes kPage = KiB(64);
constexpr size_t kBlocksPerPage = 16;

// Hands everything to the core at once, on the sender's thread.
class DirectLink : public BrokerLink {
 public:
  DirectLink(Core& core, Peer peer, LinkListener& client)
      : core_(core),
        peer_(std::move(peer)),
        listener_(std::make_shared<Listener>(client)) {}

  ~DirectLink() override {
    core_.HungUp(session());
    listener_->Detach();
  }

  void Send(ClientMessage message) override {
    if (auto* open = std::get_if<Open>(&message)) {
      auto opened = core_.OpenSession(peer_, *open, listener_);
      ASSERT_TRUE(opened.ok()) << opened.status();
      session_ = opened->value();
      return;
    }
    absl::Status status = core_.Handle(session(), message);
    EXPECT_TRUE(status.ok()) << status;
  }
  void AcknowledgeDescriptors(GrantId, uint32_t count) override {
    absl::Status status = core_.DescriptorsReceived(session(), count);
    EXPECT_TRUE(status.ok()) << status;
  }

 private:
  // Tells the client from a thread of its own.
  class Listener : public SessionListener {
   public:
    explicit Listener(LinkListener& client)
        : client_(client), thread_([this] { Run(); }) {}
    // Nothing is told after it.
    void Detach() {
      {
        MutexLock lock(&mu_);
        detached_ = true;
        changed_.SignalAll();
      }
      thread_.join();
    }
    void Tell(BrokerMessage message) override {
      Queue([this, message] { client_.OnMessage(message); });
    }
    void SendDescriptors(GrantId grant, uint32_t first_handle,
                         std::vector<UniqueFd> descriptors) override {
      auto shared =
          std::make_shared<std::vector<UniqueFd>>(std::move(descriptors));
      Queue([this, grant, first_handle, shared] {
        client_.OnDescriptors(grant, first_handle, std::move(*shared));
      });
    }
    void Close(const absl::Status& reason) override {
      Queue([this, reason] { client_.OnDisconnected(reason); });
    }

   private:
    void Queue(std::function<void()> tell) {
      MutexLock lock(&mu_);
      queue_.push_back(std::move(tell));
      changed_.SignalAll();
    }
    void Run() {
      while (true) {
        std::function<void()> tell;
        {
          MutexLock lock(&mu_);
          while (queue_.empty() && !detached_) changed_.Wait(&mu_);
          if (detached_) return;
          tell = std::move(queue_.front());
          queue_.pop_front();
        }
        tell();
      }
    }

    LinkListener& client_;
    Mutex mu_;
    CondVar changed_;
    std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mu_);
    bool detached_ ABSL_GUARDED_BY(mu_) = false;
    std::thread thread_;  // the last: it uses the others
  };

  SessionId session() const { return SessionId(session_.load()); }

  Core& core_;
  const Peer peer_;
  std::shared_ptr<Listener> listener_;
  std::atomic<uint64_t> session_ = 0;
};

// Calls RunDue when it is due, as the server does.
class CoreTimer {
 public:
  void Start(Core& core) {
    thread_ = std::thread([this, &core] {
      while (true) {
        const absl::Time due = core.RunDue();
        MutexLock lock(&mu_);
        if (!woken_ && !stop_) {
          const absl::Duration left = due - Clock::Steady().Now();
          changed_.WaitWithDeadline(&mu_, absl::Now() + left);
        }
        woken_ = false;
        if (stop_) return;
      }
    });
  }
  void Wake() {
    MutexLock lock(&mu_);
    woken_ = true;
    changed_.SignalAll();
  }
  void Stop() {
    {
      MutexLock lock(&mu_);
      stop_ = true;
      changed_.SignalAll();
    }
    thread_.join();
  }

 private:
  Mutex mu_;
  CondVar changed_;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

// A scheduler's days: takes, frees, gives way, counts on what it was told.
void RunEngine(Pool& pool, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::vector<BlockId>> requests;
  for (StepId step = 1; step <= 300; ++step) {
    pool.StepBegin();
    const size_t vacate = static_cast<size_t>(pool.pages_to_vacate());
    if (vacate > 0 && !requests.empty()) {
      EXPECT_TRUE(pool.Free(requests.back()).ok());
      requests.pop_back();
    }
    for (auto& request : requests) {
      BlockId block;
      if (!pool.Alloc({&block, 1}, Urgency::kRunning)) break;
      request.push_back(block);
    }
    std::vector<BlockId> prompt(1 + random() % (4 * kBlocksPerPage));
    if (pool.Alloc(absl::MakeSpan(prompt), Urgency::kWaiting)) {
      requests.push_back(std::move(prompt));
    }
    pool.StepEnd(step);
    while (requests.size() > 3 || (!requests.empty() && random() % 4 == 0)) {
      const size_t which = random() % requests.size();
      absl::Status freed = random() % 2 == 0 ? pool.Free(requests[which])
                                             : pool.Cache(requests[which]);
      EXPECT_TRUE(freed.ok()) << freed;
      requests.erase(requests.begin() + static_cast<ptrdiff_t>(which));
    }
    pool.StepDone(step);
    pool.usage();
    pool.available_blocks();
    if (random() % 32 == 0) pool.Reserve(kBlocksPerPage, absl::Milliseconds(1));
  }
  for (auto& request : requests) EXPECT_TRUE(pool.Free(request).ok());
}

TEST(SessionThreadsTest, EnginesShareACoreAndLeaveNothing) {
  FakeBackend backend({.total = MiB(1)});
  CoreTimer timer;
  CoreOptions options;
  options.backend = &backend;
  options.clock = &Clock::Steady();
  options.capacity = MiB(1);
  options.wake = [&] { timer.Wake(); };
  auto core = *Core::Create(std::move(options));
  timer.Start(*core);

  std::vector<std::unique_ptr<Session>> sessions;
  for (uint32_t i = 0; i < 3; ++i) {
    SessionOptions session_options;
    session_options.instance = absl::StrCat("engine", i);
    for (int p = 0; p < 2; ++p) {
      PoolOptions pool;
      pool.geometry.handle_bytes = kPage;
      pool.geometry.max_pages = 16;
      pool.block_bytes = KiB(4);
      pool.min_reserved_pages = 1;
      pool.idle_decay = absl::Milliseconds(5);
      session_options.pools.push_back(pool);
    }
    auto session = *Session::Create(
        std::move(session_options),
        [](const PoolGeometry&) {
          return std::make_unique<testing::NullMapper>();
        },
        Clock::Steady());
    session->Attach(
        std::make_unique<DirectLink>(*core, Peer{"uid:0", 0, 100 + i},
                                     *session),
        Nonce{});
    session->Start();
    ASSERT_TRUE(session->WaitUntilOpen().ok());
    sessions.push_back(std::move(session));
  }
  std::vector<std::thread> engines;
  for (size_t i = 0; i < sessions.size(); ++i) {
    for (size_t p = 0; p < 2; ++p) {
      engines.emplace_back(RunEngine, std::ref(sessions[i]->pool(p)),
                           static_cast<uint32_t>(2 * i + p));
    }
  }
  for (std::thread& engine : engines) engine.join();
  for (auto& session : sessions) {
    EXPECT_TRUE(session->health().ok()) << session->health();
    EXPECT_TRUE(session->pool(0).CheckInvariants().ok());
    session->Close();
  }
  timer.Stop();
  EXPECT_TRUE(core->CheckInvariants().ok());
  EXPECT_EQ(backend.live_handles(), 0);
}

}  // namespace
}  // namespace kvbroker::client
