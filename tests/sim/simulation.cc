#include "tests/sim/simulation.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"
#include "broker/base/clock.h"
#include "broker/core/core.h"
#include "broker/device/fake_backend.h"
#include "client/replay/pool_block_source.h"
#include "client/replay/scheduler.h"
#include "client/replay/static_block_source.h"
#include "client/session/session.h"
#include "tests/harness/in_process_link.h"
#include "tests/harness/null_mapper.h"

namespace kvbroker::testing {
namespace {

struct Engine {
  const SimulatedEngine* input = nullptr;
  std::unique_ptr<client::Session> session;  // none: static
  InProcessLink* link = nullptr;             // the session's
  std::unique_ptr<replay::BlockSource> source;
  std::unique_ptr<replay::Scheduler> scheduler;
  double due_s = 0;
};

EngineResult ResultOf(const Engine& engine) {
  EngineResult result;
  result.name = engine.input->name;
  result.preemptions = engine.scheduler->preemptions();
  std::vector<double> waits;
  for (const replay::RequestRecord& record : engine.scheduler->records()) {
    if (!record.admitted_s) continue;
    waits.push_back((*record.admitted_s - record.arrival_s) * 1000);
  }
  std::sort(waits.begin(), waits.end());
  result.requests = static_cast<int64_t>(waits.size());
  if (waits.empty()) return result;
  for (double wait : waits) result.wait_mean_ms += wait;
  result.wait_mean_ms /= static_cast<double>(waits.size());
  result.wait_p99_ms = waits[static_cast<size_t>(
      std::ceil(0.99 * static_cast<double>(waits.size()))) - 1];
  result.wait_max_ms = waits.back();
  return result;
}

}  // namespace

std::vector<EngineResult> Simulate(const SimulationOptions& options) {
  FakeClock clock;
  const absl::Time start = clock.Now();
  FakeBackend backend({.total = options.capacity});
  CoreOptions core_options;
  core_options.backend = &backend;
  core_options.clock = &clock;
  core_options.capacity = options.capacity;
  core_options.policy = options.policy;
  core_options.log = [&](std::string_view line) {
    if (!options.log) return;
    std::printf("%9.3f %.*s\n", absl::ToDoubleSeconds(clock.Now() - start),
                static_cast<int>(line.size()), line.data());
  };
  auto created = Core::Create(std::move(core_options));
  KVB_CHECK(created.ok());
  Core& core = **created;

  std::vector<Engine> engines(options.engines.size());
  for (size_t i = 0; i < engines.size(); ++i) {
    Engine& engine = engines[i];
    engine.input = &options.engines[i];
    if (engine.input->static_share) {
      auto source = replay::StaticBlockSource::Create(
          *engine.input->static_share, options.block_bytes);
      KVB_CHECK(source.ok());
      engine.source = *std::move(source);
    } else {
      client::PoolOptions pool;
      pool.geometry.handle_bytes = options.page_bytes;
      pool.geometry.max_pages =
          static_cast<uint32_t>(options.capacity / options.page_bytes + 1);
      pool.block_bytes = options.block_bytes;
      pool.running_miss_wait = absl::ZeroDuration();
      client::SessionOptions session;
      session.instance = engine.input->name;
      session.min = engine.input->min;
      session.weight = engine.input->weight;
      session.pools.push_back(pool);
      auto made = client::Session::Create(
          std::move(session),
          [](const PoolGeometry&) { return std::make_unique<NullMapper>(); },
          clock);
      KVB_CHECK(made.ok());
      engine.session = *std::move(made);
      auto link = std::make_unique<InProcessLink>(
          core, Peer{"uid:0", 0, static_cast<uint32_t>(100 + i)},
          *engine.session);
      engine.link = link.get();
      engine.session->Attach(std::move(link), Nonce{});
      engine.source =
          std::make_unique<replay::PoolBlockSource>(engine.session->pool(0));
    }
    engine.scheduler = std::make_unique<replay::Scheduler>(
        replay::SchedulerOptions{options.speed}, engine.input->trace.requests,
        *engine.source, nullptr);
  }

  absl::Time background = start;  // when sessions or the core are due next
  auto settle = [&] {
    bool busy = true;
    while (busy) {
      busy = false;
      background = core.RunDue();
      for (Engine& engine : engines) {
        if (engine.session == nullptr) continue;
        absl::Time due = engine.session->RunOnce();
        busy |= engine.link->Deliver();
        if (due <= clock.Now()) busy = true;
        background = std::min(background, due);
      }
    }
  };
  settle();
  double now_s = 0;
  while (now_s < options.until_s) {
    double next_s = std::numeric_limits<double>::infinity();
    for (Engine& engine : engines) next_s = std::min(next_s, engine.due_s);
    if (background != absl::InfiniteFuture()) {
      next_s = std::min(next_s, absl::ToDoubleSeconds(background - start));
    }
    if (std::all_of(engines.begin(), engines.end(), [](const Engine& engine) {
          return engine.scheduler->done();
        })) {
      break;
    }
    // The clock counts nanoseconds: never a step that it cannot show.
    now_s = std::max(next_s, now_s + 1e-6);
    clock.Advance(start + absl::Seconds(now_s) - clock.Now());
    settle();
    for (Engine& engine : engines) {
      if (engine.due_s > now_s && engine.session == nullptr) continue;
      engine.due_s = engine.scheduler->Step(now_s);
    }
    settle();
  }
  std::vector<EngineResult> results;
  for (Engine& engine : engines) {
    results.push_back(ResultOf(engine));
    engine.scheduler->Abandon();
    engine.scheduler.reset();
    if (engine.session != nullptr) engine.session->BeginClose();
  }
  settle();
  for (Engine& engine : engines) {
    if (engine.session == nullptr) continue;
    KVB_CHECK(engine.session->left());
    engine.session->Close();
  }
  KVB_CHECK(core.CheckInvariants().ok());
  KVB_CHECK(backend.live_handles() == 0);
  return results;
}

}  // namespace kvbroker::testing
