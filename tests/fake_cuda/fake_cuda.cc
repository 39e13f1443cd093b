// A CUDA driver and an NVML without a GPU; control.h says what for.
//
// Each allocation is a file in a tmpfs folder that all processes of one fake
// machine share. References to it are what the kernel counts anyhow:
//   - a handle (made or imported) keeps one page of the file mapped,
//   - a descriptor is an open of the file for reading, so that an importer
//     cannot resize it; importing opens the file by its name again,
//   - cuMemMap maps the file over a part of the reserved range,
//   - cuMemAlloc maps it, and so does who opens it by its inter-process handle,
//     which is the file's name.
// The kernel grants a write lease on a file exactly if nobody else has it open
// or mapped. So whoever needs room or figures tries the lease on each file and
// deletes those that nobody uses: memory of processes that were killed comes
// back, whoever they were.
//
// It is stricter than a driver has to be: mapping, access and unmapping need a
// current context, and ranges must match to the byte.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "broker/device/cuda/cuda_abi.h"

// A driver may have been built without them.
#if FAKE_CUDA_VERSION >= 10020 && !defined(FAKE_CUDA_NO_VMM)
#define HAS_VMM 1
#else
#define HAS_VMM 0
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using namespace kvbroker::cuda;  // NOLINT: this file is the interface

constexpr int kMaxDevices = 8;
[[maybe_unused]] constexpr size_t kGranularity = size_t{2} << 20;
constexpr size_t kPage = 4096;
// What the real driver keeps of the device for itself; in NVML's v1 figures.
constexpr unsigned long long kReserve = 256ull << 20;

// The machine's books, shared by its processes.
struct Machine {
  pthread_mutex_t mutex;
  int ready;
  unsigned long long next_file;
  long long charged[kMaxDevices];  // may be too high until a sweep
  long long foreign[kMaxDevices];
  int lost;  // what calls answer that need the device; 0: it is there
};

struct Allocation {
  std::string path;
  int device;
  size_t size;
  void* reference;
  bool imported;
};

struct Mapping {
  size_t size;
  bool access;
};

// Memory that is mapped where it was allocated, or opened.
struct Plain {
  std::string path;
  size_t size;
};

struct Stream {
  unsigned long long begun = 0, ended = 0;
};

struct Event {
  CUstream stream = nullptr;
  unsigned long long upto = 0;
};

struct Failure {
  int after;  // so many calls from now; 1 is the next
  int result;
};

struct Fake {
  std::mutex mu;
  bool configured = false, initialized = false;
  int nvml_users = 0;
  std::string folder;
  pid_t folder_owner = 0;  // who removes it
  Machine* machine = nullptr;
  int devices = 1;
  unsigned long long total = 0;
  bool vmm = true, posix = true, rdma = true, mig = false;
  std::vector<int> visible;  // CUDA's index to the machine's

  std::map<std::string, std::vector<Failure>> failures;
  std::map<std::string, int> latencies;
  std::map<std::string, long long> calls;
  int poison = 0;

  unsigned long long next_handle = 1;
  std::map<unsigned long long, Allocation> handles;
  std::map<unsigned long long, size_t> reservations;
  std::map<unsigned long long, Mapping> mappings;
  int retained[kMaxDevices] = {};
  std::map<CUstream, Stream> streams;    // those with work, whoever made them
  std::set<CUstream> created_streams;
  int host_allocations = 0;
  std::map<unsigned int, unsigned long long> processes;  // of every device
  std::map<unsigned long long, Plain> plain;             // cuMemAlloc
  std::map<unsigned long long, Plain> opened;            // cuIpcOpenMemHandle
  std::map<Event*, Event> events;
  int waiting = 0;
  std::condition_variable work_ended, waiter_came;
};

Fake& fake() {
  static Fake* fake = new Fake;  // Outlives whoever still calls at exit.
  return *fake;
}

char contexts[kMaxDevices];
thread_local std::vector<CUcontext> current;

const char* Environment(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value != nullptr ? value : otherwise;
}

std::vector<std::string> Split(const std::string& text, char by) {
  std::vector<std::string> parts;
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find(by, at);
    if (end == std::string::npos) end = text.size();
    parts.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

CUuuid UuidOf(int device) {
  CUuuid uuid = {{0xfa, 0x6e, 0, 0, 0, 0, 0x40, 0, 0x80, 0}};
  uuid.bytes[15] = static_cast<unsigned char>(device);
  return uuid;
}

std::string UuidTextOf(int device) {
  char text[64];
  snprintf(text, sizeof(text), "GPU-fa6e0000-0000-4000-8000-%012x", device);
  return text;
}

void ReadVisible(Fake& f) {
  f.visible.clear();
  const char* wish = getenv("CUDA_VISIBLE_DEVICES");
  if (wish == nullptr) {
    for (int i = 0; i < f.devices; ++i) f.visible.push_back(i);
    return;
  }
  for (const std::string& name : Split(wish, ',')) {
    int found = -1;
    for (int i = 0; i < f.devices; ++i) {
      const bool is_uuid = name.rfind("GPU-", 0) == 0;
      if (is_uuid ? UuidTextOf(i).rfind(name, 0) == 0
                  : std::to_string(i) == name) {
        found = i;
      }
    }
    if (found < 0) return;  // What follows an unknown one is not seen.
    f.visible.push_back(found);
  }
}

void LeaveFolder(Fake& f) {
  if (f.machine != nullptr) munmap(f.machine, sizeof(Machine));
  f.machine = nullptr;
  if (f.folder_owner == getpid()) {
    if (DIR* dir = opendir(f.folder.c_str())) {
      while (dirent* entry = readdir(dir)) {
        if (entry->d_name[0] != '.') {
          unlink((f.folder + "/" + entry->d_name).c_str());
        }
      }
      closedir(dir);
    }
    rmdir(f.folder.c_str());
  }
  f.folder_owner = 0;
}

bool EnterFolder(Fake& f) {
  f.folder = Environment("KVBROKER_FAKE_CUDA_DIR", "");
  if (f.folder.empty()) {
    char own[] = "/dev/shm/kvb_fake_cuda_XXXXXX";
    if (mkdtemp(own) == nullptr) return false;
    f.folder = own;
    f.folder_owner = getpid();
  }
  const std::string path = f.folder + "/books";
  int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return false;
  fchmod(fd, 0666);
  flock(fd, LOCK_EX);
  bool ok = ftruncate(fd, sizeof(Machine)) == 0;
  void* at = ok ? mmap(nullptr, sizeof(Machine), PROT_READ | PROT_WRITE,
                       MAP_SHARED, fd, 0)
                : MAP_FAILED;
  if (at != MAP_FAILED) {
    f.machine = static_cast<Machine*>(at);
    if (!f.machine->ready) {
      pthread_mutexattr_t attributes;
      pthread_mutexattr_init(&attributes);
      pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
      pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
      pthread_mutex_init(&f.machine->mutex, &attributes);
      f.machine->ready = 1;
    }
  }
  flock(fd, LOCK_UN);  // The mapping would keep it.
  close(fd);
  return f.machine != nullptr;
}

bool Configure(Fake& f) {
  if (f.configured) return true;
  f.devices = atoi(Environment("KVBROKER_FAKE_CUDA_DEVICES", "1"));
  if (f.devices < 0 || f.devices > kMaxDevices) f.devices = kMaxDevices;
  f.total =
      strtoull(Environment("KVBROKER_FAKE_CUDA_TOTAL", "17179869184"), 0, 10);
  f.vmm = *Environment("KVBROKER_FAKE_CUDA_VMM",
                       FAKE_CUDA_VERSION >= 11050 ? "1" : "0") == '1';
  f.posix = *Environment("KVBROKER_FAKE_CUDA_POSIX", "1") == '1';
  f.rdma = *Environment("KVBROKER_FAKE_CUDA_RDMA", "1") == '1';
  f.mig = *Environment("KVBROKER_FAKE_CUDA_MIG", "0") == '1';
  ReadVisible(f);
  for (const std::string& item :
       Split(Environment("KVBROKER_FAKE_CUDA_FAIL", ""), ',')) {
    std::vector<std::string> parts = Split(item, ':');
    if (parts.size() != 3) continue;
    f.failures[parts[0]].push_back(
        {atoi(parts[1].c_str()), atoi(parts[2].c_str())});
  }
  for (const std::string& item :
       Split(Environment("KVBROKER_FAKE_CUDA_LATENCY", ""), ',')) {
    std::vector<std::string> parts = Split(item, ':');
    if (parts.size() == 2) f.latencies[parts[0]] = atoi(parts[1].c_str());
  }
  f.configured = EnterFolder(f);
  return f.configured;
}

// Holds the machine's books. A process that was killed with them leaves
// figures that the next sweep corrects.
class MachineLock {
 public:
  explicit MachineLock(Machine* machine) : machine_(machine) {
    if (pthread_mutex_lock(&machine->mutex) == EOWNERDEAD) {
      pthread_mutex_consistent(&machine->mutex);
    }
  }
  ~MachineLock() { pthread_mutex_unlock(&machine_->mutex); }

 private:
  Machine* machine_;
};

bool IsUnreferenced(const std::string& path) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  fcntl(fd, F_SETSIG, SIGURG);
  const bool unreferenced = fcntl(fd, F_SETLEASE, F_WRLCK) == 0;
  close(fd);
  return unreferenced;
}

// Deletes what nobody uses and counts the rest. REQUIRES: the machine's lock.
void Sweep(Fake& f) {
  long long charged[kMaxDevices] = {};
  DIR* dir = opendir(f.folder.c_str());
  if (dir == nullptr) return;  // Out of descriptors: figures stay as they are.
  while (dirent* entry = readdir(dir)) {
    int device = 0;
    if (sscanf(entry->d_name, "memory%d-", &device) != 1) continue;
    const std::string path = f.folder + "/" + entry->d_name;
    struct stat info;
    if (IsUnreferenced(path)) {
      unlink(path.c_str());
    } else if (stat(path.c_str(), &info) == 0) {
      charged[device] += info.st_size;
    }
  }
  closedir(dir);
  memcpy(f.machine->charged, charged, sizeof(charged));
}

// At the start of each call: counts it, makes it slow, and answers with the
// failure that was asked for.
int Enter(const char* call) {
  Fake& f = fake();
  int microseconds = 0;
  int result = 0;
  {
    std::lock_guard<std::mutex> lock(f.mu);
    if (!Configure(f)) return CUDA_ERROR_OPERATING_SYSTEM;
    ++f.calls[call];
    if (auto it = f.latencies.find(call); it != f.latencies.end()) {
      microseconds = it->second;
    }
    if (auto it = f.failures.find(call); it != f.failures.end()) {
      for (auto failure = it->second.begin(); failure != it->second.end();) {
        if (--failure->after == 0) {
          result = failure->result;
          failure = it->second.erase(failure);
        } else {
          ++failure;
        }
      }
    }
  }
  if (microseconds > 0) {
    timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000L};
    nanosleep(&time, nullptr);
  }
  return result;
}

enum class Needs { kInit, kContext };

int EnterCuda(const char* call, Needs needs = Needs::kInit) {
  if (int result = Enter(call)) return result;
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  if (!f.initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if (f.machine->lost != 0 && strncmp(call, "cuMem", 5) == 0 &&
      strcmp(call, "cuMemRelease") != 0) {
    return f.machine->lost;
  }
  if (needs == Needs::kContext) {
    if (f.poison != 0) return f.poison;
    if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  }
  return CUDA_SUCCESS;
}

#define ENTER(...)                                                    \
  if (int entered = EnterCuda(__func__ __VA_OPT__(, ) __VA_ARGS__)) { \
    return entered;                                                   \
  }                                                                   \
  Fake& f = fake();                                                   \
  std::unique_lock<std::mutex> lock(f.mu)

[[maybe_unused]] bool IsDevice(const Fake& f, int device) {
  return device >= 0 && device < static_cast<int>(f.visible.size());
}

[[maybe_unused]] bool IsStream(const Fake& f, CUstream stream) {
  return stream == nullptr || f.created_streams.contains(stream);
}

void* Address(unsigned long long address) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

// Whether the range lies within what is mapped with access.
bool IsAccessible(Fake& f, unsigned long long address, size_t size) {
  for (const auto* plain : {&f.plain, &f.opened}) {
    auto it = plain->upper_bound(address);
    if (it == plain->begin()) continue;
    --it;
    if (address - it->first <= it->second.size &&
        size <= it->second.size - (address - it->first)) {
      return true;
    }
  }
  while (size > 0) {
    auto it = f.mappings.upper_bound(address);
    if (it == f.mappings.begin()) return false;
    --it;
    const unsigned long long end = it->first + it->second.size;
    if (!it->second.access || address >= end) return false;
    const size_t step = size < end - address ? size : end - address;
    address += step;
    size -= step;
  }
  return true;
}

// Makes the file of an allocation and counts it: its path, or empty and the
// result. REQUIRES: the machine's lock.
std::string NewFile(Fake& f, int device, size_t size, int* result) {
  auto fits = [&] {
    return size <= f.total && f.machine->charged[device] +
                                      f.machine->foreign[device] +
                                      static_cast<long long>(size) <=
                                  static_cast<long long>(f.total);
  };
  if (!fits()) Sweep(f);
  *result = CUDA_ERROR_OUT_OF_MEMORY;
  if (!fits()) return "";
  *result = CUDA_ERROR_OPERATING_SYSTEM;
  const std::string path = f.folder + "/memory" + std::to_string(device) + "-" +
                           std::to_string(f.machine->next_file++);
  int fd = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) return "";
  fchmod(fd, 0666);
  const bool sized = ftruncate(fd, static_cast<off_t>(size)) == 0;
  close(fd);
  if (!sized) {
    unlink(path.c_str());
    return "";
  }
  f.machine->charged[device] += static_cast<long long>(size);
  *result = CUDA_SUCCESS;
  return path;
}

// Maps the file whole, to read and write. Null: cannot.
void* MapFile(const std::string& path, size_t size) {
  int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return at == MAP_FAILED ? nullptr : at;
}

// The machine's number of the device that the current context is of.
int CurrentDevice(const Fake& f) {
  return f.visible[static_cast<char*>(current.back()) - contexts];
}

#if HAS_VMM

// A reference to the file, as a handle has it. Null: no more can be made.
void* Refer(const char* path) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  void* at = mmap(nullptr, kPage, PROT_NONE, MAP_SHARED, fd, 0);
  close(fd);
  return at == MAP_FAILED ? nullptr : at;
}

// The mappings that tile [address, address + size), or none.
std::vector<std::map<unsigned long long, Mapping>::iterator> Tiles(
    Fake& f, unsigned long long address, size_t size) {
  std::vector<std::map<unsigned long long, Mapping>::iterator> tiles;
  unsigned long long at = address;
  while (at < address + size) {
    auto it = f.mappings.find(at);
    if (it == f.mappings.end()) return {};
    tiles.push_back(it);
    at += it->second.size;
  }
  if (at != address + size) tiles.clear();
  return tiles;
}

#endif

}  // namespace

// --- libcuda ---------------------------------------------------------------

EXPORTED CUresult cuInit(unsigned int flags) {
  if (int result = Enter("cuInit")) return result;
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (f.visible.empty()) return CUDA_ERROR_NO_DEVICE;
  f.initialized = true;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDriverGetVersion(int* version) {
  if (int result = Enter("cuDriverGetVersion")) return result;
  *version = FAKE_CUDA_VERSION;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetCount(int* count) {
  ENTER();
  *count = static_cast<int>(f.visible.size());
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGet(CUdevice* device, int index) {
  ENTER();
  if (!IsDevice(f, index)) return CUDA_ERROR_INVALID_DEVICE;
  *device = index;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  ENTER();
  if (!IsDevice(f, device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(name, size, "Fake GPU");
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  ENTER();
  if (!IsDevice(f, device)) return CUDA_ERROR_INVALID_DEVICE;
  *uuid = UuidOf(f.visible[device]);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  ENTER();
  if (!IsDevice(f, device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = f.total;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetAttribute(int* value, int attribute,
                                       CUdevice device) {
  ENTER();
  if (!IsDevice(f, device)) return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
    case kAttributeVmm:
      *value = f.vmm;
      return CUDA_SUCCESS;
    case kAttributePosixDescriptors:
      *value = f.vmm && f.posix;
      return CUDA_SUCCESS;
    case kAttributeRdmaWithVmm:
#if FAKE_CUDA_VERSION >= 11000
      *value = f.vmm && f.rdma;
      return CUDA_SUCCESS;
#endif
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

#if HAS_VMM

EXPORTED CUresult cuMemGetAllocationGranularity(size_t* granularity,
                                                const CUmemAllocationProp* prop,
                                                int option) {
  ENTER();
  if (!f.vmm) return CUDA_ERROR_NOT_SUPPORTED;
  if (!IsDevice(f, prop->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  *granularity = kGranularity;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                              const CUmemAllocationProp* prop,
                              unsigned long long flags) {
  ENTER();
  if (!f.vmm) return CUDA_ERROR_NOT_SUPPORTED;
  if (prop->type != kAllocationPinned || size == 0 ||
      size % kGranularity != 0 || flags != 0 ||
      prop->location.type != kLocationDevice ||
      prop->requestedHandleTypes != kHandlePosixDescriptor) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!IsDevice(f, prop->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  const int device = f.visible[prop->location.id];

  MachineLock machine(f.machine);
  int result;
  const std::string path = NewFile(f, device, size, &result);
  if (path.empty()) return result;
  void* reference = Refer(path.c_str());
  if (reference == nullptr) {
    unlink(path.c_str());
    f.machine->charged[device] -= static_cast<long long>(size);
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  *handle = f.next_handle++;
  f.handles[*handle] = {path, device, size, reference, false};
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  ENTER();
  auto it = f.handles.find(handle);
  if (it == f.handles.end()) return CUDA_ERROR_INVALID_VALUE;
  munmap(it->second.reference, kPage);
  f.handles.erase(it);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemExportToShareableHandle(
    void* shareable, CUmemGenericAllocationHandle handle, int type,
    unsigned long long flags) {
  ENTER();
  auto it = f.handles.find(handle);
  if (it == f.handles.end() || type != kHandlePosixDescriptor || flags != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (it->second.imported) return CUDA_ERROR_NOT_SUPPORTED;
  // Not close-on-exec: nobody promises that the driver's are.
  int fd = open(it->second.path.c_str(), O_RDONLY);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *static_cast<int*>(shareable) = fd;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemImportFromShareableHandle(
    CUmemGenericAllocationHandle* handle, void* shareable, int type) {
  ENTER();
  if (type != kHandlePosixDescriptor) return CUDA_ERROR_INVALID_VALUE;
  const int fd = static_cast<int>(reinterpret_cast<intptr_t>(shareable));
  char path[512] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const std::string memory = f.folder + "/memory";
  struct stat info;
  if (readlink(link.c_str(), path, sizeof(path) - 1) < 0 ||
      strncmp(path, memory.c_str(), memory.size()) != 0 ||
      fstat(fd, &info) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  void* reference = Refer(path);
  if (reference == nullptr) return CUDA_ERROR_OPERATING_SYSTEM;
  *handle = f.next_handle++;
  f.handles[*handle] = {path, atoi(path + memory.size()),
                        static_cast<size_t>(info.st_size), reference, true};
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size,
                                      size_t alignment, CUdeviceptr wish,
                                      unsigned long long flags) {
  ENTER();
  if (size == 0 || size % kGranularity != 0 || alignment > kGranularity ||
      flags != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (size > SIZE_MAX - kGranularity) return CUDA_ERROR_OUT_OF_MEMORY;
  void* at = mmap(nullptr, size + kGranularity, PROT_NONE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(at);
  const uintptr_t aligned = (begin + kGranularity - 1) & ~(kGranularity - 1);
  if (aligned > begin) munmap(at, aligned - begin);
  munmap(Address(aligned + size), begin + kGranularity - aligned);
  f.reservations[aligned] = size;
  *address = aligned;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  ENTER();
  auto it = f.reservations.find(address);
  auto mapped = f.mappings.lower_bound(address);
  if (it == f.reservations.end() || it->second != size ||
      (mapped != f.mappings.end() && mapped->first < address + size)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  munmap(Address(address), size);
  f.reservations.erase(it);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                           CUmemGenericAllocationHandle handle,
                           unsigned long long flags) {
  ENTER(Needs::kContext);
  auto it = f.handles.find(handle);
  auto range = f.reservations.upper_bound(address);
  if (it == f.handles.end() || range == f.reservations.begin() || flags != 0 ||
      address % kGranularity != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  --range;
  if (address + size > range->first + range->second) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  // Handles are mapped whole.
  if (offset != 0 || size < it->second.size) return CUDA_ERROR_NOT_SUPPORTED;
  if (size > it->second.size) return CUDA_ERROR_INVALID_VALUE;
  auto next = f.mappings.lower_bound(address);
  if (next != f.mappings.end() && next->first < address + size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (next != f.mappings.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second.size > address) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  int fd = open(it->second.path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  void* at =
      mmap(Address(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0);
  close(fd);
  if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  f.mappings[address] = {size, false};
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  ENTER(Needs::kContext);
  auto tiles = Tiles(f, address, size);
  if (tiles.empty()) return CUDA_ERROR_INVALID_VALUE;
  mmap(Address(address), size, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  for (auto tile : tiles) f.mappings.erase(tile);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemSetAccess(CUdeviceptr address, size_t size,
                                 const CUmemAccessDesc* access, size_t count) {
  ENTER(Needs::kContext);
  auto tiles = Tiles(f, address, size);
  if (tiles.empty() || count != 1 || access->flags != kAccessReadWrite ||
      access->location.type != kLocationDevice) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!IsDevice(f, access->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  if (mprotect(Address(address), size, PROT_READ | PROT_WRITE) != 0) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  for (auto tile : tiles) tile->second.access = true;
  return CUDA_SUCCESS;
}

#endif  // HAS_VMM

EXPORTED CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from,
                                  size_t size) {
  ENTER(Needs::kContext);
  if (!IsAccessible(f, to, size)) return CUDA_ERROR_INVALID_VALUE;
  memcpy(Address(to), from, size);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t size) {
  ENTER(Needs::kContext);
  if (!IsAccessible(f, from, size)) return CUDA_ERROR_INVALID_VALUE;
  memcpy(to, Address(from), size);
  return CUDA_SUCCESS;
}

// Streams have no order of their own here: a copy is done when it is queued.
EXPORTED CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from,
                                       size_t size, CUstream stream) {
  ENTER(Needs::kContext);
  if (!IsStream(f, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (!IsAccessible(f, to, size)) return CUDA_ERROR_INVALID_VALUE;
  memcpy(Address(to), from, size);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t size,
                                       CUstream stream) {
  ENTER(Needs::kContext);
  if (!IsStream(f, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (!IsAccessible(f, from, size)) return CUDA_ERROR_INVALID_VALUE;
  memcpy(to, Address(from), size);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
  ENTER(Needs::kContext);
  *stream = new char;
  f.created_streams.insert(*stream);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamSynchronize(CUstream stream) {
  ENTER(Needs::kContext);
  if (!IsStream(f, stream)) return CUDA_ERROR_INVALID_HANDLE;
  const unsigned long long upto = f.streams[stream].begun;
  f.work_ended.wait(lock, [&] {
    return f.poison != 0 || f.streams[stream].ended >= upto;
  });
  return f.poison;
}

EXPORTED CUresult cuStreamDestroy_v2(CUstream stream) {
  ENTER(Needs::kContext);
  if (f.created_streams.erase(stream) == 0) return CUDA_ERROR_INVALID_HANDLE;
  f.streams.erase(stream);
  delete static_cast<char*>(stream);
  return CUDA_SUCCESS;
}

// Likewise called when it is queued.
EXPORTED CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function,
                                   void* data) {
  {
    ENTER(Needs::kContext);
    if (!IsStream(f, stream)) return CUDA_ERROR_INVALID_HANDLE;
  }
  function(data);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t size) {
  ENTER(Needs::kContext);
  if (size == 0) return CUDA_ERROR_INVALID_VALUE;
  MachineLock machine(f.machine);
  int result;
  const std::string path = NewFile(f, CurrentDevice(f), size, &result);
  if (path.empty()) return result;
  void* at = MapFile(path, size);
  if (at == nullptr) {
    unlink(path.c_str());
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  *address = reinterpret_cast<uintptr_t>(at);
  f.plain[*address] = {path, size};
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemFree_v2(CUdeviceptr address) {
  ENTER(Needs::kContext);
  auto it = f.plain.find(address);
  if (it == f.plain.end()) return CUDA_ERROR_INVALID_VALUE;
  munmap(Address(address), it->second.size);
  f.plain.erase(it);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value,
                                  size_t count, CUstream stream) {
  ENTER(Needs::kContext);
  if (!IsStream(f, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (!IsAccessible(f, to, count)) return CUDA_ERROR_INVALID_VALUE;
  // To zero, the file gives its memory back instead.
  if (value != 0 || madvise(Address(to), count, MADV_REMOVE) != 0) {
    memset(Address(to), value, count);
  }
  return CUDA_SUCCESS;
}

#if FAKE_CUDA_VERSION >= 11000

namespace {

struct IpcHandle {
  char magic[8];
  unsigned long long size;
  char name[48];  // of the file
};
static_assert(sizeof(IpcHandle) == sizeof(CUipcMemHandle));
constexpr char kIpcMagic[8] = {'f', 'a', 'k', 'e', 'i', 'p', 'c', '1'};

}  // namespace

EXPORTED CUresult cuIpcGetMemHandle(CUipcMemHandle* handle,
                                    CUdeviceptr address) {
  ENTER(Needs::kContext);
  auto it = f.plain.find(address);
  if (it == f.plain.end()) return CUDA_ERROR_INVALID_VALUE;
  IpcHandle made = {};
  memcpy(made.magic, kIpcMagic, sizeof(made.magic));
  made.size = it->second.size;
  snprintf(made.name, sizeof(made.name), "%s",
           it->second.path.c_str() + f.folder.size() + 1);
  memcpy(handle, &made, sizeof(made));
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* address,
                                        CUipcMemHandle handle,
                                        unsigned int flags) {
  ENTER(Needs::kContext);
  IpcHandle wanted;
  memcpy(&wanted, &handle, sizeof(wanted));
  int device = 0;
  if (flags != kIpcLazyPeerAccess ||
      memcmp(wanted.magic, kIpcMagic, sizeof(wanted.magic)) != 0 ||
      wanted.name[sizeof(wanted.name) - 1] != 0 ||
      strchr(wanted.name, '/') != nullptr ||
      sscanf(wanted.name, "memory%d-", &device) != 1) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (device != CurrentDevice(f)) return CUDA_ERROR_INVALID_DEVICE;
  const std::string path = f.folder + "/" + wanted.name;
  // Not in the process that allocated it, and once in any other.
  for (const auto& [at, plain] : f.plain) {
    if (plain.path == path) return CUDA_ERROR_INVALID_CONTEXT;
  }
  for (const auto& [at, plain] : f.opened) {
    if (plain.path == path) return CUDA_ERROR_ALREADY_MAPPED;
  }
  void* at = MapFile(path, wanted.size);
  if (at == nullptr) return CUDA_ERROR_INVALID_HANDLE;  // it is gone
  *address = reinterpret_cast<uintptr_t>(at);
  f.opened[*address] = {path, wanted.size};
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
  ENTER(Needs::kContext);
  auto it = f.opened.find(address);
  if (it == f.opened.end()) return CUDA_ERROR_INVALID_VALUE;
  munmap(Address(address), it->second.size);
  f.opened.erase(it);
  return CUDA_SUCCESS;
}

#endif  // FAKE_CUDA_VERSION >= 11000

EXPORTED CUresult cuMemHostAlloc(void** memory, size_t size,
                                 unsigned int flags) {
  ENTER(Needs::kContext);
  *memory = malloc(size);
  if (*memory == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  ++f.host_allocations;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemFreeHost(void* memory) {
  ENTER(Needs::kContext);
  free(memory);
  --f.host_allocations;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* context,
                                           CUdevice device) {
  ENTER();
  if (!IsDevice(f, device)) return CUDA_ERROR_INVALID_DEVICE;
  ++f.retained[device];
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  ENTER();
  if (!IsDevice(f, device)) return CUDA_ERROR_INVALID_DEVICE;
  if (f.retained[device] == 0) return CUDA_ERROR_INVALID_CONTEXT;
  --f.retained[device];
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxPushCurrent_v2(CUcontext context) {
  ENTER();
  const ptrdiff_t device = static_cast<char*>(context) - contexts;
  if (device < 0 || device >= kMaxDevices || f.retained[device] == 0) {
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  current.push_back(context);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  ENTER();
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = current.back();
  current.pop_back();
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxSynchronize() {
  ENTER(Needs::kContext);
  std::map<CUstream, unsigned long long> upto;
  for (const auto& [stream, work] : f.streams) upto[stream] = work.begun;
  ++f.waiting;
  f.waiter_came.notify_all();
  f.work_ended.wait(lock, [&] {
    return f.poison != 0 ||
           std::all_of(upto.begin(), upto.end(), [&](const auto& awaited) {
             return f.streams[awaited.first].ended >= awaited.second;
           });
  });
  --f.waiting;
  return f.poison;
}

EXPORTED CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  thread_local int capture_mode = 0;
  std::swap(capture_mode, *mode);
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventCreate(CUevent* event, unsigned int flags) {
  ENTER(Needs::kContext);
  Event* made = new Event;
  f.events[made] = {};
  *event = made;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventRecord(CUevent event, CUstream stream) {
  ENTER(Needs::kContext);
  auto it = f.events.find(static_cast<Event*>(event));
  if (it == f.events.end()) return CUDA_ERROR_INVALID_HANDLE;
  it->second = {stream, f.streams[stream].begun};
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventSynchronize(CUevent event) {
  ENTER(Needs::kContext);
  auto it = f.events.find(static_cast<Event*>(event));
  if (it == f.events.end()) return CUDA_ERROR_INVALID_HANDLE;
  const Event awaited = it->second;
  ++f.waiting;
  f.waiter_came.notify_all();
  f.work_ended.wait(lock, [&] {
    return f.poison != 0 || f.streams[awaited.stream].ended >= awaited.upto;
  });
  --f.waiting;
  return f.poison;
}

EXPORTED CUresult cuEventDestroy_v2(CUevent event) {
  ENTER();
  auto it = f.events.find(static_cast<Event*>(event));
  if (it == f.events.end()) return CUDA_ERROR_INVALID_HANDLE;
  delete it->first;
  f.events.erase(it);
  return CUDA_SUCCESS;
}

// --- NVML ------------------------------------------------------------------

namespace {

// Numbers devices from 1, so that none is null.
int DeviceOf(const Fake& f, nvmlDevice_t device) {
  const intptr_t number = reinterpret_cast<intptr_t>(device);
  return number >= 1 && number <= f.devices ? static_cast<int>(number - 1) : -1;
}

unsigned long long UsedOf(Fake& f, int device) {
  MachineLock machine(f.machine);
  Sweep(f);
  return static_cast<unsigned long long>(f.machine->charged[device] +
                                         f.machine->foreign[device]);
}

#define ENTER_NVML()                                 \
  if (int entered = Enter(__func__)) return entered; \
  Fake& f = fake();                                  \
  std::lock_guard<std::mutex> lock(f.mu);            \
  if (f.nvml_users == 0) return 1; /* NVML_ERROR_UNINITIALIZED */ \
  if (f.machine->lost != 0) return NVML_ERROR_GPU_IS_LOST

}  // namespace

EXPORTED nvmlReturn_t nvmlInit_v2() {
  if (int result = Enter("nvmlInit_v2")) return result;
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  ++f.nvml_users;
  return NVML_SUCCESS;
}

EXPORTED nvmlReturn_t nvmlShutdown() {
  ENTER_NVML();
  --f.nvml_users;
  return NVML_SUCCESS;
}

EXPORTED nvmlReturn_t nvmlSystemGetDriverVersion(char* version,
                                                 unsigned int size) {
  ENTER_NVML();
  snprintf(version, size, "%s",
           FAKE_CUDA_VERSION >= 13000 ? "580.0.fake" : "470.0.fake");
  return NVML_SUCCESS;
}

EXPORTED nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid,
                                                nvmlDevice_t* device) {
  ENTER_NVML();
  for (int i = 0; i < f.devices; ++i) {
    if (UuidTextOf(i) == uuid) {
      *device = reinterpret_cast<nvmlDevice_t>(static_cast<intptr_t>(i + 1));
      return NVML_SUCCESS;
    }
  }
  return NVML_ERROR_NOT_FOUND;
}

EXPORTED nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device,
                                              nvmlMemory_t* memory) {
  ENTER_NVML();
  const int number = DeviceOf(f, device);
  if (number < 0) return NVML_ERROR_NOT_FOUND;
  memory->total = f.total + kReserve;
  memory->used = UsedOf(f, number) + kReserve;
  memory->free = memory->total - memory->used;
  return NVML_SUCCESS;
}

#if FAKE_CUDA_VERSION >= 11060
EXPORTED nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(
    nvmlDevice_t device, unsigned int* count, nvmlProcessInfo_t* processes) {
  ENTER_NVML();
  if (DeviceOf(f, device) < 0) return NVML_ERROR_NOT_FOUND;
  const unsigned int room = *count;
  *count = static_cast<unsigned int>(f.processes.size());
  if (room < *count) return NVML_ERROR_INSUFFICIENT_SIZE;
  for (auto& [pid, bytes] : f.processes) *processes++ = {pid, bytes, 0, 0};
  return NVML_SUCCESS;
}

EXPORTED nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device,
                                                 nvmlMemory_v2_t* memory) {
  ENTER_NVML();
  if (memory->version != kNvmlMemoryV2) return 2;  // INVALID_ARGUMENT
  const int number = DeviceOf(f, device);
  if (number < 0) return NVML_ERROR_NOT_FOUND;
  memory->total = f.total + kReserve;
  memory->reserved = kReserve;
  memory->used = UsedOf(f, number);
  memory->free = f.total - memory->used;
  return NVML_SUCCESS;
}
#endif

#if FAKE_CUDA_VERSION >= 11000
EXPORTED nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device,
                                           unsigned int* now,
                                           unsigned int* pending) {
  ENTER_NVML();
  if (DeviceOf(f, device) < 0) return NVML_ERROR_NOT_FOUND;
  *now = *pending = f.mig ? 1 : 0;
  return NVML_SUCCESS;
}
#endif

// --- The test's side -------------------------------------------------------

EXPORTED void fakeCudaReset() {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  for (auto& [address, size] : f.reservations) {
    munmap(reinterpret_cast<void*>(static_cast<uintptr_t>(address)), size);
  }
  for (auto& [handle, allocation] : f.handles) {
    munmap(allocation.reference, kPage);
  }
  for (auto& [event, state] : f.events) delete event;
  f.reservations.clear();
  f.mappings.clear();
  f.handles.clear();
  f.events.clear();
  f.streams.clear();
  for (CUstream stream : f.created_streams) delete static_cast<char*>(stream);
  f.created_streams.clear();
  f.host_allocations = 0;
  f.processes.clear();
  for (auto* plain : {&f.plain, &f.opened}) {
    for (auto& [address, memory] : *plain) {
      munmap(Address(address), memory.size);
    }
    plain->clear();
  }
  f.failures.clear();
  f.latencies.clear();
  f.calls.clear();
  f.poison = 0;
  f.initialized = f.configured = false;
  memset(f.retained, 0, sizeof(f.retained));
  current.clear();
  LeaveFolder(f);
}

EXPORTED void fakeCudaFail(const char* call, int nth, int result) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  if (Configure(f)) f.failures[call].push_back({nth, result});
}

EXPORTED void fakeCudaLatency(const char* call, int microseconds) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  if (Configure(f)) f.latencies[call] = microseconds;
}

EXPORTED void fakeCudaPoison(int result) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  f.poison = result;
  f.work_ended.notify_all();
}

EXPORTED void fakeCudaLose(int result) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  if (Configure(f)) f.machine->lost = result;
}

EXPORTED void fakeCudaSetForeign(int device, int64_t bytes) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  if (!Configure(f)) return;
  MachineLock machine(f.machine);
  f.machine->foreign[device] = bytes;
}

EXPORTED void fakeCudaSetProcess(unsigned int pid, int64_t bytes) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  f.processes[pid] = static_cast<unsigned long long>(bytes);
}

EXPORTED void fakeCudaBeginWork(void* stream) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  ++f.streams[stream].begun;
}

EXPORTED void fakeCudaEndWork(void* stream) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  ++f.streams[stream].ended;
  f.work_ended.notify_all();
}

EXPORTED void fakeCudaAwaitWaiter() {
  Fake& f = fake();
  std::unique_lock<std::mutex> lock(f.mu);
  f.waiter_came.wait(lock, [&] { return f.waiting > 0; });
}

EXPORTED int64_t fakeCudaCalls(const char* call) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  auto it = f.calls.find(call);
  return it == f.calls.end() ? 0 : it->second;
}

EXPORTED void fakeCudaBooks(int64_t* books) {
  Fake& f = fake();
  std::lock_guard<std::mutex> lock(f.mu);
  int64_t created = 0, contexts_retained = 0;
  for (auto& [handle, allocation] : f.handles) created += !allocation.imported;
  for (int count : f.retained) contexts_retained += count;
  const int64_t figures[] = {created,
                             static_cast<int64_t>(f.handles.size()) - created,
                             static_cast<int64_t>(f.reservations.size()),
                             static_cast<int64_t>(f.mappings.size()),
                             contexts_retained,
                             static_cast<int64_t>(current.size()),
                             static_cast<int64_t>(f.events.size()),
                             static_cast<int64_t>(f.created_streams.size()),
                             f.host_allocations,
                             static_cast<int64_t>(f.plain.size()),
                             static_cast<int64_t>(f.opened.size())};
  memcpy(books, figures, sizeof(figures));
}

namespace {
struct AtExit {
  ~AtExit() { LeaveFolder(fake()); }
} at_exit;
}  // namespace
