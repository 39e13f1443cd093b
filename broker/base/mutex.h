// Mutex, MutexLock, CondVar: std::mutex with clang's thread-safety annotations.
//
//   Mutex mu_;
//   int x_ ABSL_GUARDED_BY(mu_);
//   MutexLock lock(&mu_);
//
// Not absl::Mutex: Debian's Abseil has its deadlock detector compiled in, which
// makes an uncontended lock ten times dearer, and is built without
// ThreadSanitizer, which then sees races at every lock. TSan knows std::mutex.
#ifndef KVBROKER_BROKER_BASE_MUTEX_H_
#define KVBROKER_BROKER_BASE_MUTEX_H_

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"

namespace kvbroker {

class ABSL_LOCKABLE Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() { mu_.lock(); }
  bool TryLock() ABSL_EXCLUSIVE_TRYLOCK_FUNCTION(true) {
    return mu_.try_lock();
  }
  void Unlock() ABSL_UNLOCK_FUNCTION() { mu_.unlock(); }
  // Tells the analysis, in a lambda say, what the caller has seen to.
  void AssertHeld() const ABSL_ASSERT_EXCLUSIVE_LOCK() {}

 private:
  friend class CondVar;
  std::mutex mu_;
};

class ABSL_SCOPED_LOCKABLE MutexLock {
 public:
  explicit MutexLock(Mutex* mu) ABSL_EXCLUSIVE_LOCK_FUNCTION(mu) : mu_(mu) {
    mu_->Lock();
  }
  ~MutexLock() ABSL_UNLOCK_FUNCTION() { mu_->Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex* const mu_;
};

class CondVar {
 public:
  // Both release `mu` while they wait and hold it again when they return. Wakes
  // may be spurious: test the condition in a loop.
  void Wait(Mutex* mu) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    std::unique_lock<std::mutex> held(mu->mu_, std::adopt_lock);
    cv_.wait(held);
    held.release();
  }
  // True when the deadline, of the wall clock, passed.
  bool WaitWithDeadline(Mutex* mu, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    if (deadline == absl::InfiniteFuture()) {
      Wait(mu);
      return false;
    }
    std::unique_lock<std::mutex> held(mu->mu_, std::adopt_lock);
    const bool expired =
        cv_.wait_until(held, absl::ToChronoTime(deadline)) ==
        std::cv_status::timeout;
    held.release();
    return expired;
  }
  void Signal() { cv_.notify_one(); }
  void SignalAll() { cv_.notify_all(); }

 private:
  std::condition_variable cv_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_BASE_MUTEX_H_
