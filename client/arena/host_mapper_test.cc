#include "client/arena/host_mapper.h"

#include <sys/mman.h>
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
                  mapper->region(0) + KiB(4).count())), "");
  handles = MakePage(PerLayer());
  handles.pop_back();
  EXPECT_EQ(mapper->Map(PageIndex(1), std::move(handles)).code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvbroker::client
