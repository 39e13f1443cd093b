#include "client/cli/fake_admin_client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker::cli {

FakeBroker::FakeBroker(std::string uuid) {
  status.set_device_uuid(std::move(uuid));
  status.set_backend("host");
  status.set_backend_reason("no GPU found");
  status.set_state("serving");
  status.set_total_bytes(GiB(10).count());
  status.set_capacity_bytes(GiB(8).count());
}

v1::InstanceStatus& FakeBroker::Add(const std::string& name, Bytes limit) {
  v1::InstanceStatus& instance = instances[name];
  instance.set_name(name);
  instance.set_tenant("uid:0");
  instance.add_pids(4711);
  instance.set_max_bytes(limit.count());
  instance.set_effective_limit_bytes(
      std::min<uint64_t>(limit.count(), status.capacity_bytes()));
  instance.set_weight(1);
  instance.set_pressure("none");
  return instance;
}

absl::StatusOr<v1::InstanceStatus*> FakeAdminClient::Find(
    const std::string& name) {
  RETURN_IF_ERROR(broker_.failure);
  auto it = broker_.instances.find(name);
  if (it == broker_.instances.end()) {
    return absl::NotFoundError(absl::StrCat("not known here: ", name));
  }
  return &it->second;
}

absl::StatusOr<v1::ListResponse> FakeAdminClient::List(
    const v1::ListRequest& request) {
  broker_.before_list();
  RETURN_IF_ERROR(broker_.failure);
  for (const std::string& name : request.names()) {
    RETURN_IF_ERROR(Find(name).status());
  }
  v1::ListResponse response;
  *response.mutable_broker() = broker_.status;
  for (const auto& [name, instance] : broker_.instances) {
    if (request.names_size() == 0 ||
        std::count(request.names().begin(), request.names().end(), name) > 0) {
      *response.add_instances() = instance;
    }
  }
  return response;
}

absl::StatusOr<v1::SetPolicyResponse> FakeAdminClient::SetPolicy(
    const v1::SetPolicyRequest& request) {
  absl::StatusOr<v1::InstanceStatus*> found = Find(request.name());
  if (absl::IsNotFound(found.status()) && request.preset()) {
    found = &broker_.Add(request.name(), GiB(8));
  }
  RETURN_IF_ERROR(found.status());
  broker_.policies_set.push_back(request);
  v1::InstanceStatus& instance = **found;
  const uint64_t total = broker_.status.total_bytes();
  if (request.has_min_bytes()) instance.set_min_bytes(request.min_bytes());
  if (request.has_max_bytes()) instance.set_max_bytes(request.max_bytes());
  if (request.has_max_percent()) {
    instance.set_max_bytes(
        static_cast<uint64_t>(total * request.max_percent() / 100));
  }
  if (request.has_weight()) instance.set_weight(request.weight());
  instance.set_effective_limit_bytes(
      std::min(instance.max_bytes(), broker_.status.capacity_bytes()));
  v1::SetPolicyResponse response;
  *response.mutable_instance() = instance;
  response.set_draining(instance.held_bytes() > instance.max_bytes());
  return response;
}

absl::StatusOr<v1::DeleteResponse> FakeAdminClient::Delete(
    const v1::DeleteRequest& request) {
  ASSIGN_OR_RETURN(v1::InstanceStatus * instance, Find(request.name()));
  if (instance->pids_size() > 0 && !request.force()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the instance has live processes: ", request.name()));
  }
  v1::DeleteResponse response;
  *response.mutable_fenced_pids() = instance->pids();
  broker_.instances.erase(request.name());
  return response;
}

absl::StatusOr<v1::ExplainResponse> FakeAdminClient::Explain(
    const v1::ExplainRequest& request) {
  ASSIGN_OR_RETURN(v1::InstanceStatus * instance, Find(request.name()));
  v1::ExplainResponse response;
  *response.mutable_instance() = *instance;
  for (const std::string& line : broker_.explanations[request.name()]) {
    response.add_lines(line);
  }
  return response;
}

}  // namespace kvbroker::cli
