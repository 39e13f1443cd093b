// ConnectionTable: whose RPC it is.
//
// gRPC says of an RPC's origin only `ServerContext::peer()`, which is "fd:N"
// for a connection that we accepted and handed over as descriptor number N.
// This table knows who is behind N:
//
//   ASSIGN_OR_RETURN(int number, table.Enter(std::move(socket), peer));
//   grpc::AddInsecureChannelFromFd(server, number);
//   ...
//   std::shared_ptr<const PeerIdentity> who = table.Find(context->peer());
//   ...
//   table.Leave(number);   // the connection has ended
//
// gRPC closes N when it likes, and the system gives the lowest free number to
// the next descriptor. An RPC of the old connection that is still on its way to
// its handler would then be taken for the new connection's. So connections live
// at numbers of their own range, and a number is taken again only when
//   - its entry has left (till then Find would give the old peer's name, which
//     harms nobody: it is the old peer's RPC), and
//   - `cooling` has passed since: an RPC that reaches its handler in that time
//     finds nobody and is refused. No handler starts later than that.
// Numbers go round, so that cooling rarely makes anybody wait; and a number
// counts as its last user's until it may be taken again, so that nobody who
// comes and goes quickly uses them up for others.
//
// Thread-safe.
#ifndef KVBROKER_BROKER_TRANSPORT_CONNECTION_TABLE_H_
#define KVBROKER_BROKER_TRANSPORT_CONNECTION_TABLE_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "broker/base/clock.h"
#include "broker/base/mutex.h"
#include "broker/base/unique_fd.h"
#include "broker/transport/peer_identity.h"

namespace kvbroker {

class ConnectionTable {
 public:
  struct Options {
    Clock* clock = nullptr;  // outlives the table
    // The range of numbers, both included.
    int first_number = 0;
    int last_number = 0;
    absl::Duration cooling = absl::Seconds(3);
    // Numbers of one uid at a time, in use or cooling.
    size_t max_per_uid = 1024;
  };

  // The range for a process that may open `limit` descriptors: its upper
  // quarter, which others reach only when the rest is full.
  static std::pair<int, int> NumberRange(uint64_t limit);

  explicit ConnectionTable(Options options) : options_(options) {}

  // Moves the socket to a number of the range, which the caller owns from now
  // on, and enters the peer under it. RESOURCE_EXHAUSTED: the uid has too many
  // connections, or no number is free.
  absl::StatusOr<int> Enter(UniqueFd socket,
                            std::shared_ptr<const PeerIdentity> peer);

  // The peer behind "fd:N"; null where nobody is, or where it is no such text.
  std::shared_ptr<const PeerIdentity> Find(std::string_view peer) const;

  // The connection with this number has ended. A number without entry is fine.
  void Leave(int number);

  // Hangs up on all that have not left. gRPC does not end a connection while a
  // write to it is under way, and a peer that is stopped lets it wait for ever.
  void HangUpAll() const;

  // Connections that have entered and not left.
  size_t size() const;

 private:
  // The first number from `next_` on that may be used as far as the table
  // knows, going round once; -1 where there is none.
  int NextNumber() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndCooling() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  mutable Mutex mu_;
  int next_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<int, std::shared_ptr<const PeerIdentity>> entries_
      ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, size_t> per_uid_ ABSL_GUARDED_BY(mu_);
  // Numbers that left, oldest first, and when; the set is for look-up.
  struct Cooling {
    absl::Time since;
    int number;
    uint32_t uid;
  };
  std::deque<Cooling> cooling_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_set<int> is_cooling_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_TRANSPORT_CONNECTION_TABLE_H_
