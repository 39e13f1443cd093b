#include "broker/server/driver_thread.h"

#include <pthread.h>

#include <utility>

namespace kvbroker {

DriverThread::DriverThread() : thread_([this] { Run(); }) {}

DriverThread::~DriverThread() { Stop(); }

void DriverThread::Do(std::function<void()> work) {
  MutexLock lock(&mu_);
  if (stopping_) return;
  queue_.push_back(std::move(work));
  changed_.Signal();
}

void DriverThread::Stop() {
  // Destroyed without the lock: what they own goes back to the device.
  std::deque<std::function<void()>> dropped;
  {
    MutexLock lock(&mu_);
    stopping_ = true;
    dropped.swap(queue_);
    changed_.Signal();
  }
  if (thread_.joinable()) thread_.join();
}

void DriverThread::Run() {
  pthread_setname_np(pthread_self(), "kvb-driver");
  for (;;) {
    std::function<void()> work;
    {
      MutexLock lock(&mu_);
      while (queue_.empty() && !stopping_) changed_.Wait(&mu_);
      if (stopping_) return;
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    work();
  }
}

}  // namespace kvbroker
