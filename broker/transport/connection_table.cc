#include "broker/transport/connection_table.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <charconv>

#include "absl/strings/str_cat.h"

namespace kvbroker {
namespace {

absl::Status NoNumberFree() {
  return absl::ResourceExhaustedError(
      "no descriptor number is free for a new connection");
}

}  // namespace

std::pair<int, int> ConnectionTable::NumberRange(uint64_t limit) {
  // Beyond 2^20 nobody has that many connections, and the table is at hand.
  const int last =
      static_cast<int>(std::min<uint64_t>(limit, uint64_t{1} << 20)) - 1;
  return {last - last / 4, last};
}

absl::StatusOr<int> ConnectionTable::Enter(
    UniqueFd socket, std::shared_ptr<const PeerIdentity> peer) {
  MutexLock lock(&mu_);
  EndCooling();
  auto count = per_uid_.find(peer->uid);
  if (count != per_uid_.end() && count->second >= options_.max_per_uid) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "quota.connections: uid ", peer->uid, " has ", count->second,
        " connections, those included that ended "
        "just now; raise quota.connections of kvbrokerd, and its "
        "limit of open files where that is the bound"));
  }
  // What others hold the table does not know: once round the range, no more.
  int previous = -1;
  int rounds = 0;
  for (;;) {
    const int wanted = NextNumber();
    if (wanted < 0) return NoNumberFree();
    if (wanted <= previous && ++rounds > 1) return NoNumberFree();
    previous = wanted;
    // The wanted number, or the next one that is free.
    const int number = fcntl(socket.get(), F_DUPFD_CLOEXEC, wanted);
    if (number < 0 && errno != EMFILE && errno != EINVAL) {
      return ErrnoToStatus(errno, "F_DUPFD_CLOEXEC");
    }
    if (number < 0 || number > options_.last_number) {
      if (number >= 0) ::close(number);
      next_ = options_.first_number;
      continue;
    }
    next_ = number + 1;
    if (entries_.contains(number) || is_cooling_.contains(number)) {
      ::close(number);
      continue;
    }
    ++per_uid_[peer->uid];
    entries_[number] = std::move(peer);
    return number;
  }
}

std::shared_ptr<const PeerIdentity> ConnectionTable::Find(
    std::string_view peer) const {
  constexpr std::string_view kPrefix = "fd:";
  if (!peer.starts_with(kPrefix)) return nullptr;
  peer.remove_prefix(kPrefix.size());
  int number;
  auto [end, error] =
      std::from_chars(peer.data(), peer.data() + peer.size(), number);
  if (error != std::errc() || end != peer.data() + peer.size()) return nullptr;
  MutexLock lock(&mu_);
  auto found = entries_.find(number);
  return found == entries_.end() ? nullptr : found->second;
}

void ConnectionTable::Leave(int number) {
  MutexLock lock(&mu_);
  auto found = entries_.find(number);
  if (found == entries_.end()) return;
  cooling_.push_back({options_.clock->Now(), number, found->second->uid});
  entries_.erase(found);
  is_cooling_.insert(number);
}

void ConnectionTable::HangUpAll() const {
  MutexLock lock(&mu_);
  for (const auto& [number, peer] : entries_) ::shutdown(number, SHUT_RDWR);
}

size_t ConnectionTable::size() const {
  MutexLock lock(&mu_);
  return entries_.size();
}

int ConnectionTable::NextNumber() {
  const int size = options_.last_number - options_.first_number + 1;
  for (int tried = 0; tried < size; ++tried) {
    if (next_ < options_.first_number || next_ > options_.last_number) {
      next_ = options_.first_number;
    }
    if (!entries_.contains(next_) && !is_cooling_.contains(next_)) {
      return next_;
    }
    ++next_;
  }
  return -1;
}

void ConnectionTable::EndCooling() {
  const absl::Time now = options_.clock->Now();
  while (!cooling_.empty() &&
         cooling_.front().since + options_.cooling <= now) {
    is_cooling_.erase(cooling_.front().number);
    auto count = per_uid_.find(cooling_.front().uid);
    if (--count->second == 0) per_uid_.erase(count);
    cooling_.pop_front();
  }
}

}  // namespace kvbroker
