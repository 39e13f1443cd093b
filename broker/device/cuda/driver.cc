#include "broker/device/cuda/driver.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"

namespace kvbroker {
namespace {

absl::StatusOr<void*> Open(const std::string& path) {
  // Not RTLD_GLOBAL: what the engine's process has loaded is left alone.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::NotFoundError(dlerror());
  return library;
}

template <typename Function>
void Find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
}

}  // namespace

std::string CudaVersionText(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

DriverPaths DriverPaths::Default() {
  DriverPaths paths;
  if (const char* path = std::getenv("KVBROKER_CUDA_DRIVER")) paths.cuda = path;
  if (const char* path = std::getenv("KVBROKER_NVML")) paths.nvml = path;
  return paths;
}

absl::StatusOr<std::unique_ptr<CudaDriver>> CudaDriver::Load(
    const DriverPaths& paths) {
  std::unique_ptr<CudaDriver> driver(new CudaDriver);
  RETURN_IF_ERROR(driver->LoadCuda(paths.cuda));
  driver->nvml_status_ = driver->LoadNvml(paths.nvml);
  return driver;
}

CudaDriver::~CudaDriver() {
  if (nvml_status_.ok() && nvml_.nvmlShutdown) nvml_.nvmlShutdown();
}

absl::Status CudaDriver::LoadCuda(const std::string& path) {
  absl::StatusOr<void*> library = Open(path);
  if (!library.ok()) {
    return absl::NotFoundError(absl::StrCat(
        "no CUDA driver: ", library.status().message(),
        "; install NVIDIA's driver, give the container its libraries, or use "
        "the backend host"));
  }
#define KVBROKER_FIND(group, name, symbol, ...) \
  Find(*library, symbol, cuda_.name);
  KVBROKER_CUDA_FUNCTIONS(KVBROKER_FIND)
#undef KVBROKER_FIND
  RETURN_IF_ERROR(Require(CudaFunctionGroup::kBase));
  RETURN_IF_ERROR(CudaStatus(cuda_.cuInit(0), "cuInit"));
  return CudaStatus(cuda_.cuDriverGetVersion(&cuda_version_),
                    "cuDriverGetVersion");
}

absl::Status CudaDriver::LoadNvml(const std::string& path) {
  absl::StatusOr<void*> library = Open(path);
  if (!library.ok()) {
    return absl::NotFoundError(
        absl::StrCat("no NVML: ", library.status().message(),
                     "; it is part of NVIDIA's driver (in containers: "
                     "NVIDIA_DRIVER_CAPABILITIES must have `utility`)"));
  }
#define KVBROKER_FIND(need, name, symbol, ...) \
  Find(*library, symbol, nvml_.name);
  KVBROKER_NVML_FUNCTIONS(KVBROKER_FIND)
#undef KVBROKER_FIND
  constexpr bool kRequired = true, kOptional = false;
#define KVBROKER_CHECK(need, name, symbol, ...)                             \
  if (need && nvml_.name == nullptr) {                                      \
    return absl::FailedPreconditionError(                                   \
        absl::StrCat("NVML at ", path, " is too old: it has no ", symbol)); \
  }
  KVBROKER_NVML_FUNCTIONS(KVBROKER_CHECK)
#undef KVBROKER_CHECK
  RETURN_IF_ERROR(NvmlStatus(nvml_.nvmlInit(), "nvmlInit"));
  std::array<char, 96> version{};
  if (nvml_.nvmlSystemGetDriverVersion(version.data(), version.size()) ==
      cuda::NVML_SUCCESS) {
    nvidia_version_ = version.data();
  }
  return absl::OkStatus();
}

absl::Status CudaDriver::Require(CudaFunctionGroup wanted) const {
  using enum CudaFunctionGroup;
  const char* missing = nullptr;
#define KVBROKER_CHECK(group, name, symbol, ...)                        \
  if (group == wanted && cuda_.name == nullptr && missing == nullptr) { \
    missing = symbol;                                                   \
  }
  KVBROKER_CUDA_FUNCTIONS(KVBROKER_CHECK)
#undef KVBROKER_CHECK
  if (missing == nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "the CUDA driver is too old: it has no ", missing,
      cuda_version_ > 0
          ? absl::StrCat(" (CUDA ", CudaVersionText(cuda_version_), ")")
          : "",
      "; update NVIDIA's driver or use the backend host"));
}

}  // namespace kvbroker
