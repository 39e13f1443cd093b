#include "client/replay/broker_block_source.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/base/status_macros.h"
#include "client/address/broker_address.h"
#include "client/history/recording_mapper.h"
#include "client/replay/pool_block_source.h"
#include "client/session/open_session.h"

namespace kvbroker::replay {
namespace {

// A PoolBlockSource with the session behind it.
class BrokerBlockSource : public PoolBlockSource {
 public:
  // `recorder` of the session's mappings, or null.
  BrokerBlockSource(std::unique_ptr<client::MappingRecorder> recorder,
                    std::unique_ptr<client::Session> session)
      : PoolBlockSource(session->pool(0)),
        recorder_(std::move(recorder)),
        session_(std::move(session)) {}

 private:
  const std::unique_ptr<client::MappingRecorder> recorder_;
  std::unique_ptr<client::Session> session_;
};

// Slots of the pool: what a replay may come to hold at most. Addresses cost
// nothing, but the block table has an entry for each of their blocks.
constexpr uint32_t kMaxPages = 8192;

}  // namespace

absl::StatusOr<std::unique_ptr<BlockSource>> MakeBrokerBlockSource(
    const ReplayOptions& options) {
  ASSIGN_OR_RETURN(
      std::vector<client::BrokerAddress> brokers,
      client::FindBrokers({.address = options.address}));
  if (brokers.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "several brokers listen there, name one with --address: ",
        absl::StrJoin(brokers, ", ",
                      [](std::string* out, const client::BrokerAddress& broker) {
                        absl::StrAppend(out, broker.rpc_path);
                      })));
  }
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
  session.pools.push_back(std::move(pool));
  std::unique_ptr<client::MappingRecorder> recorder;
  if (!options.history_file.empty()) {
    ASSIGN_OR_RETURN(recorder, client::MappingRecorder::Open(
                                   options.history_file, options.name));
    session.wrap_mapper = [to = recorder.get()](
                              std::unique_ptr<client::Mapper> mapper) {
      return to->Wrap(std::move(mapper));
    };
  }
  ASSIGN_OR_RETURN(std::unique_ptr<client::Session> opened,
                   client::OpenSession(brokers.front(), std::move(session)));
  return std::make_unique<BrokerBlockSource>(std::move(recorder),
                                             std::move(opened));
}

}  // namespace kvbroker::replay
