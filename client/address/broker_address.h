// BrokerAddress: where the broker of a device listens, and how to find it.
//
// The broker of the device with uuid U listens in a socket directory D on two
// unix sockets:
//
//   D/U.sock     gRPC: sessions and administration
//   D/U.fd.sock  SOCK_SEQPACKET: page descriptors
//
// D is the system directory (a broker run as a service), else a directory of
// the user's own (a broker started on demand). Who looks for brokers:
//
//   AddressOptions options;
//   options.address = ...;  // KVBROKER_ADDRESS or --address; may be empty
//   ASSIGN_OR_RETURN(std::vector<BrokerAddress> brokers, FindBrokers(options));
//
// A socket file can outlive its broker: that an address was found does not say
// that somebody answers there.
//
// Thread-safe: free functions without state.
#ifndef KVBROKER_CLIENT_ADDRESS_BROKER_ADDRESS_H_
#define KVBROKER_CLIENT_ADDRESS_BROKER_ADDRESS_H_

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace kvbroker::client {

struct BrokerAddress {
  std::string rpc_path;
  std::string descriptor_path;
  std::string device_uuid;

  friend bool operator==(const BrokerAddress&, const BrokerAddress&) = default;
};

// What std::getenv does: the variable's value, or null where it is unset.
using EnvironmentLookup = absl::FunctionRef<const char*(const char*)>;

// Where a broker that runs as a service puts its sockets.
std::string SystemSocketDirectory();

// Where a broker that this user started puts them: `$XDG_RUNTIME_DIR/kvbroker`
// where there is that directory, else `/tmp/kvbroker-<uid>`.
std::string UserSocketDirectory(EnvironmentLookup environment);

// That nobody but this user and root can put sockets into the directory, or a
// link in its place: in /tmp anybody can make one of the name we look for.
// PERMISSION_DENIED says why not. OK where there is none.
absl::Status CheckPrivateDirectory(const std::string& directory);

// Whether the device is called as GPUs are (GPU-...).
bool IsGpu(std::string_view device_uuid);

struct AddressOptions {
  // A socket `.../U.sock`, with or without `unix:` before it, or a directory of
  // sockets. Empty: both directories below.
  std::string address;
  // Only this device: its uuid, a prefix that no other device shares (upper and
  // lower case alike), or its index in the sorted list. Empty: all.
  std::string gpu;
  // The kind of memory wanted. In a directory, "host" leaves out the brokers of
  // GPUs, and "cuda" and "cuda_ipc" all others. Empty: any.
  std::string backend;

  std::string system_directory = SystemSocketDirectory();
  std::string user_directory = UserSocketDirectory(std::getenv);
};

// The brokers in question, sorted by device uuid, at most one a device: where
// both directories name a device, the system's, unless nobody listens there.
//
// NotFound: there is none (or none for `gpu`); says where was looked.
// InvalidArgument: `address` is not of the form above, or `gpu` fits several.
// PermissionDenied: `address` is a directory that may not be read, or the
// per-user directory belongs to somebody else.
absl::StatusOr<std::vector<BrokerAddress>> FindBrokers(
    const AddressOptions& options);

// The one broker in question. Where there is none, it may be in the middle of a
// restart: it is looked for again until `wait` is over. INVALID_ARGUMENT: there
// are several, which the message lists. Else as FindBrokers.
absl::StatusOr<BrokerAddress> FindBroker(const AddressOptions& options,
                                         absl::Duration wait = absl::Seconds(1));

// Whether anybody accepts connections there; one that we may not open counts,
// since its owner may well be there.
bool SomebodyListens(const BrokerAddress& address);

// The two sockets of a device's broker in `directory`. InvalidArgument where
// `uuid` cannot be a file name or a path is longer than a unix socket's may be
// (107 bytes).
absl::StatusOr<BrokerAddress> AddressFor(const std::string& directory,
                                         const std::string& uuid);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ADDRESS_BROKER_ADDRESS_H_
