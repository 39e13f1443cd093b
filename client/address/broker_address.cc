#include "client/address/broker_address.h"

#include <dirent.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "broker/base/status_macros.h"
#include "broker/base/unique_fd.h"

namespace kvbroker::client {
namespace {

constexpr absl::Duration kLookAgain = absl::Milliseconds(20);
constexpr absl::string_view kRpcSuffix = ".sock";
constexpr absl::string_view kDescriptorSuffix = ".fd.sock";

// The kernel's sun_path, less the terminating zero.
constexpr size_t kMaxPathBytes = sizeof(sockaddr_un::sun_path) - 1;

std::string InDirectory(const std::string& directory, absl::string_view file) {
  absl::string_view separator = absl::EndsWith(directory, "/") ? "" : "/";
  return absl::StrCat(directory, separator, file);
}

// The device whose gRPC socket has this file name; empty where it is no such
// name.
std::string UuidOfSocketName(absl::string_view name) {
  if (absl::EndsWith(name, kDescriptorSuffix)) return "";
  if (!absl::ConsumeSuffix(&name, kRpcSuffix)) return "";
  return std::string(name);
}

// The addresses of all sockets in `directory`, in no order.
absl::StatusOr<std::vector<BrokerAddress>> ReadDirectory(
    const std::string& directory) {
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(directory.c_str()), closedir);
  if (dir == nullptr) return ErrnoToStatus(errno, "open of " + directory);
  std::vector<BrokerAddress> found;
  while (const dirent* entry = readdir(dir.get())) {
    std::string uuid = UuidOfSocketName(entry->d_name);
    struct stat info;
    if (uuid.empty() ||
        stat(InDirectory(directory, entry->d_name).c_str(), &info) != 0 ||
        !S_ISSOCK(info.st_mode)) {
      continue;
    }
    ASSIGN_OR_RETURN(found.emplace_back(), AddressFor(directory, uuid));
  }
  return found;
}

absl::StatusOr<std::vector<BrokerAddress>> SearchDefaultDirectories(
    const AddressOptions& options) {
  std::vector<std::string> looked;
  std::vector<BrokerAddress> merged;
  for (const std::string* directory :
       {&options.system_directory, &options.user_directory}) {
    if (directory == &options.user_directory) {
      RETURN_IF_ERROR(CheckPrivateDirectory(*directory));
    }
    absl::StatusOr<std::vector<BrokerAddress>> found =
        ReadDirectory(*directory);
    if (!found.ok()) {
      // Usually there is no such directory; a closed one is worth a word.
      if (absl::IsInvalidArgument(found.status())) return found.status();
      looked.push_back(absl::IsPermissionDenied(found.status())
                           ? *directory + " (permission denied)"
                           : *directory);
      continue;
    }
    looked.push_back(*directory);
    for (BrokerAddress& address : *found) {
      auto same = absl::c_find_if(merged, [&](const BrokerAddress& other) {
        return other.device_uuid == address.device_uuid;
      });
      if (same == merged.end()) {
        merged.push_back(std::move(address));
      } else if (!SomebodyListens(*same)) {
        *same = std::move(address);
      }
    }
  }
  if (merged.empty()) {
    return absl::NotFoundError(absl::StrCat("no broker found: no socket in ",
                                            absl::StrJoin(looked, " nor in ")));
  }
  return merged;
}

// What `--address` or KVBROKER_ADDRESS names.
absl::StatusOr<std::vector<BrokerAddress>> ResolveAddress(
    absl::string_view address) {
  absl::string_view rest = address;
  if (absl::ConsumePrefix(&rest, "unix:")) {
    // gRPC's own spelling of an absolute path.
    if (absl::StartsWith(rest, "///")) rest.remove_prefix(2);
  }
  std::string path(rest);
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) {
      return absl::NotFoundError(absl::StrCat(
          "no broker found: the address does not exist: ", address));
    }
    return ErrnoToStatus(errno, "look-up of the broker's address " + path);
  }
  if (S_ISDIR(info.st_mode)) {
    ASSIGN_OR_RETURN(std::vector<BrokerAddress> found, ReadDirectory(path));
    if (found.empty()) {
      return absl::NotFoundError(
          absl::StrCat("no broker found: no socket in ", path));
    }
    return found;
  }
  size_t slash = path.rfind('/');
  std::string directory =
      slash == std::string::npos ? "." : path.substr(0, slash + 1);
  std::string uuid = UuidOfSocketName(path.substr(slash + 1));
  if (!S_ISSOCK(info.st_mode) || uuid.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "not a broker's address: it is a directory of sockets or a socket "
        "<device uuid>.sock; got \"",
        address, "\""));
  }
  ASSIGN_OR_RETURN(BrokerAddress found, AddressFor(directory, uuid));
  return std::vector<BrokerAddress>{std::move(found)};
}

std::string ListUuids(const std::vector<BrokerAddress>& brokers) {
  return absl::StrJoin(brokers, ", ",
                       [](std::string* out, const BrokerAddress& broker) {
                         absl::StrAppend(out, broker.device_uuid);
                       });
}

// The one of the sorted `brokers` that `gpu` means.
absl::StatusOr<BrokerAddress> SelectDevice(
    const std::vector<BrokerAddress>& brokers, const std::string& gpu) {
  if (absl::c_all_of(gpu, absl::ascii_isdigit)) {
    size_t index;
    if (absl::SimpleAtoi(gpu, &index) && index < brokers.size()) {
      return brokers[index];
    }
    return absl::NotFoundError(absl::StrCat(
        "no broker found for this GPU: the index is beyond the last of ",
        brokers.size(), " (", ListUuids(brokers), "); got ", gpu));
  }
  std::vector<BrokerAddress> fitting;
  for (const BrokerAddress& broker : brokers) {
    if (absl::EqualsIgnoreCase(broker.device_uuid, gpu)) return broker;
    if (absl::StartsWithIgnoreCase(broker.device_uuid, gpu)) {
      fitting.push_back(broker);
    }
  }
  if (fitting.size() == 1) return fitting[0];
  if (fitting.empty()) {
    return absl::NotFoundError(
        absl::StrCat("no broker found for this GPU: there are ",
                     ListUuids(brokers), "; got ", gpu));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("several GPUs begin like this, give more of the uuid: ",
                   ListUuids(fitting), "; got ", gpu));
}

// Takes out what is of another kind than `backend`; what is left may be nothing.
void KeepKind(const std::string& backend, std::vector<BrokerAddress>& brokers) {
  if (backend.empty()) return;
  std::erase_if(brokers, [&](const BrokerAddress& broker) {
    return IsGpu(broker.device_uuid) == (backend == "host");
  });
}

}  // namespace

bool IsGpu(std::string_view device_uuid) {
  return device_uuid.starts_with("GPU-");
}

bool SomebodyListens(const BrokerAddress& address) {
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return true;
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  address.rpc_path.copy(name.sun_path, kMaxPathBytes);
  return connect(fd.get(), reinterpret_cast<const sockaddr*>(&name),
                 sizeof(name)) == 0 ||
         (errno != ECONNREFUSED && errno != ENOENT);
}

absl::Status CheckPrivateDirectory(const std::string& directory) {
  struct stat info;
  if (lstat(directory.c_str(), &info) != 0) return absl::OkStatus();
  const bool ours = info.st_uid == geteuid() || info.st_uid == 0;
  if (ours && S_ISDIR(info.st_mode) && (info.st_mode & S_IWOTH) == 0) {
    return absl::OkStatus();
  }
  return absl::PermissionDeniedError(absl::StrCat(
      "the socket directory ",
      !ours                   ? "belongs to another user"
      : S_ISDIR(info.st_mode) ? "can be written to by all"
                              : "is a link or a file",
      ", set KVBROKER_ADDRESS or remove it: ", directory, " (uid ", info.st_uid,
      ")"));
}

std::string SystemSocketDirectory() { return "/run/kvbroker"; }

std::string UserSocketDirectory(EnvironmentLookup environment) {
  const char* runtime = environment("XDG_RUNTIME_DIR");
  struct stat info;
  // Containers inherit the variable, and not the directory.
  if (runtime != nullptr && stat(runtime, &info) == 0 &&
      S_ISDIR(info.st_mode)) {
    return InDirectory(runtime, "kvbroker");
  }
  return absl::StrCat("/tmp/kvbroker-", geteuid());
}

absl::StatusOr<std::vector<BrokerAddress>> FindBrokers(
    const AddressOptions& options) {
  ASSIGN_OR_RETURN(std::vector<BrokerAddress> found,
                   options.address.empty() ? SearchDefaultDirectories(options)
                                           : ResolveAddress(options.address));
  absl::c_sort(found, [](const BrokerAddress& a, const BrokerAddress& b) {
    return a.device_uuid < b.device_uuid;
  });
  std::vector<BrokerAddress> of_kind = found;
  KeepKind(options.backend, of_kind);
  if (of_kind.empty() && options.address.empty()) {
    return absl::NotFoundError(
        absl::StrCat("no broker found for ", options.backend,
                     " memory: there are ", ListUuids(found)));
  }
  // Of one that was named the session says what is wrong.
  if (!of_kind.empty()) found = std::move(of_kind);
  if (options.gpu.empty()) return found;
  ASSIGN_OR_RETURN(BrokerAddress selected, SelectDevice(found, options.gpu));
  return std::vector<BrokerAddress>{std::move(selected)};
}

absl::StatusOr<BrokerAddress> FindBroker(const AddressOptions& options,
                                         absl::Duration wait) {
  const absl::Time give_up = absl::Now() + wait;
  absl::StatusOr<std::vector<BrokerAddress>> brokers = FindBrokers(options);
  while (absl::IsNotFound(brokers.status()) && absl::Now() < give_up) {
    absl::SleepFor(kLookAgain);
    brokers = FindBrokers(options);
  }
  RETURN_IF_ERROR(brokers.status());
  if (brokers->size() == 1) return std::move(brokers->front());
  return absl::InvalidArgumentError(absl::StrCat(
      "several brokers are there, say which with the address or the gpu: ",
      absl::StrJoin(*brokers, ", ",
                    [](std::string* out, const BrokerAddress& broker) {
                      absl::StrAppend(out, broker.rpc_path);
                    })));
}

absl::StatusOr<BrokerAddress> AddressFor(const std::string& directory,
                                         const std::string& uuid) {
  if (uuid.empty() || absl::StrContains(uuid, '/') ||
      absl::EndsWith(uuid, ".fd")) {
    return absl::InvalidArgumentError(absl::StrCat(
        "not a device uuid that can name a socket: \"", uuid, "\""));
  }
  BrokerAddress address = {
      .rpc_path = InDirectory(directory, absl::StrCat(uuid, kRpcSuffix)),
      .descriptor_path =
          InDirectory(directory, absl::StrCat(uuid, kDescriptorSuffix)),
      .device_uuid = uuid};
  if (address.descriptor_path.size() > kMaxPathBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the socket directory's name is too long, a unix socket's "
                     "path may have "
                     "at most ",
                     kMaxPathBytes, " bytes: ", address.descriptor_path,
                     " has ", address.descriptor_path.size()));
  }
  return address;
}

}  // namespace kvbroker::client
