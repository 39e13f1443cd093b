#include "client/replay/broker_block_source.h"

#include <unistd.h>

#include <utility>

#include "broker/base/status_macros.h"
#include "broker/device/device_lost.h"
#include "client/address/broker_address.h"
#include "client/arena/cuda_driver.h"
#include "client/arena/make_mapper.h"
#include "client/history/recording_mapper.h"
#include "client/replay/activations.h"
#include "client/replay/cuda_block_memory.h"
#include "client/replay/fresh_pages.h"
#include "client/replay/pool_block_source.h"
#include "client/session/open_session.h"

namespace kvbroker::replay {
namespace {

// A PoolBlockSource with the session behind it.
class BrokerBlockSource : public PoolBlockSource {
 public:
  // What wraps the session's mapper.
  struct Wrappers {
    std::unique_ptr<client::MappingRecorder> recorder;  // or null
    std::unique_ptr<FreshPages> fresh;                  // or null
  };
  BrokerBlockSource(Wrappers wrappers, std::unique_ptr<client::Session> session)
      : PoolBlockSource(session->pool(0)),
        wrappers_(std::move(wrappers)),
        session_(std::move(session)) {}

  std::optional<FreshCounts> Fresh() const override {
    if (wrappers_.fresh == nullptr) return std::nullopt;
    return wrappers_.fresh->counts();
  }

  absl::Status Health() const override {
    // Where it is UNAVAILABLE, a broker, or the device, may come back.
    const absl::Status health = session_->pool(0).health();
    return absl::IsFailedPrecondition(health) || IsPoisoned(health)
               ? health
               : absl::OkStatus();
  }

 private:
  const Wrappers wrappers_;
  std::unique_ptr<client::Session> session_;
};

// The same on a GPU: blocks are written and read there, and a step is done when
// the GPU has done what was queued in it.
class CudaBlockSource : public BrokerBlockSource {
 public:
  CudaBlockSource(Wrappers wrappers, std::unique_ptr<client::Session> session,
                  std::unique_ptr<CudaBlockMemory> memory,
                  std::unique_ptr<Activations> activations)
      : BrokerBlockSource(std::move(wrappers), std::move(session)),
        memory_(std::move(memory)),
        activations_(std::move(activations)) {
    pool().mapper().AddStream(memory_->stream());
  }
  ~CudaBlockSource() override {
    // No call of StepDone is under way after that.
    memory_->Wait();
    pool().mapper().RemoveStream(memory_->stream());
  }

  std::span<std::byte> BeginWrite(BlockId /*block*/) override {
    return memory_->BeginWrite();
  }
  void EndWrite(BlockId block) override {
    memory_->EndWrite(pool().block_data(block));
  }
  std::span<const std::byte> Read(BlockId block) override {
    return memory_->Read(pool().block_data(block));
  }
  absl::Status Health() const override {
    RETURN_IF_ERROR(memory_->status());
    return BrokerBlockSource::Health();
  }
  std::optional<OtherMemory> Other() const override {
    if (activations_ == nullptr) return std::nullopt;
    return OtherMemory{activations_->taken(), activations_->failed()};
  }

 protected:
  void WhenDone(client::StepId step) override {
    memory_->WhenDone([this, step] { pool().StepDone(step); });
  }

 private:
  const std::unique_ptr<CudaBlockMemory> memory_;
  const std::unique_ptr<Activations> activations_;  // or null
};

// How long activations are there, and then are not.
constexpr absl::Duration kActivationPeriod = absl::Milliseconds(100);
// How long the broker has to make room for them.
constexpr absl::Duration kRoomWithin = absl::Minutes(1);
// What a context and its module take of the GPU, about.
constexpr Bytes kContextBytes = GiB(1);

// Slots of the pool: what a replay may come to hold at most. Addresses cost
// nothing, but the block table has an entry for each of their blocks.
constexpr uint32_t kMaxPages = 8192;

}  // namespace

absl::StatusOr<std::unique_ptr<BlockSource>> MakeBrokerBlockSource(
    const ReplayOptions& options) {
  ASSIGN_OR_RETURN(const client::BrokerAddress broker,
                   client::FindBroker(
                       {.address = options.address, .gpu = options.gpu}));
  client::SessionOptions session;
  session.instance = options.name;
  session.min = options.min;
  session.max = options.max;
  session.weight = options.weight;
  session.labels["model"] = std::string(options.model.name);
  client::PoolOptions pool;
  pool.geometry.handle_bytes = options.geometry.page_bytes;
  pool.geometry.handles_per_page = 1;
  pool.geometry.layout = Layout::kContiguous;
  pool.geometry.max_pages = kMaxPages;
  pool.geometry.label = "kv";
  pool.block_bytes = options.geometry.block_bytes;
  pool.guard = options.guard;
  session.pools.push_back(std::move(pool));
  session.backend = options.backend;
  BrokerBlockSource::Wrappers wrappers;
  if (!options.history_file.empty()) {
    ASSIGN_OR_RETURN(
        wrappers.recorder,
        client::MappingRecorder::Open(options.history_file, options.name));
  }
  if (options.check_fresh) {
    FreshPages::Reader reader;
    if (client::IsGpu(broker.device_uuid)) {
      ASSIGN_OR_RETURN(const CudaDriver* driver, client::LoadedCudaDriver());
      ASSIGN_OR_RETURN(reader,
                       FreshPages::CudaReader(*driver, broker.device_uuid));
    }
    wrappers.fresh = std::make_unique<FreshPages>(
        *options.check_fresh, getuid(), options.geometry.page_bytes,
        std::move(reader));
  }
  session.wrap_mapper = [recorder = wrappers.recorder.get(),
                         fresh = wrappers.fresh.get()](
                            std::unique_ptr<client::Mapper> mapper) {
    if (fresh != nullptr) mapper = fresh->Wrap(std::move(mapper));
    if (recorder != nullptr) mapper = recorder->Wrap(std::move(mapper));
    return mapper;
  };
  ASSIGN_OR_RETURN(std::unique_ptr<client::Session> opened,
                   client::OpenSession(broker, std::move(session)));
  if (opened->opened().backend.starts_with("cuda")) {
    ASSIGN_OR_RETURN(const CudaDriver* driver, client::LoadedCudaDriver());
    ASSIGN_OR_RETURN(
        std::unique_ptr<CudaBlockMemory> memory,
        CudaBlockMemory::Create(
            *driver, broker.device_uuid,
            static_cast<size_t>(options.geometry.block_bytes.count())));
    std::unique_ptr<Activations> activations;
    if (options.activations) {
      RETURN_IF_ERROR(opened->MakeRoom(*options.activations + kContextBytes,
                                       kRoomWithin));
      ASSIGN_OR_RETURN(
          activations,
          Activations::Start(*driver, broker.device_uuid, *options.activations,
                             kActivationPeriod));
    }
    return std::make_unique<CudaBlockSource>(
        std::move(wrappers), std::move(opened), std::move(memory),
        std::move(activations));
  }
  if (options.activations) {
    return absl::InvalidArgumentError(
        "--activations are a GPU's memory, and this broker lends the host's");
  }
  return std::make_unique<BrokerBlockSource>(std::move(wrappers),
                                             std::move(opened));
}

}  // namespace kvbroker::replay
