// Another process, as the tests of the broker need one: an engine that can be
// killed, a thief of a nonce, another user. Says one line on stdout when it has
// done what it was told, and stays until stdin ends.
//
//   test_peer RPC_PATH DESCRIPTOR_PATH UID COMMAND [ARGUMENT]
//     hold PAGES     opens instance "peer", acquires the pages: "held"
//     fork PAGES     the same, maps them, and has a child that outlives it with
//                    all that it has: the child's pid
//     steal NONCE    opens with another's nonce (hexadecimal): the status
//     list           what the admin service shows: the status, or the names
//     limit NAME     sets the limit of an instance: the status
//     delete NAME    deletes an instance by force: the status
//     explain NAME   asks for its explanation: the status
//     resume SESSION opens to go on from another's session: the status
//     grab           takes pages, of which it keeps no descriptor, until it is
//                    refused: the status
//     bulk PAGES     holds that many pages of 4 KiB, and keeps no descriptor:
//                    "held"
//     serve          opens instance "neighbour", takes and returns a page again
//                    and again: "serving", and at the end of its input how
//                    often and how long the worst took: "N WORST_US", or what
//                    went wrong
//     slow           opens "slow" and asks without ever reading: "asked"
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "broker/server/test_session.h"

namespace kvbroker {
namespace {

void Say(const std::string& line) {
  printf("%s\n", line.c_str());
  fflush(stdout);
}

bool InputEnded() {
  pollfd input = {.fd = 0, .events = POLLIN};
  return poll(&input, 1, 0) != 0;
}

std::string Serve(TestSession& session) {
  absl::Status status = session.Begin("neighbour");
  if (!status.ok()) return status.ToString();
  Say("serving");
  absl::Duration worst;
  int64_t times = 0;
  for (; times < 10 || !InputEnded(); ++times) {
    const absl::Time start = absl::Now();
    status = session.Acquire(1).status();
    if (!status.ok()) return status.ToString();
    if (!session.ReturnLast()) return session.ReadToTheEnd().ToString();
    worst = std::max(worst, absl::Now() - start);
  }
  return absl::StrCat(times, " ", absl::ToInt64Microseconds(worst));
}

// `which`: "INCARNATION SESSION".
absl::Status ResumeAnothers(TestSession& session, const std::string& which) {
  std::optional<Nonce> nonce = session.descriptors().GetNonce();
  if (!nonce) return absl::UnavailableError("no welcome");
  Open open = TestSession::OpenOf(*nonce, "resumer");
  char* rest;
  const uint64_t incarnation = strtoull(which.c_str(), &rest, 10);
  open.resuming = Resuming{incarnation, SessionId(strtoull(rest, nullptr, 10))};
  absl::Status status = session.OpenWith(open);
  if (!status.ok()) return status;
  session.Send(Resume{.pool = session.pool(),
                      .pages = {{PageIndex(0), Generation(1)}},
                      .last = true});
  return session.ReadToTheEnd();
}

absl::Status TakeSmallPages(TestSession& session, uint32_t pages) {
  std::optional<Nonce> nonce = session.descriptors().GetNonce();
  if (!nonce) return absl::UnavailableError("no welcome");
  Open open = TestSession::OpenOf(*nonce, "bulk");
  open.pools = {{.handle_bytes = KiB(4), .max_pages = 1 << 20}};
  absl::Status status = session.OpenWith(open);
  if (!status.ok()) return status;
  session.SendAcquire(pages, absl::Seconds(60));
  absl::StatusOr<BrokerMessage> answer = session.Read();
  if (!answer.ok()) return answer.status();
  const Granted* granted = std::get_if<Granted>(&*answer);
  if (granted == nullptr) return absl::UnavailableError("refused");
  for (uint32_t taken = 0; taken < pages;) {
    std::optional<DescriptorClient::Frame> frame =
        session.descriptors().ReadFrame();
    if (!frame) return absl::DataLossError("no frame");
    taken += frame->header.handle_count;
    session.descriptors().Ack(granted->grant, frame->header.handle_count);
  }
  session.Send(Mapped{.grant = granted->grant});
  return absl::OkStatus();
}

// The child inherits sockets and mappings, and stays until it is killed.
pid_t MapAndFork(const std::vector<UniqueFd>& handles) {
  for (const UniqueFd& handle : handles) {
    struct stat info;
    if (fstat(handle.get(), &info) != 0 ||
        mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ | PROT_WRITE,
             MAP_SHARED, handle.get(), 0) == MAP_FAILED) {
      return -1;
    }
  }
  const pid_t child = fork();
  if (child == 0) {
    // The descriptors go, the mappings stay; nothing of gRPC is touched.
    for (const UniqueFd& handle : handles) close(handle.get());
    close(0);
    close(1);
    for (;;) pause();
  }
  return child;
}

int Run(const std::vector<std::string>& arguments) {
  if (arguments.size() < 5) return 2;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const client::BrokerAddress address = {.rpc_path = arguments[1],
                                         .descriptor_path = arguments[2]};
  // Before any thread of gRPC's.
  const int uid = atoi(arguments[3].c_str());
  if (uid != static_cast<int>(getuid()) &&
      (setresgid(uid, uid, uid) != 0 || setresuid(uid, uid, uid) != 0)) {
    return 3;
  }
  const std::string& command = arguments[4];
  const std::string argument = arguments.size() > 5 ? arguments[5] : "";
  TestSession session(address);
  std::vector<UniqueFd> held;
  if (command == "hold" || command == "fork") {
    absl::Status status = session.Begin("peer");
    if (status.ok()) {
      absl::StatusOr<std::vector<UniqueFd>> handles =
          session.Acquire(atoi(argument.c_str()));
      status = handles.status();
      if (handles.ok()) held = *std::move(handles);
    }
    if (status.ok() && command == "fork") {
      Say(absl::StrCat(MapAndFork(held)));
      held.clear();
    } else {
      Say(status.ok() ? "held" : status.ToString());
    }
  } else if (command == "steal") {
    const std::string bytes(absl::HexStringToBytes(argument));
    Nonce nonce;
    for (size_t i = 0; i < nonce.size(); ++i) nonce[i] = bytes.at(i);
    Say(session.OpenWith(nonce, "thief").ToString());
  } else if (command == "list") {
    absl::StatusOr<std::vector<std::string>> names = TestAdmin(address).List();
    Say(names.ok() ? "OK " + absl::StrJoin(*names, ",")
                   : names.status().ToString());
  } else if (command == "limit") {
    Say(TestAdmin(address).SetMax(argument, MiB(1)).ToString());
  } else if (command == "delete") {
    Say(TestAdmin(address).Delete(argument, /*force=*/true).ToString());
  } else if (command == "explain") {
    Say(TestAdmin(address).Explain(argument).status().ToString());
  } else if (command == "resume") {
    Say(ResumeAnothers(session, argument).ToString());
  } else if (command == "grab") {
    absl::Status status = session.Begin("grabber");
    while (status.ok()) status = session.Acquire(20).status();
    Say(status.ToString());
  } else if (command == "bulk") {
    absl::Status status = TakeSmallPages(session, atoi(argument.c_str()));
    Say(status.ok() ? "held" : status.ToString());
  } else if (command == "serve") {
    Say(Serve(session));
  } else if (command == "slow") {
    absl::Status status = session.Begin("slow");
    // Each is refused with some words; until the broker has had enough.
    while (status.ok() && session.SendAcquire(65536)) {
    }
    Say(status.ok() ? "dropped" : status.ToString());
  } else {
    return 2;
  }
  while (getchar() != EOF) {
  }
  return 0;
}

}  // namespace
}  // namespace kvbroker

int main(int argc, char** argv) {
  return kvbroker::Run(std::vector<std::string>(argv, argv + argc));
}
