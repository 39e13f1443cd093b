// A shared object for LD_PRELOAD: makes chosen system calls of a whole program
// fail, or end the program, and writes down what it did.
//
//   LD_PRELOAD=libfault_injector.so KVB_FAULT=fallocate=ENOSPC/7 kvbrokerd ...
//
// KVB_FAULT, or KVB_FAULT_FILE (below), holds rules with commas between them:
//
//   CALL=ERROR        each call fails with that errno
//   CALL=ERROR/7      each 7th, counted for each rule
//   CALL=ERROR#3      only the 3rd
//   CALL=ERROR~0.05   each with that probability; KVB_FAULT_SEED makes chance
//                     repeatable
//
// ERROR is an errno's name, or
//   KILL   SIGKILL instead of the call
//   TRUNC  (recvmsg) what a process gets that has no descriptors left: the
//          message with its descriptors cut off
//
// CALL is a name of the table below, or `any`, which counts all of them
// together and only takes KILL. Calls count only where a failure is the
// program's to handle: those that its own code makes, which is told from those
// of its libraries by the return address, and of these the ones that the table
// names. `rpc_send` and `rpc_receive` are the exception: gRPC's own; they take
// nothing but KILL.
//
// KVB_FAULT_FILE names a file that is mapped at the start and looked at before
// each call: 8 bytes that change when the rules do, then the rules, then a zero
// byte. So rules come and go within one life of a program.
//
// KVB_FAULT_REPORT names a file that gets a line "PID CALL ERROR" for each
// fault, before it happens. KVB_FAULT_STATE is the folder whose files
// state_open, state_write, state_fsync and state_rename are about.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>

namespace {

enum Call {
  kMemfdCreate,
  kFallocate,    // that fills a memfd; a hole in one can always be made
  kSeal,         // F_ADD_SEALS
  kLease,        // F_SETLEASE
  kLeaseSignal,  // F_SETSIG
  kDuplicate,    // F_DUPFD_CLOEXEC
  kReopen,       // of N in /proc/self/fd
  kProcOpen,     // of anything else in /proc
  kStateOpen,
  kStateWrite,
  kStateFsync,
  kStateRename,
  kSendmsg,  // with SCM_RIGHTS
  kSend,     // on a SOCK_SEQPACKET
  kRecvmsg,  // on a SOCK_SEQPACKET
  kRecv,     // on a SOCK_SEQPACKET
  kConnect,  // of a SOCK_SEQPACKET
  kAccept,
  kMmap,     // MAP_SHARED of a memfd
  kReserve,  // mmap of PROT_NONE
  kMunmap,
  kEpollAdd,  // a change or removal of what was added cannot fail
  kEpollWait,
  kPidfdOpen,
  kPeerPidfd,  // SO_PEERPIDFD
  kEventfd,
  kTimerfd,
  kRpcSend,
  kRpcReceive,
  kCalls,
};

constexpr const char* kNames[kCalls] = {
    "memfd_create", "fallocate",    "seal",       "lease",       "lease_signal",
    "duplicate",    "reopen",       "proc_open",  "state_open",  "state_write",
    "state_fsync",  "state_rename", "sendmsg",    "send",        "recvmsg",
    "recv",         "connect",      "accept",     "mmap",        "reserve",
    "munmap",       "epoll_add",    "epoll_wait", "pidfd_open",  "peer_pidfd",
    "eventfd",      "timerfd",      "rpc_send",   "rpc_receive",
};

constexpr int kKill = -1;
constexpr int kTrunc = -2;
constexpr struct {
  const char* name;
  int number;
} kErrors[] = {
    {"KILL", kKill},
    {"TRUNC", kTrunc},
    {"EACCES", EACCES},
    {"EAGAIN", EAGAIN},
    {"EBUSY", EBUSY},
    {"ECONNABORTED", ECONNABORTED},
    {"ECONNREFUSED", ECONNREFUSED},
    {"ECONNRESET", ECONNRESET},
    {"EINTR", EINTR},
    {"EINVAL", EINVAL},
    {"EIO", EIO},
    {"EMFILE", EMFILE},
    {"ENFILE", ENFILE},
    {"ENOBUFS", ENOBUFS},
    {"ENOENT", ENOENT},
    {"ENOMEM", ENOMEM},
    {"ENOPROTOOPT", ENOPROTOOPT},
    {"ENOSPC", ENOSPC},
    {"ENOSYS", ENOSYS},
    {"EPERM", EPERM},
    {"EPIPE", EPIPE},
    {"EROFS", EROFS},
    {"ETOOMANYREFS", ETOOMANYREFS},
};

constexpr int kAny = kCalls;

struct Rule {
  int call = 0;
  int error = 0;
  const char* error_name = nullptr;
  char how = 0;  // 0, '/', '#' or '~'
  uint64_t number = 0;
  double share = 0;
  std::atomic<uint64_t> calls = 0;
};

constexpr size_t kMaxRules = 16;
struct Plan {
  Rule rules[kMaxRules];
  size_t count = 0;
  bool concerns[kCalls] = {};
  Plan* before = nullptr;  // so that leak checkers see them all
};

// Libraries call before any constructor of ours has run: all of this is good
// as zeros. A plan is never freed, since some thread may be reading it.
std::atomic<Plan*> plan;
std::atomic<uint64_t> plan_stamp;
pthread_mutex_t plan_mutex = PTHREAD_MUTEX_INITIALIZER;
const char* shared_rules;  // KVB_FAULT_FILE, mapped
int report_fd = -1;
uint64_t seed;
const char* state_folder;
uintptr_t program_begin, program_end;

constexpr size_t kSharedBytes = 4096;

// The function that ours stands before. Not a static constant, whose guard may
// call what we interpose.
template <typename Function>
Function* Next(Function*, const char* name, std::atomic<void*>& known) {
  void* next = known.load(std::memory_order_relaxed);
  if (next == nullptr) known = next = dlsym(RTLD_NEXT, name);
  return reinterpret_cast<Function*>(next);
}
#define NEXT(name)                        \
  static std::atomic<void*> known_##name; \
  const auto next = Next(&::name, #name, known_##name)

[[noreturn]] void Refuse(const char* rules) {
  fprintf(stderr, "fault_injector: cannot read the rules: %s\n", rules);
  _exit(99);
}

bool ParseRule(char* text, Rule& rule) {
  char* equals = strchr(text, '=');
  if (equals == nullptr) return false;
  *equals = 0;
  rule.call = -1;
  if (strcmp(text, "any") == 0) rule.call = kAny;
  for (int call = 0; call < kCalls; ++call) {
    if (strcmp(text, kNames[call]) == 0) rule.call = call;
  }
  char* error = equals + 1;
  if (char* how = strpbrk(error, "/#~"); how != nullptr) {
    rule.how = *how;
    *how = 0;
    char* end;
    if (rule.how == '~') {
      rule.share = strtod(how + 1, &end);
    } else {
      rule.number = strtoull(how + 1, &end, 10);
      if (rule.number == 0) return false;
    }
    if (end == how + 1 || *end != 0) return false;
  }
  for (const auto& known : kErrors) {
    if (strcmp(error, known.name) == 0) {
      rule.error = known.number;
      rule.error_name = known.name;
    }
  }
  const bool only_kill =
      rule.call == kAny || rule.call == kRpcSend || rule.call == kRpcReceive;
  return rule.call >= 0 && rule.error != 0 &&
         (!only_kill || rule.error == kKill) &&
         (rule.error != kTrunc || rule.call == kRecvmsg);
}

Plan* ParsePlan(const char* rules) {
  Plan* made = new Plan;
  char* copy = strdup(rules);
  char* rest = nullptr;
  for (char* text = strtok_r(copy, ",\n", &rest); text != nullptr;
       text = strtok_r(nullptr, ",\n", &rest)) {
    if (made->count == kMaxRules) Refuse(rules);
    Rule& rule = made->rules[made->count++];
    if (!ParseRule(text, rule)) Refuse(rules);
    for (int call = 0; call < kCalls; ++call) {
      if (rule.call == call || rule.call == kAny) made->concerns[call] = true;
    }
  }
  free(copy);
  return made;
}

__attribute__((constructor)) void Start() {
  const int saved = errno;
  // The first object is the program itself.
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        program_begin = UINTPTR_MAX;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr)& part = info->dlpi_phdr[i];
          if (part.p_type != PT_LOAD) continue;
          const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
          if (begin < program_begin) program_begin = begin;
          if (begin + part.p_memsz > program_end) {
            program_end = begin + part.p_memsz;
          }
        }
        return 1;
      },
      nullptr);
  state_folder = getenv("KVB_FAULT_STATE");
  if (const char* text = getenv("KVB_FAULT_SEED")) {
    seed = strtoull(text, nullptr, 10);
  }
  if (const char* path = getenv("KVB_FAULT_REPORT")) {
    report_fd = static_cast<int>(
        syscall(SYS_openat, AT_FDCWD, path,
                O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600));
  }
  if (const char* path = getenv("KVB_FAULT_FILE")) {
    const int fd = static_cast<int>(
        syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC));
    void* memory = reinterpret_cast<void*>(syscall(
        SYS_mmap, nullptr, kSharedBytes, PROT_READ, MAP_SHARED, fd, 0L));
    if (fd < 0 || memory == MAP_FAILED) Refuse(path);
    syscall(SYS_close, fd);
    shared_rules = static_cast<const char*>(memory);
  } else if (const char* rules = getenv("KVB_FAULT")) {
    plan = ParsePlan(rules);
  }
  errno = saved;
}

Plan* CurrentPlan() {
  if (shared_rules == nullptr) return plan.load();
  const uint64_t stamp = __atomic_load_n(
      reinterpret_cast<const uint64_t*>(shared_rules), __ATOMIC_ACQUIRE);
  if (stamp != plan_stamp.load()) {
    pthread_mutex_lock(&plan_mutex);
    if (stamp != plan_stamp.load()) {
      Plan* made = ParsePlan(shared_rules + sizeof(stamp));
      made->before = plan;
      plan = made;
      plan_stamp = stamp;
    }
    pthread_mutex_unlock(&plan_mutex);
  }
  return plan.load();
}

// Whether there is a rule that could touch such a call. Cheap: what follows it
// need not be.
bool Concerns(Call call) {
  const int saved = errno;
  Plan* const current = CurrentPlan();
  errno = saved;
  return current != nullptr && current->concerns[call];
}

bool FromProgram(void* return_address) {
  const auto at = reinterpret_cast<uintptr_t>(return_address);
  return at >= program_begin && at < program_end;
}

uint64_t Mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

bool Chosen(Rule& rule) {
  const uint64_t count = ++rule.calls;
  switch (rule.how) {
    case '/':
      return count % rule.number == 0;
    case '#':
      return count == rule.number;
    case '~':
      return Mixed(seed ^ Mixed(rule.call * 1000 + count)) * 0x1p-64 <
             rule.share;
  }
  return true;
}

// The error that this call is to end with; 0 where it is to go on. Does not
// return where the program is to end.
int Fault(Call call) {
  Plan* const current = CurrentPlan();
  int error = 0;
  for (size_t i = 0; i < current->count; ++i) {
    Rule& rule = current->rules[i];
    if (rule.call != call && rule.call != kAny) continue;
    if (!Chosen(rule) || error != 0) continue;
    error = rule.error;
    char line[96];
    const int size =
        snprintf(line, sizeof(line), "%d %s %s\n", static_cast<int>(getpid()),
                 kNames[call], rule.error_name);
    const int saved = errno;
    if (report_fd >= 0) syscall(SYS_write, report_fd, line, size);
    errno = saved;
    if (error == kKill) {
      syscall(SYS_kill, getpid(), SIGKILL);
      for (;;) pause();
    }
  }
  return error;
}

int TypeOf(int socket) {
  const int saved = errno;
  int type = 0;
  socklen_t size = sizeof(type);
  if (getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &size) != 0) type = 0;
  errno = saved;
  return type;
}

// What /proc says that the descriptor is of.
bool IsOf(int fd, const char* beginning) {
  const int saved = errno;
  char link[64], target[PATH_MAX];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, target, sizeof(target) - 1);
  errno = saved;
  if (size < 0) return false;
  target[size] = 0;
  return strncmp(target, beginning, strlen(beginning)) == 0;
}

bool IsMemfd(int fd) { return IsOf(fd, "/memfd:"); }
bool IsState(int fd) {
  return state_folder != nullptr && IsOf(fd, state_folder);
}

// Of a message that has been received: closes its descriptors.
void CutOff(msghdr* message) {
  for (cmsghdr* header = CMSG_FIRSTHDR(message); header != nullptr;
       header = CMSG_NXTHDR(message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      memcpy(&fd, CMSG_DATA(header) + i * sizeof(fd), sizeof(fd));
      close(fd);
    }
    message->msg_flags |= MSG_CTRUNC;
  }
  message->msg_controllen = 0;
}

int OpenCall(int at, const char* path) {
  static constexpr char kOwn[] = "/proc/self/fd/";
  if (strncmp(path, kOwn, strlen(kOwn)) == 0) return kReopen;
  if (strncmp(path, "/proc/", 6) == 0) return kProcOpen;
  if (path[0] == '/') {
    const bool state = state_folder != nullptr &&
                       strncmp(path, state_folder, strlen(state_folder)) == 0;
    return state ? kStateOpen : kCalls;
  }
  if (at == AT_FDCWD) return kCalls;
  if (IsOf(at, "/proc/")) return kReopen;
  return IsState(at) ? kStateOpen : kCalls;
}

bool OpenFails(int at, const char* path, void* caller) {
  if (!FromProgram(caller)) return false;
  if (!Concerns(kReopen) && !Concerns(kProcOpen) && !Concerns(kStateOpen)) {
    return false;
  }
  const int call = OpenCall(at, path);
  if (call == kCalls || !Concerns(static_cast<Call>(call))) return false;
  const int error = Fault(static_cast<Call>(call));
  if (error != 0) errno = error;
  return error != 0;
}

int FcntlCall(int command) {
  switch (command) {
    case F_ADD_SEALS:
      return kSeal;
    case F_SETLEASE:
      return kLease;
    case F_SETSIG:
      return kLeaseSignal;
    case F_DUPFD_CLOEXEC:
      return kDuplicate;
    default:
      return kCalls;
  }
}

}  // namespace

// Returns from the function with `result` where the call is chosen to fail.
#define MAYBE_FAIL(call, condition, result)                         \
  if (Concerns(call) && FromProgram(__builtin_return_address(0)) && \
      (condition)) {                                                \
    if (const int fault = Fault(call); fault != 0) {                \
      errno = fault;                                                \
      return result;                                                \
    }                                                               \
  }

#pragma GCC visibility push(default)
extern "C" {

int memfd_create(const char* name, unsigned flags) noexcept {
  NEXT(memfd_create);
  MAYBE_FAIL(kMemfdCreate, true, -1);
  return next(name, flags);
}

int fallocate(int fd, int mode, off_t offset, off_t size) {
  NEXT(fallocate);
  MAYBE_FAIL(kFallocate, mode == 0 && IsMemfd(fd), -1);
  return next(fd, mode, offset, size);
}

int fcntl(int fd, int command, ...) {
  NEXT(fcntl);
  va_list arguments;
  va_start(arguments, command);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  const int call = FcntlCall(command);
  if (call != kCalls) {
    MAYBE_FAIL(static_cast<Call>(call), true, -1);
  }
  return next(fd, command, argument);
}

int open(const char* path, int flags, ...) {
  NEXT(open);
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode =
      flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  if (OpenFails(AT_FDCWD, path, __builtin_return_address(0))) return -1;
  return next(path, flags, mode);
}

int openat(int at, const char* path, int flags, ...) {
  NEXT(openat);
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode =
      flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  if (OpenFails(at, path, __builtin_return_address(0))) return -1;
  return next(at, path, flags, mode);
}

ssize_t write(int fd, const void* bytes, size_t size) {
  NEXT(write);
  MAYBE_FAIL(kStateWrite, IsState(fd), -1);
  return next(fd, bytes, size);
}

int fsync(int fd) {
  NEXT(fsync);
  MAYBE_FAIL(kStateFsync, IsState(fd), -1);
  return next(fd);
}

int renameat(int from_at, const char* from, int to_at,
             const char* to) noexcept {
  NEXT(renameat);
  MAYBE_FAIL(kStateRename, IsState(from_at), -1);
  return next(from_at, from, to_at, to);
}

ssize_t sendmsg(int fd, const msghdr* message, int flags) {
  NEXT(sendmsg);
  if (Concerns(kRpcSend) && !FromProgram(__builtin_return_address(0)) &&
      TypeOf(fd) == SOCK_STREAM) {
    Fault(kRpcSend);
  }
  MAYBE_FAIL(kSendmsg, message->msg_controllen != 0, -1);
  return next(fd, message, flags);
}

ssize_t send(int fd, const void* bytes, size_t size, int flags) {
  NEXT(send);
  MAYBE_FAIL(kSend, TypeOf(fd) == SOCK_SEQPACKET, -1);
  return next(fd, bytes, size, flags);
}

ssize_t recvmsg(int fd, msghdr* message, int flags) {
  NEXT(recvmsg);
  if (Concerns(kRpcReceive) && !FromProgram(__builtin_return_address(0)) &&
      TypeOf(fd) == SOCK_STREAM) {
    Fault(kRpcReceive);
  }
  if (!Concerns(kRecvmsg) || !FromProgram(__builtin_return_address(0)) ||
      TypeOf(fd) != SOCK_SEQPACKET) {
    return next(fd, message, flags);
  }
  const int fault = Fault(kRecvmsg);
  if (fault > 0) {
    errno = fault;
    return -1;
  }
  const ssize_t size = next(fd, message, flags);
  if (fault == kTrunc && size > 0) CutOff(message);
  return size;
}

ssize_t recv(int fd, void* bytes, size_t size, int flags) {
  NEXT(recv);
  MAYBE_FAIL(kRecv, TypeOf(fd) == SOCK_SEQPACKET, -1);
  return next(fd, bytes, size, flags);
}

int connect(int fd, const sockaddr* address, socklen_t size) {
  NEXT(connect);
  MAYBE_FAIL(kConnect, TypeOf(fd) == SOCK_SEQPACKET, -1);
  return next(fd, address, size);
}

int accept4(int fd, sockaddr* address, socklen_t* size, int flags) {
  NEXT(accept4);
  MAYBE_FAIL(kAccept, true, -1);
  return next(fd, address, size, flags);
}

void* mmap(void* at, size_t size, int protection, int flags, int fd,
           off_t offset) noexcept {
  NEXT(mmap);
  MAYBE_FAIL(kMmap, (flags & MAP_SHARED) != 0 && IsMemfd(fd), MAP_FAILED);
  MAYBE_FAIL(kReserve, protection == PROT_NONE, MAP_FAILED);
  return next(at, size, protection, flags, fd, offset);
}

int munmap(void* at, size_t size) noexcept {
  NEXT(munmap);
  MAYBE_FAIL(kMunmap, true, -1);
  return next(at, size);
}

int epoll_ctl(int epoll, int operation, int fd, epoll_event* event) noexcept {
  NEXT(epoll_ctl);
  MAYBE_FAIL(kEpollAdd, operation == EPOLL_CTL_ADD, -1);
  return next(epoll, operation, fd, event);
}

int epoll_wait(int epoll, epoll_event* events, int room, int timeout) {
  NEXT(epoll_wait);
  MAYBE_FAIL(kEpollWait, true, -1);
  return next(epoll, events, room, timeout);
}

int eventfd(unsigned count, int flags) noexcept {
  NEXT(eventfd);
  MAYBE_FAIL(kEventfd, true, -1);
  return next(count, flags);
}

int timerfd_create(int clock, int flags) noexcept {
  NEXT(timerfd_create);
  MAYBE_FAIL(kTimerfd, true, -1);
  return next(clock, flags);
}

int getsockopt(int fd, int level, int name, void* value,
               socklen_t* size) noexcept {
  NEXT(getsockopt);
  constexpr int kSoPeerPidfd = 77;  // newer than the headers
  if (level == SOL_SOCKET && name == kSoPeerPidfd) {
    MAYBE_FAIL(kPeerPidfd, true, -1);
  }
  return next(fd, level, name, value, size);
}

long syscall(long number, ...) noexcept {
  NEXT(syscall);
  va_list arguments;
  va_start(arguments, number);
  long values[6];
  for (long& value : values) value = va_arg(arguments, long);
  va_end(arguments);
  if (number == SYS_pidfd_open) {
    MAYBE_FAIL(kPidfdOpen, true, -1);
  }
  return next(number, values[0], values[1], values[2], values[3], values[4],
              values[5]);
}

}  // extern "C"
#pragma GCC visibility pop
