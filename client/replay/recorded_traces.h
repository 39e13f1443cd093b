// RecordedTraces: the two production traces that the generator was fitted to,
// for tests on machines that have them. They are not part of this repository
// (docs/testing.md says where they are published).
#ifndef KVBROKER_CLIENT_REPLAY_RECORDED_TRACES_H_
#define KVBROKER_CLIENT_REPLAY_RECORDED_TRACES_H_

#include <optional>

#include "client/replay/trace.h"

namespace kvbroker::replay {

struct RecordedTraces {
  Trace conv;
  Trace code;  // with conv's origin
};

// From the folder named by KVBROKER_TRACE_DIR, else from shared/data beside the
// source tree. Nothing: neither has them. Ends the test program where they are
// there but do not parse.
std::optional<RecordedTraces> LoadRecordedTraces();

// What a test says that goes without.
inline constexpr char kNoRecordedTraces[] =
    "the recorded traces are not here: set KVBROKER_TRACE_DIR";

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_RECORDED_TRACES_H_
