#include "client/address/broker_address.h"

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "broker/base/temp_folder.h"
#include "broker/base/unique_fd.h"
#include "gtest/gtest.h"

namespace kvbroker::client {
namespace {

namespace fs = std::filesystem;

// Two empty directories that stand for the system's and the user's.
class FindBrokersTest : public testing::Test {
 protected:
  FindBrokersTest() {
    system_ = root_ / "system";
    user_ = root_ / "user";
    options_.system_directory = system_;
    options_.user_directory = user_;
  }

  // Makes the gRPC socket of a device. The broker that listens there lives
  // until the test ends, or is dead from the start.
  void MakeSocket(const std::string& directory, const std::string& uuid,
                  bool alive = true) {
    fs::create_directories(directory);
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    absl::StrCat(directory, "/", uuid, ".sock")
        .copy(address.sun_path, sizeof(address.sun_path) - 1);
    ASSERT_EQ(
        bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)),
        0);
    if (!alive) return;
    ASSERT_EQ(listen(fd.get(), 1), 0);
    listeners_.push_back(std::move(fd));
  }

  std::vector<std::string> FoundUuids() {
    absl::StatusOr<std::vector<BrokerAddress>> found = FindBrokers(options_);
    EXPECT_TRUE(found.ok()) << found.status();
    std::vector<std::string> uuids;
    if (!found.ok()) return uuids;
    for (const BrokerAddress& address : *found) {
      uuids.push_back(address.device_uuid);
    }
    return uuids;
  }

  void ExpectFailure(absl::StatusCode code, const std::string& part) {
    absl::Status status = FindBrokers(options_).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), part)) << status;
  }

  TempFolder root_;
  std::string system_, user_;
  AddressOptions options_;
  std::vector<UniqueFd> listeners_;
};

// In /tmp anybody can make what is looked for.
TEST_F(FindBrokersTest, TheUsersDirectoryIsNobodyElsesToWriteTo) {
  MakeSocket(user_, "GPU-1");
  EXPECT_EQ(FoundUuids(), std::vector<std::string>{"GPU-1"});
  fs::permissions(user_, fs::perms::all);
  ExpectFailure(absl::StatusCode::kPermissionDenied,
                "can be written to by all");
  fs::permissions(user_, fs::perms::owner_all);
  const std::string real = root_ / "elsewhere";
  fs::rename(user_, real);
  fs::create_directory_symlink(real, user_);
  ExpectFailure(absl::StatusCode::kPermissionDenied, "is a link");
  fs::remove(user_);
  if (geteuid() != 0) return;
  fs::rename(real, user_);
  ASSERT_EQ(chown(user_.c_str(), 4001, 4001), 0);
  ExpectFailure(absl::StatusCode::kPermissionDenied,
                "belongs to another user");
}

using Uuids = std::vector<std::string>;

TEST(UserSocketDirectoryTest, PrefersTheRuntimeDirectory) {
  std::map<std::string, std::string> environment;
  auto lookup = [&](const char* name) -> const char* {
    auto it = environment.find(name);
    return it == environment.end() ? nullptr : it->second.c_str();
  };
  EXPECT_EQ(UserSocketDirectory(lookup),
            absl::StrCat("/tmp/kvbroker-", geteuid()));
  environment["XDG_RUNTIME_DIR"] = "";
  EXPECT_EQ(UserSocketDirectory(lookup),
            absl::StrCat("/tmp/kvbroker-", geteuid()));
  environment["XDG_RUNTIME_DIR"] = "/no/such/directory";
  EXPECT_EQ(UserSocketDirectory(lookup),
            absl::StrCat("/tmp/kvbroker-", geteuid()));
  environment["XDG_RUNTIME_DIR"] = "/tmp";
  EXPECT_EQ(UserSocketDirectory(lookup), "/tmp/kvbroker");
}

TEST(AddressForTest, NamesBothSockets) {
  absl::StatusOr<BrokerAddress> address = AddressFor("/run/kvbroker", "GPU-1");
  ASSERT_TRUE(address.ok()) << address.status();
  EXPECT_EQ(address->rpc_path, "/run/kvbroker/GPU-1.sock");
  EXPECT_EQ(address->descriptor_path, "/run/kvbroker/GPU-1.fd.sock");
  EXPECT_EQ(address->device_uuid, "GPU-1");
}

TEST(AddressForTest, RefusesWhatCannotNameASocket) {
  for (const char* uuid : {"", "a/b", "GPU-1.fd"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(AddressFor("/d", uuid).status()))
        << uuid;
  }
}

TEST(AddressForTest, AllowsExactlyWhatTheKernelAllows) {
  const std::string rest = "/GPU-1.fd.sock";
  std::string longest(107 - rest.size(), 'd');
  EXPECT_TRUE(AddressFor(longest, "GPU-1").ok());
  absl::Status status = AddressFor(longest + "d", "GPU-1").status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "at most 107 bytes"))
      << status;
}

TEST_F(FindBrokersTest, SaysWhereItLookedInVain) {
  ExpectFailure(absl::StatusCode::kNotFound,
                absl::StrCat(system_, " nor in ", user_));
}

TEST_F(FindBrokersTest, MergesBothDirectoriesSorted) {
  MakeSocket(system_, "GPU-b");
  MakeSocket(user_, "GPU-a");
  EXPECT_EQ(FoundUuids(), (Uuids{"GPU-a", "GPU-b"}));
}

TEST_F(FindBrokersTest, PrefersTheSystemsBrokerOfADevice) {
  MakeSocket(system_, "GPU-a");
  MakeSocket(user_, "GPU-a");
  auto found = FindBrokers(options_);
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_EQ(found->size(), 1u);
  EXPECT_EQ(found->front().rpc_path, system_ + "/GPU-a.sock");
}

TEST_F(FindBrokersTest, PassesOverADeadBrokerWhereTheUserHasALiveOne) {
  MakeSocket(system_, "GPU-a", /*alive=*/false);
  MakeSocket(user_, "GPU-a");
  auto found = FindBrokers(options_);
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_EQ(found->size(), 1u);
  EXPECT_EQ(found->front().rpc_path, user_ + "/GPU-a.sock");
}

TEST_F(FindBrokersTest, IgnoresDescriptorSocketsAndOtherFiles) {
  MakeSocket(system_, "GPU-a");
  MakeSocket(system_, "GPU-a.fd");
  std::ofstream(system_ + "/GPU-z.sock") << "a plain file";
  std::ofstream(system_ + "/lock") << "";
  EXPECT_EQ(FoundUuids(), Uuids{"GPU-a"});
}

TEST_F(FindBrokersTest, TakesADirectoryAsAddress) {
  MakeSocket(system_, "GPU-a");
  MakeSocket(user_, "GPU-b");
  options_.address = user_;
  EXPECT_EQ(FoundUuids(), Uuids{"GPU-b"});
  options_.address = "unix:" + user_ + "/";
  EXPECT_EQ(FoundUuids(), Uuids{"GPU-b"});
}

TEST_F(FindBrokersTest, TakesASocketAsAddress) {
  MakeSocket(user_, "GPU-a");
  MakeSocket(user_, "GPU-b");
  for (const char* prefix : {"", "unix:", "unix://"}) {
    options_.address = absl::StrCat(prefix, user_, "/GPU-b.sock");
    auto found = FindBrokers(options_);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(*found, (std::vector<BrokerAddress>{
                          {.rpc_path = user_ + "/GPU-b.sock",
                           .descriptor_path = user_ + "/GPU-b.fd.sock",
                           .device_uuid = "GPU-b"}}));
  }
}

TEST_F(FindBrokersTest, RefusesAnAddressThatIsNeither) {
  fs::create_directories(user_);
  options_.address = user_ + "/GPU-a.sock";
  ExpectFailure(absl::StatusCode::kNotFound, "does not exist");

  MakeSocket(user_, "GPU-a.fd");
  options_.address = user_ + "/GPU-a.fd.sock";
  ExpectFailure(absl::StatusCode::kInvalidArgument, "<device uuid>.sock");

  std::ofstream(user_ + "/GPU-z.sock") << "a plain file";
  options_.address = user_ + "/GPU-z.sock";
  ExpectFailure(absl::StatusCode::kInvalidArgument, "not a broker's address");
}

TEST_F(FindBrokersTest, AnEmptyDirectoryAsAddressIsNotFound) {
  fs::create_directories(user_);
  options_.address = user_;
  ExpectFailure(absl::StatusCode::kNotFound, user_);
}

TEST_F(FindBrokersTest, SelectsByUuidPrefixOrIndex) {
  MakeSocket(system_, "GPU-0a");
  MakeSocket(system_, "GPU-0b");
  MakeSocket(system_, "GPU-0b1");
  const std::map<std::string, std::string> expected = {
      {"GPU-0a", "GPU-0a"},   {"gpu-0A", "GPU-0a"}, {"GPU-0b", "GPU-0b"},
      {"GPU-0b1", "GPU-0b1"}, {"0", "GPU-0a"},      {"2", "GPU-0b1"}};
  for (const auto& [gpu, uuid] : expected) {
    options_.gpu = gpu;
    EXPECT_EQ(FoundUuids(), Uuids{uuid}) << gpu;
  }
}

TEST_F(FindBrokersTest, TellsGpusFromTheHost) {
  MakeSocket(user_, "GPU-0a");
  MakeSocket(user_, "GPU-0b");
  MakeSocket(user_, "HOST-1");
  options_.backend = "host";
  EXPECT_EQ(FoundUuids(), Uuids{"HOST-1"});
  options_.address = user_;
  EXPECT_EQ(FoundUuids(), Uuids{"HOST-1"});
  for (const char* backend : {"cuda", "cuda_ipc"}) {
    options_.backend = backend;
    EXPECT_EQ(FoundUuids(), (Uuids{"GPU-0a", "GPU-0b"}));
  }
  options_.gpu = "1";
  EXPECT_EQ(FoundUuids(), Uuids{"GPU-0b"});
}

TEST_F(FindBrokersTest, NoneOfTheKindIsNotFoundUnlessItWasNamed) {
  MakeSocket(user_, "GPU-0a");
  options_.backend = "host";
  ExpectFailure(absl::StatusCode::kNotFound, "host memory: there are GPU-0a");
  options_.address = user_;
  EXPECT_EQ(FoundUuids(), Uuids{"GPU-0a"});
}

TEST_F(FindBrokersTest, RefusesAGpuThatIsUnknownOrNotUnique) {
  MakeSocket(system_, "GPU-0a");
  MakeSocket(system_, "GPU-0b");
  options_.gpu = "GPU-0";
  ExpectFailure(absl::StatusCode::kInvalidArgument,
                "GPU-0a, GPU-0b; got GPU-0");
  options_.gpu = "GPU-1";
  ExpectFailure(absl::StatusCode::kNotFound, "GPU-0a, GPU-0b; got GPU-1");
  options_.gpu = "2";
  ExpectFailure(absl::StatusCode::kNotFound, "last of 2");
}

TEST_F(FindBrokersTest, TheOneBrokerIsFoundThoughItComesLate) {
  std::thread late([this] {
    absl::SleepFor(absl::Milliseconds(100));
    MakeSocket(system_, "HOST-1");
  });
  // The limit is for giving up only.
  absl::StatusOr<BrokerAddress> found = FindBroker(options_, absl::Minutes(1));
  late.join();
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->device_uuid, "HOST-1");
  MakeSocket(system_, "HOST-2");
  found = FindBroker(options_, absl::ZeroDuration());
  EXPECT_TRUE(absl::IsInvalidArgument(found.status())) << found.status();
  EXPECT_TRUE(absl::StrContains(found.status().message(), "HOST-2.sock"))
      << found.status();
}

TEST_F(FindBrokersTest, WhereNoneComesItIsSaidWhereWasLooked) {
  absl::Status status = FindBroker(options_, absl::ZeroDuration()).status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), system_)) << status;
}

}  // namespace
}  // namespace kvbroker::client
