#include "broker/state/file_system.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

namespace kvbroker {

int FileSystem::Mkdir(const std::string& path, mode_t mode) {
  return mkdir(path.c_str(), mode);
}

int FileSystem::Openat(int at, const std::string& name, int flags,
                       mode_t mode) {
  return openat(at, name.c_str(), flags, mode);
}

int FileSystem::Fstat(int fd, struct stat* info) { return fstat(fd, info); }

ssize_t FileSystem::Read(int fd, char* bytes, size_t size) {
  return read(fd, bytes, size);
}

ssize_t FileSystem::Write(int fd, const char* bytes, size_t size) {
  return write(fd, bytes, size);
}

int FileSystem::Fsync(int fd) { return fsync(fd); }

int FileSystem::Renameat(int at, const std::string& from,
                         const std::string& to) {
  return renameat(at, from.c_str(), at, to.c_str());
}

int FileSystem::Unlinkat(int at, const std::string& name) {
  return unlinkat(at, name.c_str(), 0);
}

FileSystem& FileSystem::Real() {
  static FileSystem* const real = new FileSystem;
  return *real;
}

}  // namespace kvbroker
