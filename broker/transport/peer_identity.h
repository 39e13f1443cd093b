// PeerIdentity: who is at the other end of a unix socket, by the kernel's word.
//
//   ASSIGN_OR_RETURN(PeerIdentity peer, IdentifyPeer(fd, options));
//   if (!peer.pidfd) ... the hello may bring one: AdoptPidfd(peer, pidfd)
//
// uid, gid and groups are those of the process that connected, as they were
// then (SO_PEERCRED, SO_PEERGROUPS). The process itself is held by a pidfd, so
// that its number can be used again without our taking the new process for the
// old one. Where the pidfd comes from, the first that works:
//
//   1. SO_PEERPIDFD (Linux 6.5): exactly the process that connected, in
//      whatever PID namespace.
//   2. pidfd_open of the pid, where it is visible from here, with the start
//   time
//      read before and after. Leaves a gap the kernel gives no means to close:
//      a process that connected, left its socket to a child and died before we
//      looked, and whose number was used again by then.
//   3. A pidfd that the peer sends. It can name another process than the
//      sender's only where neither is visible from here; who does so only
//      delays the return of its own pages.
#ifndef KVBROKER_BROKER_TRANSPORT_PEER_IDENTITY_H_
#define KVBROKER_BROKER_TRANSPORT_PEER_IDENTITY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {

// What makes a tenant, the trust domain whose members share names and pages.
enum class TenantBy {
  kUidAndPidNamespace,  // "uid:1000/pidns:4026531836": in containers all are 0
  kUid,                 // "uid:1000"
  kSocket,              // "socket:NAME": by the socket that it came in by
};

struct IdentifyOptions {
  TenantBy tenant_by = TenantBy::kUidAndPidNamespace;
  std::string socket_name;  // for TenantBy::kSocket
  // Off for tests of the ways for older kernels.
  bool use_peer_pidfd = true;
  bool use_pidfd_open = true;
};

struct PeerIdentity {
  uint32_t uid = 0;
  uint32_t gid = 0;
  std::vector<uint32_t> groups;  // supplementary ones
  uint32_t pid = 0;              // 0: not visible from our PID namespace
  uint64_t start_time = 0;       // of the pid, in clock ticks; 0: not known
  uint64_t process_inode = 0;    // unique per process and boot; 0: not known
  UniqueFd pidfd;                // readable once the process is gone
  // "uid:U/pidns:hidden" where the namespace cannot be read.
  std::string tenant;

  bool InGroup(uint32_t group) const;
};

// Fails where the socket is none or the peer has gone meanwhile. Succeeds
// without a pidfd where neither 1 nor 2 works.
absl::StatusOr<PeerIdentity> IdentifyPeer(int socket,
                                          const IdentifyOptions& options);

// Takes a pidfd that `peer`, who has none yet, sent. InvalidArgument: it is no
// pidfd, or names a process other than the peer as far as can be seen, or one
// that is gone.
absl::Status AdoptPidfd(UniqueFd pidfd, PeerIdentity& peer);

// Whether both are one process of one uid, as far as can be told: by the
// process's inode, else by pid and start time; of two that are invisible from
// here only the uid.
bool SameProcess(const PeerIdentity& a, const PeerIdentity& b);

// A pidfd of the process with this number and start time (in clock ticks);
// empty where it is gone.
UniqueFd OpenProcess(uint32_t pid, uint64_t start_time);

// Whether the pidfd's process has exited (a zombie has).
bool ProcessHasExited(int pidfd);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_PEER_IDENTITY_H_
