#include "client/replay/fresh_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "broker/device/cuda/cuda_backend.h"
#include "client/arena/cuda_mapper.h"
#include "client/arena/host_mapper.h"
#include "client/replay/pattern.h"
#include "gtest/gtest.h"
#include "tests/fake_cuda/control.h"

namespace kvbroker::replay {
namespace {

constexpr uint32_t kMine = 1001, kTheirs = 1002;

TEST(CountLinesTest, TellsWhoWroteEachLine) {
  std::vector<std::byte> memory(8 * kPatternLineBytes);
  const auto lines = [&](size_t first, size_t count) {
    return std::span(memory).subspan(first * kPatternLineBytes,
                                     count * kPatternLineBytes);
  };
  WritePattern({MakeEngineId("a", 7, kMine), 1, 2}, lines(1, 2));
  WritePattern({MakeEngineId("a", 7, kTheirs), 1, 2}, lines(4, 3));
  memory[7 * kPatternLineBytes + 5] = std::byte{1};
  const PatternLines seen = CountLines(kMine, memory);
  EXPECT_EQ(seen.zero, 2);
  EXPECT_EQ(seen.own, 2);
  EXPECT_EQ(seen.foreign, 3);
  EXPECT_EQ(seen.other, 1);
}

class FreshPagesTest : public testing::Test {
 protected:
  static constexpr Bytes kPage = MiB(2);

  PoolGeometry Geometry() {
    return {.handle_bytes = kPage, .handles_per_page = 1, .max_pages = 4};
  }
  UniqueFd HostPage() {
    UniqueFd fd(memfd_create("test", MFD_CLOEXEC));
    EXPECT_EQ(ftruncate(fd.get(), kPage.count()), 0);
    return fd;
  }
  static std::vector<UniqueFd> One(const UniqueFd& fd) {
    std::vector<UniqueFd> page;
    page.push_back(*fd.Duplicate());
    return page;
  }
  // Of four pages the first stays as it is, the second gets a block of ours,
  // the third one of theirs, the fourth a byte of nobody's.
  void Write(client::Mapper& mapper) {
    const size_t page = static_cast<size_t>(kPage.count());
    WritePattern({MakeEngineId("a", 1, kMine), 0, 0},
                 {mapper.region(0) + page, 4096});
    WritePattern({MakeEngineId("b", 2, kTheirs), 0, 0},
                 {mapper.region(0) + 2 * page + 8192, 4096});
    mapper.region(0)[4 * page - 1] = std::byte{1};
  }
  void ExpectCounts(FreshCounts counts, int64_t errors) {
    EXPECT_EQ(counts.pages, 4);
    EXPECT_EQ(counts.zero_pages, 1);
    EXPECT_EQ(counts.own_pages, 1);
    EXPECT_EQ(counts.foreign_patterns, 64);
    EXPECT_EQ(counts.garbage, 1);
    EXPECT_EQ(counts.errors, errors);
  }
};

TEST_F(FreshPagesTest, CountsWhatIsInPagesOfHostMemory) {
  std::vector<UniqueFd> pages;
  for (int i = 0; i < 4; ++i) pages.push_back(HostPage());
  {
    auto first = *client::HostMapper::Create(Geometry());
    for (uint32_t i = 0; i < 4; ++i) {
      ASSERT_TRUE(first->Map(PageIndex(i), One(pages[i])).ok());
    }
    Write(*first);
  }
  for (auto [rule, errors] :
       {std::pair{FreshRule::kZero, 3}, {FreshRule::kTenant, 2}}) {
    FreshPages fresh(rule, kMine, kPage);
    auto mapper = fresh.Wrap(*client::HostMapper::Create(Geometry()));
    for (uint32_t i = 0; i < 4; ++i) {
      ASSERT_TRUE(mapper->Map(PageIndex(i), One(pages[i])).ok());
    }
    ExpectCounts(fresh.counts(), errors);
    EXPECT_NE(fresh.counts().first_error, "");
    EXPECT_TRUE(mapper->Unmap(PageIndex(0)).ok());
  }
}

TEST_F(FreshPagesTest, ReadsAGpusPagesByCopies) {
  FakeCuda fake = FakeCuda::Open();
  fake.Reset();
  auto driver = *CudaDriver::Load(fake.paths());
  auto backend = *CudaBackend::Create(*CudaDriver::Load(fake.paths()), {});
  std::vector<Handle> handles;
  for (int i = 0; i < 4; ++i) handles.push_back(*backend->Create(kPage));
  const auto exported = [&](uint32_t i) {
    std::vector<UniqueFd> page;
    page.push_back(*backend->Export(handles[i]));
    return page;
  };
  {
    auto first = *client::CudaMapper::Create(Geometry(), *driver, "");
    for (uint32_t i = 0; i < 4; ++i) {
      ASSERT_TRUE(first->Map(PageIndex(i), exported(i)).ok());
    }
    Write(*first);
  }
  {
    FreshPages fresh(FreshRule::kTenant, kMine, kPage,
                     *FreshPages::CudaReader(*driver, ""));
    auto mapper =
        fresh.Wrap(*client::CudaMapper::Create(Geometry(), *driver, ""));
    fake.Fail("cuMemcpyDtoH_v2", 1, cuda::CUDA_ERROR_UNKNOWN);
    EXPECT_FALSE(mapper->Map(PageIndex(0), exported(0)).ok());
    EXPECT_EQ(fake.Books().mappings, 0)
        << "a page that was not read is not used";
    for (uint32_t i = 0; i < 4; ++i) {
      ASSERT_TRUE(mapper->Map(PageIndex(i), exported(i)).ok());
    }
    ExpectCounts(fresh.counts(), 2);
  }
  EXPECT_EQ(fake.Books().contexts, 0);
  handles.clear();
  backend.reset();
  driver.reset();
  fake.Reset();
}

}  // namespace
}  // namespace kvbroker::replay
