// A broker in memory, for tests of what stands on AdminClient.
//
// It keeps policies and forgets instances as a broker would; what instances
// hold is for the test to say.
#ifndef KVBROKER_CLIENT_CLI_FAKE_ADMIN_CLIENT_H_
#define KVBROKER_CLIENT_CLI_FAKE_ADMIN_CLIENT_H_

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "broker/base/bytes.h"
#include "client/cli/admin_client.h"

namespace kvbroker::cli {

// The broker itself; outlives the clients.
struct FakeBroker {
  explicit FakeBroker(std::string uuid);

  // Adds an instance of one live process, with a limit and nothing held.
  v1::InstanceStatus& Add(const std::string& name, Bytes limit);

  v1::BrokerStatus status;
  std::map<std::string, v1::InstanceStatus> instances;
  std::map<std::string, std::vector<std::string>> explanations;
  // What every call answers, where it is not OK.
  absl::Status failure;
  // Runs before each List.
  std::function<void()> before_list = [] {};
  std::vector<v1::SetPolicyRequest> policies_set;
};

class FakeAdminClient : public AdminClient {
 public:
  explicit FakeAdminClient(FakeBroker& broker) : broker_(broker) {}

  const std::string& device_uuid() const override {
    return broker_.status.device_uuid();
  }
  absl::StatusOr<v1::ListResponse> List(
      const v1::ListRequest& request) override;
  absl::StatusOr<v1::SetPolicyResponse> SetPolicy(
      const v1::SetPolicyRequest& request) override;
  absl::StatusOr<v1::DeleteResponse> Delete(
      const v1::DeleteRequest& request) override;
  absl::StatusOr<v1::ExplainResponse> Explain(
      const v1::ExplainRequest& request) override;

 private:
  absl::StatusOr<v1::InstanceStatus*> Find(const std::string& name);

  FakeBroker& broker_;
};

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_FAKE_ADMIN_CLIENT_H_
