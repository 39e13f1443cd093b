#include "broker/server/test_session.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/transport/grpc_status.h"
#include "proto/convert.h"
#include "proto/kvbroker/v1/admin.grpc.pb.h"
#include "proto/kvbroker/v1/session.grpc.pb.h"

namespace kvbroker {
namespace {

// A test that would wait for ever fails instead.
std::chrono::system_clock::time_point Patience() {
  return std::chrono::system_clock::now() + std::chrono::seconds(100);
}

// Each its own connection.
std::shared_ptr<grpc::Channel> Connect(const client::BrokerAddress& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel("unix:" + address.rpc_path,
                                   grpc::InsecureChannelCredentials(),
                                   arguments);
}

grpc::ByteBuffer ToBuffer(const std::string& bytes) {
  grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

std::string ToString(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string bytes;
  if (!buffer.Dump(&slices).ok()) return bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

}  // namespace

struct TestSession::Connection {
  explicit Connection(const client::BrokerAddress& address)
      : channel(Connect(address)), stub(v1::Broker::NewStub(channel)) {}

  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Broker::Stub> stub;
};

struct TestSession::Stream {
  explicit Stream(v1::Broker::Stub& stub) {
    context.set_deadline(Patience());
    call = stub.Attach(&context);
  }

  grpc::ClientContext context;
  std::unique_ptr<
      grpc::ClientReaderWriter<v1::ClientMessage, v1::BrokerMessage>>
      call;
  bool finished = false;
};

TestSession::TestSession(const client::BrokerAddress& address)
    : address_(address),
      descriptors_(address.descriptor_path),
      connection_(std::make_shared<Connection>(address)) {}

TestSession::TestSession(const TestSession& other)
    : address_(other.address_),
      descriptors_(other.address_.descriptor_path),
      connection_(other.connection_) {}

TestSession::~TestSession() { HangUpStream(); }

void TestSession::HangUpStream() {
  if (stream_ != nullptr && !stream_->finished) {
    stream_->context.TryCancel();
    stream_->call->Finish();
  }
  stream_.reset();
}

absl::Status TestSession::Begin(const std::string& instance, bool with_pidfd) {
  std::optional<Nonce> nonce = descriptors_.GetNonce(with_pidfd);
  if (!nonce) return absl::UnavailableError("no welcome");
  return OpenWith(*nonce, instance);
}

absl::Status TestSession::OpenWith(const Nonce& nonce,
                                   const std::string& instance) {
  return OpenWith(OpenOf(nonce, instance));
}

Open TestSession::OpenOf(const Nonce& nonce, const std::string& instance) {
  Open open;
  open.nonce = nonce;
  open.instance = instance;
  open.pools = {{.handle_bytes = KiB(64),
                 .handles_per_page = 2,
                 .layout = Layout::kPerLayer,
                 .max_pages = 100000,
                 .label = "kv"}};
  return open;
}

absl::Status TestSession::OpenWith(const Open& open) {
  stream_ = std::make_unique<Stream>(*connection_->stub);
  Send(open);
  ASSIGN_OR_RETURN(BrokerMessage answer, Read());
  if (!std::holds_alternative<Opened>(answer)) {
    return absl::InternalError("something else than Opened");
  }
  opened_ = std::get<Opened>(std::move(answer));
  return absl::OkStatus();
}

bool TestSession::Send(const ClientMessage& message) {
  v1::ClientMessage wire;
  ToWire(message, &wire);
  return stream_->call->Write(wire);
}

bool TestSession::SendBytes(const std::string& serialized) {
  v1::ClientMessage wire;
  wire.ParseFromString(serialized);
  return stream_->call->Write(wire);
}

absl::StatusOr<BrokerMessage> TestSession::Read() {
  v1::BrokerMessage wire;
  if (stream_->call->Read(&wire)) return FromWire(wire);
  stream_->finished = true;
  absl::Status status = FromGrpcStatus(stream_->call->Finish());
  if (status.ok()) return absl::CancelledError("the stream ended with OK");
  return status;
}

absl::Status TestSession::ReadToTheEnd() {
  for (;;) {
    absl::StatusOr<BrokerMessage> message = Read();
    if (!message.ok()) return message.status();
  }
}

bool TestSession::ReturnLast() {
  return Send(Return{granted_.pool, granted_.pages});
}

bool TestSession::SendAcquire(uint32_t pages, absl::Duration deadline) {
  return Send(kvbroker::Acquire{.sequence = Sequence(++sequence_),
                                .acked = Sequence(sequence_ - 1),
                                .pool = pool(),
                                .want = pages,
                                .at_least = pages,
                                .urgency = Urgency::kWaiting,
                                .deadline = deadline});
}

absl::StatusOr<std::vector<UniqueFd>> TestSession::Acquire(uint32_t pages) {
  SendAcquire(pages);
  ASSIGN_OR_RETURN(BrokerMessage answer, Read());
  const Granted* granted = std::get_if<Granted>(&answer);
  if (granted == nullptr) {
    const Refused* refused = std::get_if<Refused>(&answer);
    return absl::Status(refused ? refused->code : absl::StatusCode::kInternal,
                        refused ? refused->reason : "not an answer");
  }
  std::vector<UniqueFd> handles(granted->pages.size() * 2);
  // Frames of one grant come in any order.
  for (size_t taken = 0; taken < handles.size();) {
    std::optional<DescriptorClient::Frame> frame = descriptors_.ReadFrame();
    if (!frame || frame->header.grant_id != granted->grant.value()) {
      return absl::DataLossError("not the frame that was expected");
    }
    for (size_t i = 0; i < frame->descriptors.size(); ++i) {
      handles.at(frame->header.first_handle + i) =
          std::move(frame->descriptors[i]);
      ++taken;
    }
    descriptors_.Ack(granted->grant, frame->header.handle_count);
  }
  granted_ = *granted;
  for (const UniqueFd& handle : handles) {
    if (!handle) return absl::DataLossError("a handle came twice");
  }
  Send(Mapped{.grant = granted->grant});
  return handles;
}

struct TestAdmin::Stub {
  explicit Stub(const client::BrokerAddress& address)
      : channel(Connect(address)),
        admin(v1::Admin::NewStub(channel)),
        generic(channel) {}
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Admin::Stub> admin;
  grpc::GenericStub generic;
};

TestAdmin::TestAdmin(const client::BrokerAddress& address)
    : stub_(std::make_unique<Stub>(address)) {}
TestAdmin::~TestAdmin() = default;

absl::StatusOr<std::vector<std::string>> TestAdmin::List(
    const std::vector<std::string>& names) {
  grpc::ClientContext context;
  context.set_deadline(Patience());
  v1::ListRequest request;
  for (const std::string& name : names) request.add_names(name);
  v1::ListResponse response;
  RETURN_IF_ERROR(
      FromGrpcStatus(stub_->admin->List(&context, request, &response)));
  std::vector<std::string> found;
  for (const v1::InstanceStatus& instance : response.instances()) {
    found.push_back(absl::StrCat(instance.tenant(), " ", instance.name()));
  }
  return found;
}

absl::Status TestAdmin::SetMax(const std::string& name, Bytes max,
                               const std::string& tenant, bool preset) {
  grpc::ClientContext context;
  context.set_deadline(Patience());
  v1::SetPolicyRequest request;
  request.set_name(name);
  request.set_tenant(tenant);
  request.set_max_bytes(max.count());
  request.set_preset(preset);
  v1::SetPolicyResponse response;
  RETURN_IF_ERROR(
      FromGrpcStatus(stub_->admin->SetPolicy(&context, request, &response)));
  if (response.instance().max_bytes() != static_cast<uint64_t>(max.count())) {
    return absl::InternalError("the limit was not echoed");
  }
  return absl::OkStatus();
}

absl::Status TestAdmin::Delete(const std::string& name, bool force) {
  grpc::ClientContext context;
  context.set_deadline(Patience());
  v1::DeleteRequest request;
  request.set_name(name);
  request.set_force(force);
  v1::DeleteResponse response;
  return FromGrpcStatus(stub_->admin->Delete(&context, request, &response));
}

absl::StatusOr<std::vector<std::string>> TestAdmin::Explain(
    const std::string& name) {
  grpc::ClientContext context;
  context.set_deadline(Patience());
  v1::ExplainRequest request;
  request.set_name(name);
  v1::ExplainResponse response;
  RETURN_IF_ERROR(
      FromGrpcStatus(stub_->admin->Explain(&context, request, &response)));
  return std::vector<std::string>(response.lines().begin(),
                                  response.lines().end());
}

bool TestAdmin::Healthy() {
  grpc::ClientContext context;
  context.set_deadline(Patience());
  grpc::CompletionQueue queue;
  // An empty request asks for the whole server; 1 in field 1 is SERVING.
  auto call = stub_->generic.PrepareUnaryCall(
      &context, "/grpc.health.v1.Health/Check", ToBuffer(""), &queue);
  call->StartCall();
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->Finish(&answer, &status, nullptr);
  void* tag;
  bool ok;
  queue.Next(&tag, &ok);
  return status.ok() && ToString(answer) == std::string("\x08\x01", 2);
}

std::string TestAdmin::Reflect() {
  grpc::ClientContext context;
  context.set_deadline(Patience());
  grpc::CompletionQueue queue;
  auto call = stub_->generic.PrepareCall(
      &context,
      "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  void* tag;
  bool ok;
  call->StartCall(nullptr);
  queue.Next(&tag, &ok);
  // Field 7, list_services, a string.
  call->Write(ToBuffer(std::string("\x3a\x01*", 3)), nullptr);
  queue.Next(&tag, &ok);
  grpc::ByteBuffer answer;
  call->Read(&answer, nullptr);
  queue.Next(&tag, &ok);
  call->WritesDone(nullptr);
  queue.Next(&tag, &ok);
  grpc::Status status;
  call->Finish(&status, nullptr);
  queue.Next(&tag, &ok);
  return ToString(answer);
}

}  // namespace kvbroker
