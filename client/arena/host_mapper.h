// HostMapper: memfd pages mapped into this process.
//
// As strict as a GPU: a handle is mapped whole, an unmapped page faults, and a
// page that running work uses is not unmapped. The work is a stand-in for a
// GPU's stream: BeginWork ... EndWork around whatever touches the page.
#ifndef KVBROKER_CLIENT_ARENA_HOST_MAPPER_H_
#define KVBROKER_CLIENT_ARENA_HOST_MAPPER_H_

#include <atomic>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/arena/mapper.h"
#include "proto/messages.h"

namespace kvbroker::client {

class HostMapper : public Mapper {
 public:
  // RESOURCE_EXHAUSTED: no such large range of addresses is left.
  static absl::StatusOr<std::unique_ptr<HostMapper>> Create(
      const PoolGeometry& geometry);
  ~HostMapper() override;

  absl::Status Map(PageIndex page, std::vector<UniqueFd> descriptors) override;
  absl::Status Unmap(PageIndex page) override;
  std::byte* region(size_t handle_of_page) const override;
  std::shared_ptr<void> range() const override { return range_; }
  // RESOURCE_EXHAUSTED: of memory, descriptors or mappings (vm.max_map_count).
  absl::Status Guard() override;

  // The stand-in stream; both from any thread. REQUIRES: the page is mapped.
  void BeginWork(PageIndex page) { work_[page.value()].fetch_add(1); }
  void EndWork(PageIndex page) { work_[page.value()].fetch_sub(1); }

 private:
  HostMapper(const PoolGeometry& geometry, std::shared_ptr<void> range);

  size_t handle_bytes() const {
    return static_cast<size_t>(geometry_.handle_bytes.count());
  }
  std::byte* AddressOf(PageIndex page, size_t handle) const;
  // What lies at a slot without a page: the guard, or addresses that fault.
  // `place` as MAP_FIXED says where.
  void* MapNothing(void* at, int place);
  // Takes the first `count` handles of the page out of the address space.
  void UnmapHandles(PageIndex page, size_t count);

  const PoolGeometry geometry_;
  const std::shared_ptr<void> range_;
  std::byte* const base_;
  std::vector<std::atomic<uint32_t>> work_;
  UniqueFd guard_;  // of guard mode: its handle
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_HOST_MAPPER_H_
