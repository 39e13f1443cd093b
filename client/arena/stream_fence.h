// StreamFence: waits for what is queued on the streams that touch a pool.
//
//   fence.Add(stream);
//   RETURN_IF_ERROR(fence.Wait());   // before pages are taken away
//   fence.Clear();                   // before the context goes
//
// Wait waits for what was queued when it was called; other streams neither wait
// nor are waited for, unless kAllStreams was added. Add and Remove from any thread, the rest by one thread at
// a time and with the context current that the streams are of.
#ifndef KVBROKER_CLIENT_ARENA_STREAM_FENCE_H_
#define KVBROKER_CLIENT_ARENA_STREAM_FENCE_H_

#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "broker/base/mutex.h"
#include "broker/device/cuda/driver.h"

namespace kvbroker::client {

// In a stream's place: whatever is queued anywhere in the context. For those who
// do not know which streams touch their pool. While a graph is captured it cannot
// be waited for, and Wait answers FAILED_PRECONDITION.
inline const cuda::CUstream kAllStreams = reinterpret_cast<cuda::CUstream>(-1);

class StreamFence {
 public:
  // `cuda` outlives it.
  explicit StreamFence(const CudaFunctions& cuda) : cuda_(cuda) {}

  // Null is the context's default stream.
  void Add(cuda::CUstream stream);
  void Remove(cuda::CUstream stream);
  absl::Status Wait();
  // Gives back what the driver was asked for.
  void Clear();

 private:
  const CudaFunctions& cuda_;
  // One for each stream there was at once, kept to be used again.
  std::vector<cuda::CUevent> events_;
  // Held while events are recorded, so that a stream that was removed is not
  // used any more; never while they are waited for.
  Mutex mu_;
  std::vector<cuda::CUstream> streams_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_ARENA_STREAM_FENCE_H_
