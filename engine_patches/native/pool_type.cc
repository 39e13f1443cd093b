// kvcached._C.Pool: see _C.pyi.
#include <algorithm>

#include "engine_patches/native/python.h"
#include "engine_patches/native/session_state.h"

namespace kvbroker::python {
namespace {

// Not an urgency of the library's: kvb_pool_try_alloc.
constexpr long kNow = 1;

struct PoolObject {
  PyObject_HEAD
  PyObject* session;
  SessionState* state;  // of `session`
  kvb_pool* pool;
};

PyObject* pool_type = nullptr;

PoolObject* As(PyObject* self) { return reinterpret_cast<PoolObject*>(self); }

bool Usable(PyObject* self) { return CheckUsable(*As(self)->state); }

void Dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(As(self)->session);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// Pools are made by their sessions.
PyObject* RefuseNew(PyTypeObject*, PyObject*, PyObject*) {
  PyErr_SetString(PyExc_TypeError, "a Pool comes from Session.pool()");
  return nullptr;
}

PyObject* Alloc(PyObject* self, PyObject* args, PyObject* keywords) {
  long long count;
  long urgency = KVB_RUNNING;
  if (keywords == nullptr) {
    if (!PyArg_ParseTuple(args, "L|l:alloc", &count, &urgency)) return nullptr;
  } else {
    static const char* kNames[] = {"count", "urgency", nullptr};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "L|l:alloc",
                                     const_cast<char**>(kNames), &count,
                                     &urgency)) {
      return nullptr;
    }
  }
  if (!CheckCount(count, "count") || !Usable(self)) return nullptr;
  if (urgency != kNow && urgency != KVB_WAITING && urgency != KVB_RUNNING) {
    return PyErr_Format(PyExc_ValueError,
                        "urgency must be NOW, WAITING or RUNNING; got %ld",
                        urgency);
  }
  kvb_pool* const pool = As(self)->pool;
  // More than there are ids can never be, and would only cost memory here.
  IntArray<int32_t> blocks;
  if (static_cast<size_t>(count) > blocks.kInline &&
      static_cast<size_t>(count) > kvb_pool_block_ids(pool)) {
    Py_RETURN_NONE;
  }
  if (!blocks.Resize(static_cast<Py_ssize_t>(count))) return nullptr;
  bool taken = kvb_pool_try_alloc(pool, blocks.size(), blocks.data());
  if (!taken && urgency != kNow) {
    Visit visit(*As(self)->state);
    WithoutGil without;
    taken = kvb_pool_alloc(pool, blocks.size(), static_cast<int>(urgency),
                           blocks.data());
  }
  if (!taken) Py_RETURN_NONE;
  PyObject* list = ToList(blocks.data(), blocks.size());
  if (list == nullptr && As(self)->state->session != nullptr) {
    kvb_pool_free(pool, blocks.data(), blocks.size(), nullptr);
  }
  return list;
}

PyObject* AllocAt(PyObject* self, PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"blocks", "timeout_ms", nullptr};
  PyObject* sequence;
  long long timeout;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OL:alloc_at",
                                   const_cast<char**>(kNames), &sequence,
                                   &timeout)) {
    return nullptr;
  }
  IntArray<int32_t> blocks;
  if (!blocks.Read(sequence) || !Usable(self)) return nullptr;
  int taken = 0;
  kvb_code code;
  char* error = nullptr;
  {
    Visit visit(*As(self)->state);
    WithoutGil without;
    code = kvb_pool_alloc_at(As(self)->pool, blocks.data(), blocks.size(),
                             timeout, &taken, &error);
  }
  if (code != KVB_OK) return RaiseAndFree(code, error);
  return PyBool_FromLong(taken);
}

using GiveBack = kvb_code(kvb_pool*, const int32_t*, size_t, char**) noexcept;

PyObject* Give(PyObject* self, PyObject* sequence, GiveBack* give) {
  IntArray<int32_t> blocks;
  if (!blocks.Read(sequence) || !Usable(self)) return nullptr;
  char* error = nullptr;
  const kvb_code code =
      give(As(self)->pool, blocks.data(), blocks.size(), &error);
  if (code != KVB_OK) return RaiseAndFree(code, error);
  Py_RETURN_NONE;
}

PyObject* Free(PyObject* self, PyObject* blocks) {
  return Give(self, blocks, kvb_pool_free);
}

PyObject* Cache(PyObject* self, PyObject* blocks) {
  return Give(self, blocks, kvb_pool_cache);
}

PyObject* SetMaxCached(PyObject* self, PyObject* argument) {
  const long long blocks = PyLong_AsLongLong(argument);
  if (blocks == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (!Usable(self)) return nullptr;
  kvb_pool_set_max_cached(As(self)->pool, blocks);
  Py_RETURN_NONE;
}

PyObject* Touch(PyObject* self, PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"blocks", "generations", nullptr};
  PyObject* ids;
  PyObject* of_when;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO:touch",
                                   const_cast<char**>(kNames), &ids,
                                   &of_when)) {
    return nullptr;
  }
  IntArray<int32_t> blocks;
  IntArray<uint32_t> generations;
  if (!blocks.Read(ids) || !generations.Read(of_when) || !Usable(self)) {
    return nullptr;
  }
  if (blocks.size() != generations.size()) {
    PyErr_SetString(PyExc_ValueError, "touch: a generation for each block");
    return nullptr;
  }
  return PyBool_FromLong(kvb_pool_touch(As(self)->pool, blocks.data(),
                                        generations.data(), blocks.size()));
}

PyObject* Generations(PyObject* self, PyObject* sequence) {
  IntArray<int32_t> blocks;
  IntArray<uint32_t> generations;
  if (!blocks.Read(sequence) ||
      !generations.Resize(static_cast<Py_ssize_t>(blocks.size())) ||
      !Usable(self)) {
    return nullptr;
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    generations.data()[i] = kvb_pool_generation(As(self)->pool, blocks.data()[i]);
  }
  return ToList(generations.data(), generations.size());
}

// `limit` of drain_removals and blocks_to_vacate; below 0: an exception is set.
long long LimitOf(PyObject* args, PyObject* keywords, const char* format) {
  static const char* kNames[] = {"limit", nullptr};
  long long limit = 4096;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, format,
                                   const_cast<char**>(kNames), &limit) ||
      !CheckCount(limit, "limit")) {
    return -1;
  }
  return limit;
}

PyObject* DrainRemovals(PyObject* self, PyObject* args, PyObject* keywords) {
  long long limit = LimitOf(args, keywords, "|L:drain_removals");
  if (limit < 0) return nullptr;
  Ref list(PyList_New(0));
  if (list == nullptr) return nullptr;
  kvb_removal removals[64];
  while (limit > 0) {
    // What is made below may run anything, through the collector.
    if (!Usable(self)) return nullptr;
    const size_t count = kvb_pool_drain_removals(
        As(self)->pool, removals,
        static_cast<size_t>(std::min<long long>(limit, 64)));
    if (count == 0) break;
    limit -= static_cast<long long>(count);
    for (size_t i = 0; i < count; ++i) {
      Ref pair(Py_BuildValue("(iI)", removals[i].block, removals[i].generation));
      if (pair == nullptr || PyList_Append(list.get(), pair.get()) != 0) {
        return nullptr;
      }
    }
  }
  return list.release();
}

PyObject* Available(PyObject* self, PyObject*) {
  if (!Usable(self)) return nullptr;
  return PyLong_FromSize_t(kvb_pool_available(As(self)->pool));
}

PyObject* Capacity(PyObject* self, PyObject*) {
  if (!Usable(self)) return nullptr;
  return PyLong_FromSize_t(kvb_pool_capacity(As(self)->pool));
}

PyObject* Reserve(PyObject* self, PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"count", "timeout_ms", nullptr};
  long long count, timeout;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "LL:reserve",
                                   const_cast<char**>(kNames), &count,
                                   &timeout) ||
      !CheckCount(count, "count") || !Usable(self)) {
    return nullptr;
  }
  int reserved;
  {
    Visit visit(*As(self)->state);
    WithoutGil without;
    reserved = kvb_pool_reserve(As(self)->pool, static_cast<size_t>(count),
                                timeout);
  }
  return PyBool_FromLong(reserved);
}

PyObject* SetBlocks(PyObject* self, PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"block_bytes", "max_blocks",
                                 "reserve_null_block", nullptr};
  long long bytes, most;
  int reserve;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "LLp:set_blocks",
                                   const_cast<char**>(kNames), &bytes, &most,
                                   &reserve) ||
      !CheckCount(most, "max_blocks") || !Usable(self)) {
    return nullptr;
  }
  if (bytes <= 0) {
    return PyErr_Format(PyExc_ValueError,
                        "block_bytes must be above 0; got %lld", bytes);
  }
  char* error = nullptr;
  const kvb_code code =
      kvb_pool_set_blocks(As(self)->pool, static_cast<uint64_t>(bytes),
                          static_cast<uint32_t>(most), reserve, &error);
  if (code != KVB_OK) return RaiseAndFree(code, error);
  Py_RETURN_NONE;
}

PyObject* Trim(PyObject* self, PyObject*) {
  if (!Usable(self)) return nullptr;
  uint64_t pages;
  {
    Visit visit(*As(self)->state);
    WithoutGil without;
    pages = kvb_pool_trim(As(self)->pool);
  }
  return PyLong_FromUnsignedLongLong(pages);
}

PyObject* UsedBlocks(PyObject* self, PyObject*) {
  if (!Usable(self)) return nullptr;
  IntArray<int32_t> blocks;
  size_t count = kvb_pool_used_blocks(As(self)->pool, nullptr, 0);
  // More may be in use by now.
  while (true) {
    if (!blocks.Resize(static_cast<Py_ssize_t>(count))) return nullptr;
    count = kvb_pool_used_blocks(As(self)->pool, blocks.data(), blocks.size());
    if (count <= blocks.size()) return ToList(blocks.data(), count);
  }
}

PyObject* PageUsed(PyObject* self, PyObject* argument) {
  const long long page = PyLong_AsLongLong(argument);
  if (page == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (!CheckCount(page, "page") || !Usable(self)) return nullptr;
  return PyLong_FromSize_t(
      kvb_pool_page_used(As(self)->pool, static_cast<uint32_t>(page)));
}

PyObject* State(PyObject* self, PyObject* argument) {
  const long long block = PyLong_AsLongLong(argument);
  if (block == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (!Usable(self)) return nullptr;
  const bool fits = block >= 0 && block <= INT32_MAX;
  return PyLong_FromLong(
      fits ? kvb_pool_block_state(As(self)->pool, static_cast<int32_t>(block))
           : KVB_BLOCK_UNBACKED);
}

PyObject* StepBegin(PyObject* self, PyObject*) {
  if (!Usable(self)) return nullptr;
  kvb_pool_step_begin(As(self)->pool);
  Py_RETURN_NONE;
}

using TellStep = void(kvb_pool*, uint64_t) noexcept;

PyObject* Tell(PyObject* self, PyObject* argument, TellStep* tell) {
  const unsigned long long step = PyLong_AsUnsignedLongLong(argument);
  if (step == static_cast<unsigned long long>(-1) &&
      PyErr_Occurred() != nullptr) {
    return nullptr;
  }
  if (!Usable(self)) return nullptr;
  tell(As(self)->pool, step);
  Py_RETURN_NONE;
}

PyObject* StepEnd(PyObject* self, PyObject* step) {
  return Tell(self, step, kvb_pool_step_end);
}

PyObject* StepDone(PyObject* self, PyObject* step) {
  return Tell(self, step, kvb_pool_step_done);
}

PyObject* PagesToVacate(PyObject* self, PyObject*) {
  if (!Usable(self)) return nullptr;
  return PyLong_FromUnsignedLongLong(kvb_pool_pages_to_vacate(As(self)->pool));
}

PyObject* BlocksToVacate(PyObject* self, PyObject* args, PyObject* keywords) {
  const long long limit = LimitOf(args, keywords, "|L:blocks_to_vacate");
  if (limit < 0 || !Usable(self)) return nullptr;
  IntArray<int32_t> blocks;
  if (!blocks.Resize(static_cast<Py_ssize_t>(std::min<size_t>(
          static_cast<size_t>(limit), kvb_pool_block_ids(As(self)->pool))))) {
    return nullptr;
  }
  return ToList(blocks.data(),
                kvb_pool_blocks_to_vacate(As(self)->pool, blocks.data(),
                                          blocks.size()));
}

PyObject* Usage(PyObject* self, PyObject*) {
  if (!Usable(self)) return nullptr;
  kvb_usage usage = {};
  usage.size = sizeof(usage);
  kvb_pool_usage(As(self)->pool, &usage);
  return Py_BuildValue(
      "(KKKKK)", static_cast<unsigned long long>(usage.in_use_bytes),
      static_cast<unsigned long long>(usage.cached_bytes),
      static_cast<unsigned long long>(usage.idle_bytes),
      static_cast<unsigned long long>(usage.arriving_bytes),
      static_cast<unsigned long long>(usage.waiting_bytes));
}

using TellStream = void(kvb_pool*, void*) noexcept;

PyObject* TellOf(PyObject* self, PyObject* argument, TellStream* tell) {
  void* stream = PyLong_AsVoidPtr(argument);  // -1 becomes KVB_ALL_STREAMS
  if (stream == nullptr && PyErr_Occurred() != nullptr) return nullptr;
  if (!Usable(self)) return nullptr;
  tell(As(self)->pool, stream);
  Py_RETURN_NONE;
}

PyObject* AddStream(PyObject* self, PyObject* stream) {
  return TellOf(self, stream, kvb_pool_add_stream);
}

PyObject* RemoveStream(PyObject* self, PyObject* stream) {
  return TellOf(self, stream, kvb_pool_remove_stream);
}

size_t CountRegions(kvb_pool* pool) {
  size_t regions = 1;
  while (kvb_pool_region(pool, regions) != nullptr) ++regions;
  return regions;
}

PyObject* Regions(PyObject* self, void*) {
  if (!Usable(self)) return nullptr;
  return PyLong_FromSize_t(CountRegions(As(self)->pool));
}

PyObject* RegionBytes(PyObject* self, void*) {
  if (!Usable(self)) return nullptr;
  return PyLong_FromUnsignedLongLong(kvb_pool_region_bytes(As(self)->pool));
}

PyObject* Address(PyObject* self, void*) {
  if (!Usable(self)) return nullptr;
  return PyLong_FromVoidPtr(kvb_pool_region(As(self)->pool, 0));
}

PyObject* Dlpack(PyObject* self, PyObject* args, PyObject* keywords) {
  static const char* kNames[] = {"offset", "nbytes", nullptr};
  long long offset, bytes;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "LL:dlpack",
                                   const_cast<char**>(kNames), &offset,
                                   &bytes) ||
      !Usable(self)) {
    return nullptr;
  }
  kvb_pool* const pool = As(self)->pool;
  const long long range = static_cast<long long>(kvb_pool_region_bytes(pool)) *
                          static_cast<long long>(CountRegions(pool));
  if (offset < 0 || bytes < 0 || offset > range || bytes > range - offset) {
    return PyErr_Format(PyExc_ValueError,
                        "dlpack: %lld bytes at %lld are not within the pool's "
                        "range of %lld bytes",
                        bytes, offset, range);
  }
  char* const start = static_cast<char*>(kvb_pool_region(pool, 0));
  return MakeCapsule(start + offset, bytes,
                     kvb_session_device(As(self)->state->session),
                     kvb_pool_retain_range(pool));
}

}  // namespace

PyObject* MakePoolType() {
  static PyMethodDef methods[] = {
      {"alloc", WithKeywords(Alloc), METH_VARARGS | METH_KEYWORDS,
       "alloc(count, urgency=RUNNING): exactly count block ids, or None"},
      {"alloc_at", WithKeywords(AllocAt), METH_VARARGS | METH_KEYWORDS,
       "alloc_at(blocks, timeout_ms): exactly these blocks"},
      {"free", Free, METH_O, "free(blocks)"},
      {"cache", Cache, METH_O, "cache(blocks): free them, keeping contents"},
      {"set_max_cached", SetMaxCached, METH_O,
       "set_max_cached(blocks): -1 for no limit"},
      {"touch", WithKeywords(Touch), METH_VARARGS | METH_KEYWORDS,
       "touch(blocks, generations): in use again, if nothing was lost"},
      {"generations", Generations, METH_O, "generations(blocks)"},
      {"drain_removals", WithKeywords(DrainRemovals),
       METH_VARARGS | METH_KEYWORDS, "drain_removals(limit=4096)"},
      {"available", Available, METH_NOARGS, "blocks that alloc would get now"},
      {"capacity", Capacity, METH_NOARGS, "the most blocks there can be"},
      {"reserve", WithKeywords(Reserve), METH_VARARGS | METH_KEYWORDS,
       "reserve(count, timeout_ms)"},
      {"set_blocks", WithKeywords(SetBlocks), METH_VARARGS | METH_KEYWORDS,
       "set_blocks(block_bytes, max_blocks, reserve_null_block)"},
      {"trim", Trim, METH_NOARGS, "returns idle pages; how many"},
      {"used_blocks", UsedBlocks, METH_NOARGS, "ids of blocks in use"},
      {"page_used", PageUsed, METH_O, "page_used(page): blocks in use there"},
      {"state", State, METH_O, "state(block)"},
      {"step_begin", StepBegin, METH_NOARGS, "a scheduling step begins"},
      {"step_end", StepEnd, METH_O, "step_end(scheduled_step)"},
      {"step_done", StepDone, METH_O, "step_done(completed_step)"},
      {"pages_to_vacate", PagesToVacate, METH_NOARGS,
       "pages whose requests shall be preempted"},
      {"blocks_to_vacate", WithKeywords(BlocksToVacate),
       METH_VARARGS | METH_KEYWORDS, "blocks_to_vacate(limit=4096)"},
      {"usage", Usage, METH_NOARGS,
       "bytes: in use, cached, idle, arriving, wished for"},
      {"add_stream", AddStream, METH_O, "add_stream(stream)"},
      {"remove_stream", RemoveStream, METH_O, "remove_stream(stream)"},
      {"dlpack", WithKeywords(Dlpack), METH_VARARGS | METH_KEYWORDS,
       "dlpack(offset, nbytes): a DLPack capsule of uint8"},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef properties[] = {
      {"regions", Regions, nullptr, "handles of a page", nullptr},
      {"region_bytes", RegionBytes, nullptr, "of one region", nullptr},
      {"address", Address, nullptr, "of the range's first byte", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(RefuseNew)},
      {Py_tp_dealloc, reinterpret_cast<void*>(Dealloc)},
      {Py_tp_methods, methods},
      {Py_tp_getset, properties},
      {Py_tp_doc, const_cast<char*>("One KV pool of a Session.")},
      {0, nullptr}};
  static PyType_Spec spec = {"kvcached._C.Pool", sizeof(PoolObject), 0,
                             Py_TPFLAGS_DEFAULT, slots};
  pool_type = PyType_FromSpec(&spec);
  return pool_type;
}

PyObject* NewPool(PyObject* session, kvb_pool* pool) {
  PyTypeObject* type = reinterpret_cast<PyTypeObject*>(pool_type);
  auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* made = alloc(type, 0);
  if (made == nullptr) return nullptr;
  Py_INCREF(session);
  As(made)->session = session;
  As(made)->state = StateOf(session);
  As(made)->pool = pool;
  return made;
}

}  // namespace kvbroker::python
