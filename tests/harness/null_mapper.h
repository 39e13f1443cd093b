// NullMapper: keeps the books of a mapper and maps nothing.
#ifndef KVBROKER_TESTS_HARNESS_NULL_MAPPER_H_
#define KVBROKER_TESTS_HARNESS_NULL_MAPPER_H_

#include <functional>
#include <set>
#include <vector>

#include "client/arena/mapper.h"

namespace kvbroker::testing {

class NullMapper : public client::Mapper {
 public:
  absl::Status Map(PageIndex page, std::vector<UniqueFd>) override {
    if (fail_next_map_) {
      fail_next_map_ = false;
      return absl::ResourceExhaustedError("injected");
    }
    if (on_map) on_map();
    if (!mapped_.insert(page).second) {
      return absl::InternalError("mapped twice");
    }
    return absl::OkStatus();
  }
  absl::Status Unmap(PageIndex page) override {
    if (mapped_.erase(page) == 0) return absl::InternalError("not mapped");
    return absl::OkStatus();
  }
  std::byte* region(size_t) const override { return nullptr; }

  void FailNextMap() { fail_next_map_ = true; }
  size_t mapped() const { return mapped_.size(); }
  // Called by each Map, if set.
  std::function<void()> on_map;

 private:
  std::set<PageIndex> mapped_;
  bool fail_next_map_ = false;
};

}  // namespace kvbroker::testing

#endif  // KVBROKER_TESTS_HARNESS_NULL_MAPPER_H_
