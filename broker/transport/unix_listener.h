// UnixListener: a unix socket that listens at a path, and the folder it is in.
//
//   RETURN_IF_ERROR(PrepareSocketDirectory(directory, access));
//   ASSIGN_OR_RETURN(UnixListener listener,
//                    UnixListener::Bind(path, SOCK_SEQPACKET, access));
//
// Bind replaces whatever socket lies at the path: the caller makes sure that it
// is a dead broker's, by holding the device's lock. The path is removed when
// the listener goes, if it is still this one's.
//
// Descriptors are non-blocking and close-on-exec.
#ifndef KVBROKER_BROKER_TRANSPORT_UNIX_LISTENER_H_
#define KVBROKER_BROKER_TRANSPORT_UNIX_LISTENER_H_

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {

struct SocketAccess {
  // Besides the owner, members of this group may connect.
  std::optional<uint32_t> group;
  // Anybody may reach the sockets, and is judged by credentials alone: needed
  // where users are allowed one by one, which file modes cannot say.
  bool anybody = false;
};

// Makes the directory, 0750 (0755 for anybody, who looks for brokers there), where
// there is none. One that exists is left as it is: it may be /tmp.
// FAILED_PRECONDITION: it is no directory; or others may replace files in it, who
// could put sockets of their own in our place; or its mode keeps out those whom
// `access` lets in.
absl::Status PrepareSocketDirectory(const std::string& directory,
                                    const SocketAccess& access);

class UnixListener {
 public:
  // `type` is SOCK_STREAM or SOCK_SEQPACKET. The socket's mode is 0660 (0666
  // for anybody) before the first peer can connect. FAILED_PRECONDITION: the
  // path is taken by something that is no socket.
  static absl::StatusOr<UnixListener> Bind(const std::string& path, int type,
                                           const SocketAccess& access);

  UnixListener(UnixListener&& other) noexcept = default;
  UnixListener& operator=(UnixListener&& other) noexcept = delete;
  ~UnixListener();

  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }

 private:
  UnixListener(UniqueFd fd, std::string path, dev_t device, ino_t inode)
      : fd_(std::move(fd)),
        path_(std::move(path)),
        device_(device),
        inode_(inode) {}

  UniqueFd fd_;
  std::string path_;
  // Of the file at `path_`, to know it from a successor's.
  dev_t device_;
  ino_t inode_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_UNIX_LISTENER_H_
