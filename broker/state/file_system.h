// FileSystem: the system calls that StateFile makes, so that a test can fail
// each of them.
#ifndef KVBROKER_BROKER_STATE_FILE_SYSTEM_H_
#define KVBROKER_BROKER_STATE_FILE_SYSTEM_H_

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <string>

namespace kvbroker {

// Each is the system call of its name: -1 and errno where it fails, EINTR
// included. Names are relative to the open directory `at`, or to the current
// one where that is AT_FDCWD. Opened descriptors are the caller's to close.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual int Mkdir(const std::string& path, mode_t mode);
  virtual int Openat(int at, const std::string& name, int flags, mode_t mode);
  virtual int Fstat(int fd, struct stat* info);
  virtual ssize_t Read(int fd, char* bytes, size_t size);
  virtual ssize_t Write(int fd, const char* bytes, size_t size);
  virtual int Fsync(int fd);
  virtual int Renameat(int at, const std::string& from, const std::string& to);
  virtual int Unlinkat(int at, const std::string& name);

  // The process's own; never destroyed.
  static FileSystem& Real();
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_STATE_FILE_SYSTEM_H_
