#include "tests/harness/in_process_link.h"

#include <utility>

namespace kvbroker::testing {

class InProcessLink::Listener : public SessionListener {
 public:
  explicit Listener(client::LinkListener& client) : client_(&client) {}

  // The client may be gone while the core still has the listener.
  void Detach() { client_ = nullptr; }

  void Tell(BrokerMessage message) override {
    if (client_ != nullptr) client_->OnMessage(std::move(message));
  }
  void SendDescriptors(GrantId grant, uint32_t first_handle,
                       std::vector<UniqueFd> descriptors) override {
    if (client_ == nullptr) return;
    client_->OnDescriptors(grant, first_handle, std::move(descriptors));
  }
  void Close(const absl::Status& reason) override {
    if (client_ != nullptr) client_->OnDisconnected(reason);
  }

 private:
  client::LinkListener* client_;
};

InProcessLink::InProcessLink(Core& core, Peer peer,
                             client::LinkListener& client)
    : core_(core),
      peer_(std::move(peer)),
      listener_(std::make_shared<Listener>(client)) {}

InProcessLink::~InProcessLink() {
  Deliver();
  listener_->Detach();
  if (!dead_ && session_ != SessionId()) core_.HungUp(session_);
}

void InProcessLink::Kill() {
  dead_ = true;
  sent_.clear();
  acknowledged_ = 0;
  listener_->Detach();
  if (session_ != SessionId()) core_.ProcessGone(session_);
}

void InProcessLink::Break(bool broker_gone) {
  if (dead_) return;
  dead_ = true;
  sent_.clear();
  acknowledged_ = 0;
  listener_->Close(absl::UnavailableError("the connection broke"));
  listener_->Detach();
  if (!broker_gone && session_ != SessionId()) core_.HungUp(session_);
}

bool InProcessLink::Deliver() {
  bool any = false;
  while (!dead_ && (!sent_.empty() || acknowledged_ > 0)) {
    any = true;
    absl::Status status;
    if (acknowledged_ > 0) {
      status =
          core_.DescriptorsReceived(session_, std::exchange(acknowledged_, 0));
    } else {
      ClientMessage message = std::move(sent_.front());
      sent_.pop_front();
      if (auto* open = std::get_if<Open>(&message)) {
        absl::StatusOr<SessionId> opened =
            core_.OpenSession(peer_, *open, listener_);
        status = opened.status();
        if (opened.ok()) session_ = *opened;
      } else {
        status = core_.Handle(session_, message);
      }
    }
    if (!status.ok()) {
      dead_ = true;
      if (session_ != SessionId()) core_.HungUp(session_);
      listener_->Close(status);
    }
  }
  return any;
}

void InProcessLink::Send(ClientMessage message) {
  sent_.push_back(std::move(message));
}

void InProcessLink::AcknowledgeDescriptors(GrantId, uint32_t count) {
  acknowledged_ += count;
}

}  // namespace kvbroker::testing
