#include "broker/transport/connection_table.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <set>
#include <string>
#include <vector>

namespace kvbroker {
namespace {

constexpr int kFirst = 500;

class ConnectionTableTest : public testing::Test {
 protected:
  ConnectionTable::Options SomeOptions(int numbers) {
    return {.clock = &clock_,
            .first_number = kFirst,
            .last_number = kFirst + numbers - 1};
  }

  static std::shared_ptr<const PeerIdentity> Peer(uint32_t uid) {
    auto peer = std::make_shared<PeerIdentity>();
    peer->uid = uid;
    return peer;
  }

  static UniqueFd Socket() {
    return UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  }

  static std::string Name(int number) { return "fd:" + std::to_string(number); }

  FakeClock clock_;
};

TEST_F(ConnectionTableTest, FindsWhoIsBehindANumber) {
  ConnectionTable table(SomeOptions(4));
  auto peer = Peer(7);
  absl::StatusOr<int> number = table.Enter(Socket(), peer);
  ASSERT_TRUE(number.ok()) << number.status();
  UniqueFd owned(*number);
  EXPECT_GE(*number, kFirst);
  EXPECT_EQ(table.Find(Name(*number)), peer);
  EXPECT_EQ(fcntl(*number, F_GETFD), FD_CLOEXEC);
  table.Leave(*number);
  EXPECT_EQ(table.Find(Name(*number)), nullptr);
  table.Leave(*number);
}

TEST_F(ConnectionTableTest, OtherTextsNameNobody) {
  ConnectionTable table(SomeOptions(4));
  UniqueFd owned(*table.Enter(Socket(), Peer(7)));
  for (const char* text : {"", "fd:", "fd:x", "fd:500x", "fd:-1", "500",
                           "unix:/x", "fd:99999999999999999999", "fd: 500"}) {
    EXPECT_EQ(table.Find(text), nullptr) << text;
  }
}

TEST_F(ConnectionTableTest, AClosedNumberIsNotReusedAtOnce) {
  ConnectionTable table(SomeOptions(3));
  std::set<int> used;
  for (int i = 0; i < 3; ++i) {
    absl::StatusOr<int> number = table.Enter(Socket(), Peer(7));
    ASSERT_TRUE(number.ok()) << number.status();
    EXPECT_TRUE(used.insert(*number).second) << *number;
    close(*number);
    table.Leave(*number);
  }
  // All three are free for the system, and none for us.
  EXPECT_TRUE(
      absl::IsResourceExhausted(table.Enter(Socket(), Peer(8)).status()));
  clock_.Advance(absl::Seconds(3));
  UniqueFd again(table.Enter(Socket(), Peer(8)).value_or(-1));
  EXPECT_TRUE(used.contains(again.get()));
}

// gRPC has closed the number, but nobody has told the table yet.
TEST_F(ConnectionTableTest, ANumberWhoseEntryIsStillThereIsNotReused) {
  ConnectionTable table(SomeOptions(2));
  int first = *table.Enter(Socket(), Peer(7));
  close(first);
  UniqueFd second(*table.Enter(Socket(), Peer(8)));
  EXPECT_NE(second.get(), first);
  EXPECT_TRUE(
      absl::IsResourceExhausted(table.Enter(Socket(), Peer(9)).status()));
  EXPECT_EQ(table.Find(Name(first))->uid, 7);
}

TEST_F(ConnectionTableTest, NumbersThatOthersHoldAreSkipped) {
  ConnectionTable table(SomeOptions(4));
  UniqueFd foreign(fcntl(Socket().get(), F_DUPFD_CLOEXEC, kFirst + 1));
  ASSERT_EQ(foreign.get(), kFirst + 1);
  std::set<int> numbers;
  std::vector<UniqueFd> owned;
  for (int i = 0; i < 3; ++i) {
    absl::StatusOr<int> number = table.Enter(Socket(), Peer(7));
    ASSERT_TRUE(number.ok()) << number.status();
    owned.emplace_back(*number);
    numbers.insert(*number);
  }
  EXPECT_EQ(numbers, (std::set<int>{kFirst, kFirst + 2, kFirst + 3}));
  EXPECT_TRUE(
      absl::IsResourceExhausted(table.Enter(Socket(), Peer(7)).status()));
  // The last number of the range freed: found by going round.
  table.Leave(kFirst);
  owned.erase(owned.begin());
  clock_.Advance(absl::Minutes(1));
  EXPECT_EQ(table.Enter(Socket(), Peer(7)).value_or(-1), kFirst);
  close(kFirst);
}

TEST_F(ConnectionTableTest, OneUserCannotTakeAllNumbers) {
  ConnectionTable::Options options = SomeOptions(8);
  options.max_per_uid = 2;
  ConnectionTable table(options);
  UniqueFd one(*table.Enter(Socket(), Peer(7)));
  UniqueFd two(*table.Enter(Socket(), Peer(7)));
  EXPECT_TRUE(
      absl::IsResourceExhausted(table.Enter(Socket(), Peer(7)).status()));
  UniqueFd other(table.Enter(Socket(), Peer(8)).value_or(-1));
  EXPECT_TRUE(other);
  table.Leave(one.get());
  // Who comes and goes does not use them up either.
  EXPECT_TRUE(
      absl::IsResourceExhausted(table.Enter(Socket(), Peer(7)).status()));
  clock_.Advance(absl::Seconds(3));
  UniqueFd three(table.Enter(Socket(), Peer(7)).value_or(-1));
  EXPECT_TRUE(three);
}

TEST_F(ConnectionTableTest, TheRangeIsTheUpperQuarter) {
  EXPECT_EQ(ConnectionTable::NumberRange(1024), std::pair(768, 1023));
  auto [first, last] = ConnectionTable::NumberRange(~uint64_t{0});
  EXPECT_EQ(last, (1 << 20) - 1);
  EXPECT_LT(first, last);
}

}  // namespace
}  // namespace kvbroker
