#include "broker/transport/admission.h"

#include "absl/algorithm/container.h"

namespace kvbroker {

bool Admission::IsAdministrator(const PeerIdentity& peer) const {
  return peer.uid == 0 || peer.uid == broker_uid;
}

bool Admission::Admits(const PeerIdentity& peer) const {
  return IsAdministrator(peer) || absl::c_linear_search(uids, peer.uid) ||
         absl::c_any_of(groups,
                        [&](uint32_t group) { return peer.InGroup(group); });
}

}  // namespace kvbroker
