#include "broker/config/broker_config.h"

#include <filesystem>
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "broker/config/command_line.h"
#include "broker/config/config_file.h"

namespace kvbroker {
namespace {

// Reads `text` as a file; the error's text, "" where there is none.
std::string FileError(const std::string& text) {
  BrokerConfig config;
  absl::Status status = ReadConfigText(text, "kv.yaml", config);
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

const char* NoEnvironment(const char*) { return nullptr; }

absl::StatusOr<CommandLine> Parse(std::vector<const char*> flags) {
  flags.insert(flags.begin(), "kvbrokerd");
  return ReadCommandLine(flags.size(), flags.data(), NoEnvironment, "1.2.3");
}

TEST(BrokerConfigTest, EverySettingIsReadFromAFile) {
  BrokerConfig config;
  absl::Status status = ReadConfigText(R"(
backend: host
gpu: 1
device_uuid: HOST-test
capacity: 12.5%
headroom: 512M
socket_dir: /run/kv
socket_group: video
allow_uids: [1000, 1001]
tenant_by: uid
lock_dir: /tmp/locks
policy:
  reclaim_patience: 500ms
  hold_off: 3s
  reclaim_deadline: 1m
  ageing: 20s
  limit_patience: 100ms
  fence: true
log_level: debug
log_file: "/var/log/kv broker.log"
history_file: "/var/log/kvbroker.history"
idle_exit: 30s
)",
                                       "kv.yaml", config);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(config.backend, "host");
  EXPECT_EQ(config.gpu, "1");
  EXPECT_EQ(config.device_uuid, "HOST-test");
  EXPECT_EQ(config.capacity.percent, 12.5);
  EXPECT_EQ(config.headroom, MiB(512));
  EXPECT_EQ(config.socket_dir, "/run/kv");
  EXPECT_EQ(config.socket_group, "video");
  EXPECT_EQ(config.allow_uids, (std::vector<uint32_t>{1000, 1001}));
  EXPECT_EQ(config.tenant_by, "uid");
  EXPECT_EQ(config.lock_dir, "/tmp/locks");
  EXPECT_EQ(config.policy.patience, absl::Milliseconds(500));
  EXPECT_EQ(config.policy.hold_off, absl::Seconds(3));
  EXPECT_EQ(config.policy.reclaim_deadline, absl::Minutes(1));
  EXPECT_EQ(config.policy.ageing, absl::Seconds(20));
  EXPECT_EQ(config.policy.limit_patience, absl::Milliseconds(100));
  EXPECT_TRUE(config.policy.fence_ignoring);
  EXPECT_EQ(config.log_level, "debug");
  EXPECT_EQ(config.log_file, "/var/log/kv broker.log");
  EXPECT_EQ(config.history_file, "/var/log/kvbroker.history");
  EXPECT_EQ(config.idle_exit, absl::Seconds(30));

  // What is printed reads back to the same.
  BrokerConfig again;
  status = ReadConfigText(PrintConfig(config), "printed", again);
  ASSERT_TRUE(status.ok()) << status << PrintConfig(config);
  EXPECT_EQ(PrintConfig(again), PrintConfig(config));
}

TEST(BrokerConfigTest, WhateverATextHoldsIsPrintedSoThatItReadsBack) {
  for (const std::string text :
       {"/var/log/a b", "two\nlines", "\x01\x7f\t\\x", "null", "~", "---", "",
        "%x", "-", "...", "# no comment", "[a", "r\xc3\xa9sum\xc3\xa9"}) {
    BrokerConfig config, again;
    config.log_file = text;
    const std::string printed = PrintConfig(config);
    ASSERT_TRUE(ReadConfigText(printed, "printed", again).ok()) << printed;
    EXPECT_EQ(again.log_file, text) << printed;
  }
}

TEST(BrokerConfigTest, AnEmptyFileLeavesTheDefaults) {
  EXPECT_EQ(FileError(""), "");
  EXPECT_EQ(FileError("# nothing\n"), "");
  BrokerConfig config, again;
  ASSERT_TRUE(ReadConfigText(PrintConfig(config), "printed", again).ok());
  EXPECT_EQ(PrintConfig(again), PrintConfig(config));
}

TEST(BrokerConfigTest, AWrongValueIsNamedWithFileLineKeyAndWhatIsAllowed) {
  std::string error = FileError("backend: host\npolicy:\n  hold_off: soon\n");
  EXPECT_TRUE(Has(error, "kv.yaml line 3: policy.hold_off must be a duration"))
      << error;
  EXPECT_TRUE(Has(error, "got \"soon\"")) << error;
  for (const char* text :
       {"backend: gpu", "capacity: lots", "capacity: 0%", "capacity: 101%",
        "capacity: nan%", "capacity: 0", "capacity: -5", "headroom: -1G",
        "allow_uids: root", "allow_uids: -1", "tenant_by: gid",
        "policy: {fence: maybe}", "policy: {ageing: -1s}",
        "policy: {ageing: inf}", "log_level: loud", "idle_exit: sometimes"}) {
    error = FileError(text);
    EXPECT_TRUE(Has(error, "kv.yaml line 1: ")) << text << ": " << error;
    EXPECT_TRUE(Has(error, " must be ")) << text << ": " << error;
  }
}

TEST(BrokerConfigTest, AnUnknownKeyIsAnErrorThatNamesTheNearest) {
  EXPECT_TRUE(Has(FileError("backend: host\ncapasity: 1G"),
                  "kv.yaml line 2: unknown key capasity; did you mean "
                  "capacity?"));
  EXPECT_TRUE(Has(FileError("policy:\n  reclaim_patiense: 1s"),
                  "line 2: unknown key policy.reclaim_patiense; did you mean "
                  "reclaim_patience?"));
  // A key of the policy outside of it is not known there.
  EXPECT_TRUE(Has(FileError("hold_off: 1s"), "unknown key hold_off"));
  EXPECT_TRUE(Has(FileError("xyzzyxyzzy: 1"), "known are backend"));
}

TEST(BrokerConfigTest, BrokenFilesAreErrorsWithALine) {
  EXPECT_TRUE(Has(FileError("backend: host\nbackend: auto"),
                  "line 2: backend is given twice"));
  EXPECT_TRUE(Has(FileError("backend: [a, [b]]"), "must be a single value"));
  EXPECT_TRUE(Has(FileError("policy: fast"), "policy. must be lines"));
  EXPECT_TRUE(Has(FileError("just words"), "the file must be lines"));
  EXPECT_TRUE(Has(FileError("a: [1, 2\nb: 3"), "not valid YAML"));
  BrokerConfig config;
  EXPECT_TRUE(absl::IsNotFound(ReadConfigFile("/no/such/file", config)));
}

TEST(BrokerConfigTest, TheEnvironmentIsReadByKey) {
  std::map<std::string, std::string> variables = {
      {"KVBROKERD_CAPACITY", "1G"},
      {"KVBROKERD_POLICY_HOLD_OFF", "9s"},
      {"KVBROKERD_ALLOW_UIDS", "5,6"}};
  auto lookup = [&](const char* name) {
    auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
  BrokerConfig config;
  ASSERT_TRUE(ReadEnvironment(lookup, config).ok());
  EXPECT_EQ(config.capacity.bytes, GiB(1));
  EXPECT_EQ(config.policy.hold_off, absl::Seconds(9));
  EXPECT_EQ(config.allow_uids, (std::vector<uint32_t>{5, 6}));
  variables["KVBROKERD_POLICY_HOLD_OFF"] = "x";
  EXPECT_TRUE(Has(std::string(ReadEnvironment(lookup, config).message()),
                  "environment variable KVBROKERD_POLICY_HOLD_OFF: "));
}

TEST(BrokerConfigTest, FlagsWinOverTheEnvironmentAndThatOverTheFile) {
  std::string path = testing::TempDir() + "/kv.yaml";
  FILE* file = fopen(path.c_str(), "w");
  fputs("capacity: 1G\nheadroom: 1G\nlog_level: warn\n", file);
  fclose(file);
  auto environment = [](const char* name) -> const char* {
    if (std::string_view(name) == "KVBROKERD_CAPACITY") return "2G";
    if (std::string_view(name) == "KVBROKERD_HEADROOM") return "2G";
    return nullptr;
  };
  const char* flags[] = {"kvbrokerd", "--config", path.c_str(), "--capacity",
                         "3G"};
  absl::StatusOr<CommandLine> line =
      ReadCommandLine(5, flags, environment, "1");
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->config.capacity.bytes, GiB(3));
  EXPECT_EQ(line->config.headroom, GiB(2));
  EXPECT_EQ(line->config.log_level, "warn");
  EXPECT_FALSE(line->print);
}

TEST(BrokerConfigTest, FlagsAreNamedLikeKeys) {
  absl::StatusOr<CommandLine> line =
      Parse({"--policy-reclaim-patience=250ms", "--tenant-by", "socket",
             "--ready-fd", "7", "--allow-uids", "1,2"});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->config.policy.patience, absl::Milliseconds(250));
  EXPECT_EQ(line->config.tenant_by, "socket");
  EXPECT_EQ(line->config.allow_uids.size(), 2);
  EXPECT_EQ(line->ready_fd, 7);
  EXPECT_FALSE(line->detach);
}

TEST(BrokerConfigTest, PathsOfADetachedBrokerAreAbsolute) {
  const std::string here = std::filesystem::current_path();
  absl::StatusOr<CommandLine> line =
      Parse({"--detach", "--socket-dir", "a", "--state-dir", "none",
             "--lock-dir", "/b"});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_TRUE(line->detach);
  EXPECT_EQ(line->config.socket_dir, here + "/a");
  EXPECT_EQ(line->config.lock_dir, "/b");
  EXPECT_EQ(line->config.state_dir, "none");
  EXPECT_EQ(line->config.log_file, "");
  EXPECT_EQ(Parse({"--detach", "--state-dir", "s"})->config.state_dir,
            here + "/s");
}

TEST(BrokerConfigTest, WrongFlagsAreErrors) {
  auto error = [](std::vector<const char*> flags) {
    absl::Status status = Parse(std::move(flags)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  };
  EXPECT_TRUE(Has(error({"--capacity", "x"}), "--capacity: capacity must be"));
  EXPECT_TRUE(Has(error({"--capasity", "1G"}), "did you mean --capacity?"));
  EXPECT_TRUE(Has(error({"stray"}), "unknown argument stray"));
  EXPECT_TRUE(Has(error({"--capacity"}), "--capacity"));
  EXPECT_TRUE(Has(error({"--ready-fd", "-1"}), "--ready-fd"));
  EXPECT_TRUE(Has(error({"--detach", "--ready-fd", "3"}), "--detach"));
}

TEST(BrokerConfigTest, HelpVersionAndPrintConfigArePrinted) {
  std::string help = Parse({"--help"})->print.value_or("");
  for (const Setting& setting : Settings()) {
    EXPECT_TRUE(Has(help, setting.meaning)) << setting.key;
  }
  EXPECT_EQ(Parse({"--version"})->print, "kvbrokerd 1.2.3\n");
  std::string printed =
      Parse({"--print-config", "--capacity", "1G"})->print.value_or("");
  EXPECT_TRUE(Has(printed, "capacity: 1073741824\n")) << printed;
}

TEST(BrokerConfigTest, CapacityIsResolvedAgainstTheDevice) {
  BrokerConfig config;
  EXPECT_EQ(*ResolveCapacity(config, "host", GiB(8)), GiB(8));
  EXPECT_EQ(*ResolveCapacity(config, "cuda", GiB(8)), GiB(6));
  config.capacity = {.percent = 25};
  EXPECT_EQ(*ResolveCapacity(config, "cuda", GiB(8)), GiB(2));
  config.capacity = {.bytes = GiB(8)};
  EXPECT_EQ(*ResolveCapacity(config, "cuda", GiB(8)), GiB(8));
  config.capacity = {.bytes = GiB(9)};
  EXPECT_TRUE(absl::IsInvalidArgument(
      ResolveCapacity(config, "cuda", GiB(8)).status()));
  config.capacity = {};
  config.headroom = GiB(8);
  EXPECT_TRUE(absl::IsInvalidArgument(
      ResolveCapacity(config, "cuda", GiB(8)).status()));
}

TEST(BrokerConfigTest, ASlabIsWhatHeadroomLeavesOfWhatIsFreeAtTheStart) {
  BrokerConfig config;
  EXPECT_EQ(*ResolveSlab(config, GiB(12), GiB(1)), GiB(9));
  config.headroom = GiB(11);
  EXPECT_TRUE(
      absl::IsInvalidArgument(ResolveSlab(config, GiB(12), GiB(1)).status()));
  // What is asked for is asked for.
  config.capacity = {.percent = 50};
  EXPECT_EQ(*ResolveSlab(config, GiB(12), GiB(1)), GiB(6));
  config.capacity = {.bytes = GiB(12)};
  EXPECT_EQ(*ResolveSlab(config, GiB(12), GiB(1)), GiB(12));
  config.capacity = {.bytes = GiB(13)};
  EXPECT_TRUE(
      absl::IsInvalidArgument(ResolveSlab(config, GiB(12), GiB(1)).status()));
}

}  // namespace
}  // namespace kvbroker
