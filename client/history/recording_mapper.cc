#include "client/history/recording_mapper.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "broker/base/clock.h"

namespace kvbroker::client {

absl::StatusOr<std::unique_ptr<MappingRecorder>> MappingRecorder::Open(
    const std::string& path, std::string instance) {
  UniqueFd file(open(path.c_str(),
                     O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY,
                     0640));
  if (!file) return ErrnoToStatus(errno, "open of history " + path);
  return std::unique_ptr<MappingRecorder>(
      new MappingRecorder(std::move(file), std::move(instance)));
}

MappingRecorder::MappingRecorder(UniqueFd file, std::string instance)
    : file_(std::move(file)),
      instance_(std::move(instance)),
      pid_(static_cast<uint32_t>(getpid())) {}

std::unique_ptr<Mapper> MappingRecorder::Wrap(std::unique_ptr<Mapper> mapper) {
  return std::unique_ptr<Mapper>(
      new RecordingMapper(std::move(mapper), *this, pools_++));
}

void MappingRecorder::Record(MappingEvent event) {
  event.at = Clock::Steady().Now();
  event.pid = pid_;
  const std::string line = ToJsonLine(event);
  std::string_view rest = line;
  while (!rest.empty()) {
    const ssize_t written = write(file_.get(), rest.data(), rest.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      std::perror("kvbroker: the history cannot be written on; write");
      std::abort();
    }
    rest.remove_prefix(static_cast<size_t>(written));
  }
}

RecordingMapper::RecordingMapper(std::unique_ptr<Mapper> mapper,
                                 MappingRecorder& recorder, uint32_t pool)
    : recorder_(recorder), pool_(pool), mapper_(std::move(mapper)) {
  recorder_.Record({.kind = MappingEvent::Kind::kPool,
                    .pool = pool_,
                    .instance = recorder_.instance_});
}

RecordingMapper::~RecordingMapper() {
  mapper_.reset();
  --recorder_.pools_;
  recorder_.Record({.kind = MappingEvent::Kind::kClosed, .pool = pool_});
}

absl::Status RecordingMapper::Map(PageIndex page,
                                  std::vector<UniqueFd> descriptors) {
  MappingEvent event = {
      .kind = MappingEvent::Kind::kMap, .pool = pool_, .page = page};
  for (const UniqueFd& descriptor : descriptors) {
    struct stat file;
    if (fstat(descriptor.get(), &file) != 0) {
      return ErrnoToStatus(errno, "fstat of a page's handle");
    }
    // A GPU's descriptors are all of the driver's one device file, which tells
    // no memory from another.
    if (S_ISREG(file.st_mode)) {
      event.memory.push_back({file.st_dev, file.st_ino});
    }
  }
  recorder_.Record(std::move(event));
  absl::Status status = mapper_->Map(page, std::move(descriptors));
  if (!status.ok()) {
    recorder_.Record(
        {.kind = MappingEvent::Kind::kUnmap, .pool = pool_, .page = page});
  }
  return status;
}

absl::Status RecordingMapper::Unmap(PageIndex page) {
  absl::Status status = mapper_->Unmap(page);
  if (status.ok()) {
    recorder_.Record(
        {.kind = MappingEvent::Kind::kUnmap, .pool = pool_, .page = page});
  }
  return status;
}

std::byte* RecordingMapper::region(size_t handle_of_page) const {
  return mapper_->region(handle_of_page);
}

}  // namespace kvbroker::client
