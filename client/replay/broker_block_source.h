// The elastic pool: blocks on pages borrowed from the broker.
#ifndef KVBROKER_CLIENT_REPLAY_BROKER_BLOCK_SOURCE_H_
#define KVBROKER_CLIENT_REPLAY_BROKER_BLOCK_SOURCE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "client/replay/block_source.h"
#include "client/replay/replay_options.h"

namespace kvbroker::replay {

// Opens a session under the options' name, limits and weight with the broker at
// their address, with one pool of their geometry. The session ends with the
// source.
absl::StatusOr<std::unique_ptr<BlockSource>> MakeBrokerBlockSource(
    const ReplayOptions& options);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_BROKER_BLOCK_SOURCE_H_
