// What was in pages when they came to a replay, and what may be.
#ifndef KVBROKER_CLIENT_REPLAY_FRESH_COUNTS_H_
#define KVBROKER_CLIENT_REPLAY_FRESH_COUNTS_H_

#include <cstdint>
#include <string>

namespace kvbroker::replay {

// A page that comes is all zero; or, where its tenant may have used it before,
// has patterns of that.
enum class FreshRule { kZero, kTenant };

struct FreshCounts {
  int64_t pages = 0;
  int64_t zero_pages = 0;
  // With lines of the same tenant, and no others.
  int64_t own_pages = 0;
  // Lines with a pattern of another tenant; and those that no engine wrote.
  int64_t foreign_patterns = 0, garbage = 0;
  // Pages that break the rule, and what the first one has.
  int64_t errors = 0;
  std::string first_error;
};

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_FRESH_COUNTS_H_
