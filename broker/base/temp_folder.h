// A folder for a test, removed with all it holds when the object goes.
#ifndef KVBROKER_BROKER_BASE_TEMP_FOLDER_H_
#define KVBROKER_BROKER_BASE_TEMP_FOLDER_H_

#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "broker/base/check.h"

namespace kvbroker {

// testing::TempDir() does not do for sockets (bazel's is longer than the 107
// bytes that a socket's path may have) nor for tests that change their user
// (bazel's lies under the home folder of the first). This one is short and
// open to all: /tmp/kvb_XXXXXX, or /tmp/kvb<infix>_XXXXXX.
class TempFolder {
 public:
  explicit TempFolder(const std::string& infix = "") {
    path_ = absl::StrCat("/tmp/kvb", infix, "_XXXXXX");
    KVB_CHECK(mkdtemp(path_.data()) != nullptr);
    KVB_CHECK(chmod(path_.c_str(), 0755) == 0);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const {
    return path_ + "/" + name;
  }

 private:
  std::string path_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_BASE_TEMP_FOLDER_H_
