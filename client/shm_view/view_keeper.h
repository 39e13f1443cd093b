// ViewKeeper: keeps the views of all sessions of this process up to date.
//
//   ViewOwner owner = {.device = uuid, .figures = ..., .set_limit = ...};
//   ASSIGN_OR_RETURN(std::unique_ptr<KeptView> kept,
//                    KeepView("/dev/shm", "llama", std::move(owner)));
//   ...
//   kept.reset();
//
// One thread does it all, for all views: it starts with the first and ends with
// the last. It looks every 100 ms, because who writes through a mapping raises
// no event, and at once when inotify says that somebody wrote. A lock that
// others hold is tried again after 10 ms. Whatever others do to a file costs
// this thread some work, and nobody else anything.
//
// Threads: KeepView and the end of a KeptView from any, but not from a
// callback. Both wait for the thread, which may be in a callback. A forked
// child has no part in it: it ends a KeptView of its parent's without effect.
#ifndef KVBROKER_CLIENT_SHM_VIEW_VIEW_KEEPER_H_
#define KVBROKER_CLIENT_SHM_VIEW_VIEW_KEEPER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "broker/base/bytes.h"
#include "client/shm_view/view_figures.h"

namespace kvbroker::client {

// One session's part in a view. Callbacks come from the keeper's thread,
// without locks, one at a time.
struct ViewOwner {
  // The uuid of the device whose memory it uses.
  std::string device;
  // As of now. Often called: cheap, and waits for nobody.
  std::function<ViewFigures()> figures;
  // Somebody wrote this limit. In force, and in `figures`, when it returns OK;
  // else `figures` has the limit that stays. UNAVAILABLE is asked again for a
  // few seconds: a broker may be in the middle of a restart.
  std::function<absl::Status(Bytes)> set_limit;
  // Something for a log: a limit that was refused, why there is no view.
  std::function<void(const std::string&)> remark;
};

// Ends the owner's part when it goes: after that no callback runs.
class KeptView {
 public:
  virtual ~KeptView() = default;
};

// The file is there, with the figures, when it returns; where something is in
// its way, it comes when that is gone, and a remark says so. INVALID_ARGUMENT:
// a name that no view can have. Else `directory` cannot be opened.
absl::StatusOr<std::unique_ptr<KeptView>> KeepView(const std::string& directory,
                                                   const std::string& name,
                                                   ViewOwner owner);

}  // namespace kvbroker::client

#endif  // KVBROKER_CLIENT_SHM_VIEW_VIEW_KEEPER_H_
