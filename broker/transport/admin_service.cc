#include "broker/transport/admin_service.h"

#include <unistd.h>

#include <set>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/base/status_macros.h"
#include "broker/transport/grpc_status.h"
#include "broker/transport/peer_identity.h"
#include "broker/transport/status_convert.h"
#include "proto/kvbroker/v1/admin.grpc.pb.h"

namespace kvbroker {
namespace {

absl::Status NoSuchInstance(const std::string& name,
                            const std::set<std::string>& existing) {
  return absl::NotFoundError(
      absl::StrCat("no instance of this name: ", name, "; there are: ",
                   existing.empty() ? "none" : absl::StrJoin(existing, ", ")));
}

class AdminService final : public v1::Admin::CallbackService {
 public:
  explicit AdminService(AdminServiceOptions options)
      : options_(std::move(options)) {}

  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* context,
                                 const v1::ListRequest* request,
                                 v1::ListResponse* response) override {
    return Answer(context, [&](const PeerIdentity& caller) {
      return DoList(caller, *request, response);
    });
  }

  grpc::ServerUnaryReactor* SetPolicy(
      grpc::CallbackServerContext* context, const v1::SetPolicyRequest* request,
      v1::SetPolicyResponse* response) override {
    return Answer(context, [&](const PeerIdentity& caller) {
      return DoSetPolicy(caller, *request, response);
    });
  }

  grpc::ServerUnaryReactor* Delete(grpc::CallbackServerContext* context,
                                   const v1::DeleteRequest* request,
                                   v1::DeleteResponse* response) override {
    return Answer(context, [&](const PeerIdentity& caller) {
      return DoDelete(caller, *request, response);
    });
  }

  grpc::ServerUnaryReactor* Explain(grpc::CallbackServerContext* context,
                                    const v1::ExplainRequest* request,
                                    v1::ExplainResponse* response) override {
    return Answer(context, [&](const PeerIdentity& caller) {
      return DoExplain(caller, *request, response);
    });
  }

 private:
  // Answers at once with what `handle` makes of it.
  template <typename Handle>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context,
                                   Handle handle) {
    std::shared_ptr<const PeerIdentity> caller =
        options_.connections->Find(context->peer());
    absl::Status status =
        caller == nullptr
            ? absl::UnauthenticatedError(
                  "the connection is not one that the broker accepted")
            : handle(*caller);
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }

  bool MayTouch(const PeerIdentity& caller, const std::string& tenant) const {
    return tenant == caller.tenant ||
           options_.admission.IsAdministrator(caller);
  }

  absl::Status NotYours(const std::string& name) const {
    return absl::PermissionDeniedError(absl::StrCat(
        "the instance belongs to another tenant; only root and the broker's "
        "user (uid ",
        options_.admission.broker_uid, ") may see and change it: ", name));
  }

  // What the caller means, within what it may touch. `create`: a name that
  // nobody has is fine.
  absl::StatusOr<InstanceSelector> Select(const PeerIdentity& caller,
                                          const std::string& name,
                                          const std::string& tenant,
                                          bool create) const {
    if (name.empty()) {
      return absl::InvalidArgumentError("name must not be empty");
    }
    if (options_.admission.IsAdministrator(caller)) {
      // A name that nobody has yet is to be the administrator's own, unless it
      // says whose.
      if (!create || !tenant.empty() || Exists(name)) {
        return InstanceSelector{.name = name, .tenant = tenant};
      }
      return InstanceSelector{.name = name, .tenant = caller.tenant};
    }
    if (!tenant.empty() && tenant != caller.tenant) return NotYours(name);
    bool anothers = false;
    std::set<std::string> existing;
    for (const InstanceStatus& instance : options_.core->Snapshot().instances) {
      if (instance.tenant == caller.tenant) {
        existing.insert(instance.name);
      } else if (instance.name == name) {
        anothers = true;
      }
    }
    if (!existing.contains(name)) {
      if (anothers) return NotYours(name);
      if (!create) return NoSuchInstance(name, existing);
    }
    return InstanceSelector{.name = name, .tenant = caller.tenant};
  }

  // Whether any tenant has an instance of this name.
  bool Exists(const std::string& name) const {
    for (const InstanceStatus& instance : options_.core->Snapshot().instances) {
      if (instance.name == name) return true;
    }
    return false;
  }

  absl::Status DoList(const PeerIdentity& caller,
                      const v1::ListRequest& request,
                      v1::ListResponse* response) const {
    CoreSnapshot snapshot = options_.core->Snapshot();
    ToWire(snapshot.broker, response->mutable_broker());
    response->mutable_broker()->set_version(options_.version);
    response->mutable_broker()->set_backend_reason(options_.backend_reason);
    response->mutable_broker()->set_pid(getpid());

    std::set<std::string> wanted(request.names().begin(),
                                 request.names().end());
    std::set<std::string> existing;
    std::set<std::string> anothers;
    for (const InstanceStatus& instance : snapshot.instances) {
      if (!MayTouch(caller, instance.tenant)) {
        anothers.insert(instance.name);
        continue;
      }
      existing.insert(instance.name);
      if (wanted.empty() || wanted.contains(instance.name)) {
        ToWire(instance, response->add_instances());
      }
    }
    for (const std::string& name : wanted) {
      if (existing.contains(name)) continue;
      if (anothers.contains(name)) return NotYours(name);
      return NoSuchInstance(name, existing);
    }
    return absl::OkStatus();
  }

  absl::Status DoSetPolicy(const PeerIdentity& caller,
                           const v1::SetPolicyRequest& request,
                           v1::SetPolicyResponse* response) const {
    ASSIGN_OR_RETURN(PolicyChange change, FromWire(request));
    ASSIGN_OR_RETURN(
        InstanceSelector which,
        Select(caller, request.name(), request.tenant(), request.preset()));
    ASSIGN_OR_RETURN(InstanceStatus status,
                     options_.core->SetPolicy(which, change));
    ToWire(status, response->mutable_instance());
    response->set_draining(status.held > status.max);
    return absl::OkStatus();
  }

  absl::Status DoDelete(const PeerIdentity& caller,
                        const v1::DeleteRequest& request,
                        v1::DeleteResponse* response) const {
    ASSIGN_OR_RETURN(InstanceSelector which,
                     Select(caller, request.name(), request.tenant(),
                            /*create=*/false));
    ASSIGN_OR_RETURN(std::vector<uint32_t> pids,
                     options_.core->Delete(which, request.force()));
    response->mutable_fenced_pids()->Add(pids.begin(), pids.end());
    return absl::OkStatus();
  }

  absl::Status DoExplain(const PeerIdentity& caller,
                         const v1::ExplainRequest& request,
                         v1::ExplainResponse* response) const {
    ASSIGN_OR_RETURN(InstanceSelector which,
                     Select(caller, request.name(), request.tenant(),
                            /*create=*/false));
    ASSIGN_OR_RETURN(Explanation explanation, options_.core->Explain(which));
    ToWire(explanation, response);
    return absl::OkStatus();
  }

  const AdminServiceOptions options_;
};

}  // namespace

std::shared_ptr<grpc::Service> MakeAdminService(AdminServiceOptions options) {
  return std::make_shared<AdminService>(std::move(options));
}

}  // namespace kvbroker
