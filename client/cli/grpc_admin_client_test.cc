#include "client/cli/grpc_admin_client.h"

#include <grpcpp/grpcpp.h>
#include <stdlib.h>

#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "broker/base/temp_folder.h"
#include "client/address/broker_address.h"
#include "gtest/gtest.h"
#include "proto/kvbroker/v1/admin.grpc.pb.h"

namespace kvbroker::cli {
namespace {

// Answers List with one instance, SetPolicy with the request's name and limit,
// Delete with an error of its own; does not know Explain.
class AdminService : public v1::Admin::Service {
 public:
  grpc::Status List(grpc::ServerContext*, const v1::ListRequest* request,
                    v1::ListResponse* response) override {
    response->add_instances()->set_name("conv");
    return grpc::Status::OK;
  }
  grpc::Status SetPolicy(grpc::ServerContext*,
                         const v1::SetPolicyRequest* request,
                         v1::SetPolicyResponse* response) override {
    response->mutable_instance()->set_name(request->name());
    response->mutable_instance()->set_max_bytes(request->max_bytes());
    return grpc::Status::OK;
  }
  grpc::Status Delete(grpc::ServerContext* context, const v1::DeleteRequest*,
                      v1::DeleteResponse*) override {
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "it lives");
  }
};

class GrpcAdminClientTest : public testing::Test {
 protected:
  GrpcAdminClientTest() {
    address_ = client::AddressFor(directory_.path(), "GPU-1").value();
  }

  void StartServer() {
    // The server's address is a URI as well.
    std::string path = address_.rpc_path;
    path.replace(path.find(' '), 1, "%20");
    grpc::ServerBuilder builder;
    builder.AddListeningPort("unix:" + path, grpc::InsecureServerCredentials());
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
  }

  std::unique_ptr<AdminClient> Client() {
    return MakeGrpcAdminClient(address_, absl::InfiniteDuration());
  }

  TempFolder directory_{"ctl "};  // With the space it is no plain URI.
  client::BrokerAddress address_;
  AdminService service_;
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(GrpcAdminClientTest, CarriesQuestionsAndAnswers) {
  StartServer();
  auto client = Client();
  EXPECT_EQ(client->device_uuid(), "GPU-1");
  auto listed = client->List({});
  ASSERT_TRUE(listed.ok()) << listed.status();
  EXPECT_EQ(listed->instances(0).name(), "conv");

  v1::SetPolicyRequest request;
  request.set_name("conv");
  request.set_max_bytes(12345);
  auto set = client->SetPolicy(request);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->instance().max_bytes(), 12345u);
}

TEST_F(GrpcAdminClientTest, PassesOnTheBrokersOwnErrors) {
  StartServer();
  EXPECT_EQ(Client()->Delete({}).status(),
            absl::FailedPreconditionError("it lives"));
}

TEST_F(GrpcAdminClientTest, NamesABrokerThatIsOlder) {
  StartServer();
  absl::Status status = Client()->Explain({}).status();
  EXPECT_TRUE(absl::IsUnimplemented(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), address_.rpc_path)) << status;
}

TEST_F(GrpcAdminClientTest, SaysThatNobodyListens) {
  absl::Status status = Client()->List({}).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_EQ(status.message(),
            absl::StrCat("no broker listens at ", address_.rpc_path,
                         ": No such file or directory"));
}

TEST_F(GrpcAdminClientTest, GivesUpAtTheTimeout) {
  StartServer();
  absl::Status status =
      MakeGrpcAdminClient(address_, absl::ZeroDuration())->List({}).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "did not answer within 0"))
      << status;
}

}  // namespace
}  // namespace kvbroker::cli
