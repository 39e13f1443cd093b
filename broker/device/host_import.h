// HostImport: maps an exported memfd whole, as an importing process would. For
// tests of the backend; the client library has a mapper of its own.
#ifndef KVBROKER_BROKER_DEVICE_HOST_IMPORT_H_
#define KVBROKER_BROKER_DEVICE_HOST_IMPORT_H_

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "broker/base/bytes.h"
#include "broker/base/unique_fd.h"
#include "broker/device/backend_conformance.h"

namespace kvbroker {

class HostImport : public ImportedHandle {
 public:
  // Fails where the file behind `fd` is not `size` bytes long. `fd` stays the
  // caller's: the mapping is a reference of its own.
  static absl::StatusOr<std::unique_ptr<ImportedHandle>> Create(int fd,
                                                                Bytes size) {
    struct stat file;
    if (fstat(fd, &file) < 0) return ErrnoToStatus(errno, "fstat of an import");
    if (file.st_size != size.count()) {
      return absl::InvalidArgumentError(
          absl::StrCat("a handle is mapped whole or not at all: its bytes ",
                       file.st_size, ", asked for ", size.count()));
    }
    void* address =
        mmap(nullptr, size.count(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) return ErrnoToStatus(errno, "mmap of an import");
    return std::unique_ptr<ImportedHandle>(new HostImport(absl::MakeSpan(
        static_cast<uint8_t*>(address), static_cast<size_t>(size.count()))));
  }
  ~HostImport() override { munmap(memory_.data(), memory_.size()); }

  absl::Span<uint8_t> memory() override { return memory_; }

 private:
  explicit HostImport(absl::Span<uint8_t> memory) : memory_(memory) {}

  const absl::Span<uint8_t> memory_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_DEVICE_HOST_IMPORT_H_
