// The version of all programs of this tree: what --version and the admin service
// say. That of the protocol is kProtocolVersion.
#ifndef KVBROKER_PROTO_VERSION_H_
#define KVBROKER_PROTO_VERSION_H_

namespace kvbroker {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace kvbroker

#endif  // KVBROKER_PROTO_VERSION_H_
