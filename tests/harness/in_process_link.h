// InProcessLink: a client Session joined to a Core without sockets or threads.
//
//   auto link = std::make_unique<InProcessLink>(core, peer, *session);
//   InProcessLink& wire = *link;
//   session->Attach(std::move(link), Nonce{});
//   while (wire.Deliver() || ...) session->RunOnce();
//
// What the client sends waits in a queue until Deliver; what the broker sends
// goes into the session's inbox at once. Destroying the link hangs up; `Kill`
// makes the process die. Single-threaded.
#ifndef KVBROKER_TESTS_HARNESS_IN_PROCESS_LINK_H_
#define KVBROKER_TESTS_HARNESS_IN_PROCESS_LINK_H_

#include <deque>
#include <memory>

#include "broker/core/core.h"
#include "client/session/broker_link.h"

namespace kvbroker::testing {

class InProcessLink : public client::BrokerLink {
 public:
  // Both outlive the link.
  InProcessLink(Core& core, Peer peer, client::LinkListener& client);
  ~InProcessLink() override;

  // Hands what was sent to the core. True where there was something.
  bool Deliver();
  // The process is gone, as its pidfd would say.
  void Kill();
  // The connection breaks; both ends notice. With `broker_gone` the core is no
  // more, or will not be when the link goes.
  void Break(bool broker_gone);
  SessionId session() const { return session_; }

  // ---- BrokerLink ----
  void Send(ClientMessage message) override;
  void AcknowledgeDescriptors(GrantId grant, uint32_t count) override;

 private:
  class Listener;

  Core& core_;
  const Peer peer_;
  std::shared_ptr<Listener> listener_;
  std::deque<ClientMessage> sent_;
  uint32_t acknowledged_ = 0;
  SessionId session_;
  bool dead_ = false;
};

}  // namespace kvbroker::testing

#endif  // KVBROKER_TESTS_HARNESS_IN_PROCESS_LINK_H_
