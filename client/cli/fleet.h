// Fleet: the brokers of one machine, asked as if they were one.
//
// An instance lives on one GPU or, with tensor parallelism, on several, and its
// name is all that an operator gives. So a verb that names an instance goes to
// all brokers; those that do not know the name do not count, unless nobody
// does.
//
//   Fleet fleet(std::move(clients));
//   ASSIGN_OR_RETURN(auto replies, fleet.Explain(request));
//   for (auto& answer : replies.answers) ...
//
// A broker at whose socket nobody listens is passed over while others answer: a
// killed broker leaves its socket behind. Not thread-safe.
#ifndef KVBROKER_CLIENT_CLI_FLEET_H_
#define KVBROKER_CLIENT_CLI_FLEET_H_

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cli/admin_client.h"
#include "client/cli/operands.h"

namespace kvbroker::cli {

// Which brokers answered a question, and how.
template <typename Response>
struct Replies {
  struct Answer {
    std::string device_uuid;
    Response response;
  };
  // In the order of the brokers; not empty.
  std::vector<Answer> answers;
  // From brokers that refused or did not answer in time; the verb has failed in
  // part.
  std::vector<absl::Status> failures;
  // For sockets that nobody listens at; worth a warning.
  std::vector<absl::Status> absent;
};

using Listing = Replies<v1::ListResponse>;

// A change of one instance's policy; what is absent stays.
struct PolicyChange {
  std::string name;
  // Empty: the only one that has an instance of this name.
  std::string tenant;
  std::optional<Amount> min;
  std::optional<Amount> max;
  std::optional<double> weight;
  // Also where there is no such instance yet; then on every broker.
  bool preset = false;
};

class Fleet {
 public:
  // REQUIRES: at least one broker.
  explicit Fleet(std::vector<std::unique_ptr<AdminClient>> brokers)
      : brokers_(std::move(brokers)) {}

  // The instances of these names, all of them where `names` is empty, with the
  // state of every broker. NotFound: no broker knows one of the names.
  absl::StatusOr<Listing> List(const std::vector<std::string>& names);

  // These three: NotFound when no broker knows the name; the message lists the
  // names that exist. Any other error: nobody did what was asked, and this is
  // the first broker's reason.
  absl::StatusOr<Replies<v1::SetPolicyResponse>> SetPolicy(
      const PolicyChange& change);
  absl::StatusOr<Replies<v1::DeleteResponse>> Delete(
      const v1::DeleteRequest& request);
  absl::StatusOr<Replies<v1::ExplainResponse>> Explain(
      const v1::ExplainRequest& request);

 private:
  // Puts one question to every broker.
  template <typename Response>
  absl::StatusOr<Replies<Response>> AskAll(
      const std::string& name,
      absl::FunctionRef<absl::StatusOr<Response>(AdminClient&)> ask);

  absl::Status UnknownName(const std::string& name);

  std::vector<std::unique_ptr<AdminClient>> brokers_;
};

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_FLEET_H_
