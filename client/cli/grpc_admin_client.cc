#include "client/cli/grpc_admin_client.h"

#include <grpcpp/grpcpp.h>

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "proto/kvbroker/v1/admin.grpc.pb.h"

namespace kvbroker::cli {
namespace {

// The path as a gRPC target: a URI, in which some characters mean something
// else.
std::string TargetOf(const std::string& path) {
  std::string target = "unix:";
  for (char c : path) {
    if (absl::ascii_isalnum(c) || absl::StrContains("/._-~", c)) {
      target += c;
    } else {
      absl::StrAppendFormat(&target, "%%%02X", static_cast<unsigned char>(c));
    }
  }
  return target;
}

absl::Status FromGrpc(const grpc::Status& status, const std::string& path,
                      absl::Duration timeout) {
  if (status.ok()) return absl::OkStatus();
  const std::string& text = status.error_message();
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
      // gRPC knows why only in words.
      if (absl::EndsWith(text, "Permission denied")) {
        return absl::PermissionDeniedError(
            absl::StrCat("not permitted to open the broker's socket, it admits "
                         "its owner and "
                         "group: ",
                         path));
      }
      if (absl::StrContains(text, "failed to connect")) {
        return absl::UnavailableError(
            absl::StrCat("no broker listens at ", path, ": ",
                         text.substr(text.rfind(": ") + 2)));
      }
      return absl::UnavailableError(
          absl::StrCat("the broker at ", path, " went away: ", text));
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return absl::DeadlineExceededError(
          absl::StrCat("the broker at ", path, " did not answer within ",
                       absl::FormatDuration(timeout)));
    case grpc::StatusCode::UNIMPLEMENTED:
      return absl::UnimplementedError(absl::StrCat(
          "the broker at ", path, " does not know this call, it is older"));
    default:
      return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                          text);
  }
}

class GrpcAdminClient : public AdminClient {
 public:
  GrpcAdminClient(const client::BrokerAddress& address, absl::Duration timeout)
      : address_(address), timeout_(timeout) {
    grpc::ChannelArguments arguments;
    arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    stub_ = v1::Admin::NewStub(grpc::CreateCustomChannel(
        TargetOf(address.rpc_path), grpc::InsecureChannelCredentials(),
        arguments));
  }

  const std::string& device_uuid() const override {
    return address_.device_uuid;
  }

  absl::StatusOr<v1::ListResponse> List(
      const v1::ListRequest& request) override {
    return Call(&v1::Admin::Stub::List, request);
  }
  absl::StatusOr<v1::SetPolicyResponse> SetPolicy(
      const v1::SetPolicyRequest& request) override {
    return Call(&v1::Admin::Stub::SetPolicy, request);
  }
  absl::StatusOr<v1::DeleteResponse> Delete(
      const v1::DeleteRequest& request) override {
    return Call(&v1::Admin::Stub::Delete, request);
  }
  absl::StatusOr<v1::ExplainResponse> Explain(
      const v1::ExplainRequest& request) override {
    return Call(&v1::Admin::Stub::Explain, request);
  }

 private:
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(
      grpc::Status (v1::Admin::Stub::*method)(grpc::ClientContext*,
                                              const Request&, Response*),
      const Request& request) {
    grpc::ClientContext context;
    if (timeout_ != absl::InfiniteDuration()) {
      context.set_deadline(absl::ToChronoTime(absl::Now() + timeout_));
    }
    Response response;
    grpc::Status status = (*stub_.*method)(&context, request, &response);
    if (!status.ok()) return FromGrpc(status, address_.rpc_path, timeout_);
    return response;
  }

  const client::BrokerAddress address_;
  const absl::Duration timeout_;
  std::unique_ptr<v1::Admin::Stub> stub_;
};

}  // namespace

std::unique_ptr<AdminClient> MakeGrpcAdminClient(
    const client::BrokerAddress& address, absl::Duration timeout) {
  return std::make_unique<GrpcAdminClient>(address, timeout);
}

}  // namespace kvbroker::cli
