// A part of a pool's range as a DLPack tensor. The structs are those of DLPack's
// first ABI, which every consumer since torch 1.10 and numpy 1.23 reads.
#include <new>

#include "engine_patches/native/python.h"

namespace kvbroker::python {
namespace {

constexpr char kCapsuleName[] = "dltensor";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
constexpr uint8_t kUnsignedInteger = 1;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType type;
  int64_t* shape;
  int64_t* strides;  // null: dense
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

// A tensor and what it points to.
struct Owned {
  ManagedTensor managed;
  int64_t shape[1];
  kvb_range* range;
};

// By the consumer, on any thread, with or without the GIL.
void Delete(ManagedTensor* managed) {
  Owned* owned = static_cast<Owned*>(managed->context);
  kvb_range_release(owned->range);
  delete owned;
}

// A consumer renames the capsule when it takes the tensor over.
void DeleteIfNobodyTookIt(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kCapsuleName)) return;
  auto* managed = static_cast<ManagedTensor*>(
      PyCapsule_GetPointer(capsule, kCapsuleName));
  managed->deleter(managed);
}

}  // namespace

PyObject* MakeCapsule(void* address, int64_t bytes, int device,
                      kvb_range* range) {
  auto* owned = new (std::nothrow) Owned{};
  if (owned == nullptr) {
    kvb_range_release(range);
    return PyErr_NoMemory();
  }
  owned->range = range;
  owned->shape[0] = bytes;
  owned->managed.context = owned;
  owned->managed.deleter = Delete;
  Tensor& tensor = owned->managed.tensor;
  tensor.data = address;
  tensor.device = device < 0 ? Device{kCpu, 0} : Device{kCuda, device};
  tensor.dimensions = 1;
  tensor.type = {kUnsignedInteger, 8, 1};
  tensor.shape = owned->shape;
  PyObject* capsule =
      PyCapsule_New(&owned->managed, kCapsuleName, DeleteIfNobodyTookIt);
  if (capsule == nullptr) Delete(&owned->managed);
  return capsule;
}

}  // namespace kvbroker::python
