// bench_engine: an engine's process for benchmarks: the client library's link
// and mapper with no pool between them, so that what is measured is the broker
// and the way to it.
//
//   bench_engine churn ADDRESS NAME HANDLES HANDLE_BYTES
//     Over and over: acquires a page of HANDLES handles, maps it, touches each
//     handle, says so, unmaps it, gives it back.
//   bench_engine hold ADDRESS NAME SESSIONS PAGES
//     Sessions NAME-0, NAME-1, ... hold PAGES pages of 4 KiB each.
//   bench_engine wait ADDRESS NAME PAGES 0
//     Asks for so many pages of 4 KiB, more than there are, and waits.
//   bench_engine steal ADDRESS NAME HANDLE_BYTES TOUCH
//     Takes a page of one handle when told to, and gives it when asked. TOUCH:
//     1 writes to all of it once it is mapped, 0 leaves it alone.
//
// One line on stdin is one order, one line on stdout the answer. First comes
// "ready". Then churn is told for how many seconds to run and says how many
// grants it made in how many seconds; steal is told "take" and says after how
// many microseconds it had the page mapped. The end of stdin ends it.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>
#include <deque>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "broker/base/clock.h"
#include "broker/base/mutex.h"
#include "client/address/broker_address.h"
#include "client/arena/host_mapper.h"
#include "client/session/broker_link.h"
#include "client/session/grpc_link.h"
#include "proto/messages.h"

namespace kvbroker::client {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(30);
constexpr size_t kSystemPage = 4096;

[[noreturn]] void Fail(const std::string& what) {
  fprintf(stderr, "bench_engine: %s\n", what.c_str());
  _exit(1);
}

void Say(const std::string& line) {
  printf("%s\n", line.c_str());
  fflush(stdout);
}

void FailIfRefused(const BrokerMessage& message) {
  if (const auto* refused = std::get_if<Refused>(&message)) {
    Fail(absl::StrCat("refused: ", refused->reason));
  }
}

// One session with one pool. One thread acts; the link's threads only queue, as
// in the client library's session.
class Engine : public LinkListener {
 public:
  Engine(const std::string& address, const std::string& name,
         const PoolGeometry& geometry, Bytes min = Bytes(0))
      : geometry_(geometry) {
    absl::StatusOr<std::vector<BrokerAddress>> brokers =
        FindBrokers({.address = address});
    if (!brokers.ok()) Fail(brokers.status().ToString());
    absl::StatusOr<std::unique_ptr<GrpcLink>> link =
        GrpcLink::Connect(brokers->front(), *this, kPatience);
    if (!link.ok()) Fail(link.status().ToString());
    link_ = *std::move(link);
    Open open;
    open.nonce = link_->nonce();
    open.instance = name;
    open.pools = {geometry};
    open.min = min;
    link_->Send(open);
    pool_ = std::get<Opened>(NextMessage()).pools.at(0);
  }

  void OnMessage(BrokerMessage message) override {
    MutexLock lock(&mu_);
    messages_.push_back(std::move(message));
    changed_.Signal();
  }
  void OnDescriptors(GrantId grant, uint32_t first_handle,
                     std::vector<UniqueFd> descriptors) override {
    MutexLock lock(&mu_);
    frames_.push_back({grant, std::move(descriptors)});
    changed_.Signal();
  }
  void OnDisconnected(absl::Status why) override {
    MutexLock lock(&mu_);
    if (!leaving_) Fail(absl::StrCat("the broker has gone: ", why.ToString()));
  }

  // Asks for pages [0, count).
  void Ask(PageCount count, absl::Duration deadline) {
    Acquire acquire;
    acquire.acked = sequence_;
    acquire.sequence = sequence_ = Sequence(sequence_.value() + 1);
    acquire.pool = pool_;
    acquire.want = acquire.at_least = count;
    for (PageCount i = 0; i < count; ++i) {
      acquire.indexes.push_back(PageIndex(static_cast<uint32_t>(i)));
    }
    acquire.deadline = deadline;
    link_->Send(std::move(acquire));
  }

  // Pages [0, count) are acquired, and their descriptors received.
  Granted AcquirePages(PageCount count, std::vector<UniqueFd>& descriptors) {
    Ask(count, kPatience);
    const size_t wanted = count * geometry_.handles_per_page;
    while (descriptors.size() < wanted) {
      Frame frame = NextFrame();
      link_->AcknowledgeDescriptors(
          frame.grant, static_cast<uint32_t>(frame.descriptors.size()));
      for (UniqueFd& fd : frame.descriptors) {
        descriptors.push_back(std::move(fd));
      }
    }
    for (;;) {
      BrokerMessage answer = NextMessage();
      if (auto* granted = std::get_if<Granted>(&answer)) return *granted;
      FailIfRefused(answer);
    }
  }

  void SayMapped(const Granted& granted) {
    link_->Send(Mapped{.grant = granted.grant});
  }

  BrokerMessage NextMessage() {
    MutexLock lock(&mu_);
    while (messages_.empty()) changed_.Wait(&mu_);
    BrokerMessage message = std::move(messages_.front());
    messages_.pop_front();
    return message;
  }

  void Leave() {
    {
      MutexLock lock(&mu_);
      leaving_ = true;
    }
    link_.reset();
  }

  GrpcLink& link() { return *link_; }
  PoolId pool() const { return pool_; }

 private:
  struct Frame {
    GrantId grant;
    std::vector<UniqueFd> descriptors;
  };

  Frame NextFrame() {
    MutexLock lock(&mu_);
    while (frames_.empty()) {
      if (!messages_.empty()) FailIfRefused(messages_.front());
      changed_.Wait(&mu_);
    }
    Frame frame = std::move(frames_.front());
    frames_.pop_front();
    return frame;
  }

  const PoolGeometry geometry_;
  std::unique_ptr<GrpcLink> link_;
  PoolId pool_;
  Sequence sequence_;

  Mutex mu_;
  CondVar changed_;
  std::deque<BrokerMessage> messages_ ABSL_GUARDED_BY(mu_);
  std::deque<Frame> frames_ ABSL_GUARDED_BY(mu_);
  bool leaving_ ABSL_GUARDED_BY(mu_) = false;
};

std::unique_ptr<HostMapper> MapperFor(const PoolGeometry& geometry) {
  absl::StatusOr<std::unique_ptr<HostMapper>> mapper =
      HostMapper::Create(geometry);
  if (!mapper.ok()) Fail(mapper.status().ToString());
  return *std::move(mapper);
}

void MapPage(HostMapper& mapper, std::vector<UniqueFd> descriptors) {
  absl::Status mapped = mapper.Map(PageIndex(0), std::move(descriptors));
  if (!mapped.ok()) Fail(mapped.ToString());
}

void Churn(const std::string& address, const std::string& name,
           uint32_t handles, Bytes handle_bytes) {
  const PoolGeometry geometry = {
      .handle_bytes = handle_bytes,
      .handles_per_page = handles,
      .layout = handles == 1 ? Layout::kContiguous : Layout::kPerLayer,
      .max_pages = 1};
  // A guarantee, so that one who waits for more than there is keeps nothing
  // from it.
  Engine engine(address, name, geometry, geometry.page_bytes());
  std::unique_ptr<HostMapper> mapper = MapperFor(geometry);
  Say("ready");
  for (std::string line; std::getline(std::cin, line);) {
    double seconds;
    if (!absl::SimpleAtod(line, &seconds)) Fail("not a time: " + line);
    const absl::Time begin = Clock::Steady().Now();
    const absl::Time end = begin + absl::Seconds(seconds);
    int64_t grants = 0;
    absl::Time now = begin;
    for (; now < end; now = Clock::Steady().Now()) {
      std::vector<UniqueFd> descriptors;
      const Granted granted = engine.AcquirePages(1, descriptors);
      MapPage(*mapper, std::move(descriptors));
      for (uint32_t h = 0; h < handles; ++h) *mapper->region(h) = std::byte{1};
      engine.SayMapped(granted);
      if (!mapper->Unmap(PageIndex(0)).ok()) Fail("unmap");
      engine.link().Send(Return{.pool = engine.pool(), .pages = granted.pages});
      ++grants;
    }
    Say(absl::StrCat(grants, " ", absl::ToDoubleSeconds(now - begin)));
  }
  engine.Leave();
}

void Hold(const std::string& address, const std::string& name, int sessions,
          PageCount pages) {
  std::vector<std::unique_ptr<Engine>> engines;
  for (int i = 0; i < sessions; ++i) {
    engines.push_back(std::make_unique<Engine>(
        address, absl::StrCat(name, "-", i),
        PoolGeometry{.handle_bytes = Bytes(kSystemPage),
                     .max_pages = std::max(static_cast<uint32_t>(pages), 1u)}));
    if (pages == 0) continue;
    // Not mapped: a process has no more than 65,530 mappings.
    std::vector<UniqueFd> descriptors;
    engines.back()->SayMapped(engines.back()->AcquirePages(pages, descriptors));
  }
  Say("ready");
  for (std::string line; std::getline(std::cin, line);) {
  }
  for (auto& engine : engines) engine->Leave();
}

void Wait(const std::string& address, const std::string& name,
          PageCount pages) {
  Engine engine(address, name,
                {.handle_bytes = Bytes(kSystemPage),
                 .max_pages = static_cast<uint32_t>(pages)});
  engine.Ask(pages, absl::Minutes(10));
  Say("ready");
  for (std::string line; std::getline(std::cin, line);) {
  }
  engine.Leave();
}

void Steal(const std::string& address, const std::string& name,
           Bytes handle_bytes, bool touch) {
  const PoolGeometry geometry = {.handle_bytes = handle_bytes, .max_pages = 1};
  Engine engine(address, name, geometry);
  std::unique_ptr<HostMapper> mapper = MapperFor(geometry);
  Say("ready");
  for (std::string line; std::getline(std::cin, line);) {
    const absl::Time begin = Clock::Steady().Now();
    std::vector<UniqueFd> descriptors;
    const Granted granted = engine.AcquirePages(1, descriptors);
    MapPage(*mapper, std::move(descriptors));
    const absl::Time mapped = Clock::Steady().Now();
    engine.SayMapped(granted);
    if (touch) {
      const size_t bytes = static_cast<size_t>(handle_bytes.count());
      for (size_t at = 0; at < bytes; at += kSystemPage) {
        mapper->region(0)[at] = std::byte{1};
      }
    }
    engine.link().Send(Report{.pool = engine.pool(),
                              .idle = 1,
                              .settled = 1,
                              .oldest_idle = absl::Seconds(1)});
    Say(absl::StrCat(absl::ToDoubleMicroseconds(mapped - begin)));
    // The other one will ask for it; lifted orders are of no interest.
    for (;;) {
      BrokerMessage message = engine.NextMessage();
      const auto* order = std::get_if<Reclaim>(&message);
      if (order == nullptr || order->hold_at_most != 0) continue;
      if (!mapper->Unmap(PageIndex(0)).ok()) Fail("unmap");
      engine.link().Send(ReclaimAnswer{.pool = engine.pool(),
                                       .revision = order->revision,
                                       .given = granted.pages,
                                       .final = true});
      break;
    }
  }
  engine.Leave();
}

int Run(const std::vector<std::string>& words) {
  // Whoever started it may be killed.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // As in kvbrokerd: Debian's Abseil checks every lock's order, gRPC's
  // included.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  int64_t third, fourth;
  if (words.size() != 6 || !absl::SimpleAtoi(words[4], &third) ||
      !absl::SimpleAtoi(words[5], &fourth)) {
    fprintf(stderr, "usage: see the head of tests/bench/bench_engine.cc\n");
    return 2;
  }
  const std::string& address = words[2];
  const std::string& name = words[3];
  if (words[1] == "churn") {
    Churn(address, name, static_cast<uint32_t>(third), Bytes(fourth));
  } else if (words[1] == "hold") {
    Hold(address, name, static_cast<int>(third), fourth);
  } else if (words[1] == "wait") {
    Wait(address, name, third);
  } else if (words[1] == "steal") {
    Steal(address, name, Bytes(third), fourth != 0);
  } else {
    return 2;
  }
  return 0;
}

}  // namespace
}  // namespace kvbroker::client

int main(int argc, char** argv) {
  return kvbroker::client::Run(std::vector<std::string>(argv, argv + argc));
}
