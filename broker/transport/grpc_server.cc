#include "broker/transport/grpc_server.h"

#include <google/protobuf/stubs/logging.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/server_posix.h>
#include <unistd.h>

#include <chrono>
#include <utility>

namespace kvbroker {
namespace {

// The largest message there is, a list of 65,536 pages, has 14 bytes each at
// most. Larger ones end the call before they are read.
constexpr int kMaxMessageBytes = 1 << 20;
// One session a connection, and a few admin calls beside it.
constexpr int kMaxStreamsPerConnection = 16;
// Reflection is a blocking service; the thread that waits for its calls looks
// up this often.
constexpr int kReflectionWakeMillis = 24 * 3600 * 1000;

std::unique_ptr<grpc::Server> StartServer(
    const std::vector<std::shared_ptr<grpc::Service>>& services) {
  // Else every byte that is no UTF-8 from a peer is a line on stderr.
  google::protobuf::SetLogHandler(nullptr);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                             kMaxStreamsPerConnection);
  // Its probes are pings of megabytes over the network's length; here they are
  // system calls for nothing.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  using Sync = grpc::ServerBuilder::SyncServerOption;
  builder.SetSyncServerOption(Sync::NUM_CQS, 1);
  builder.SetSyncServerOption(Sync::MIN_POLLERS, 1);
  builder.SetSyncServerOption(Sync::MAX_POLLERS, 1);
  builder.SetSyncServerOption(Sync::CQ_TIMEOUT_MSEC, kReflectionWakeMillis);
  builder.SetResourceQuota(grpc::ResourceQuota("kvbrokerd").SetMaxThreads(4));
  for (const std::shared_ptr<grpc::Service>& service : services) {
    builder.RegisterService(service.get());
  }
  return builder.BuildAndStart();
}

}  // namespace

GrpcServer::GrpcServer(std::vector<std::shared_ptr<grpc::Service>> services)
    : services_(std::move(services)) {}

GrpcServer::~GrpcServer() { Stop(absl::ZeroDuration()); }

absl::Status GrpcServer::Serve(int number) {
  MutexLock lock(&mu_);
  if (server_ == nullptr) {
    server_ = StartServer(services_);
    MutexLock health_lock(&health_mu_);
    health_ = server_ ? server_->GetHealthCheckService() : nullptr;
    if (health_ != nullptr) health_->SetServingStatus(healthy_);
  }
  if (server_ == nullptr) {
    close(number);
    return absl::InternalError("gRPC's server did not start");
  }
  grpc::AddInsecureChannelFromFd(server_.get(), number);
  return absl::OkStatus();
}

void GrpcServer::SetHealth(bool serving) {
  MutexLock lock(&health_mu_);
  healthy_ = serving;
  if (health_ != nullptr) health_->SetServingStatus(serving);
}

void GrpcServer::Stop(absl::Duration grace) {
  MutexLock lock(&mu_);
  if (server_ == nullptr) return;
  {
    MutexLock health_lock(&health_mu_);
    if (health_ != nullptr) health_->SetServingStatus(false);
    health_ = nullptr;
  }
  server_->Shutdown(std::chrono::system_clock::now() +
                    absl::ToChronoMilliseconds(grace));
  server_.reset();
}

}  // namespace kvbroker
