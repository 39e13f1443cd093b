// MakeMapper: the mapper for the kind of memory that a broker lends.
#ifndef KVBROKER_CLIENT_ARENA_MAKE_MAPPER_H_
#define KVBROKER_CLIENT_ARENA_MAKE_MAPPER_H_

#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "client/arena/mapper.h"
#include "proto/messages.h"

namespace kvbroker::client {

// `backend` is "host", "cuda", "cuda_ipc", or empty: on a GPU what the broker
// lends there, else "host". `device_uuid` names the GPU. The CUDA driver is
// loaded with the first mapper that wants it, and stays.
// INVALID_ARGUMENT: no such backend, or a geometry that it cannot have.
// NOT_FOUND, FAILED_PRECONDITION: no driver, or the process does not see that
// GPU.
absl::StatusOr<std::unique_ptr<Mapper>> MakeMapper(
    std::string_view backend, std::string_view device_uuid,
    const PoolGeometry& geometry);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_MAKE_MAPPER_H_
