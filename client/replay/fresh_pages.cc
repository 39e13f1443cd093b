#include "client/replay/fresh_pages.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/device/cuda/current_context.h"
#include "broker/device/cuda/probe.h"
#include "client/replay/pattern.h"

namespace kvbroker::replay {
namespace {

// A whole number of lines.
constexpr size_t kReadAtOnce = 1 << 20;

}  // namespace

class FreshPages::LookingMapper : public client::Mapper {
 public:
  LookingMapper(FreshPages& fresh, std::unique_ptr<client::Mapper> mapper)
      : fresh_(fresh), mapper_(std::move(mapper)) {}

  absl::Status Begin(const Opened& opened) override {
    return mapper_->Begin(opened);
  }
  absl::Status Map(PageIndex page, std::vector<UniqueFd> descriptors) override {
    RETURN_IF_ERROR(mapper_->Map(page, std::move(descriptors)));
    absl::Status looked = fresh_.Look(
        mapper_->region(0) + page.value() * fresh_.page_bytes_.count());
    if (looked.ok()) return looked;
    RETURN_IF_ERROR(mapper_->Unmap(page));
    return looked;
  }
  absl::Status Unmap(PageIndex page) override { return mapper_->Unmap(page); }
  std::byte* region(size_t handle_of_page) const override {
    return mapper_->region(handle_of_page);
  }
  void AddStream(void* stream) override { mapper_->AddStream(stream); }
  void RemoveStream(void* stream) override { mapper_->RemoveStream(stream); }

 private:
  FreshPages& fresh_;
  const std::unique_ptr<client::Mapper> mapper_;
};

FreshPages::FreshPages(FreshRule rule, uint32_t tenant, Bytes page_bytes,
                       Reader reader)
    : rule_(rule),
      tenant_(tenant),
      page_bytes_(page_bytes),
      reader_(std::move(reader)) {}

absl::StatusOr<FreshPages::Reader> FreshPages::CudaReader(
    const CudaDriver& driver, std::string_view gpu) {
  RETURN_IF_ERROR(driver.Require(CudaFunctionGroup::kContext));
  ASSIGN_OR_RETURN(const CudaDevice device, FindDevice(driver, gpu));
  const CudaFunctions& cuda = driver.cuda();
  cuda::CUcontext context = nullptr;
  RETURN_IF_ERROR(
      CudaStatus(cuda.cuDevicePrimaryCtxRetain(&context, device.device),
                 "cuDevicePrimaryCtxRetain"));
  // Goes with the last copy of the reader.
  std::shared_ptr<void> retained(context, [&cuda, device](void*) {
    cuda.cuDevicePrimaryCtxRelease(device.device);
  });
  return Reader([&cuda, retained](const std::byte* from,
                                  std::span<std::byte> to) -> absl::Status {
    CurrentCudaContext current(cuda, retained.get());
    RETURN_IF_ERROR(current.status());
    return CudaStatus(cuda.cuMemcpyDtoH(to.data(),
                                        static_cast<cuda::CUdeviceptr>(
                                            reinterpret_cast<uintptr_t>(from)),
                                        to.size()),
                      "cuMemcpyDtoH");
  });
}

std::unique_ptr<client::Mapper> FreshPages::Wrap(
    std::unique_ptr<client::Mapper> mapper) {
  return std::make_unique<LookingMapper>(*this, std::move(mapper));
}

FreshCounts FreshPages::counts() {
  MutexLock lock(&mu_);
  return counts_;
}

absl::Status FreshPages::Look(const std::byte* page) {
  const size_t size = static_cast<size_t>(page_bytes_.count());
  PatternLines lines;
  for (size_t at = 0; at < size;) {
    const size_t step = std::min(kReadAtOnce, size - at);
    std::span<const std::byte> seen(page + at, step);
    if (reader_) {
      copy_.resize(step);
      RETURN_IF_ERROR(reader_(page + at, copy_));
      seen = copy_;
    }
    const PatternLines some = CountLines(tenant_, seen);
    lines.zero += some.zero;
    lines.own += some.own;
    lines.foreign += some.foreign;
    lines.other += some.other;
    at += step;
  }
  MutexLock lock(&mu_);
  ++counts_.pages;
  counts_.foreign_patterns += lines.foreign;
  counts_.garbage += lines.other;
  const bool others = lines.foreign > 0 || lines.other > 0;
  if (lines.own == 0 && !others) ++counts_.zero_pages;
  if (lines.own > 0 && !others) ++counts_.own_pages;
  if (others || (rule_ == FreshRule::kZero && lines.own > 0)) {
    if (++counts_.errors == 1) {
      counts_.first_error = absl::StrCat(
          "a page came with ", lines.own, " lines of this tenant, ",
          lines.foreign, " of others and ", lines.other, " of nobody");
    }
  }
  return absl::OkStatus();
}

}  // namespace kvbroker::replay
