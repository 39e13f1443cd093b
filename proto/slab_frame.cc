#include "proto/slab_frame.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace kvbroker {

std::string SlabFrameText(const SlabFrame& frame) {
  return std::string(reinterpret_cast<const char*>(&frame), sizeof(frame));
}

absl::StatusOr<SlabFrame> ParseSlabFrame(std::string_view text) {
  SlabFrame frame;
  if (text.size() != sizeof(frame)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a slab's frame has ", sizeof(frame), " bytes; got ", text.size()));
  }
  std::memcpy(&frame, text.data(), sizeof(frame));
  if (frame.magic != kSlabMagic || frame.version != kSlabVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a slab's frame of version ", kSlabVersion, ": magic ",
                     absl::Hex(frame.magic), ", version ", frame.version));
  }
  if (frame.offset > frame.slab_bytes ||
      frame.size > frame.slab_bytes - frame.offset) {
    return absl::InvalidArgumentError(absl::StrCat(
        "not within the slab of ", frame.slab_bytes, " bytes: ", frame.size,
        " bytes from ", frame.offset, " on"));
  }
  return frame;
}

absl::StatusOr<UniqueFd> SealSlabFrame(const SlabFrame& frame) {
  UniqueFd fd(memfd_create("kvbroker-lease", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return ErrnoToStatus(errno, "memfd_create of a lease");
  const ssize_t written = pwrite(fd.get(), &frame, sizeof(frame), 0);
  if (written != sizeof(frame)) {
    return ErrnoToStatus(written < 0 ? errno : ENOSPC, "write of a lease");
  }
  if (fcntl(fd.get(), F_ADD_SEALS,
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) != 0) {
    return ErrnoToStatus(errno, "sealing of a lease");
  }
  return fd;
}

absl::StatusOr<SlabFrame> ReadSlabFrame(int fd) {
  std::array<char, sizeof(SlabFrame) + 1> text;
  const ssize_t size = pread(fd, text.data(), text.size(), 0);
  // What cannot be read by position is no file.
  if (size < 0 && errno != ESPIPE)
    return ErrnoToStatus(errno, "read of a lease");
  return ParseSlabFrame(
      {text.data(), size < 0 ? 0 : static_cast<size_t>(size)});
}

}  // namespace kvbroker
