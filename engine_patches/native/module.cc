// kvcached._C: see _C.pyi.
#include <pthread.h>

#include "engine_patches/native/python.h"
//
#include "proto/version.h"

namespace kvbroker::python {
namespace {

// The library's text as a str, which frees it.
PyObject* TakeText(char* text) {
  PyObject* result = PyUnicode_FromString(text);
  kvb_text_free(text);
  return result;
}

PyObject* GpuUuid(PyObject*, PyObject* argument) {
  const long ordinal = PyLong_AsLong(argument);
  if (ordinal == -1 && PyErr_Occurred() != nullptr) return nullptr;
  char* uuid = nullptr;
  char* error = nullptr;
  kvb_code code;
  {
    WithoutGil without;
    code = kvb_gpu_uuid(static_cast<int>(ordinal), &uuid, &error);
  }
  if (code != KVB_OK) return RaiseAndFree(code, error);
  return TakeText(uuid);
}

using List = kvb_code(const char*, const char*, int64_t, char**,
                      char**) noexcept;

PyObject* CallList(PyObject* args, PyObject* keywords, const char* format,
                   List* list) {
  static const char* kNames[] = {"address", "gpu", "timeout_ms", nullptr};
  const char *address = nullptr, *gpu = nullptr;
  long long timeout = 10'000;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, format,
                                   const_cast<char**>(kNames), &address, &gpu,
                                   &timeout)) {
    return nullptr;
  }
  char* json = nullptr;
  char* error = nullptr;
  kvb_code code;
  {
    WithoutGil without;
    code = list(address, gpu, timeout, &json, &error);
  }
  if (code != KVB_OK) {
    kvb_text_free(json);  // of the brokers that did answer
    return RaiseAndFree(code, error);
  }
  return TakeText(json);
}

PyObject* ListInstances(PyObject*, PyObject* args, PyObject* keywords) {
  return CallList(args, keywords, "|zzL:list_instances", kvb_list_instances);
}

PyObject* ListBrokers(PyObject*, PyObject* args, PyObject* keywords) {
  return CallList(args, keywords, "|zzL:list_brokers", kvb_list_brokers);
}

// Puts a number of set_limit into the policy, where it is not None. False: an
// exception is set.
bool TakeBytes(PyObject* given, const char* name, uint32_t field,
               kvb_policy* policy, uint64_t* out) {
  if (given == Py_None) return true;
  const long long value = PyLong_AsLongLong(given);
  if (value == -1 && PyErr_Occurred() != nullptr) return false;
  if (value < 0) {
    PyErr_Format(PyExc_ValueError, "%s must be 0 or more; got %lld", name,
                 value);
    return false;
  }
  policy->fields |= field;
  *out = static_cast<uint64_t>(value);
  return true;
}

bool TakeNumber(PyObject* given, uint32_t field, kvb_policy* policy,
                double* out) {
  if (given == Py_None) return true;
  *out = PyFloat_AsDouble(given);
  if (*out == -1 && PyErr_Occurred() != nullptr) return false;
  policy->fields |= field;
  return true;
}

PyObject* SetLimit(PyObject*, PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"name",    "min_bytes",  "max_bytes",
                                 "max_percent", "weight", "preset",
                                 "address", "gpu",        "timeout_ms",
                                 nullptr};
  const char *name, *address = nullptr, *gpu = nullptr;
  PyObject *min = Py_None, *max = Py_None, *percent = Py_None;
  PyObject* weight = Py_None;
  long long timeout = 10'000;
  kvb_policy policy = {};
  policy.size = sizeof(policy);
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "s|$OOOOpzzL:set_limit",
                                   const_cast<char**>(kNames), &name, &min,
                                   &max, &percent, &weight, &policy.preset,
                                   &address, &gpu, &timeout) ||
      !TakeBytes(min, "min_bytes", KVB_POLICY_MIN, &policy,
                 &policy.min_bytes) ||
      !TakeBytes(max, "max_bytes", KVB_POLICY_MAX, &policy,
                 &policy.max_bytes) ||
      !TakeNumber(percent, KVB_POLICY_MAX_PERCENT, &policy,
                  &policy.max_percent) ||
      !TakeNumber(weight, KVB_POLICY_WEIGHT, &policy, &policy.weight)) {
    return nullptr;
  }
  char* error = nullptr;
  kvb_code code;
  {
    WithoutGil without;
    code = kvb_set_policy(address, gpu, name, &policy, timeout, &error);
  }
  if (code != KVB_OK) return RaiseAndFree(code, error);
  Py_RETURN_NONE;
}

// Whether the module could be filled.
bool Fill(PyObject* module) {
  error_type = PyErr_NewExceptionWithDoc(
      "kvcached._C.Error",
      "What the library answers; `code` is one of google.rpc.Code.",
      PyExc_RuntimeError, nullptr);
  if (error_type == nullptr) return false;
  Ref unknown(PyLong_FromLong(KVB_INTERNAL));
  PyObject* session = MakeSessionType();
  PyObject* pool = MakePoolType();
  if (unknown == nullptr || session == nullptr || pool == nullptr ||
      PyObject_SetAttrString(error_type, "code", unknown.get()) != 0) {
    return false;
  }
  const struct {
    const char* name;
    PyObject* object;
  } objects[] = {{"Error", error_type}, {"Session", session}, {"Pool", pool}};
  for (const auto& [name, object] : objects) {
    Py_INCREF(object);  // which AddObject takes, where it succeeds
    if (PyModule_AddObject(module, name, object) != 0) return false;
  }
  const struct {
    const char* name;
    long value;
  } numbers[] = {
      {"ABI_VERSION", kvb_abi_version()},
      {"ALL_STREAMS", -1},
      {"NOW", 1},
      {"WAITING", KVB_WAITING},
      {"RUNNING", KVB_RUNNING},
      {"UNBACKED", KVB_BLOCK_UNBACKED},
      {"FREE", KVB_BLOCK_FREE},
      {"USED", KVB_BLOCK_USED},
      {"CACHED", KVB_BLOCK_CACHED},
      {"RESERVED", KVB_BLOCK_RESERVED},
      {"INVALID_ARGUMENT", KVB_INVALID_ARGUMENT},
      {"DEADLINE_EXCEEDED", KVB_DEADLINE_EXCEEDED},
      {"NOT_FOUND", KVB_NOT_FOUND},
      {"PERMISSION_DENIED", KVB_PERMISSION_DENIED},
      {"RESOURCE_EXHAUSTED", KVB_RESOURCE_EXHAUSTED},
      {"FAILED_PRECONDITION", KVB_FAILED_PRECONDITION},
      {"INTERNAL", KVB_INTERNAL},
      {"UNAVAILABLE", KVB_UNAVAILABLE},
  };
  for (const auto& [name, value] : numbers) {
    if (PyModule_AddIntConstant(module, name, value) != 0) return false;
  }
  PyObject* forever = PyLong_FromLongLong(KVB_FOREVER);
  if (forever == nullptr) return false;
  if (PyModule_AddObject(module, "FOREVER", forever) != 0) {
    Py_DECREF(forever);
    return false;
  }
  return PyModule_AddStringConstant(module, "VERSION", kVersion) == 0;
}

PyObject* MakeModule() {
  static PyMethodDef functions[] = {
      {"gpu_uuid", GpuUuid, METH_O, "gpu_uuid(ordinal)"},
      {"list_instances", WithKeywords(ListInstances),
       METH_VARARGS | METH_KEYWORDS,
       "list_instances(address=None, gpu=None, timeout_ms=10000): JSON"},
      {"list_brokers", WithKeywords(ListBrokers), METH_VARARGS | METH_KEYWORDS,
       "list_brokers(address=None, gpu=None, timeout_ms=10000): JSON"},
      {"set_limit", WithKeywords(SetLimit), METH_VARARGS | METH_KEYWORDS,
       "set_limit(name, *, min_bytes, max_bytes, max_percent, weight, preset, "
       "address, gpu, timeout_ms)"},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "The native part of kvcached: sessions with a broker, pools of KV blocks.",
      -1,
      functions,
      nullptr,
      nullptr,
      nullptr,
      nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || Fill(module)) return module;
  Py_DECREF(module);
  return nullptr;
}

}  // namespace
}  // namespace kvbroker::python

PyMODINIT_FUNC PyInit__C() {
  using kvbroker::python::fork_generation;
  if (pthread_atfork(nullptr, nullptr, [] { ++fork_generation; }) != 0) {
    return PyErr_NoMemory();
  }
  return kvbroker::python::MakeModule();
}
