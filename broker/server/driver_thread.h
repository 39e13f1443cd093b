// DriverThread: does bulk work on handles (CoreOptions.executor), one piece
// after the other, so that the threads that serve peers need not.
//
//   DriverThread driver;
//   driver.Do([] { ... });
//
// Thread-safe.
#ifndef KVBROKER_BROKER_SERVER_DRIVER_THREAD_H_
#define KVBROKER_BROKER_SERVER_DRIVER_THREAD_H_

#include <deque>
#include <functional>
#include <thread>

#include "broker/base/mutex.h"

namespace kvbroker {

class DriverThread {
 public:
  DriverThread();
  // Stops first.
  ~DriverThread();

  // In the order given. Dropped after Stop.
  void Do(std::function<void()> work);

  // Ends the piece that is under way, drops the others. Not from the thread
  // itself.
  void Stop();

 private:
  void Run();

  Mutex mu_;
  CondVar changed_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_DRIVER_THREAD_H_
