#include "client/arena/host_mapper.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>

#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

PoolGeometry Contiguous() {
  return {.handle_bytes = KiB(8), .handles_per_page = 1, .max_pages = 16};
}

PoolGeometry PerLayer() {
  return {.handle_bytes = KiB(4),
          .handles_per_page = 3,
          .layout = Layout::kPerLayer,
          .max_pages = 16};
}

UniqueFd MakeHandle(Bytes size) {
  UniqueFd fd(memfd_create("test", MFD_CLOEXEC));
  EXPECT_EQ(ftruncate(fd.get(), size.count()), 0);
  return fd;
}

std::vector<UniqueFd> MakePage(const PoolGeometry& geometry) {
  std::vector<UniqueFd> handles;
  for (uint32_t i = 0; i < geometry.handles_per_page; ++i) {
    handles.push_back(MakeHandle(geometry.handle_bytes));
  }
  return handles;
}

TEST(HostMapperTest, MapsAPageWhereTheLayoutPutsIt) {
  for (const PoolGeometry& geometry : {Contiguous(), PerLayer()}) {
    auto mapper = HostMapper::Create(geometry);
    ASSERT_TRUE(mapper.ok()) << mapper.status();
    std::vector<UniqueFd> handles = MakePage(geometry);
    std::vector<UniqueFd> mine;
    for (UniqueFd& handle : handles) mine.push_back(*handle.Duplicate());
    ASSERT_TRUE((*mapper)->Map(PageIndex(5), std::move(handles)).ok());
    const size_t bytes = static_cast<size_t>(geometry.handle_bytes.count());
    for (size_t h = 0; h < geometry.handles_per_page; ++h) {
      std::memset((*mapper)->region(h) + 5 * bytes, 'a' + h, bytes);
      char seen = 0;
      ASSERT_EQ(pread(mine[h].get(), &seen, 1, bytes - 1), 1);
      EXPECT_EQ(seen, static_cast<char>('a' + h));
    }
    EXPECT_TRUE((*mapper)->Unmap(PageIndex(5)).ok());
  }
}

TEST(HostMapperDeathTest, AnUnmappedPageFaults) {
  auto mapper = *HostMapper::Create(Contiguous());
  volatile std::byte* at = mapper->region(0) + 2 * KiB(8).count();
  EXPECT_DEATH(static_cast<void>(*at), "");
  ASSERT_TRUE(mapper->Map(PageIndex(2), MakePage(Contiguous())).ok());
  EXPECT_TRUE(*at == std::byte{0});
  ASSERT_TRUE(mapper->Unmap(PageIndex(2)).ok());
  EXPECT_DEATH(static_cast<void>(*at), "");
}

TEST(HostMapperTest, AddressesThatAreKeptAreNobodysOnceTheMapperIsGone) {
  auto mapper = *HostMapper::Create(Contiguous());
  ASSERT_TRUE(mapper->Map(PageIndex(2), MakePage(Contiguous())).ok());
  std::byte* const at = mapper->region(0) + 2 * KiB(8).count();
  *at = std::byte{7};
  std::shared_ptr<void> range = mapper->range();
  EXPECT_EQ(range.get(), mapper->region(0));
  mapper.reset();
  EXPECT_EQ(*at, std::byte{0});
  *at = std::byte{1};  // lost
  // Nobody else is put there.
  auto other = *HostMapper::Create(Contiguous());
  EXPECT_NE(other->region(0), range.get());
}

TEST(HostMapperTest, DoesNotUnmapUnderRunningWork) {
  auto mapper = *HostMapper::Create(Contiguous());
  ASSERT_TRUE(mapper->Map(PageIndex(0), MakePage(Contiguous())).ok());
  mapper->BeginWork(PageIndex(0));
  EXPECT_EQ(mapper->Unmap(PageIndex(0)).code(),
            absl::StatusCode::kFailedPrecondition);
  mapper->region(0)[0] = std::byte{7};
  mapper->EndWork(PageIndex(0));
  EXPECT_TRUE(mapper->Unmap(PageIndex(0)).ok());
}

TEST(HostMapperTest, MapsAllHandlesOfAPageOrNone) {
  auto mapper = *HostMapper::Create(PerLayer());
  std::vector<UniqueFd> handles = MakePage(PerLayer());
  handles[2] = MakeHandle(KiB(8));  // of the wrong size
  EXPECT_EQ(mapper->Map(PageIndex(1), std::move(handles)).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_DEATH(static_cast<void>(*static_cast<volatile std::byte*>(
                   mapper->region(0) + KiB(4).count())),
               "");
  handles = MakePage(PerLayer());
  handles.pop_back();
  EXPECT_EQ(mapper->Map(PageIndex(1), std::move(handles)).code(),
            absl::StatusCode::kInvalidArgument);
}

// Each page between unmapped ones is a mapping of its own, and beyond
// vm.max_map_count the kernel refuses even a mapping that replaces another.
TEST(HostMapperTest, PagesComeAndGoWhereTheProcessMayHaveNoMoreMappings) {
  const PoolGeometry geometry = {
      .handle_bytes = KiB(4), .handles_per_page = 2, .max_pages = 1 << 20};
  auto mapper = *HostMapper::Create(geometry);
  UniqueFd file = MakeHandle(KiB(4));
  const auto map = [&](uint32_t page) {
    std::vector<UniqueFd> handles;
    handles.push_back(*file.Duplicate());
    handles.push_back(*file.Duplicate());
    return mapper->Map(PageIndex(page), std::move(handles));
  };
  uint32_t mapped = 0;
  absl::Status status;
  while (status.ok()) {
    if (mapped == 500000) GTEST_SKIP() << "vm.max_map_count is very large here";
    status = map(2 * mapped);
    if (status.ok()) ++mapped;
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  // The heap may take what is left, too.
  std::vector<void*> others;
  for (int protection = PROT_READ;; protection ^= PROT_READ ^ PROT_NONE) {
    void* one = mmap(nullptr, 4096, protection,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (one == MAP_FAILED) break;
    others.push_back(one);
  }
  EXPECT_FALSE(map(2 * mapped + 2).ok());
  EXPECT_TRUE(mapper->Unmap(PageIndex(0)).ok());
  EXPECT_TRUE(mapper->Unmap(PageIndex(2)).ok());
  for (void* one : others) munmap(one, 4096);
  for (uint32_t page = 2; page < mapped; ++page) {
    EXPECT_TRUE(mapper->Unmap(PageIndex(2 * page)).ok());
  }
}

// --- Guard mode -------------------------------------------------------------

TEST(HostMapperGuardTest, NothingFaultsAndTheGuardIsNobodys) {
  auto mapper = *HostMapper::Create(Contiguous());
  ASSERT_EQ(mapper->Guard(), absl::OkStatus());
  const int64_t bytes = KiB(8).count();
  for (int page = 0; page < 16; ++page) {
    mapper->region(0)[page * bytes] = std::byte{9};
  }
  std::byte* at = mapper->region(0) + 3 * bytes;
  ASSERT_TRUE(mapper->Map(PageIndex(3), MakePage(Contiguous())).ok());
  EXPECT_EQ(*at, std::byte{0}) << "the page, not the guard";
  *at = std::byte{7};
  mapper->region(0)[4 * bytes] = std::byte{8};
  EXPECT_EQ(*at, std::byte{7}) << "stray writes miss it";
  ASSERT_TRUE(mapper->Unmap(PageIndex(3)).ok());
  EXPECT_EQ(*at, std::byte{8}) << "the guard again";
}

TEST(HostMapperGuardTest, AMapThatFailsPutsItBack) {
  auto mapper = *HostMapper::Create(Contiguous());
  ASSERT_EQ(mapper->Guard(), absl::OkStatus());
  std::vector<UniqueFd> wrong;
  wrong.push_back(MakeHandle(KiB(4)));
  EXPECT_FALSE(mapper->Map(PageIndex(3), std::move(wrong)).ok());
  mapper->region(0)[3 * KiB(8).count()] = std::byte{1};
  ASSERT_TRUE(mapper->Map(PageIndex(3), MakePage(Contiguous())).ok());
}

TEST(HostMapperGuardTest, APerLayerPoolIsRefused) {
  auto mapper = *HostMapper::Create(PerLayer());
  absl::Status refused = mapper->Guard();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(refused.message().find("contiguous layout"),
            absl::string_view::npos)
      << refused;
}

TEST(HostMapperGuardDeathTest, WithoutDescriptorsItBeginsNotAtAll) {
  auto mapper = *HostMapper::Create(Contiguous());
  rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit none = {.rlim_cur = 0, .rlim_max = limit.rlim_max};
  setrlimit(RLIMIT_NOFILE, &none);
  const absl::Status refused = mapper->Guard();
  setrlimit(RLIMIT_NOFILE, &limit);
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted) << refused;
  volatile std::byte* at = mapper->region(0);
  EXPECT_DEATH(static_cast<void>(*at), "");
  EXPECT_EQ(mapper->Guard(), absl::OkStatus());
}

}  // namespace
}  // namespace kvbroker::client
