// HistoryChecker: whether what happened is what was promised.
//
//   HistoryChecker checker;
//   for (...) checker.Add(ref, event);      // of all sides, in order of time
//   checker.Finish();
//   for (const Violation& v : checker.violations()) ...
//
// The broker's events say what it decided, those of the processes what they
// mapped. From these alone the checker recomputes who held what, and compares.
// It knows nothing of the broker's code but the events, and believes no figure
// in them that it can compute itself.
//
// Events of one broker come in the order of their numbers; all events in the
// order of their times. A second `start` is another broker: what the first one
// lent is forgotten, until processes resume with it; what they have mapped is
// not.
//
// Single-threaded. Memory grows with what is lent and mapped at a time, and
// with the number of different pages, not with the number of events.
#ifndef KVBROKER_TESTS_HISTORY_HISTORY_CHECKER_H_
#define KVBROKER_TESTS_HISTORY_HISTORY_CHECKER_H_

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/container/node_hash_map.h"
#include "absl/time/time.h"
#include "broker/base/bytes.h"
#include "broker/base/ids.h"
#include "broker/core/history.h"
#include "client/history/mapping_event.h"

namespace kvbroker {

enum class Rule {
  kOneOwner,    // no memory is mapped in two places at the same time
  kTenant,      // no memory is ever mapped by processes of two tenants
  kLent,        // a page is mapped only between its grant and its return
  kMax,         // no grant and no credit leaves an instance above its `max`
  kMin,         // no order for the sake of others pushes one below its `min`
  kCapacity,    // lent, set aside, in stock and being released: never above it,
                // but by what processes resume with
  kSums,        // the ledger's sums are those of its grants and returns
  kGeneration,  // absent slots only, generations rise, returns name what is
                // lent
  kDeath,     // what a dead process held is free again within the time allowed
  kComplete,  // no event misses, but for the last ones of a broker that died
};
inline constexpr size_t kRules = 10;
// "one-owner" ...
std::string_view NameOf(Rule rule);

// A test has waited for the process's end: it was over at `at`.
struct ProcessExited {
  absl::Time at;
  uint32_t pid = 0;
};

// What the caller calls an event, to find it again.
using EventRef = uint64_t;

struct Violation {
  Rule rule;
  std::string what;
  std::vector<EventRef> events;  // that contradict each other, in order
};

struct HistoryStatistics {
  int64_t events = 0;
  int64_t processes = 0;  // that mapped something
  int64_t grants = 0;
  int64_t pages = 0;      // lent, counted each time
  int64_t intervals = 0;  // mappings of a page
  int64_t passed_on = 0;  // of a handle that another process had mapped before
  int64_t orders = 0;
  int64_t deaths = 0;  // judged by kDeath
  // Not judged: deaths after which the broker did not live long enough, and
  // mappings of processes that no broker's history knows.
  int64_t unjudged_deaths = 0;
  int64_t unmatched_mappings = 0;
  std::array<int64_t, kRules> violations{};
};

class HistoryChecker {
 public:
  struct Options {
    absl::Duration free_within = absl::Seconds(1);
    // Violations of one rule that are kept; all are counted.
    size_t keep = 20;
  };

  HistoryChecker() : HistoryChecker(Options()) {}
  explicit HistoryChecker(Options options) : options_(options) {}

  void Add(EventRef ref, const HistoryEvent& event);
  void Add(EventRef ref, const client::MappingEvent& event);
  void Add(EventRef ref, const ProcessExited& event);
  // No more events come.
  void Finish();

  const std::vector<Violation>& violations() const { return violations_; }
  const HistoryStatistics& statistics() const { return statistics_; }

 private:
  using InstanceKey = std::pair<std::string, std::string>;  // tenant, name

  // ---- by the broker's word ----
  struct Slot {
    bool lent = false;
    Generation generation;
    EventRef event;  // that lent it or took it back
  };
  struct Pool {
    SessionId session;
    Bytes page;
    int64_t held = 0;
    absl::flat_hash_map<PageIndex, Slot> slots;
  };
  struct Session {
    InstanceKey instance;
    uint32_t pid = 0;
    std::vector<PoolId> pools;
    EventRef opened;
  };
  struct Instance {
    Bytes lent, credit, min, max;
    EventRef limits = 0;  // where they were set
    int sessions = 0;
    int pools = 0;
    Bytes held() const { return lent + credit; }
  };
  // Bytes of a session that has ended, on their way back to the device.
  struct Freeing {
    SessionId session;
    uint32_t pid = 0;
    Bytes ahead;  // bytes that have to be released until its are, too
    EventRef gone;
  };
  // The session's bytes must be free by then.
  struct Deadline {
    SessionId session;
    absl::Time due;
    EventRef exited;
  };

  // ---- by the processes' word ----
  struct Mapping {
    std::vector<client::MemoryIdentity> memory;
    EventRef event;
  };
  struct Process {
    std::optional<SessionId> session;
    // By the number of the pool.
    std::map<uint32_t, absl::flat_hash_map<PageIndex, Mapping>> pools;
  };
  struct Memory {
    bool mapped = false;
    EventRef mapped_by = 0;
    uint32_t pid = 0;                     // the last one that mapped it
    const std::string* tenant = nullptr;  // null: of none that is known
    EventRef first_of_tenant = 0;
  };

  void Break(Rule rule, std::string what, std::vector<EventRef> events);

  // False: the event cannot be judged, others before it are missing.
  bool InOrder(EventRef ref, const HistoryEvent& event);
  void Start(const HistoryEvent& event);
  void Open(EventRef ref, const HistoryEvent& event);
  void Limits(EventRef ref, const HistoryEvent& event);
  void Grant(EventRef ref, const HistoryEvent& event);
  void Back(EventRef ref, const HistoryEvent& event);
  void Resume(EventRef ref, const HistoryEvent& event);
  void Credit(EventRef ref, const HistoryEvent& event);
  void Order(EventRef ref, const HistoryEvent& event);
  void Gone(EventRef ref, const HistoryEvent& event);
  // No page that was not resumed is mapped.
  void CheckLeftBehind(EventRef ref, const Session& earlier);
  void CheckAbove(EventRef ref, const Instance& instance,
                  const HistoryEvent& event);
  void CheckSums(EventRef ref, const HistoryEvent& event);
  void CheckDeadlines(EventRef ref, absl::Time now);
  void NoteReleased(const HistoryEvent& event);
  // The session is known, or the event is a violation.
  Session* FindSession(EventRef ref, const HistoryEvent& event);
  Pool* FindPool(EventRef ref, const HistoryEvent& event);
  // Those of the process's pool that is the broker's `pool`, or null.
  absl::flat_hash_map<PageIndex, Mapping>* MappingsOf(const Session& session,
                                                      PoolId pool);

  void Map(EventRef ref, const client::MappingEvent& event);
  void EndMapping(const Mapping& mapping);
  void EndMappings(absl::flat_hash_map<PageIndex, Mapping>& mappings);

  const Options options_;
  std::vector<Violation> violations_;
  HistoryStatistics statistics_;

  // A broker's history is at hand, and nothing misses so far.
  bool known_ = false;
  uint64_t last_number_ = 0;
  EventRef last_event_ = 0;
  int64_t after_gap_ = 0;  // events that could not be judged
  Bytes capacity_, lent_, credit_;
  Bytes used_;  // after the last event, with stock and what is being released
  std::map<InstanceKey, Instance> instances_;
  absl::node_hash_map<SessionId, Session> sessions_;
  absl::node_hash_map<PoolId, Pool> pools_;
  std::vector<Freeing> freeing_;
  std::vector<Deadline> deadlines_;

  std::map<uint32_t, Process> processes_;
  absl::flat_hash_set<uint32_t> mapped_once_;  // pids
  absl::flat_hash_map<client::MemoryIdentity, Memory> memory_;
  absl::node_hash_map<std::string, bool> tenants_;  // names that live for ever
};

}  // namespace kvbroker

#endif  // KVBROKER_TESTS_HISTORY_HISTORY_CHECKER_H_
