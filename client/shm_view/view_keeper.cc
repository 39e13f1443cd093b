#include "client/shm_view/view_keeper.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "broker/base/mutex.h"
#include "broker/base/status_macros.h"
#include "broker/base/unique_fd.h"
#include "client/shm_view/shm_view.h"

namespace kvbroker::client {
namespace {

// Half of what a change may take to be seen.
constexpr absl::Duration kLook = absl::Milliseconds(100);
constexpr absl::Duration kTryAgain = absl::Milliseconds(10);
// Between two passes, however often somebody writes.
constexpr absl::Duration kPause = absl::Milliseconds(5);
// A broker that is being restarted is asked again for so long; less than ShmView
// lets others wait for it.
constexpr absl::Duration kAskFor = absl::Seconds(4);
// While something else has the view's name.
constexpr absl::Duration kAfterProblem = absl::Seconds(1);
// A view that somebody else has locked is waited for so long at its owner's
// start.
constexpr absl::Duration kFirstPass = absl::Milliseconds(200);
constexpr absl::Duration kSameRemark = absl::Seconds(1);

// An owner that is kept.
struct Entry {
  enum class State { kNew, kKept, kLeaving, kGone };

  std::string directory;
  std::string name;
  ViewOwner owner;
  absl::Time since;
  State state = State::kNew;  // guarded by the keeper's lock
  absl::Status failed;        // why it never was kept; likewise
};

// The thread, and what only it touches.
class ViewKeeper {
 public:
  ViewKeeper()
      : bell_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        inotify_(inotify_init1(IN_CLOEXEC | IN_NONBLOCK)) {}

  void Start() {
    // Signals are for the engine's threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { Run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread_.native_handle(), "kvb-views");
  }

  // Returns when the view is there.
  absl::Status Add(const std::shared_ptr<Entry>& entry) {
    MutexLock lock(&mu_);
    entries_.push_back(entry);
    Ring();
    while (entry->state == Entry::State::kNew) changed_.Wait(&mu_);
    return entry->failed;
  }

  void Remove(const std::shared_ptr<Entry>& entry) {
    MutexLock lock(&mu_);
    if (entry->state == Entry::State::kKept) {
      entry->state = Entry::State::kLeaving;
    }
    Ring();
    while (entry->state != Entry::State::kGone) changed_.Wait(&mu_);
  }

  // After the last Remove.
  void Stop() {
    {
      MutexLock lock(&mu_);
      stop_ = true;
      Ring();
    }
    thread_.join();
  }

 private:
  struct Kept {
    explicit Kept(ShmView opened) : view(std::move(opened)) {}
    ShmView view;
    std::map<ShmView::Owner, std::shared_ptr<Entry>> owners;
    absl::Time due = absl::InfinitePast();
    uint64_t watched = 0;
    int watch = -1;
    std::optional<Bytes> asked;  // of the broker, again and again if need be
    absl::Time ask_until;
    std::string last_remark;
    absl::Time remarked_at = absl::InfinitePast();
  };

  void Ring() {
    const uint64_t one = 1;
    (void)!write(bell_.get(), &one, sizeof(one));
  }

  void Run() {
    while (true) {
      absl::Time due = absl::InfiniteFuture();
      if (!ComeAndGo()) return;
      for (Kept& kept : kept_) {
        if (absl::Now() >= kept.due) Look(kept);
        due = std::min(due, kept.due);
      }
      MarkKept();
      WaitUntil(due);
    }
  }

  // False: the thread ends.
  bool ComeAndGo() {
    std::vector<std::shared_ptr<Entry>> coming, leaving;
    {
      MutexLock lock(&mu_);
      if (stop_) return false;
      for (const auto& entry : entries_) {
        const bool known = known_.count(entry.get()) > 0;
        if (!known && entry->state == Entry::State::kNew) {
          coming.push_back(entry);
        } else if (entry->state == Entry::State::kLeaving) {
          leaving.push_back(entry);
        }
      }
    }
    for (const auto& entry : coming) Come(entry);
    for (const auto& entry : leaving) Leave(entry);
    return true;
  }

  void Come(const std::shared_ptr<Entry>& entry) {
    auto kept = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& one) {
      return one.view.Is(entry->directory, entry->name);
    });
    if (kept == kept_.end()) {
      absl::StatusOr<ShmView> view =
          ShmView::Open(entry->directory, entry->name);
      if (!view.ok()) {
        Forget(entry, view.status());
        return;
      }
      kept = kept_.emplace(kept_.end(), *std::move(view));
    }
    kept->owners[kept->view.AddOwner(entry->owner.device)] = entry;
    kept->due = absl::InfinitePast();
    known_.insert(entry.get());
  }

  void Leave(const std::shared_ptr<Entry>& entry) {
    for (auto kept = kept_.begin(); kept != kept_.end(); ++kept) {
      auto owner =
          std::find_if(kept->owners.begin(), kept->owners.end(),
                       [&](const auto& one) { return one.second == entry; });
      if (owner == kept->owners.end()) continue;
      kept->view.RemoveOwner(owner->first);
      kept->owners.erase(owner);
      kept->due = absl::InfinitePast();  // the others' sum is another
      if (!kept->view.has_owners()) {
        Unwatch(*kept);
        kept_.erase(kept);
      }
      break;
    }
    known_.erase(entry.get());
    Forget(entry, absl::OkStatus());
  }

  void Forget(const std::shared_ptr<Entry>& entry, absl::Status why) {
    MutexLock lock(&mu_);
    entry->failed = std::move(why);
    entry->state = Entry::State::kGone;
    entries_.remove(entry);
    changed_.SignalAll();
  }

  // Those whose view is there, or is not going to be soon.
  void MarkKept() {
    MutexLock lock(&mu_);
    for (const auto& entry : entries_) {
      if (entry->state == Entry::State::kNew && ready_.count(entry.get()) > 0) {
        entry->state = Entry::State::kKept;
        changed_.SignalAll();
      }
    }
    ready_.clear();
  }

  void Look(Kept& kept) {
    ShmView::Outcome outcome = kept.view.Pass(FiguresOf(kept));
    if (outcome.ignored) {
      Remark(kept, absl::StrCat("the limit written to it is ignored, it is no "
                                "number of bytes: ",
                                *outcome.ignored));
    }
    const absl::Time now = absl::Now();
    if (outcome.asked) {
      kept.asked = outcome.asked;
      kept.ask_until = now + kAskFor;
    }
    if (kept.asked) {
      // Shows what is in force next, after the others' turn.
      kept.due = Ask(kept) ? absl::InfinitePast() : now + kLook;
    } else if (!outcome.problem.ok()) {
      Remark(kept, absl::StrCat("it is not kept at present: ",
                                outcome.problem.message()));
      kept.due = now + kAfterProblem;
    } else {
      kept.due = now + (outcome.done ? kLook : kTryAgain);
    }
    Watch(kept);
    for (const auto& [owner, entry] : kept.owners) {
      if (outcome.done || !outcome.problem.ok() ||
          now > entry->since + kFirstPass) {
        ready_.insert(entry.get());
      }
    }
  }

  std::map<ShmView::Owner, ViewFigures> FiguresOf(const Kept& kept) {
    std::map<ShmView::Owner, ViewFigures> figures;
    for (const auto& [owner, entry] : kept.owners) {
      figures[owner] = entry->owner.figures();
    }
    return figures;
  }

  // Each device has a limit of its own. False: a broker is not there, and to be
  // asked again.
  bool Ask(Kept& kept) {
    std::set<std::string> asked;
    for (const auto& [owner, entry] : kept.owners) {
      if (!asked.insert(entry->owner.device).second) continue;
      absl::Status answer = entry->owner.set_limit(*kept.asked);
      if (absl::IsUnavailable(answer) && absl::Now() < kept.ask_until) {
        return false;
      }
      if (!answer.ok()) {
        Remark(kept, absl::StrCat("the limit written to it is not set, ",
                                  kept.asked->count(), ": ", answer.message()));
      }
    }
    kept.asked.reset();
    kept.view.Answered();
    return true;
  }

  void Remark(Kept& kept, const std::string& text) {
    const absl::Time now = absl::Now();
    if (text == kept.last_remark && now < kept.remarked_at + kSameRemark) {
      return;
    }
    // What does not go away is said once.
    const bool lasts =
        text == kept.last_remark && now < kept.remarked_at + 2 * kAfterProblem;
    kept.last_remark = text;
    kept.remarked_at = now;
    if (lasts) return;
    Entry& entry = *kept.owners.begin()->second;
    if (entry.owner.remark) {
      entry.owner.remark(
          absl::StrCat(entry.directory, "/", entry.name, ": ", text));
    }
  }

  // Without inotify, whose instances a user may run out of, looking does.
  void Watch(Kept& kept) {
    if (!inotify_ || kept.watched == kept.view.file_number()) return;
    Unwatch(kept);
    kept.watched = kept.view.file_number();
    if (kept.view.descriptor() < 0) return;
    // The file itself, whatever its name means by now.
    const std::string path =
        absl::StrCat("/proc/self/fd/", kept.view.descriptor());
    kept.watch = inotify_add_watch(inotify_.get(), path.c_str(),
                                   IN_MODIFY | IN_CLOSE_WRITE | IN_ATTRIB);
    // Somebody may have written in between.
    kept.due = std::min(kept.due, absl::Now() + kTryAgain);
  }

  void Unwatch(Kept& kept) {
    if (kept.watch >= 0) inotify_rm_watch(inotify_.get(), kept.watch);
    kept.watch = -1;
  }

  void WaitUntil(absl::Time due) {
    // Without a bell it looks who has come.
    const absl::Duration left =
        std::clamp(due - absl::Now(), absl::ZeroDuration(),
                   bell_ ? absl::Hours(1) : kLook);
    // Rounded up, or it would turn for the rest of a millisecond.
    pollfd sources[] = {{bell_.get(), POLLIN, 0}, {inotify_.get(), POLLIN, 0}};
    if (poll(sources, inotify_ ? 2 : 1,
             static_cast<int>(absl::ToInt64Milliseconds(
                 absl::Ceil(left, absl::Milliseconds(1))))) <= 0) {
      return;
    }
    uint64_t rung;
    (void)!read(bell_.get(), &rung, sizeof(rung));
    if (sources[1].revents == 0) return;
    absl::SleepFor(kPause);
    DrainEvents();
  }

  void DrainEvents() {
    alignas(inotify_event) char events[4096];
    ssize_t got;
    while ((got = read(inotify_.get(), events, sizeof(events))) > 0) {
      for (const char* at = events; at < events + got;) {
        const auto* event = reinterpret_cast<const inotify_event*>(at);
        for (Kept& kept : kept_) {
          if (kept.watch == event->wd || event->wd < 0) {
            kept.due = absl::InfinitePast();
          }
        }
        at += sizeof(inotify_event) + event->len;
      }
    }
  }

  UniqueFd bell_;
  UniqueFd inotify_;
  std::thread thread_;

  // Of the thread.
  std::list<Kept> kept_;
  std::set<const Entry*> known_;
  std::set<const Entry*> ready_;

  Mutex mu_;
  CondVar changed_;
  std::list<std::shared_ptr<Entry>> entries_ ABSL_GUARDED_BY(mu_);
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
};

// The process's keeper, while it has views: one thread, and each file opened
// once, which record locks want. A forked child leaves its parent's alone.
struct Keepers {
  Mutex mu;
  ViewKeeper* keeper ABSL_GUARDED_BY(mu) = nullptr;
  int views ABSL_GUARDED_BY(mu) = 0;
  pid_t process ABSL_GUARDED_BY(mu) = 0;
};

Keepers& TheKeepers() {
  static Keepers* const keepers = new Keepers;  // outlives all threads
  return *keepers;
}

ViewKeeper& EnterKeeper() {
  Keepers& keepers = TheKeepers();
  MutexLock lock(&keepers.mu);
  if (keepers.process != getpid()) {
    keepers.keeper = nullptr;
    keepers.views = 0;
    keepers.process = getpid();
  }
  if (keepers.views++ == 0) {
    keepers.keeper = new ViewKeeper;
    keepers.keeper->Start();
  }
  return *keepers.keeper;
}

void LeaveKeeper() {
  Keepers& keepers = TheKeepers();
  MutexLock lock(&keepers.mu);
  if (--keepers.views > 0) return;
  keepers.keeper->Stop();
  delete std::exchange(keepers.keeper, nullptr);
}

class RealKeptView : public KeptView {
 public:
  RealKeptView(ViewKeeper& keeper, std::shared_ptr<Entry> entry)
      : keeper_(keeper), entry_(std::move(entry)), process_(getpid()) {}
  ~RealKeptView() override {
    if (process_ != getpid()) return;
    keeper_.Remove(entry_);
    LeaveKeeper();
  }

 private:
  ViewKeeper& keeper_;
  const std::shared_ptr<Entry> entry_;
  const pid_t process_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<KeptView>> KeepView(const std::string& directory,
                                                   const std::string& name,
                                                   ViewOwner owner) {
  RETURN_IF_ERROR(CheckViewName(name));
  auto entry = std::make_shared<Entry>();
  entry->directory = directory;
  entry->name = name;
  entry->owner = std::move(owner);
  entry->since = absl::Now();
  ViewKeeper& keeper = EnterKeeper();
  if (absl::Status added = keeper.Add(entry); !added.ok()) {
    LeaveKeeper();
    return added;
  }
  return std::make_unique<RealKeptView>(keeper, std::move(entry));
}

}  // namespace kvbroker::client
