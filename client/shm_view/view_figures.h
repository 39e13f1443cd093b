// ViewFigures: what the shared-memory view of an instance shows, as it lies in
// the file: three native int64.
#ifndef KVBROKER_CLIENT_SHM_VIEW_VIEW_FIGURES_H_
#define KVBROKER_CLIENT_SHM_VIEW_VIEW_FIGURES_H_

#include <cstdint>
#include <type_traits>

namespace kvbroker::client {

// Bytes. `limit` as it was asked for; `used`: pages with referenced blocks;
// `preallocated`: what the engine will not give back.
struct ViewFigures {
  int64_t limit = 0;
  int64_t used = 0;
  int64_t preallocated = 0;

  friend bool operator==(const ViewFigures&, const ViewFigures&) = default;
};
static_assert(sizeof(ViewFigures) == 24);
static_assert(std::is_trivially_copyable_v<ViewFigures>);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SHM_VIEW_VIEW_FIGURES_H_
