#include "broker/transport/rendezvous.h"

#include <errno.h>
#include <sys/random.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "broker/base/unique_fd.h"
#include "broker/transport/descriptor_connection.h"

namespace kvbroker {

absl::StatusOr<Rendezvous::Place> Rendezvous::Enter(uint32_t uid) {
  MutexLock lock(&mu_);
  size_t& taken = places_[uid];
  if (taken >= places_per_uid_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("quota.half_open: uid ", uid, " has ", taken,
                     " connections that wait for Open; raise quota.half_open "
                     "of kvbrokerd"));
  }
  ++taken;
  return Place(this, uid);
}

void Rendezvous::GiveUpPlace(uint32_t uid) {
  MutexLock lock(&mu_);
  auto found = places_.find(uid);
  if (--found->second == 0) places_.erase(found);
}

size_t Rendezvous::half_open() const {
  MutexLock lock(&mu_);
  size_t all = 0;
  for (const auto& [uid, places] : places_) all += places;
  return all;
}

absl::StatusOr<Nonce> Rendezvous::Offer(
    std::weak_ptr<DescriptorConnection> connection) {
  Nonce nonce;
  if (getrandom(nonce.data(), nonce.size(), 0) !=
      static_cast<ssize_t>(nonce.size())) {
    return ErrnoToStatus(errno, "getrandom");
  }
  MutexLock lock(&mu_);
  offers_[nonce] = std::move(connection);
  return nonce;
}

void Rendezvous::Withdraw(const Nonce& nonce) {
  MutexLock lock(&mu_);
  offers_.erase(nonce);
}

absl::StatusOr<std::shared_ptr<DescriptorConnection>> Rendezvous::Meet(
    const Nonce& nonce, const PeerIdentity& who) {
  MutexLock lock(&mu_);
  auto found = offers_.find(nonce);
  std::shared_ptr<DescriptorConnection> connection;
  if (found != offers_.end()) connection = found->second.lock();
  if (connection == nullptr) {
    return absl::AbortedError(
        "the nonce in Open is unknown: it was used already, or its descriptor "
        "connection has ended");
  }
  if (!SameProcess(connection->peer(), who)) {
    return absl::PermissionDeniedError(
        "the nonce in Open was given to another process");
  }
  offers_.erase(found);
  return connection;
}

}  // namespace kvbroker
