// TestSession and TestAdmin: a bare engine and a bare operator, for tests: the
// real sockets and the real gRPC, one step a call, blocking, nothing checked
// that the broker should check. Includes no gRPC.
#ifndef KVBROKER_BROKER_SERVER_TEST_SESSION_H_
#define KVBROKER_BROKER_SERVER_TEST_SESSION_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"
#include "broker/core/status.h"
#include "broker/transport/descriptor_client.h"
#include "client/address/broker_address.h"
#include "proto/messages.h"

namespace kvbroker {

// One instance with one pool of two-handle pages of 2 x 64 KiB.
class TestSession {
 public:
  explicit TestSession(const client::BrokerAddress& address);
  // Its stream goes over the other's gRPC connection.
  explicit TestSession(const TestSession& other);
  ~TestSession();

  DescriptorClient& descriptors() { return descriptors_; }

  // Hello, stream, Open; fails as the stream does.
  absl::Status Begin(const std::string& instance, bool with_pidfd = false);
  // Only the stream and Open.
  absl::Status OpenWith(const Nonce& nonce, const std::string& instance);
  absl::Status OpenWith(const Open& open);
  // What the other two say.
  static Open OpenOf(const Nonce& nonce, const std::string& instance);

  // False where the stream has ended.
  bool Send(const ClientMessage& message);
  bool SendBytes(const std::string& serialized);
  // The next message; where the stream has ended, its status.
  absl::StatusOr<BrokerMessage> Read();
  // The stream's status, once it has ended.
  absl::Status ReadToTheEnd();

  // Acquires, takes the descriptors and acknowledges all.
  absl::StatusOr<std::vector<UniqueFd>> Acquire(uint32_t pages);
  bool SendAcquire(uint32_t pages, absl::Duration deadline = absl::Seconds(5));
  // Gives back what Acquire brought last.
  bool ReturnLast();
  const Granted& last_granted() const { return granted_; }

  SessionId id() const { return opened_.session; }
  const Opened& opened() const { return opened_; }
  PoolId pool() const { return opened_.pools.at(0); }
  Bytes page_bytes() const { return KiB(128); }

  // Ends the stream and leaves the descriptor connection.
  void HangUpStream();

 private:
  struct Stream;
  struct Connection;

  const client::BrokerAddress address_;
  DescriptorClient descriptors_;
  std::shared_ptr<Connection> connection_;
  std::unique_ptr<Stream> stream_;
  Opened opened_;
  Granted granted_;
  uint64_t sequence_ = 0;
};

class TestAdmin {
 public:
  explicit TestAdmin(const client::BrokerAddress& address);
  ~TestAdmin();

  // "tenant name" of each instance.
  absl::StatusOr<std::vector<std::string>> List(
      const std::vector<std::string>& names = {});
  absl::Status SetMax(const std::string& name, Bytes max,
                      const std::string& tenant = "", bool preset = false);
  absl::Status Delete(const std::string& name, bool force);
  absl::StatusOr<std::vector<std::string>> Explain(const std::string& name);
  // grpc.health.v1 says SERVING.
  bool Healthy();
  // What reflection answers to "list services", as it is on the wire.
  std::string Reflect();

 private:
  struct Stub;
  std::unique_ptr<Stub> stub_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_TEST_SESSION_H_
