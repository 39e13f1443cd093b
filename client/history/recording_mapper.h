// RecordingMapper: a Mapper that leaves a history of what was mapped.
//
//   ASSIGN_OR_RETURN(auto recorder, MappingRecorder::Open(path, "llama"));
//   options.wrap_mapper = [&](auto mapper) {
//     return recorder->Wrap(std::move(mapper));
//   };
//
// What is recorded covers what was: "map" is on file before the page is mapped,
// "unmap" only after it is gone. So two mappings of the same memory that were
// there at the same time overlap in the history as well; none is missed, and a
// process that is killed in between has mapped no more than its file says. Nor
// is anybody accused wrongly: a page passes from one process to another only
// after its Return, which is sent when Unmap has returned, so in a run without
// mistakes the covering intervals do not overlap either.
//
// An event is one write to a file opened for appending: whoever is killed
// leaves whole lines, but for the last one. A write that fails ends the
// process, since a history with holes would accuse the innocent.
//
// One recorder a session, and for the next one when that has been destroyed.
// Threads: as for any Mapper; several mappers of one recorder may be used at the
// same time.
#ifndef KVBROKER_CLIENT_HISTORY_RECORDING_MAPPER_H_
#define KVBROKER_CLIENT_HISTORY_RECORDING_MAPPER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"
#include "client/arena/mapper.h"
#include "client/history/mapping_event.h"

namespace kvbroker::client {

class MappingRecorder {
 public:
  // Appends to the file. PERMISSION_DENIED and the like: it cannot be opened.
  // REQUIRES: `instance` is a valid name of an instance.
  static absl::StatusOr<std::unique_ptr<MappingRecorder>> Open(
      const std::string& path, std::string instance);

  // The mapper of the session's next pool. The recorder outlives it.
  std::unique_ptr<Mapper> Wrap(std::unique_ptr<Mapper> mapper);

 private:
  friend class RecordingMapper;

  MappingRecorder(UniqueFd file, std::string instance);
  // Fills in `at` and `pid`.
  void Record(MappingEvent event);

  const UniqueFd file_;
  const std::string instance_;
  const uint32_t pid_;
  uint32_t pools_ = 0;  // mappers that live
};

class RecordingMapper : public Mapper {
 public:
  ~RecordingMapper() override;

  absl::Status Begin(const Opened& opened) override {
    return mapper_->Begin(opened);
  }
  absl::Status Map(PageIndex page, std::vector<UniqueFd> descriptors) override;
  absl::Status Unmap(PageIndex page) override;
  std::byte* region(size_t handle_of_page) const override;
  std::shared_ptr<void> range() const override { return mapper_->range(); }
  absl::Status Guard() override { return mapper_->Guard(); }
  void AddStream(void* stream) override { mapper_->AddStream(stream); }
  void RemoveStream(void* stream) override { mapper_->RemoveStream(stream); }

 private:
  friend class MappingRecorder;

  RecordingMapper(std::unique_ptr<Mapper> mapper, MappingRecorder& recorder,
                  uint32_t pool);

  MappingRecorder& recorder_;
  const uint32_t pool_;
  std::unique_ptr<Mapper> mapper_;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_HISTORY_RECORDING_MAPPER_H_
