#include "broker/transport/admission.h"

#include <gtest/gtest.h>

namespace kvbroker {
namespace {

PeerIdentity Peer(uint32_t uid, uint32_t gid, std::vector<uint32_t> groups) {
  PeerIdentity peer;
  peer.uid = uid;
  peer.gid = gid;
  peer.groups = std::move(groups);
  return peer;
}

TEST(AdmissionTest, RootAndTheBrokersUserAreAdministrators) {
  Admission admission{.broker_uid = 1000};
  EXPECT_TRUE(admission.IsAdministrator(Peer(0, 5, {})));
  EXPECT_TRUE(admission.IsAdministrator(Peer(1000, 5, {})));
  EXPECT_TRUE(admission.Admits(Peer(0, 5, {})));
  EXPECT_TRUE(admission.Admits(Peer(1000, 5, {})));
}

TEST(AdmissionTest, OthersComeInByUidOrGroupAndAreNoAdministrators) {
  Admission admission{.broker_uid = 1000, .uids = {1001}, .groups = {44}};
  for (const PeerIdentity& peer :
       {Peer(1001, 5, {}), Peer(1002, 44, {}), Peer(1003, 5, {7, 44})}) {
    EXPECT_TRUE(admission.Admits(peer)) << peer.uid;
    EXPECT_FALSE(admission.IsAdministrator(peer)) << peer.uid;
  }
  EXPECT_FALSE(admission.Admits(Peer(1004, 5, {7})));
}

}  // namespace
}  // namespace kvbroker
