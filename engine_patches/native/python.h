// What the files of kvcached._C share: CPython's stable ABI, and how its errors,
// integers and locks go together with the C library's.
//
// The interpreter's lock (GIL) is held wherever nothing else is said. Nothing in
// this folder is called by the library, so the broker's orders need no GIL.
#ifndef KVBROKER_ENGINE_PATCHES_NATIVE_PYTHON_H_
#define KVBROKER_ENGINE_PATCHES_NATIVE_PYTHON_H_

// Before any other header. 3.9 is the oldest Python that the package supports.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x03090000
#include <Python.h>
//
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "client/capi/kvbroker.h"

namespace kvbroker::python {

// A reference that is owned.
struct DropReference {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Ref = std::unique_ptr<PyObject, DropReference>;

// Without the GIL while it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  // Where the interpreter is about to end, CPython before 3.14 ends a daemon's
  // thread here, by unwinding its stack.
  ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

// kvcached._C.Error; a borrowed reference.
extern PyObject* error_type;

// Raises Error with this code. `message` may be null. Returns null.
PyObject* Raise(kvb_code code, const char* message);
// The same, and frees the library's message.
PyObject* RaiseAndFree(kvb_code code, char* error);

// Block ids or generations of a Python sequence, without allocating for the usual
// number of them.
template <typename Int>
class IntArray {
 public:
  static constexpr size_t kInline = 128;
  // False: an exception is set.
  bool Read(PyObject* sequence);

  const Int* data() const { return data_; }
  Int* data() { return data_; }
  size_t size() const { return size_; }
  // Room for `size`, whatever is in it; up to kInline without allocating. False: an
  // exception is set.
  bool Resize(Py_ssize_t size);

 private:
  Int inline_[kInline];
  std::vector<Int> heap_;
  Int* data_ = inline_;
  size_t size_ = 0;
};

// A list of ints; null and an exception.
template <typename Int>
PyObject* ToList(const Int* values, size_t count);

// For a PyMethodDef with METH_KEYWORDS.
inline PyCFunction WithKeywords(PyCFunctionWithKeywords function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

// How many; false and ValueError where it is negative.
bool CheckCount(long long count, const char* what);

// Rises in each forked child: what belongs to another process is known by it.
extern int fork_generation;

// The types; null and an exception where they cannot be made.
PyObject* MakeSessionType();
PyObject* MakePoolType();

// A Pool of the session, for which `session` stays alive.
PyObject* NewPool(PyObject* session, kvb_pool* pool);

// What Pool needs of its Session.
struct SessionState;
SessionState* StateOf(PyObject* session);
// False, with an exception, where the session is closed or another process's.
bool CheckUsable(const SessionState& session);

// Around each call that gives up the GIL: `close` waits for them.
class Visit {
 public:
  explicit Visit(SessionState& session);
  ~Visit();
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  SessionState& session_;
};

// A DLPack capsule of `bytes` bytes at `address`; `range` is what keeps them, and
// is taken over. `device`: as kvb_session_device.
PyObject* MakeCapsule(void* address, int64_t bytes, int device,
                      kvb_range* range);


}  // namespace kvbroker::python

#endif  // KVBROKER_ENGINE_PATCHES_NATIVE_PYTHON_H_
