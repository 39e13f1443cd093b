// TestPeer: test_peer (test_peer_main.cc) in a process of its own. The test has
// //broker/server:test_peer among its data.
#ifndef KVBROKER_BROKER_SERVER_TEST_PEER_H_
#define KVBROKER_BROKER_SERVER_TEST_PEER_H_

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "broker/base/unique_fd.h"
#include "client/address/broker_address.h"

namespace kvbroker {

class TestPeer {
 public:
  TestPeer(const client::BrokerAddress& address, const std::string& command,
           const std::string& argument = "", uid_t uid = getuid()) {
    int in[2], out[2];
    EXPECT_EQ(pipe2(in, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    const std::string program = std::string(getenv("TEST_SRCDIR")) + "/" +
                                getenv("TEST_WORKSPACE") +
                                "/broker/server/test_peer";
    const std::string uid_text = std::to_string(uid);
    const char* arguments[] = {program.c_str(),
                               address.rpc_path.c_str(),
                               address.descriptor_path.c_str(),
                               uid_text.c_str(),
                               command.c_str(),
                               argument.c_str(),
                               nullptr};
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], 0);
      dup2(out[1], 1);
      execv(program.c_str(), const_cast<char* const*>(arguments));
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    in_ = UniqueFd(in[1]);
    out_ = fdopen(out[0], "r");
  }

  ~TestPeer() {
    CloseInput();
    fclose(out_);
    if (pid_ > 0) waitpid(pid_, nullptr, 0);
  }

  // The line it says when it is done.
  std::string Line() {
    char line[4096] = "";
    if (fgets(line, sizeof(line), out_) == nullptr) return "nothing";
    return std::string(line).substr(0, strlen(line) - 1);
  }

  // What most commands end at.
  void CloseInput() { in_.Reset(); }

  void Kill() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

  pid_t pid() const { return pid_; }

 private:
  pid_t pid_;
  UniqueFd in_;
  FILE* out_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_TEST_PEER_H_
