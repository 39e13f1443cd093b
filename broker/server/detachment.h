// Detachment: a process that goes on by itself, out of reach of who started it.
//
//   ASSIGN_OR_RETURN(Detachment detachment, Detachment::Begin());
//   if (absl::Status started = Serve(); !started.ok()) {
//     detachment.End(1, "", started.message());
//     return 1;
//   }
//   detachment.End(0, "ready", "");
//
//   first process --fork--> (in a new session) --fork--> the one that serves
//        |  waits                   | leaves                   |
//        |<--- status and words -------------------------------+
//        v leaves with them                                    v stays
//
// The one that serves is in a session and a process group of its own, is no
// child of the starter's (but of init's, or of the nearest process that asked
// for orphans), has no terminal, none of the starter's descriptors, / as its
// directory, and no signal blocked or ignored but SIGHUP.
//
// To be made before there are threads. Move-only.
#ifndef KVBROKER_BROKER_SERVER_DETACHMENT_H_
#define KVBROKER_BROKER_SERVER_DETACHMENT_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "broker/base/unique_fd.h"

namespace kvbroker {

class Detachment {
 public:
  // Returns in the process that is to serve, whose standard streams are
  // `log_file` (appended to; one that has grown large is put aside first), or
  // nothing where that is empty or cannot be written. The first process ends in
  // here.
  static absl::StatusOr<Detachment> Begin(const std::string& log_file);

  // What the first process leaves with: its exit status, and what it writes to
  // stdout and stderr. Once. Who dies before has failed (1).
  void End(int exit_status, std::string_view out, std::string_view error);

 private:
  explicit Detachment(UniqueFd report) : report_(std::move(report)) {}
  UniqueFd report_;
};

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_SERVER_DETACHMENT_H_
