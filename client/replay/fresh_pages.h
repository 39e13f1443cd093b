// FreshPages: reads each page that a session maps, before anybody uses it, and
// counts what is in it.
//
//   FreshPages fresh(FreshRule::kTenant, getuid(), page_bytes);
//   session.wrap_mapper = [&](auto mapper) { return
//   fresh.Wrap(std::move(mapper)); };
//   ... fresh.counts() ...
//
// On a GPU, pages are read by copies. What is found is what BlockPattern wrote:
// engine ids name their tenant (pattern.h). Outlives the session. counts() from
// any thread.
#ifndef KVBROKER_CLIENT_REPLAY_FRESH_PAGES_H_
#define KVBROKER_CLIENT_REPLAY_FRESH_PAGES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "broker/base/mutex.h"
#include "broker/device/cuda/driver.h"
#include "client/arena/mapper.h"
#include "client/replay/fresh_counts.h"

namespace kvbroker::replay {

class FreshPages {
 public:
  // The contents at an address of a mapper's region, as many as `to` has.
  using Reader = std::function<absl::Status(const std::byte* from,
                                            std::span<std::byte> to)>;

  // Without a reader, memory is the process's own.
  FreshPages(FreshRule rule, uint32_t tenant, Bytes page_bytes,
             Reader reader = nullptr);

  // Of a GPU's memory, in its primary context. `gpu` as in FindDevice().
  static absl::StatusOr<Reader> CudaReader(const CudaDriver& driver,
                                           std::string_view gpu);

  // The mapper of a pool of the contiguous layout.
  std::unique_ptr<client::Mapper> Wrap(std::unique_ptr<client::Mapper> mapper);

  FreshCounts counts();

 private:
  class LookingMapper;

  absl::Status Look(const std::byte* page);

  const FreshRule rule_;
  const uint32_t tenant_;
  const Bytes page_bytes_;
  const Reader reader_;
  std::vector<std::byte> copy_;  // the mapping thread's
  Mutex mu_;
  FreshCounts counts_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_FRESH_PAGES_H_
