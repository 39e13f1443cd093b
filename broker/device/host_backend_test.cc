#include "broker/device/host_backend.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "broker/device/backend_conformance.h"
#include "broker/device/host_import.h"
#include "broker/device/host_memory.h"
#include "gtest/gtest.h"

namespace kvbroker {
namespace {

std::unique_ptr<HostBackend> MustMake(HostBackendOptions options) {
  absl::StatusOr<std::unique_ptr<HostBackend>> backend =
      HostBackend::Create(std::move(options));
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

class HostHarness : public BackendHarness {
 public:
  explicit HostHarness(Bytes handle_size) : handle_size_(handle_size) {}

  Backend& backend() override { return *backend_; }
  Bytes handle_size() const override { return handle_size_; }
  absl::StatusOr<std::unique_ptr<ImportedHandle>> Import(int fd,
                                                         Bytes size) override {
    return HostImport::Create(fd, size);
  }

 private:
  const Bytes handle_size_;
  std::unique_ptr<HostBackend> backend_ =
      MustMake({.total = handle_size_ * 8 + KiB(16)});
};

INSTANTIATE_TEST_SUITE_P(
    Host, BackendConformanceTest,
    testing::Values(
        ConformanceParam{"page",
                         [] { return std::make_unique<HostHarness>(KiB(4)); }},
        ConformanceParam{"large",
                         [] { return std::make_unique<HostHarness>(MiB(2)); }}),
    ConformanceParamName);

// --- What the device is -----------------------------------------------------

TEST(HostBackendTest, DefaultsToHalfTheMachineAndTheBootsName) {
  auto backend = MustMake({});
  absl::StatusOr<HostMemory> machine = ReadHostMemory();
  ASSERT_TRUE(machine.ok()) << machine.status();
  EXPECT_EQ(backend->info().name, "host");
  EXPECT_EQ(backend->info().total, Bytes(machine->total.count() / 2));
  EXPECT_EQ(backend->info().granularity, Bytes(sysconf(_SC_PAGESIZE)));
  const std::string uuid = backend->info().device_uuid;
  EXPECT_EQ(uuid.size(), 13);
  EXPECT_EQ(uuid.substr(0, 5), "HOST-");
  EXPECT_EQ(uuid.find_first_not_of("0123456789abcdef", 5), std::string::npos);
  EXPECT_EQ(MustMake({})->info().device_uuid, uuid);
}

TEST(HostBackendTest, OptionsNameTheDevice) {
  auto backend = MustMake({.total = MiB(3), .device_uuid = "HOST-second"});
  EXPECT_EQ(backend->info().total, MiB(3));
  EXPECT_EQ(backend->info().device_uuid, "HOST-second");
}

TEST(HostBackendTest, RefusesATotalThatNoDeviceHas) {
  for (Bytes total : {Bytes(0), Bytes(-1), Bytes(4095), kMaxBytes + Bytes(1)}) {
    auto backend = HostBackend::Create(HostBackendOptions{.total = total});
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  }
}

// --- What an importer gets
// ----------------------------------------------------

TEST(HostBackendTest, ExportsAFileWithAllItsPagesAndASealedSize) {
  auto backend = MustMake({.total = MiB(4)});
  absl::StatusOr<Handle> handle = backend->Create(MiB(1));
  ASSERT_TRUE(handle.ok()) << handle.status();
  absl::StatusOr<UniqueFd> fd = backend->Export(*handle);
  ASSERT_TRUE(fd.ok()) << fd.status();
  struct stat file;
  ASSERT_EQ(fstat(fd->get(), &file), 0);
  EXPECT_EQ(file.st_size, MiB(1).count());
  EXPECT_EQ(file.st_blocks * 512, MiB(1).count());
  EXPECT_EQ(fcntl(fd->get(), F_GET_SEALS),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_NE(fcntl(fd->get(), F_ADD_SEALS, F_SEAL_WRITE), 0);
}

// --- When memory is free
// -------------------------------------------------------

class HostBackendReferencesTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!backend_->sees_importers()) GTEST_SKIP() << "no leases on this kernel";
    absl::StatusOr<Handle> handle = backend_->Create(kSize);
    ASSERT_TRUE(handle.ok()) << handle.status();
    handle_ = *std::move(handle);
    absl::StatusOr<UniqueFd> fd = backend_->Export(handle_);
    ASSERT_TRUE(fd.ok()) << fd.status();
    fd_ = *std::move(fd);
  }

  Bytes Used() { return backend_->UsedBytes().value_or(Bytes(-1)); }

  static constexpr Bytes kSize = MiB(1);
  std::unique_ptr<HostBackend> backend_ = MustMake({.total = MiB(4)});
  Handle handle_;
  UniqueFd fd_;
};

TEST_F(HostBackendReferencesTest, AnUnreadMessageIsAReference) {
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets), 0);
  UniqueFd sender(sockets[0]);
  UniqueFd receiver(sockets[1]);
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  int fd = fd_.get();
  std::memcpy(CMSG_DATA(header), &fd, sizeof(fd));
  ASSERT_EQ(sendmsg(sender.get(), &message, 0), 1);

  fd_.Reset();
  handle_.Reset();
  EXPECT_EQ(Used(), kSize);
  sender.Reset();
  EXPECT_EQ(Used(), kSize);
  receiver.Reset();
  EXPECT_EQ(Used(), Bytes(0));
}

TEST_F(HostBackendReferencesTest, AnotherProcessIsAReferenceUntilItIsGone) {
  int gate[2];
  ASSERT_EQ(pipe2(gate, O_CLOEXEC), 0);
  UniqueFd hold(gate[1]);
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // Keeps its copies of all descriptors until the parent opens the gate.
    close(gate[1]);
    char byte;
    _exit(read(gate[0], &byte, 1) == 0 ? 0 : 1);
  }
  close(gate[0]);
  fd_.Reset();
  handle_.Reset();
  EXPECT_EQ(Used(), kSize);
  hold.Reset();
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(Used(), Bytes(0));
}

TEST_F(HostBackendReferencesTest, AMappingThatCannotWriteIsAReference) {
  void* address =
      mmap(nullptr, kSize.count(), PROT_READ, MAP_PRIVATE, fd_.get(), 0);
  ASSERT_NE(address, MAP_FAILED);
  fd_.Reset();
  handle_.Reset();
  EXPECT_EQ(Used(), kSize);
  // Part of it is as good as all of it.
  ASSERT_EQ(munmap(address, kSize.count() / 2), 0);
  EXPECT_EQ(Used(), kSize);
  ASSERT_EQ(munmap(static_cast<char*>(address) + kSize.count() / 2,
                   kSize.count() / 2),
            0);
  EXPECT_EQ(Used(), Bytes(0));
}

TEST_F(HostBackendReferencesTest, LeftoverReferencesAreGivenBackOneByOne) {
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(fd_));
  for (int i = 0; i < 3; ++i) {
    absl::StatusOr<Handle> handle = backend_->Create(kSize);
    ASSERT_TRUE(handle.ok()) << handle.status();
    absl::StatusOr<UniqueFd> fd = backend_->Export(*handle);
    ASSERT_TRUE(fd.ok()) << fd.status();
    fds.push_back(*std::move(fd));
  }
  handle_.Reset();
  EXPECT_EQ(Used(), kSize * 4);
  fds[2].Reset();
  EXPECT_EQ(Used(), kSize * 3);
  fds[0].Reset();
  fds[3].Reset();
  EXPECT_EQ(Used(), kSize);
  fds[1].Reset();
  EXPECT_EQ(Used(), Bytes(0));
}

// The memory itself, as the kernel counts it for the file; an O_PATH descriptor
// keeps the file to look at without being counted.
TEST_F(HostBackendReferencesTest, MemoryIsReallyGivenBack) {
  UniqueFd watch(open(absl::StrCat("/proc/self/fd/", fd_.get()).c_str(),
                      O_PATH | O_CLOEXEC));
  ASSERT_TRUE(watch);
  auto resident = [&] {
    struct stat file;
    return fstat(watch.get(), &file) == 0 ? Bytes(file.st_blocks * 512)
                                          : Bytes(-1);
  };
  absl::StatusOr<std::unique_ptr<ImportedHandle>> imported =
      HostImport::Create(fd_.get(), kSize);
  ASSERT_TRUE(imported.ok()) << imported.status();
  fd_.Reset();
  handle_.Reset();
  EXPECT_EQ(Used(), kSize);
  EXPECT_EQ(resident(), kSize) << "taken from a live importer";
  imported->reset();
  EXPECT_EQ(Used(), Bytes(0));
  EXPECT_EQ(resident(), Bytes(0));
}

// Another process that opens the file while we ask about it makes the kernel
// send us a signal, which must not end us.
TEST_F(HostBackendReferencesTest, SurvivesWhoeverOpensTheFileMeanwhile) {
  UniqueFd watch(open(absl::StrCat("/proc/self/fd/", fd_.get()).c_str(),
                      O_PATH | O_CLOEXEC));
  ASSERT_TRUE(watch);
  const std::string path = absl::StrCat("/proc/self/fd/", watch.get());
  std::atomic<bool> stop = false;
  std::thread opener([&] {
    while (!stop) UniqueFd(open(path.c_str(), O_RDWR | O_CLOEXEC));
  });
  fd_.Reset();
  handle_.Reset();
  while (Used() != Bytes(0)) {
  }
  stop = true;
  opener.join();
}

TEST_F(HostBackendReferencesTest, AnImportersLeaseDoesNotHoldUpAnExport) {
  signal(SIGIO, SIG_IGN);  // an open tells the lease's holder, that is us
  ASSERT_EQ(fcntl(fd_.get(), F_SETLEASE, F_WRLCK), 0);
  // Not after /proc/sys/fs/lease-break-time, 45 s, when the kernel ends it.
  EXPECT_EQ(backend_->Export(handle_).status().code(),
            absl::StatusCode::kUnavailable);
  fd_.Reset();
  EXPECT_TRUE(backend_->Export(handle_).ok());
  signal(SIGIO, SIG_DFL);
}

TEST(HostBackendTest, WithoutLeasesBytesAreTheCreatorsAlone) {
  auto backend = MustMake({.total = MiB(2), .watch_importers = false});
  EXPECT_FALSE(backend->sees_importers());
  absl::StatusOr<Handle> handle = backend->Create(MiB(2));
  ASSERT_TRUE(handle.ok()) << handle.status();
  absl::StatusOr<UniqueFd> fd = backend->Export(*handle);
  ASSERT_TRUE(fd.ok()) << fd.status();
  absl::StatusOr<std::unique_ptr<ImportedHandle>> imported =
      HostImport::Create(fd->get(), MiB(2));
  ASSERT_TRUE(imported.ok()) << imported.status();
  (*imported)->memory()[5] = 17;
  handle->Reset();
  EXPECT_EQ(*backend->UsedBytes(), Bytes(0));
  EXPECT_EQ((*imported)->memory()[5], 17);
}

// --- When there is none
// ---------------------------------------------------------

TEST(HostBackendTest, MoreThanTheMachineHasIsRefusedNotPromised) {
  auto backend = MustMake({.total = kMaxBytes});
  absl::StatusOr<HostMemory> machine = ReadHostMemory();
  ASSERT_TRUE(machine.ok()) << machine.status();
  absl::StatusOr<Handle> handle =
      backend->Create(GiB(CeilDivide(machine->total, GiB(1)) + 1));
  EXPECT_EQ(handle.status().code(), absl::StatusCode::kResourceExhausted)
      << handle.status();
  EXPECT_EQ(*backend->UsedBytes(), Bytes(0));
  EXPECT_TRUE(backend->Create(MiB(1)).ok()) << "the refusal left no mark";
}

TEST(HostBackendTest, KeepsTheMachineFromRunningDry) {
  auto backend = MustMake({.total = MiB(8), .keep_available = kMaxBytes});
  absl::StatusOr<Handle> handle = backend->Create(MiB(1));
  EXPECT_EQ(handle.status().code(), absl::StatusCode::kResourceExhausted)
      << handle.status();
  EXPECT_EQ(*backend->UsedBytes(), Bytes(0));
}

TEST(HostBackendTest, CreateWithoutDescriptorsHoldsNothing) {
  auto backend = MustMake({.total = MiB(8)});
  absl::StatusOr<Handle> handle;
  {
    NoMoreDescriptors none;
    handle = backend->Create(MiB(1));
  }
  EXPECT_EQ(handle.status().code(), absl::StatusCode::kResourceExhausted)
      << handle.status();
  EXPECT_EQ(*backend->UsedBytes(), Bytes(0));
}

TEST(HostBackendTest, FailsToStartWithoutDescriptors) {
  NoMoreDescriptors none;
  EXPECT_EQ(HostBackend::Create(HostBackendOptions{}).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace kvbroker
