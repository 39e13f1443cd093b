#include "proto/fd_parse.h"

#include <gtest/gtest.h>

#include <string>

namespace kvbroker {
namespace {

template <typename Packet>
std::string Bytes(const Packet& packet) {
  return {reinterpret_cast<const char*>(&packet), sizeof(packet)};
}

kvb_fd_hello Hello() { return {FdHeader(KVB_FD_HELLO), 17, 0}; }
kvb_fd_ack Ack() { return {FdHeader(KVB_FD_ACK), 1, 2, 0}; }
kvb_fd_welcome Welcome() { return {FdHeader(KVB_FD_WELCOME), {9}, 5}; }
kvb_fd_frame Frame() { return {FdHeader(KVB_FD_FRAME), 1, 0, 3}; }

bool Hello(const std::string& bytes, size_t descriptors) {
  return ParseHello(bytes, descriptors).ok();
}
bool Ack(const std::string& bytes, size_t descriptors) {
  return ParseAck(bytes, descriptors).ok();
}
bool Welcome(const std::string& bytes, size_t descriptors) {
  return ParseWelcome(bytes, descriptors).ok();
}
bool Frame(const std::string& bytes, size_t descriptors) {
  return ParseFrame(bytes, descriptors).ok();
}

TEST(FdParseTest, TakesWhatTheOtherEndMaySend) {
  EXPECT_EQ(ParseHello(Bytes(Hello()), 0)->pid, 17u);
  EXPECT_TRUE(Hello(Bytes(Hello()), 1));
  EXPECT_EQ(ParseAck(Bytes(Ack()), 0)->handle_count, 2u);
  EXPECT_EQ(ParseWelcome(Bytes(Welcome()), 0)->incarnation, 5u);
  EXPECT_EQ(ParseFrame(Bytes(Frame()), 3)->handle_count, 3u);
}

TEST(FdParseTest, EachHasItsOwnSizeAndType) {
  const std::string packets[] = {Bytes(Hello()), Bytes(Ack()), Bytes(Welcome()),
                                 Bytes(Frame())};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(Hello(packets[i], 0), i == 0) << i;
    EXPECT_EQ(Ack(packets[i], 0), i == 1) << i;
    EXPECT_EQ(Welcome(packets[i], 0), i == 2) << i;
    EXPECT_EQ(Frame(packets[i], 0), i == 3) << i;
  }
}

TEST(FdParseTest, RefusesOtherSizesMagicsAndVersions) {
  const std::string good = Bytes(Ack());
  EXPECT_FALSE(Ack("", 0));
  EXPECT_FALSE(Ack(good.substr(0, good.size() - 1), 0));
  EXPECT_FALSE(Ack(good + '\0', 0));
  for (size_t byte = 0; byte < sizeof(kvb_fd_header); ++byte) {
    std::string bad = good;
    bad[byte] ^= 1;
    EXPECT_FALSE(Ack(bad, 0)) << byte;
  }
}

TEST(FdParseTest, RefusesDescriptorsWhereNoneBelong) {
  EXPECT_FALSE(Hello(Bytes(Hello()), 2));
  EXPECT_FALSE(Ack(Bytes(Ack()), 1));
  EXPECT_FALSE(Welcome(Bytes(Welcome()), 1));
  EXPECT_FALSE(Frame(Bytes(Frame()), 4));
}

TEST(FdParseTest, RefusesFiguresOutOfRange) {
  kvb_fd_hello hello = Hello();
  hello.reserved = 1;
  EXPECT_FALSE(Hello(Bytes(hello), 0));
  kvb_fd_ack ack = Ack();
  ack.reserved = 1;
  EXPECT_FALSE(Ack(Bytes(ack), 0));
  ack = Ack();
  ack.handle_count = 0;
  EXPECT_FALSE(Ack(Bytes(ack), 0));
  kvb_fd_frame frame = Frame();
  frame.handle_count = 0;
  EXPECT_FALSE(Frame(Bytes(frame), 0));
  frame.handle_count = KVB_FD_MAX_PER_FRAME;
  EXPECT_TRUE(Frame(Bytes(frame), KVB_FD_MAX_PER_FRAME));
  frame.handle_count = KVB_FD_MAX_PER_FRAME + 1;
  EXPECT_FALSE(Frame(Bytes(frame), 0));
  frame = Frame();
  frame.first_handle = 0xffffffff - 3;
  EXPECT_TRUE(Frame(Bytes(frame), 3));
  frame.first_handle = 0xffffffff - 2;
  EXPECT_FALSE(Frame(Bytes(frame), 3));
}

TEST(FdParseTest, AFrameMayHaveLostDescriptors) {
  EXPECT_TRUE(Frame(Bytes(Frame()), 0));
  EXPECT_TRUE(Frame(Bytes(Frame()), 2));
}

}  // namespace
}  // namespace kvbroker
