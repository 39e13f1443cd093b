#include "engine_patches/native/python.h"

#include <limits>
#include <new>

namespace kvbroker::python {

PyObject* error_type = nullptr;
int fork_generation = 0;

PyObject* Raise(kvb_code code, const char* message) {
  Ref text(PyUnicode_FromString(message == nullptr ? "" : message));
  Ref number(PyLong_FromLong(code));
  if (text == nullptr || number == nullptr) return nullptr;
  Ref error(PyObject_CallFunctionObjArgs(error_type, text.get(), nullptr));
  if (error == nullptr ||
      PyObject_SetAttrString(error.get(), "code", number.get()) != 0) {
    return nullptr;
  }
  PyErr_SetObject(error_type, error.get());
  return nullptr;
}

PyObject* RaiseAndFree(kvb_code code, char* error) {
  Raise(code, error);
  kvb_error_free(error);
  return nullptr;
}

template <typename Int>
bool IntArray<Int>::Resize(Py_ssize_t size) {
  size_ = static_cast<size_t>(size);
  if (size_ <= kInline) {
    data_ = inline_;
    return true;
  }
  try {
    heap_.resize(size_);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    return false;
  }
  data_ = heap_.data();
  return true;
}

template <typename Int>
bool IntArray<Int>::Read(PyObject* sequence) {
  const bool is_list = PyList_Check(sequence);
  Ref converted;
  if (!is_list) {
    converted.reset(PySequence_List(sequence));
    if (converted == nullptr) return false;
    sequence = converted.get();
  }
  if (!Resize(PyList_Size(sequence))) return false;
  for (size_t i = 0; i < size_; ++i) {
    PyObject* item = PyList_GetItem(sequence, static_cast<Py_ssize_t>(i));
    if (item == nullptr) return false;  // it got shorter
    Ref index;
    if (!PyLong_Check(item)) {
      // numpy's and torch's integers, too.
      index.reset(PyNumber_Index(item));
      if (index == nullptr) return false;
      item = index.get();
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (value == -1 && PyErr_Occurred() != nullptr) return false;
    if (overflow != 0 || value < std::numeric_limits<Int>::min() ||
        value > static_cast<long long>(std::numeric_limits<Int>::max())) {
      PyErr_SetString(PyExc_OverflowError,
                      "block ids and generations have 32 bits");
      return false;
    }
    data_[i] = static_cast<Int>(value);
  }
  return true;
}

template class IntArray<int32_t>;
template class IntArray<uint32_t>;

template <typename Int>
PyObject* ToList(const Int* values, size_t count) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(count));
  if (list == nullptr) return nullptr;
  for (size_t i = 0; i < count; ++i) {
    PyObject* item = PyLong_FromLongLong(values[i]);
    if (item == nullptr) {
      Py_DECREF(list);
      return nullptr;
    }
    PyList_SetItem(list, static_cast<Py_ssize_t>(i), item);
  }
  return list;
}

template PyObject* ToList(const int32_t*, size_t);
template PyObject* ToList(const uint32_t*, size_t);

bool CheckCount(long long count, const char* what) {
  // Far above what any pool has; keeps sums from overflowing.
  if (count >= 0 && count <= std::numeric_limits<int32_t>::max()) return true;
  PyErr_Format(PyExc_ValueError, "%s must be 0 or more and below 2**31; got %lld",
               what, count);
  return false;
}

}  // namespace kvbroker::python
