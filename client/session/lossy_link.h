// LossyLink: a session's way to a Core in tests, which loses, repeats, holds
// back and records what passes.
//
//   LossyLink& wire = LossyLink::Join(core, peer, *session);
//   wire.LoseNextDescriptors();
//   while (session->RunOnce() <= clock.Now() || wire.Deliver()) {}
//
// The session owns it. Single-threaded.
#ifndef KVBROKER_CLIENT_SESSION_LOSSY_LINK_H_
#define KVBROKER_CLIENT_SESSION_LOSSY_LINK_H_

#include <algorithm>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "client/session/broker_link.h"
#include "client/session/session.h"
#include "tests/harness/in_process_link.h"

namespace kvbroker::client {

class LossyLink : public BrokerLink, public LinkListener {
 public:
  // Opens `session` with the core.
  static LossyLink& Join(Core& core, Peer peer, Session& session) {
    auto link = std::make_unique<LossyLink>(core, std::move(peer), session);
    LossyLink& joined = *link;
    session.Attach(std::move(link), Nonce{});
    return joined;
  }

  LossyLink(Core& core, Peer peer, LinkListener& session)
      : session_(session), wire_(core, std::move(peer), *this) {}

  bool Deliver() {
    const bool sent = wire_.Deliver();
    return PassHeld() || sent;
  }
  void Kill() { wire_.Kill(); }
  // As InProcessLink::Break; what was on its way is lost.
  void Break(bool broker_gone) {
    held_.clear();
    wire_.Break(broker_gone);
  }
  SessionId session() const { return wire_.session(); }

  // ---- what shall go wrong ----
  // The next grant arrives without its message, or without its descriptors.
  void LoseNextGrant() {
    lose_grant_ = true;
    lose_descriptors_ = false;
  }
  void LoseNextDescriptors() {
    lose_descriptors_ = true;
    lose_grant_ = false;
  }
  void LoseNothing() { lose_grant_ = lose_descriptors_ = false; }
  void RepeatEverything(bool repeat) { repeat_ = repeat; }
  // From now on messages wait until descriptors have passed, or for Deliver.
  void DescriptorsFirst(bool first) { descriptors_first_ = first; }

  // ---- what the client said ----
  template <typename Message>
  std::vector<Message> Said() const {
    std::vector<Message> said;
    for (const ClientMessage& message : said_) {
      if (auto* match = std::get_if<Message>(&message)) said.push_back(*match);
    }
    return said;
  }
  void Forget() { said_.clear(); }

  // ---- BrokerLink ----
  void Send(ClientMessage message) override {
    said_.push_back(message);
    wire_.Send(std::move(message));
  }
  void AcknowledgeDescriptors(GrantId grant, uint32_t count) override {
    // The broker has sent a repeated one once.
    const uint32_t repeated = std::min(repeated_, count);
    repeated_ -= repeated;
    if (count > repeated) wire_.AcknowledgeDescriptors(grant, count - repeated);
  }

  // ---- LinkListener ----
  void OnMessage(BrokerMessage message) override {
    if (lose_grant_ && std::holds_alternative<Granted>(message)) {
      lose_grant_ = false;
      return;
    }
    held_.push_back(std::move(message));
    if (!descriptors_first_) PassHeld();
  }
  void OnDescriptors(GrantId grant, uint32_t first_handle,
                     std::vector<UniqueFd> descriptors) override {
    if (std::exchange(lose_descriptors_, false)) return;
    const size_t count = descriptors.size();
    session_.OnDescriptors(grant, first_handle, std::move(descriptors));
    if (repeat_) {
      repeated_ += static_cast<uint32_t>(count);
      session_.OnDescriptors(grant, first_handle, std::vector<UniqueFd>(count));
    }
    PassHeld();
  }
  void OnDisconnected(absl::Status why) override {
    session_.OnDisconnected(std::move(why));
  }

 private:
  bool PassHeld() {
    const std::vector<BrokerMessage> held = std::exchange(held_, {});
    for (const BrokerMessage& message : held) {
      if (repeat_) session_.OnMessage(message);
      session_.OnMessage(message);
    }
    return !held.empty();
  }

  LinkListener& session_;
  std::vector<ClientMessage> said_;
  std::vector<BrokerMessage> held_;
  bool lose_grant_ = false;
  bool lose_descriptors_ = false;
  bool repeat_ = false;
  bool descriptors_first_ = false;
  uint32_t repeated_ = 0;  // descriptors passed on for a second time
  testing::InProcessLink wire_;  // last: its end may still call in
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_LOSSY_LINK_H_
