// The session's messages: what is read from the wire is written as it was read,
// and whatever is not read is refused with a reason. Input: which side's, and
// its protobuf.
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <string>

#include "broker/base/check.h"
#include "proto/convert.h"
#include "proto/kvbroker/v1/session.pb.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvbroker {
namespace {

// Maps in the order of their keys.
template <typename Wire>
std::string Serialize(const Wire& wire) {
  std::string bytes;
  google::protobuf::io::StringOutputStream stream(&bytes);
  google::protobuf::io::CodedOutputStream coded(&stream);
  coded.SetSerializationDeterministic(true);
  KVB_CHECK(wire.SerializeToCodedStream(&coded));
  coded.Trim();
  return bytes;
}

template <typename Wire>
void RoundTrip(std::string_view bytes) {
  Wire came;
  if (!came.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return;
  }
  const auto message = FromWire(came);
  if (!message.ok()) {
    KVB_CHECK(absl::IsInvalidArgument(message.status()));
    KVB_CHECK(!message.status().message().empty());
    return;
  }
  Wire written;
  ToWire(*message, &written);
  const auto again = FromWire(written);
  KVB_CHECK(again.ok());
  Wire rewritten;
  ToWire(*again, &rewritten);
  KVB_CHECK(Serialize(written) == Serialize(rewritten));
}

}  // namespace
}  // namespace kvbroker

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvbroker;
  testing::FuzzInput input(data, size);
  if (input.Flip()) {
    RoundTrip<v1::BrokerMessage>(input.TakeAll());
  } else {
    RoundTrip<v1::ClientMessage>(input.TakeAll());
  }
  return 0;
}
