// ScriptedSession: a pool's session in tests. It keeps what the pool sends, and
// the test answers by hand.
//
//   ScriptedSession session;
//   ... the pool under test misses; its Work() asks ...
//   Acquire asked = session.TakeOnly<Acquire>();
//
// Threads: safe.
#ifndef KVBROKER_CLIENT_SESSION_SCRIPTED_SESSION_H_
#define KVBROKER_CLIENT_SESSION_SCRIPTED_SESSION_H_

#include <cstdint>
#include <utility>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "broker/base/check.h"
#include "broker/base/mutex.h"
#include "client/session/pool.h"
#include "proto/messages.h"

namespace kvbroker::client {

class ScriptedSession : public PoolSession {
 public:
  Sequence NextSequence() override {
    MutexLock lock(&mu_);
    return Sequence(++last_sequence_);
  }
  void Send(ClientMessage message) override {
    MutexLock lock(&mu_);
    ++sends_;
    sent_.push_back(std::move(message));
    happened_.SignalAll();
  }
  void Wake() override {
    MutexLock lock(&mu_);
    ++wakes_;
    happened_.SignalAll();
  }

  // Takes out what was sent of this kind, oldest first.
  template <typename Message>
  std::vector<Message> Take() {
    MutexLock lock(&mu_);
    return TakeLocked<Message>();
  }
  // Where there is exactly one.
  template <typename Message>
  Message TakeOnly() {
    std::vector<Message> taken = Take<Message>();
    KVB_CHECK(taken.size() == 1);
    return std::move(taken.front());
  }
  // Blocks until there is one.
  template <typename Message>
  Message Await() {
    MutexLock lock(&mu_);
    while (true) {
      std::vector<Message> taken = TakeLocked<Message>();
      KVB_CHECK(taken.size() <= 1);
      if (!taken.empty()) return std::move(taken.front());
      happened_.Wait(&mu_);
    }
  }

  int sends() {
    MutexLock lock(&mu_);
    return sends_;
  }
  // Since the last call.
  int TakeWakes() {
    MutexLock lock(&mu_);
    return std::exchange(wakes_, 0);
  }
  // Blocks until there is one, and takes it.
  void AwaitWake() {
    MutexLock lock(&mu_);
    while (wakes_ == 0) happened_.Wait(&mu_);
    wakes_ = 0;
  }

 private:
  template <typename Message>
  std::vector<Message> TakeLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    std::vector<Message> taken;
    std::vector<ClientMessage> others;
    for (ClientMessage& message : sent_) {
      if (auto* match = std::get_if<Message>(&message)) {
        taken.push_back(std::move(*match));
      } else {
        others.push_back(std::move(message));
      }
    }
    sent_ = std::move(others);
    return taken;
  }

  Mutex mu_;
  CondVar happened_;  // sent or woken
  std::vector<ClientMessage> sent_ ABSL_GUARDED_BY(mu_);
  uint64_t last_sequence_ ABSL_GUARDED_BY(mu_) = 0;
  int sends_ ABSL_GUARDED_BY(mu_) = 0;
  int wakes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SESSION_SCRIPTED_SESSION_H_
