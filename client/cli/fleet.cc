#include "client/cli/fleet.h"

#include <set>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "broker/base/bytes.h"
#include "broker/base/status_macros.h"

namespace kvbroker::cli {
namespace {

std::set<std::string> NamesIn(const Listing& listing) {
  std::set<std::string> names;
  for (const Listing::Answer& answer : listing.answers) {
    for (const v1::InstanceStatus& instance : answer.response.instances()) {
      names.insert(instance.name());
    }
  }
  return names;
}

absl::Status UnknownNameError(const std::string& name,
                              const std::set<std::string>& known) {
  return absl::NotFoundError(
      known.empty()
          ? absl::StrCat("no such instance, there is none at all: \"", name,
                         "\"")
          : absl::StrCat("no such instance: \"", name,
                         "\"; instances: ", absl::StrJoin(known, ", ")));
}

// `amount` in bytes of the broker's device.
absl::StatusOr<Bytes> BytesOn(AdminClient& broker, const Amount& amount) {
  if (const Bytes* bytes = std::get_if<Bytes>(&amount)) return *bytes;
  ASSIGN_OR_RETURN(v1::ListResponse listed, broker.List({}));
  return Bytes(
      static_cast<int64_t>(static_cast<double>(listed.broker().total_bytes()) *
                           std::get<Percent>(amount).value / 100));
}

absl::StatusOr<v1::SetPolicyResponse> SetPolicyOn(AdminClient& broker,
                                                  const PolicyChange& change) {
  v1::SetPolicyRequest request;
  request.set_name(change.name);
  request.set_tenant(change.tenant);
  request.set_preset(change.preset);
  if (change.weight.has_value()) request.set_weight(*change.weight);
  if (change.min.has_value()) {
    ASSIGN_OR_RETURN(Bytes min, BytesOn(broker, *change.min));
    request.set_min_bytes(min.count());
  }
  if (change.max.has_value()) {
    if (const Bytes* max = std::get_if<Bytes>(&*change.max)) {
      request.set_max_bytes(max->count());
    } else if (double percent = std::get<Percent>(*change.max).value;
               percent > 0) {
      request.set_max_percent(percent);
    } else {
      request.set_max_bytes(0);
    }
  }
  return broker.SetPolicy(request);
}

}  // namespace

template <typename Response>
absl::StatusOr<Replies<Response>> Fleet::AskAll(
    const std::string& name,
    absl::FunctionRef<absl::StatusOr<Response>(AdminClient&)> ask) {
  Replies<Response> replies;
  bool somebody_does_not_know = false;
  for (const auto& broker : brokers_) {
    absl::StatusOr<Response> response = ask(*broker);
    if (response.ok()) {
      replies.answers.push_back({broker->device_uuid(), *std::move(response)});
    } else if (absl::IsNotFound(response.status())) {
      somebody_does_not_know = true;
    } else if (absl::IsUnavailable(response.status())) {
      replies.absent.push_back(std::move(response).status());
    } else {
      replies.failures.push_back(std::move(response).status());
    }
  }
  if (!replies.answers.empty()) return replies;
  if (!replies.failures.empty()) return replies.failures.front();
  if (!somebody_does_not_know) return replies.absent.front();
  absl::Status unknown = UnknownName(name);
  if (replies.absent.empty()) return unknown;
  // Perhaps the name is known where nobody answers.
  return absl::Status(unknown.code(),
                      absl::StrCat(unknown.message(), "; and ",
                                   replies.absent.front().message()));
}

absl::Status Fleet::UnknownName(const std::string& name) {
  ASSIGN_OR_RETURN(Listing all, List({}));
  return UnknownNameError(name, NamesIn(all));
}

absl::StatusOr<Listing> Fleet::List(const std::vector<std::string>& names) {
  // Asked for all and chosen from here: to a single broker, a name that another
  // one knows is an error.
  ASSIGN_OR_RETURN(Listing listing,
                   AskAll<v1::ListResponse>("", [](AdminClient& broker) {
                     return broker.List({});
                   }));
  if (names.empty()) return listing;
  std::set<std::string> known = NamesIn(listing);
  for (const std::string& name : names) {
    if (known.count(name) == 0) return UnknownNameError(name, known);
  }
  for (Listing::Answer& answer : listing.answers) {
    auto& instances = *answer.response.mutable_instances();
    instances.erase(std::remove_if(instances.begin(), instances.end(),
                                   [&](const v1::InstanceStatus& instance) {
                                     return !absl::c_linear_search(
                                         names, instance.name());
                                   }),
                    instances.end());
  }
  return listing;
}

absl::StatusOr<Replies<v1::SetPolicyResponse>> Fleet::SetPolicy(
    const PolicyChange& change) {
  return AskAll<v1::SetPolicyResponse>(change.name, [&](AdminClient& broker) {
    return SetPolicyOn(broker, change);
  });
}

absl::StatusOr<Replies<v1::DeleteResponse>> Fleet::Delete(
    const v1::DeleteRequest& request) {
  return AskAll<v1::DeleteResponse>(request.name(), [&](AdminClient& broker) {
    return broker.Delete(request);
  });
}

absl::StatusOr<Replies<v1::ExplainResponse>> Fleet::Explain(
    const v1::ExplainRequest& request) {
  return AskAll<v1::ExplainResponse>(request.name(), [&](AdminClient& broker) {
    return broker.Explain(request);
  });
}

}  // namespace kvbroker::cli
