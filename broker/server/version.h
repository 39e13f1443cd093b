// What `kvbrokerd --version` and the admin service say.
#ifndef KVBROKER_BROKER_SERVER_VERSION_H_
#define KVBROKER_BROKER_SERVER_VERSION_H_

namespace kvbroker {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_VERSION_H_
