// ScriptedLink: a session's way to no broker at all: it keeps what the session
// sends, and the test says to the session what a broker would, or would not.
//
//   auto link = std::make_unique<ScriptedLink>();
//   ScriptedLink& wire = *link;
//   session->Attach(std::move(link), Nonce{});
//   session->OnMessage(Opened{...});
//   session->RunOnce();
//   std::vector<Acquire> asked = wire.Take<Acquire>();
//
// Single-threaded.
#ifndef KVBROKER_TESTS_HARNESS_SCRIPTED_LINK_H_
#define KVBROKER_TESTS_HARNESS_SCRIPTED_LINK_H_

#include <cstdint>
#include <utility>
#include <variant>
#include <vector>

#include "client/session/broker_link.h"

namespace kvbroker::testing {

class ScriptedLink : public client::BrokerLink {
 public:
  void Send(ClientMessage message) override {
    sent_.push_back(std::move(message));
  }
  void AcknowledgeDescriptors(GrantId, uint32_t count) override {
    acknowledged_ += count;
  }

  // Takes out what was sent of this kind, oldest first.
  template <typename Message>
  std::vector<Message> Take() {
    std::vector<Message> taken;
    std::erase_if(sent_, [&](const ClientMessage& message) {
      const auto* match = std::get_if<Message>(&message);
      if (match != nullptr) taken.push_back(*match);
      return match != nullptr;
    });
    return taken;
  }
  // All kinds.
  std::vector<ClientMessage> TakeAll() { return std::exchange(sent_, {}); }
  uint64_t acknowledged() const { return acknowledged_; }

 private:
  std::vector<ClientMessage> sent_;
  uint64_t acknowledged_ = 0;
};

}  // namespace kvbroker::testing

#endif  // KVBROKER_TESTS_HARNESS_SCRIPTED_LINK_H_
