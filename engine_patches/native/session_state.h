// SessionState: what stands behind a kvcached._C.Session, and its Pools read.
#ifndef KVBROKER_ENGINE_PATCHES_NATIVE_SESSION_STATE_H_
#define KVBROKER_ENGINE_PATCHES_NATIVE_SESSION_STATE_H_

#include "engine_patches/native/python.h"
//
#include <condition_variable>
#include <mutex>

namespace kvbroker::python {

struct SessionState {
  // Null before it is open and once it is closed; changes under the GIL.
  kvb_session* session = nullptr;
  int fork_generation = 0;
  bool initialized = false;  // by Session(...), once
  // Calls that are inside of the library without the GIL.
  std::mutex mu;
  std::condition_variable left;
  int visits = 0;
  int pauses = 0;  // under the GIL
};

}  // namespace kvbroker::python

#endif  // KVBROKER_ENGINE_PATCHES_NATIVE_SESSION_STATE_H_
