// kvcached._C.Session: see _C.pyi.
#include "engine_patches/native/session_state.h"
//
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

namespace kvbroker::python {
namespace {

struct SessionObject {
  PyObject_HEAD
  SessionState* state;
};

SessionObject* As(PyObject* self) {
  return reinterpret_cast<SessionObject*>(self);
}

struct FreeOptions {
  void operator()(kvb_session_options* options) const {
    kvb_session_options_free(options);
  }
};
using Options = std::unique_ptr<kvb_session_options, FreeOptions>;

// ---- what Session(...) is given ----

// The int of a dictionary's value, or an exception.
bool ToInt64(PyObject* value, const char* key, int64_t* out) {
  Ref index(PyNumber_Index(value));
  if (index == nullptr) {
    PyErr_Format(PyExc_TypeError, "pool option %s must be an integer", key);
    return false;
  }
  *out = PyLong_AsLongLong(index.get());
  return *out != -1 || PyErr_Occurred() == nullptr;
}

bool ReadPoolOption(const char* key, int64_t value, kvb_pool_options* pool) {
  const std::string_view name(key);
  // What C takes as unsigned.
  const bool negative_is_fine = name == "max_reserved_pages";
  if (value < 0 && !negative_is_fine) {
    PyErr_Format(PyExc_ValueError, "pool option %s must be 0 or more; got %lld",
                 key, static_cast<long long>(value));
    return false;
  }
  const bool fits32 = value <= UINT32_MAX;
  if (name == "handle_bytes") {
    pool->handle_bytes = static_cast<uint64_t>(value);
  } else if (name == "handles_per_page" && fits32) {
    pool->handles_per_page = static_cast<uint32_t>(value);
  } else if (name == "per_layer") {
    pool->layout = value != 0 ? KVB_PER_LAYER : KVB_CONTIGUOUS;
  } else if (name == "max_pages" && fits32) {
    pool->max_pages = static_cast<uint32_t>(value);
  } else if (name == "block_bytes") {
    pool->block_bytes = static_cast<uint64_t>(value);
  } else if (name == "max_blocks" && fits32) {
    pool->max_blocks = static_cast<uint32_t>(value);
  } else if (name == "reserve_null_block") {
    pool->reserve_null_block = value != 0;
  } else if (name == "map_ahead") {
    pool->map_ahead = value != 0;
  } else if (name == "min_reserved_pages") {
    pool->min_reserved_pages = value;
  } else if (name == "max_reserved_pages") {
    pool->max_reserved_pages = value;
  } else if (name == "idle_decay_ms") {
    pool->idle_decay_ms = value;
  } else if (name == "running_miss_wait_us") {
    pool->running_miss_wait_us = value;
  } else if (name == "claim_deadline_ms") {
    pool->claim_deadline_ms = value;
  } else if (name == "guard") {
    pool->guard = value != 0;
  } else if (name == "grow_when_polled") {
    pool->grow_when_polled = value != 0;
  } else {
    PyErr_Format(PyExc_ValueError,
                 fits32 ? "no such pool option: %s"
                        : "pool option %s must be below 2**32",
                 key);
    return false;
  }
  return true;
}

bool AddPool(PyObject* given, kvb_session_options* options) {
  kvb_pool_options pool;
  kvb_pool_options_init(&pool, sizeof(pool));
  Ref items(PyMapping_Items(given));
  if (items == nullptr) return false;
  for (Py_ssize_t i = 0; i < PyList_Size(items.get()); ++i) {
    PyObject* pair = PyList_GetItem(items.get(), i);
    Ref name(PyUnicode_AsUTF8String(PyTuple_GetItem(pair, 0)));
    if (name == nullptr) return false;
    const char* key = PyBytes_AsString(name.get());
    int64_t value;
    if (!ToInt64(PyTuple_GetItem(pair, 1), key, &value) ||
        !ReadPoolOption(key, value, &pool)) {
      return false;
    }
  }
  char* error = nullptr;
  const kvb_code code = kvb_session_options_add_pool(options, &pool, &error);
  if (code == KVB_OK) return true;
  RaiseAndFree(code, error);
  return false;
}

bool AddPools(PyObject* pools, kvb_session_options* options) {
  Ref list(PySequence_List(pools));
  if (list == nullptr) return false;
  for (Py_ssize_t i = 0; i < PyList_Size(list.get()); ++i) {
    if (!AddPool(PyList_GetItem(list.get(), i), options)) return false;
  }
  return true;
}

bool AddLabels(PyObject* labels, kvb_session_options* options) {
  if (labels == Py_None) return true;
  Ref items(PyMapping_Items(labels));
  if (items == nullptr) return false;
  for (Py_ssize_t i = 0; i < PyList_Size(items.get()); ++i) {
    PyObject* pair = PyList_GetItem(items.get(), i);
    Ref key(PyUnicode_AsUTF8String(PyTuple_GetItem(pair, 0)));
    if (key == nullptr) return false;
    Ref value(PyUnicode_AsUTF8String(PyTuple_GetItem(pair, 1)));
    if (value == nullptr) return false;
    kvb_session_options_set_label(options, PyBytes_AsString(key.get()),
                                  PyBytes_AsString(value.get()));
  }
  return true;
}

// Calls set(options, value) where `given` is not None; an exception otherwise.
bool SetBytes(PyObject* given, const char* name, kvb_session_options* options,
              void (*set)(kvb_session_options*, uint64_t)) {
  if (given == Py_None) return true;
  const long long value = PyLong_AsLongLong(given);
  if (value == -1 && PyErr_Occurred() != nullptr) return false;
  if (value < 0) {
    PyErr_Format(PyExc_ValueError, "%s must be 0 or more; got %lld", name,
                 value);
    return false;
  }
  set(options, static_cast<uint64_t>(value));
  return true;
}

bool SetNumber(PyObject* given, kvb_session_options* options,
               void (*set)(kvb_session_options*, double)) {
  if (given == Py_None) return true;
  const double value = PyFloat_AsDouble(given);
  if (value == -1 && PyErr_Occurred() != nullptr) return false;
  set(options, value);
  return true;
}

bool SetConflict(std::string_view given, kvb_session_options* options) {
  constexpr std::pair<std::string_view, int> kKinds[] = {
      {"join", KVB_JOIN}, {"suffix", KVB_SUFFIX}, {"error", KVB_ERROR}};
  for (const auto& [name, kind] : kKinds) {
    if (name != given) continue;
    kvb_session_options_set_name_conflict(options, kind);
    return true;
  }
  PyErr_SetString(PyExc_ValueError,
                  "name_conflict must be join, suffix or error");
  return false;
}

// Reads the arguments of Session(...); null and an exception.
Options ReadOptions(PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"instance",      "pools",
                                 "address",       "gpu",
                                 "backend",       "member",
                                 "min_bytes",     "min_fraction",
                                 "max_bytes",     "max_fraction",
                                 "weight",        "declared_peak",
                                 "labels",        "timeout_ms",
                                 "name_conflict", "broker_program",
                                 "shm_directory", nullptr};
  const char* instance;
  PyObject* pools;
  const char *address = nullptr, *gpu = nullptr, *backend = nullptr;
  const char *member = nullptr, *conflict = "join";
  const char *program = nullptr, *shm = nullptr;
  PyObject *min = Py_None, *min_fraction = Py_None, *max = Py_None;
  PyObject *max_fraction = Py_None, *weight = Py_None, *peak = Py_None;
  PyObject* labels = Py_None;
  long long timeout = 10'000;
  if (!PyArg_ParseTupleAndKeywords(
          args, keywords, "sO|$zzzzOOOOOOOLszz:Session",
          const_cast<char**>(kNames), &instance, &pools, &address, &gpu,
          &backend, &member, &min, &min_fraction, &max, &max_fraction, &weight,
          &peak, &labels, &timeout, &conflict, &program, &shm)) {
    return nullptr;
  }
  Options options(kvb_session_options_new(instance));
  if (address != nullptr) {
    kvb_session_options_set_address(options.get(), address);
  }
  if (gpu != nullptr) kvb_session_options_set_gpu(options.get(), gpu);
  if (backend != nullptr) {
    kvb_session_options_set_backend(options.get(), backend);
  }
  if (member != nullptr) kvb_session_options_set_member(options.get(), member);
  kvb_session_options_set_timeout(options.get(), timeout);
  if (!SetConflict(conflict, options.get()) ||
      !SetBytes(min, "min_bytes", options.get(), kvb_session_options_set_min) ||
      !SetNumber(min_fraction, options.get(),
                 kvb_session_options_set_min_fraction) ||
      !SetBytes(max, "max_bytes", options.get(), kvb_session_options_set_max) ||
      !SetNumber(max_fraction, options.get(),
                 kvb_session_options_set_max_fraction) ||
      !SetNumber(weight, options.get(), kvb_session_options_set_weight) ||
      !SetBytes(peak, "declared_peak", options.get(),
                kvb_session_options_set_declared_peak) ||
      !AddLabels(labels, options.get()) || !AddPools(pools, options.get())) {
    return nullptr;
  }
  if (program != nullptr) {
    kvb_session_options_set_autostart(options.get(), program);
  }
  if (shm != nullptr) kvb_session_options_set_shm_view(options.get(), shm);
  return options;
}

// ---- the type ----

PyObject* New(PyTypeObject* type, PyObject*, PyObject*) {
  auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* self = alloc(type, 0);
  if (self == nullptr) return nullptr;
  As(self)->state = new (std::nothrow) SessionState;
  if (As(self)->state == nullptr) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  As(self)->state->fork_generation = fork_generation;
  return self;
}

int Init(PyObject* self, PyObject* args, PyObject* keywords) {
  SessionState& state = *As(self)->state;
  // Its pools would take another session for theirs.
  if (std::exchange(state.initialized, true)) {
    PyErr_SetString(PyExc_RuntimeError, "the session was opened before");
    return -1;
  }
  Options options = ReadOptions(args, keywords);
  if (options == nullptr) return -1;
  kvb_session* opened = nullptr;
  char* error = nullptr;
  kvb_code code;
  {
    WithoutGil without;
    code = kvb_session_open(options.get(), &opened, &error);
  }
  if (code != KVB_OK) {
    RaiseAndFree(code, error);
    return -1;
  }
  state.session = opened;
  return 0;
}

// Ends the session once nobody is inside of it. New calls are refused.
void CloseState(SessionState& state) {
  kvb_session* const session = std::exchange(state.session, nullptr);
  if (session == nullptr) return;
  // The parent's, in a child: the lock may be held for ever, and closing does
  // nothing.
  if (state.fork_generation != fork_generation) return;
  WithoutGil without;
  kvb_session_begin_close(session);
  {
    std::unique_lock lock(state.mu);
    state.left.wait(lock, [&] { return state.visits == 0; });
  }
  kvb_session_close(session);
}

void Dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  if (As(self)->state != nullptr) {
    CloseState(*As(self)->state);
    delete As(self)->state;
  }
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* Close(PyObject* self, PyObject*) {
  CloseState(*As(self)->state);
  Py_RETURN_NONE;
}

PyObject* GetPool(PyObject* self, PyObject* argument) {
  const long long index = PyLong_AsLongLong(argument);
  if (index == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (!CheckUsable(*As(self)->state)) return nullptr;
  kvb_pool* pool = nullptr;
  if (index >= 0) {
    pool = kvb_session_pool(As(self)->state->session,
                            static_cast<size_t>(index));
  }
  if (pool == nullptr) {
    return PyErr_Format(PyExc_IndexError, "the session has no pool %lld",
                        index);
  }
  return NewPool(self, pool);
}

PyObject* Health(PyObject* self, PyObject*) {
  if (!CheckUsable(*As(self)->state)) return nullptr;
  char* error = nullptr;
  const kvb_code code =
      kvb_session_health(As(self)->state->session, &error);
  PyObject* health =
      Py_BuildValue("(is)", static_cast<int>(code), error ? error : "");
  kvb_error_free(error);
  return health;
}

PyObject* Limits(PyObject* self, PyObject*) {
  if (!CheckUsable(*As(self)->state)) return nullptr;
  kvb_limits limits = {};
  limits.size = sizeof(limits);
  kvb_session_limits(As(self)->state->session, &limits);
  return Py_BuildValue("(KKK)",
                       static_cast<unsigned long long>(limits.min_bytes),
                       static_cast<unsigned long long>(limits.max_bytes),
                       static_cast<unsigned long long>(limits.capacity_bytes));
}

PyObject* SetMax(PyObject* self, PyObject* argument) {
  const long long bytes = PyLong_AsLongLong(argument);
  if (bytes == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (bytes < 0) {
    return PyErr_Format(PyExc_ValueError, "a limit must be 0 or more; got %lld",
                        bytes);
  }
  if (!CheckUsable(*As(self)->state)) return nullptr;
  char* error = nullptr;
  kvb_code code;
  {
    SessionState& state = *As(self)->state;
    kvb_session* const session = state.session;
    Visit visit(state);
    WithoutGil without;
    code = kvb_session_set_max(session, static_cast<uint64_t>(bytes), &error);
  }
  if (code != KVB_OK) return RaiseAndFree(code, error);
  Py_RETURN_NONE;
}

PyObject* Pause(PyObject* self, PyObject*) {
  SessionState& state = *As(self)->state;
  if (!CheckUsable(state)) return nullptr;
  kvb_session* const session = state.session;
  {
    Visit visit(state);
    WithoutGil without;
    kvb_session_pause(session);
  }
  ++state.pauses;
  Py_RETURN_NONE;
}

PyObject* Resume(PyObject* self, PyObject*) {
  SessionState& state = *As(self)->state;
  if (!CheckUsable(state)) return nullptr;
  if (state.pauses == 0) {
    return Raise(KVB_FAILED_PRECONDITION, "the session is not paused");
  }
  --state.pauses;
  kvb_session* const session = state.session;
  {
    Visit visit(state);
    WithoutGil without;
    kvb_session_resume(session);
  }
  Py_RETURN_NONE;
}

PyObject* MakeRoom(PyObject* self, PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"declared_peak", "timeout_ms", nullptr};
  long long peak, timeout;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "LL:make_room",
                                   const_cast<char**>(kNames), &peak,
                                   &timeout)) {
    return nullptr;
  }
  if (peak < 0) {
    return PyErr_Format(PyExc_ValueError,
                        "declared_peak must be 0 or more; got %lld", peak);
  }
  if (!CheckUsable(*As(self)->state)) return nullptr;
  char* error = nullptr;
  kvb_code code;
  {
    SessionState& state = *As(self)->state;
    kvb_session* const session = state.session;
    Visit visit(state);
    WithoutGil without;
    code = kvb_session_make_room(session, static_cast<uint64_t>(peak), timeout,
                                 &error);
  }
  if (code != KVB_OK) return RaiseAndFree(code, error);
  Py_RETURN_NONE;
}

PyObject* Instance(PyObject* self, void*) {
  if (!CheckUsable(*As(self)->state)) return nullptr;
  return PyUnicode_FromString(
      kvb_session_instance(As(self)->state->session));
}

PyObject* JoinedPids(PyObject* self, void*) {
  if (!CheckUsable(*As(self)->state)) return nullptr;
  return PyUnicode_FromString(
      kvb_session_joined_pids(As(self)->state->session));
}

PyObject* DeviceOrdinal(PyObject* self, void*) {
  if (!CheckUsable(*As(self)->state)) return nullptr;
  return PyLong_FromLong(kvb_session_device(As(self)->state->session));
}

PyObject* IsClosed(PyObject* self, void*) {
  return PyBool_FromLong(As(self)->state->session == nullptr);
}

}  // namespace

SessionState* StateOf(PyObject* session) { return As(session)->state; }

bool CheckUsable(const SessionState& session) {
  if (session.session != nullptr &&
      session.fork_generation == fork_generation) {
    return true;
  }
  Raise(KVB_FAILED_PRECONDITION,
        session.session == nullptr
            ? "the session is closed"
            : "this process was forked after its parent had opened the session, "
              "which stays the parent's: spawn such processes, or open a session "
              "only after the fork");
  return false;
}

Visit::Visit(SessionState& session) : session_(session) {
  std::lock_guard lock(session_.mu);
  ++session_.visits;
}

Visit::~Visit() {
  std::lock_guard lock(session_.mu);
  --session_.visits;
  session_.left.notify_all();
}

PyObject* MakeSessionType() {
  static PyMethodDef methods[] = {
      {"pool", GetPool, METH_O, "pool(index)"},
      {"health", Health, METH_NOARGS, "(0, '') or (code, why)"},
      {"limits", Limits, METH_NOARGS, "(min, max, capacity) in bytes"},
      {"set_max", SetMax, METH_O, "set_max(bytes): the instance's limit"},
      {"pause", Pause, METH_NOARGS, "no page comes or goes until resume"},
      {"resume", Resume, METH_NOARGS, "ends a pause"},
      {"make_room", WithKeywords(MakeRoom), METH_VARARGS | METH_KEYWORDS,
       "make_room(declared_peak, timeout_ms)"},
      {"close", Close, METH_NOARGS, "unmaps and returns everything"},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef properties[] = {
      {"instance", Instance, nullptr, "the name in force", nullptr},
      {"joined_pids", JoinedPids, nullptr,
       "processes that had the name, with commas", nullptr},
      {"device", DeviceOrdinal, nullptr, "CUDA ordinal; -1: host", nullptr},
      {"closed", IsClosed, nullptr, "whether it is closed", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(New)},
      {Py_tp_init, reinterpret_cast<void*>(Init)},
      {Py_tp_dealloc, reinterpret_cast<void*>(Dealloc)},
      {Py_tp_methods, methods},
      {Py_tp_getset, properties},
      {Py_tp_doc, const_cast<char*>("A conversation with one broker.")},
      {0, nullptr}};
  static PyType_Spec spec = {"kvcached._C.Session", sizeof(SessionObject), 0,
                             Py_TPFLAGS_DEFAULT, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace kvbroker::python
