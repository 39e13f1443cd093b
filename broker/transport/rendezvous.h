// Rendezvous: where a process's two connections find each other.
//
// A descriptor connection that said hello offers itself under a nonce that only
// its peer is told; Open on the gRPC stream of the same process brings the
// nonce back:
//
//   descriptor socket                         gRPC stream
//     Enter(uid) -> Place
//     Offer(connection) -> nonce  - - - - - -> Meet(nonce, who) -> connection
//
// A nonce is 16 bytes of the kernel's randomness and good once. One that was
// stolen is of no use: Meet compares the processes, and a mismatch leaves the
// offer to its owner.
//
// Connections that are no sessions yet cost something before anybody has shown
// any good will, so each uid has only so many places for them.
//
// Thread-safe.
#ifndef KVBROKER_BROKER_TRANSPORT_RENDEZVOUS_H_
#define KVBROKER_BROKER_TRANSPORT_RENDEZVOUS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "broker/base/mutex.h"
#include "broker/transport/peer_identity.h"
#include "proto/messages.h"

namespace kvbroker {

class DescriptorConnection;

class Rendezvous {
 public:
  // One uid's right to one connection that is no session yet; given up on
  // destruction. The rendezvous outlives it.
  class Place {
   public:
    Place() = default;
    Place(Place&& other) noexcept
        : rendezvous_(std::exchange(other.rendezvous_, nullptr)),
          uid_(other.uid_) {}
    Place& operator=(Place&& other) noexcept {
      std::swap(rendezvous_, other.rendezvous_);
      std::swap(uid_, other.uid_);
      return *this;
    }
    ~Place() {
      if (rendezvous_ != nullptr) rendezvous_->GiveUpPlace(uid_);
    }

   private:
    friend class Rendezvous;
    Place(Rendezvous* rendezvous, uint32_t uid)
        : rendezvous_(rendezvous), uid_(uid) {}
    Rendezvous* rendezvous_ = nullptr;
    uint32_t uid_ = 0;
  };

  explicit Rendezvous(size_t places_per_uid = 64)
      : places_per_uid_(places_per_uid) {}

  // RESOURCE_EXHAUSTED: the uid has too many half-open connections.
  absl::StatusOr<Place> Enter(uint32_t uid);

  // Places taken, of whatever uid.
  size_t half_open() const;

  // A new nonce for the connection, valid until met, withdrawn or the
  // connection is destroyed.
  absl::StatusOr<Nonce> Offer(std::weak_ptr<DescriptorConnection> connection);
  // A nonce that is not on offer any more is fine.
  void Withdraw(const Nonce& nonce);

  // The connection under the nonce, which is used up by it. ABORTED: no such
  // nonce (any more); with a new one it may be tried again. PERMISSION_DENIED:
  // it was given to another process.
  absl::StatusOr<std::shared_ptr<DescriptorConnection>> Meet(
      const Nonce& nonce, const PeerIdentity& who);

 private:
  void GiveUpPlace(uint32_t uid);

  const size_t places_per_uid_;
  mutable Mutex mu_;
  absl::flat_hash_map<uint32_t, size_t> places_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<Nonce, std::weak_ptr<DescriptorConnection>> offers_
      ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_RENDEZVOUS_H_
