#include "client/replay/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvbroker::replay {
namespace {

constexpr int64_t kNobody = -1;

int64_t BlocksFor(int64_t tokens) {
  return (tokens + kBlockTokens - 1) / kBlockTokens;
}

// The most that a request ever holds: room for the token that follows its
// prompt, and for all that it generates.
int64_t MostBlocks(const TraceRequest& request) {
  return BlocksFor(request.prompt_tokens +
                   std::max<int64_t>(request.generated_tokens, 1));
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options,
                     std::vector<TraceRequest> requests, BlockSource& source,
                     BlockPattern* pattern)
    : options_(options),
      requests_(std::move(requests)),
      source_(source),
      pattern_(pattern),
      progress_(requests_.size()),
      records_(requests_.size()) {
  for (size_t i = 0; i < requests_.size(); ++i) {
    records_[i].arrival_s = requests_[i].arrival_s;
  }
}

Scheduler::~Scheduler() {
  for (size_t request : running_) source_.Free(progress_[request].blocks);
}

double Scheduler::Step(double now_s) {
  source_.StepBegin();
  preempted_in_step_ = false;
  RunDueEvents(now_s);
  VacateBlocks(now_s);
  QueueArrivals(now_s);
  if (!preempted_in_step_ || running_.empty()) Admit(now_s);
  source_.StepEnd();
  return NextDue(now_s);
}

void Scheduler::Abandon() {
  for (size_t request : running_) ReleaseBlocks(request);
  running_.clear();
}

bool Scheduler::done() const {
  return finished_ == static_cast<int64_t>(requests_.size());
}

int64_t Scheduler::LoadTokens(double now_s) const {
  int64_t tokens = 0;
  for (size_t request : running_) {
    const Progress& progress = progress_[request];
    tokens += requests_[request].prompt_tokens + progress.generated +
              SegmentTokensBy(progress, now_s);
  }
  return tokens;
}

void Scheduler::RunDueEvents(double now_s) {
  while (!events_.empty() && events_.top().due_s <= now_s) {
    const Event event = events_.top();
    events_.pop();
    if (!IsStale(event)) EndSegment(event.request, event.due_s, now_s);
  }
}

void Scheduler::VacateBlocks(double now_s) {
  while (true) {
    // Asked again after each preemption: what it freed may be enough.
    std::vector<size_t>::iterator youngest = running_.begin();
    bool found = false;
    for (BlockId block : source_.BlocksToVacate()) {
      if (static_cast<size_t>(block) >= owner_of_block_.size()) continue;
      const int64_t owner = owner_of_block_[block];
      if (owner == kNobody) continue;
      const auto position =
          std::find(found ? youngest : running_.begin(), running_.end(),
                    static_cast<size_t>(owner));
      if (position == running_.end()) continue;  // older than the one found
      youngest = position;
      found = true;
    }
    if (!found) return;
    Preempt(*youngest, now_s);
  }
}

void Scheduler::QueueArrivals(double now_s) {
  while (arrived_ < requests_.size() &&
         requests_[arrived_].arrival_s <= now_s) {
    progress_[arrived_].state = State::kWaiting;
    waiting_.push_back(arrived_++);
  }
}

void Scheduler::Admit(double now_s) {
  while (!waiting_.empty()) {
    const size_t request = waiting_.front();
    Progress& progress = progress_[request];
    const int64_t most = MostBlocks(requests_[request]);
    const int64_t capacity = source_.CapacityBlocks();
    if (most > capacity) {
      waiting_.pop_front();
      progress.state = State::kRejected;
      records_[request].rejected = true;
      rejections_.push_back({request, most, capacity});
      ++finished_;
      continue;
    }
    const int64_t tokens =
        requests_[request].prompt_tokens + progress.generated;
    if (!TakeBlocks(request, BlocksFor(tokens + 1), Urgency::kWaiting)) return;

    waiting_.pop_front();
    running_.push_back(request);
    progress.state = State::kRunning;
    ++progress.admissions;
    if (!records_[request].admitted_s.has_value()) {
      records_[request].admitted_s = now_s;
    }
    BeginSegment(request, now_s + tokens / options_.speed.prefill_tokens_per_s);
  }
}

double Scheduler::NextDue(double now_s) {
  while (!events_.empty() && IsStale(events_.top())) events_.pop();
  double due_s = std::numeric_limits<double>::infinity();
  if (!events_.empty()) due_s = events_.top().due_s;
  if (arrived_ < requests_.size()) {
    due_s = std::min(due_s, requests_[arrived_].arrival_s);
  }
  if (!waiting_.empty()) {
    due_s = std::min(due_s, now_s + 1 / options_.speed.decode_tokens_per_s);
  }
  return due_s;
}

void Scheduler::BeginSegment(size_t request, double start_s) {
  Progress& progress = progress_[request];
  const TraceRequest& wanted = requests_[request];
  const int64_t room =
      static_cast<int64_t>(progress.blocks.size()) * kBlockTokens -
      wanted.prompt_tokens - progress.generated;
  progress.segment_start_s = start_s;
  progress.segment_tokens =
      std::min(room, wanted.generated_tokens - progress.generated);
  events_.push({.due_s = start_s + progress.segment_tokens /
                                       options_.speed.decode_tokens_per_s,
                .sequence = next_sequence_++,
                .request = request,
                .admission = progress.admissions});
}

void Scheduler::EndSegment(size_t request, double due_s, double now_s) {
  Progress& progress = progress_[request];
  CountGenerated(request, progress.segment_tokens);
  progress.segment_tokens = 0;
  progress.segment_start_s = due_s;

  if (progress.generated == requests_[request].generated_tokens) {
    ReleaseBlocks(request);
    running_.erase(std::find(running_.begin(), running_.end(), request));
    progress.state = State::kDone;
    records_[request].end_s = due_s;
    ++finished_;
    return;
  }
  while (!TakeBlocks(request, 1, Urgency::kRunning)) {
    const size_t youngest = running_.back();
    Preempt(youngest, now_s);
    if (youngest == request) return;
  }
  BeginSegment(request, due_s);
}

void Scheduler::Preempt(size_t request, double now_s) {
  Progress& progress = progress_[request];
  CountGenerated(request, SegmentTokensBy(progress, now_s));
  progress.segment_tokens = 0;
  ReleaseBlocks(request);
  running_.erase(std::find(running_.begin(), running_.end(), request));
  progress.state = State::kWaiting;
  waiting_.push_front(request);
  ++records_[request].preemptions;
  ++preemptions_;
  preempted_in_step_ = true;
}

int64_t Scheduler::SegmentTokensBy(const Progress& progress,
                                   double now_s) const {
  const double tokens =
      (now_s - progress.segment_start_s) * options_.speed.decode_tokens_per_s;
  if (tokens <= 0) return 0;
  // The last one is counted by the segment's own end, which also asks whether
  // the request is done.
  const int64_t most = std::max<int64_t>(progress.segment_tokens - 1, 0);
  return tokens >= most ? most : static_cast<int64_t>(tokens);
}

void Scheduler::CountGenerated(size_t request, int64_t tokens) {
  if (tokens == 0) return;
  Progress& progress = progress_[request];
  if (!records_[request].first_token_s.has_value()) {
    records_[request].first_token_s =
        progress.segment_start_s + 1 / options_.speed.decode_tokens_per_s;
  }
  progress.generated += tokens;
}

bool Scheduler::TakeBlocks(size_t request, int64_t blocks, Urgency urgency) {
  std::vector<BlockId>& held = progress_[request].blocks;
  const size_t held_before = held.size();
  if (!source_.Alloc(blocks, urgency, &held)) return false;
  for (size_t i = held_before; i < held.size(); ++i) {
    const auto id = static_cast<size_t>(held[i]);
    if (id >= owner_of_block_.size()) owner_of_block_.resize(id + 1, kNobody);
    owner_of_block_[id] = static_cast<int64_t>(request);
    if (pattern_ == nullptr) continue;
    pattern_->Write(request, i, source_.BeginWrite(held[i]));
    source_.EndWrite(held[i]);
  }
  return true;
}

void Scheduler::ReleaseBlocks(size_t request) {
  std::vector<BlockId>& held = progress_[request].blocks;
  for (size_t i = 0; i < held.size(); ++i) {
    owner_of_block_[held[i]] = kNobody;
    if (pattern_ == nullptr) continue;
    pattern_->Check(request, i, source_.Read(held[i]));
  }
  source_.Free(held);
  held = {};
}

bool Scheduler::IsStale(const Event& event) const {
  const Progress& progress = progress_[event.request];
  return progress.state != State::kRunning ||
         progress.admissions != event.admission;
}

absl::Status Scheduler::CheckInvariants() const {
  size_t owned = 0;
  for (size_t request : running_) {
    const Progress& progress = progress_[request];
    if (progress.state != State::kRunning) {
      return absl::InternalError(
          absl::StrCat("listed as running but is not: request ", request));
    }
    const int64_t tokens = requests_[request].prompt_tokens +
                           progress.generated + progress.segment_tokens;
    if (static_cast<int64_t>(progress.blocks.size()) < BlocksFor(tokens)) {
      return absl::InternalError(
          absl::StrCat("has fewer blocks than tokens: request ", request));
    }
    owned += progress.blocks.size();
    for (BlockId block : progress.blocks) {
      if (owner_of_block_[block] != static_cast<int64_t>(request)) {
        return absl::InternalError(
            absl::StrCat("block has another owner than its holder: block ",
                         block, ", request ", request));
      }
    }
  }
  const auto listed = static_cast<size_t>(
      std::count_if(owner_of_block_.begin(), owner_of_block_.end(),
                    [](int64_t owner) { return owner != kNobody; }));
  if (listed != owned) {
    return absl::InternalError(absl::StrCat(
        "blocks owned but not held: ", listed, " against ", owned));
  }
  for (size_t request : waiting_) {
    if (progress_[request].state != State::kWaiting ||
        !progress_[request].blocks.empty()) {
      return absl::InternalError(
          absl::StrCat("waits but runs or holds blocks: request ", request));
    }
  }
  return absl::OkStatus();
}

}  // namespace kvbroker::replay
