// Peer: whom a session belongs to, by the kernel's word.
#ifndef KVBROKER_BROKER_CORE_PEER_H_
#define KVBROKER_BROKER_CORE_PEER_H_

#include <cstdint>
#include <string>

namespace kvbroker {

// What is not known is 0; broker/transport/peer_identity.h says where each
// figure comes from.
struct Peer {
  std::string tenant;  // trust domain, such as "uid:1000/pidns:4026531836"
  uint32_t uid = 0;
  uint32_t pid = 0;  // as the broker sees it
  uint64_t start_time = 0;
  uint64_t process_inode = 0;
};

// Whether both are one process of one tenant, as far as can be told: by the
// process's inode, else by pid and start time; of two that are invisible from
// here only the tenant.
bool SameProcess(const Peer& a, const Peer& b);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CORE_PEER_H_
