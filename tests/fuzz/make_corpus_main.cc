// Writes the seeds that are binary, or that follow from code: a file each under
// FOLDER/TARGET. Run it after a change of what they are made of:
//
//   bazel run //tests/fuzz:make_corpus -- "$PWD/tests/fuzz/corpus"
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "broker/state/broker_state.h"
#include "broker/state/state_envelope.h"
#include "proto/convert.h"
#include "proto/fd_parse.h"
#include "proto/kvbroker/v1/session.pb.h"

namespace kvbroker {
namespace {

class Corpus {
 public:
  Corpus(std::filesystem::path folder, const std::string& target)
      : folder_(folder / target) {
    std::filesystem::create_directories(folder_);
  }

  void Add(const std::string& name, std::string_view bytes) {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
  }

 private:
  const std::filesystem::path folder_;
};

template <typename Packet>
void AddPacket(Corpus& corpus, const std::string& name, char descriptors,
               const Packet& packet) {
  std::string input(1, descriptors);
  input.append(reinterpret_cast<const char*>(&packet), sizeof(packet));
  corpus.Add(name, input);
}

void MakeFdPackets(const std::filesystem::path& folder) {
  Corpus corpus(folder, "fd_packets");
  AddPacket(corpus, "hello", 1, kvb_fd_hello{FdHeader(KVB_FD_HELLO), 4711, 0});
  AddPacket(corpus, "ack", 0, kvb_fd_ack{FdHeader(KVB_FD_ACK), 5, 64, 0});
  AddPacket(corpus, "welcome", 0,
            kvb_fd_welcome{FdHeader(KVB_FD_WELCOME), {1, 2, 3}, 9});
  AddPacket(corpus, "frame", 2, kvb_fd_frame{FdHeader(KVB_FD_FRAME), 5, 64, 2});
}

void AddMessage(Corpus& corpus, const std::string& name,
                const ClientMessage& message) {
  v1::ClientMessage wire;
  ToWire(message, &wire);
  corpus.Add("client_" + name, std::string(1, '\0') + wire.SerializeAsString());
}

void AddMessage(Corpus& corpus, const std::string& name,
                const BrokerMessage& message) {
  v1::BrokerMessage wire;
  ToWire(message, &wire);
  corpus.Add("broker_" + name, std::string(1, '\1') + wire.SerializeAsString());
}

void MakeSessionMessages(const std::filesystem::path& folder) {
  Corpus corpus(folder, "session_messages");
  const std::vector<PageName> pages = {{PageIndex(0), Generation(1)},
                                       {PageIndex(300), Generation(70'000)}};
  Open open;
  open.nonce = {1, 2, 3};
  open.instance = "chat";
  open.member = "replica-0";
  open.pools = {{.handle_bytes = MiB(2),
                 .handles_per_page = 64,
                 .layout = Layout::kPerLayer,
                 .max_pages = 1024,
                 .label = "kv"}};
  open.declared_peak = GiB(1);
  open.min = MiB(512);
  open.max = GiB(4);
  open.max_fraction = 0.5;
  open.weight = 2;
  open.labels = {{"model", "llama"}};
  open.resuming = Resuming{77, SessionId(4)};
  AddMessage(corpus, "open", ClientMessage(open));
  Acquire acquire;
  acquire.sequence = Sequence(3);
  acquire.acked = Sequence(2);
  acquire.pool = PoolId(1);
  acquire.want = 2;
  acquire.at_least = 1;
  acquire.indexes = {PageIndex(0), PageIndex(300)};
  acquire.urgency = Urgency::kRunning;
  acquire.deadline = absl::Seconds(10);
  acquire.replaces = Sequence(1);
  AddMessage(corpus, "acquire", ClientMessage(acquire));
  AddMessage(corpus, "cancel", ClientMessage(Cancel{Sequence(3)}));
  AddMessage(corpus, "mapped", ClientMessage(Mapped{GrantId(5), pages}));
  AddMessage(corpus, "return", ClientMessage(Return{PoolId(1), pages}));
  ReclaimAnswer answer;
  answer.pool = PoolId(1);
  answer.revision = Revision(2);
  answer.given = pages;
  answer.kept = 3;
  answer.reason = "in use";
  answer.final = true;
  AddMessage(corpus, "reclaim_answer", ClientMessage(answer));
  Report report;
  report.pool = PoolId(1);
  report.in_use = 4;
  report.cached = 3;
  report.idle = 2;
  report.settled = 1;
  report.oldest_idle = absl::Seconds(1);
  report.revision = Revision(2);
  AddMessage(corpus, "report", ClientMessage(report));
  AddMessage(corpus, "resend", ClientMessage(Resend{Sequence(3)}));
  AddMessage(corpus, "resume", ClientMessage(Resume{PoolId(1), pages, true}));
  AddMessage(corpus, "limit_ack", ClientMessage(LimitAck{7}));
  AddMessage(corpus, "make_room",
             ClientMessage(MakeRoom{Sequence(9), GiB(1), absl::Seconds(5)}));

  Opened opened;
  opened.incarnation = 77;
  opened.session = SessionId(1);
  opened.instance = "chat_1";
  opened.backend = "host";
  opened.pools = {PoolId(1), PoolId(2)};
  opened.min = MiB(1);
  opened.max = opened.capacity = GiB(8);
  opened.limit_revision = 2;
  AddMessage(corpus, "opened", BrokerMessage(opened));
  Granted granted;
  granted.sequence = Sequence(3);
  granted.grant = GrantId(5);
  granted.pool = PoolId(1);
  granted.pages = pages;
  AddMessage(corpus, "granted", BrokerMessage(granted));
  granted.pages.clear();
  granted.credit = 4;
  granted.credit_for = absl::Seconds(1);
  AddMessage(corpus, "credit", BrokerMessage(granted));
  Refused refused;
  refused.sequence = Sequence(3);
  refused.reason = "others have to give first";
  refused.holders = {{"code", GiB(2), MiB(1), MiB(2), GiB(1)}};
  AddMessage(corpus, "refused", BrokerMessage(refused));
  AddMessage(corpus, "reclaim",
             BrokerMessage(Reclaim{PoolId(1), Revision(3), 2, Tier::kClosing,
                                   absl::Seconds(2)}));
  AddMessage(corpus, "limit_changed",
             BrokerMessage(LimitChanged{4, MiB(1), GiB(1)}));
  AddMessage(corpus, "fenced", BrokerMessage(Fenced{"deleted by uid 0"}));
}

void MakeBrokerState(const std::filesystem::path& folder) {
  Corpus corpus(folder, "broker_state");
  BrokerState state;
  state.incarnation = 5;
  const std::string whole(1, '\0');
  corpus.Add("empty", whole + FormatState(state));
  state.limits = {{.tenant = "uid:0",
                   .name = "a",
                   .min = MiB(1),
                   .max = GiB(1),
                   .weight = 0.5,
                   .revision = 9},
                  {.name = "b",
                   .max = kMaxBytes,
                   .unused_since = absl::UnixEpoch() + absl::Seconds(90)}};
  state.sessions = {{.tenant = "uid:0",
                     .instance = "a",
                     .member = "m",
                     .rank = 1,
                     .pid = 2,
                     .start_time = 3,
                     .process_inode = 4}};
  const std::string text = FormatState(state);
  corpus.Add("full", whole + text);
  const std::string body(Unseal(text)->body);
  // Version 1, readable by 1; and 2, readable by 1.
  corpus.Add("body", "\1\1\1" + body);
  corpus.Add("newer_body", "\1\2\1" + body);
}

// Programs: any bytes are one.
void MakePrograms(const std::filesystem::path& folder,
                  const std::string& target) {
  Corpus corpus(folder, target);
  std::mt19937_64 random(1);
  for (int i = 0; i < 24; ++i) {
    std::string program(32 << (i % 6), '\0');
    for (char& byte : program) byte = static_cast<char>(random());
    corpus.Add(absl::StrCat("program_", i), program);
  }
}

}  // namespace
}  // namespace kvbroker

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: make_corpus FOLDER\n");
    return 2;
  }
  const std::filesystem::path folder(argv[1]);
  kvbroker::MakeFdPackets(folder);
  kvbroker::MakeSessionMessages(folder);
  kvbroker::MakeBrokerState(folder);
  kvbroker::MakePrograms(folder, "core");
  kvbroker::MakePrograms(folder, "client_session");
  return 0;
}
