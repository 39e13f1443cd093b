// Admission: which processes may talk to this broker, and which may see and
// change what is not theirs. Pure: judges an identity that the kernel vouched
// for.
#ifndef KVBROKER_BROKER_TRANSPORT_ADMISSION_H_
#define KVBROKER_BROKER_TRANSPORT_ADMISSION_H_

#include <cstdint>
#include <vector>

#include "broker/transport/peer_identity.h"

namespace kvbroker {

struct Admission {
  // Besides root and these, members of `groups`.
  uint32_t broker_uid = 0;
  std::vector<uint32_t> uids;
  std::vector<uint32_t> groups;

  // May connect at all.
  bool Admits(const PeerIdentity& peer) const;
  // May see and change instances of every tenant: root and the broker's user.
  bool IsAdministrator(const PeerIdentity& peer) const;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_ADMISSION_H_
