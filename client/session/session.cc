#include "client/session/session.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "broker/base/status_macros.h"
#include "broker/device/device_lost.h"

namespace kvbroker::client {
namespace {

// An answer or its descriptors that miss for so long are asked for again.
constexpr absl::Duration kResendAfter = absl::Seconds(1);
constexpr size_t kRememberDelivered = 256;
// More grants that are not whole than there can be questions.
constexpr size_t kMaxIncoming = 1024;
constexpr absl::Duration kLeaveWithin = absl::Seconds(1);
constexpr int kFencedExitStatus = 86;
// Attempts to connect again come at a quarter of the time away, within these:
// who is away for long is in no hurry, and costs nothing.
constexpr absl::Duration kShortestPause = absl::Milliseconds(10);
constexpr absl::Duration kLongestPause = absl::Milliseconds(500);
// A session that was open for less goes on being away, so that a broker that
// opens sessions only to end them is not pressed.
constexpr absl::Duration kWasOpen = absl::Milliseconds(500);
// What a message may hold (proto/convert.h).
constexpr size_t kPagesPerMessage = 16384;

// Longer than it takes to say that a deadline has passed.
constexpr absl::Duration kAnswerIsLate = absl::Seconds(2);

// The reason and who holds what.
absl::Status InWords(const Refused& refused) {
  std::string text = refused.reason;
  const char* before = "; held by ";
  for (const Holder& holder : refused.holders) {
    absl::StrAppend(&text, before, holder.instance, ": ",
                    FormatBytes(holder.held));
    before = ", ";
  }
  return absl::Status(refused.code, text);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Session>> Session::Create(
    SessionOptions options, const MapperFactory& make_mapper, Clock& clock) {
  std::unique_ptr<Session> session(new Session(std::move(options), clock));
  for (const PoolOptions& pool : session->options_.pools) {
    ASSIGN_OR_RETURN(std::unique_ptr<Mapper> mapper,
                     make_mapper(pool.geometry));
    if (pool.guard) RETURN_IF_ERROR(mapper->Guard());
    if (session->options_.wrap_mapper) {
      mapper = session->options_.wrap_mapper(std::move(mapper));
    }
    ASSIGN_OR_RETURN(std::unique_ptr<Pool> created,
                     Pool::Create(pool, std::move(mapper), *session, clock));
    session->pools_.push_back(std::move(created));
  }
  return session;
}

Session::Session(SessionOptions options, Clock& clock)
    : options_(std::move(options)),
      clock_(clock),
      declared_peak_(options_.declared_peak) {}

Session::~Session() { Close(); }

void Session::Attach(std::unique_ptr<BrokerLink> link, const Nonce& nonce) {
  {
    MutexLock lock(&link_mu_);
    link_ = std::move(link);
  }
  SendOpen(nonce, std::nullopt);
}

void Session::ReconnectWith(Connector connect) {
  connect_ = std::move(connect);
}

void Session::SendOpen(const Nonce& nonce,
                       const std::optional<Resuming>& resuming) {
  kvbroker::Open open;
  open.nonce = nonce;
  open.instance = options_.instance;
  open.member = options_.member;
  open.labels = options_.labels;
  {
    MutexLock lock(&mu_);
    open.declared_peak = declared_peak_;
    // It has been this one's.
    if (resuming && !opened_->instance.empty()) {
      open.instance = opened_->instance;
    }
  }
  open.name_conflict = options_.name_conflict;
  open.min = options_.min;
  open.max = options_.max;
  open.min_fraction = options_.min_fraction;
  open.max_fraction = options_.max_fraction;
  open.weight = options_.weight;
  for (const PoolOptions& pool : options_.pools) {
    open.pools.push_back(pool.geometry);
  }
  open.resuming = resuming;
  Send(std::move(open));
}

void Session::Start() {
  {
    MutexLock lock(&mu_);
    started_ = true;
  }
  worker_ = std::thread([this] { WorkerLoop(); });
}

absl::Status Session::WaitUntilOpen() {
  const absl::Time give_up = absl::Now() + options_.open_timeout;
  MutexLock lock(&mu_);
  while (!opened_ && health_.ok()) {
    if (changed_.WaitWithDeadline(&mu_, give_up) && !opened_ && health_.ok()) {
      return absl::DeadlineExceededError(
          absl::StrCat("the broker did not open the session within ",
                       absl::FormatDuration(options_.open_timeout)));
    }
  }
  return health_;
}

void Session::BeginClose() {
  MutexLock lock(&mu_);
  closing_ = true;
  woken_ = true;
  changed_.SignalAll();
}

bool Session::Left() {
  return pools_left_ && unanswered_.empty() && events_.empty();
}

bool Session::left() {
  MutexLock lock(&mu_);
  return Left();
}

void Session::Close() {
  BeginClose();
  {
    MutexLock lock(&mu_);
    if (std::exchange(closed_, true)) return;
  }
  if (worker_.joinable()) {
    {
      MutexLock lock(&mu_);
      const absl::Time give_up = absl::Now() + kLeaveWithin;
      while (!Left() || working_) {
        if (changed_.WaitWithDeadline(&mu_, give_up)) break;
      }
      stop_ = true;
      changed_.SignalAll();
    }
    worker_.join();
  } else {
    RunOnce();
  }
  std::unique_ptr<BrokerLink> link;
  {
    MutexLock lock(&link_mu_);
    link = std::move(link_);
  }
}

Opened Session::opened() {
  MutexLock lock(&mu_);
  return opened_.value_or(Opened{});
}

bool Session::AwaitMax(Bytes max, absl::Duration timeout) {
  const absl::Time give_up = absl::Now() + timeout;
  MutexLock lock(&mu_);
  while (!closing_ && opened_ && opened_->max != max) {
    if (changed_.WaitWithDeadline(&mu_, give_up)) break;
  }
  return opened_ && opened_->max == max;
}

absl::Status Session::health() {
  for (const std::unique_ptr<Pool>& pool : pools_) {
    absl::Status of_pool = pool->health();
    if (IsDeviceLost(of_pool)) return of_pool;
  }
  MutexLock lock(&mu_);
  if (!health_.ok()) return health_;
  if (!opened_) return absl::UnavailableError("the session is not open yet");
  return absl::OkStatus();
}

Sequence Session::NextSequence() {
  MutexLock lock(&mu_);
  Sequence sequence(++last_sequence_);
  unanswered_.insert(sequence);
  return sequence;
}

void Session::Send(ClientMessage message) {
  if (auto* acquire = std::get_if<Acquire>(&message)) {
    MutexLock lock(&mu_);
    const Sequence waiting =
        unanswered_.empty() ? acquire->sequence
                            : std::min(*unanswered_.begin(), acquire->sequence);
    acquire->acked = Sequence(waiting.value() - 1);
  }
  std::vector<PageName>* given = nullptr;
  PoolId pool;
  if (auto* back = std::get_if<Return>(&message)) {
    given = &back->pages;
    pool = back->pool;
  } else if (auto* answer = std::get_if<ReclaimAnswer>(&message)) {
    given = &answer->given;
    pool = answer->pool;
  }
  MutexLock lock(&link_mu_);
  if (link_ == nullptr) return;
  // What does not fit goes ahead. No other list grows beyond one message: a
  // grant has no more pages than fit.
  while (given != nullptr && given->size() > kPagesPerMessage) {
    const auto rest = given->end() - static_cast<ptrdiff_t>(kPagesPerMessage);
    link_->Send(Return{.pool = pool, .pages = {rest, given->end()}});
    given->erase(rest, given->end());
  }
  link_->Send(std::move(message));
}

void Session::Wake() {
  if (woken_.exchange(true)) return;
  MutexLock lock(&mu_);
  changed_.SignalAll();
}

void Session::Queue(Event event) {
  MutexLock lock(&mu_);
  events_.push_back(std::move(event));
}

void Session::OnMessage(BrokerMessage message) {
  Queue(std::move(message));
  WorkHere();
}

void Session::OnDescriptors(GrantId grant, uint32_t first_handle,
                            std::vector<UniqueFd> descriptors) {
  Queue(Descriptors{grant, first_handle, std::move(descriptors)});
  WorkHere();
}

void Session::OnDisconnected(absl::Status why) {
  Queue(Disconnected{std::move(why)});
  Wake();
}

bool Session::IsForAnyThread(const Event& event) {
  if (std::holds_alternative<Descriptors>(event)) return true;
  const auto* message = std::get_if<BrokerMessage>(&event);
  return message != nullptr && (std::holds_alternative<Granted>(*message) ||
                                std::holds_alternative<Refused>(*message) ||
                                std::holds_alternative<Reclaim>(*message));
}

void Session::WorkHere() {
  // A thread that sleeps takes longer to wake than most of this work takes.
  if (!work_mu_.TryLock()) return Wake();
  if (paused_ > 0) {
    work_mu_.Unlock();
    return Wake();  // Unpause has it done, or Close
  }
  absl::Time due = absl::InfiniteFuture();
  bool worked = false, left = false;
  while (true) {
    std::optional<Event> event;
    {
      MutexLock lock(&mu_);
      left = !started_ || stop_ || closing_ || away_ ||
             (!events_.empty() && !IsForAnyThread(events_.front()));
      if (left || events_.empty()) break;
      event = std::move(events_.front());
      events_.pop_front();
    }
    worked = true;
    woken_ = true;  // who wakes the worker has what it wants from here on
    std::visit([&](auto& kind) { Process(std::move(kind)); }, *event);
  }
  if (worked) {
    woken_ = false;
    due = AskForMissing();
    for (auto& pool : pools_) due = std::min(due, pool->Work());
  }
  work_mu_.Unlock();
  {
    MutexLock lock(&mu_);
    WorkBy(due);
    left |= closing_ || !events_.empty();
  }
  if (left) Wake();
}

void Session::WorkBy(absl::Time due) {
  if (due >= due_) return;
  due_ = due;
  changed_.SignalAll();
}

void Session::WorkerLoop() {
  while (true) {
    {
      MutexLock lock(&mu_);
      working_ = true;
    }
    // What comes up while it works is earlier.
    {
      MutexLock lock(&mu_);
      due_ = absl::InfiniteFuture();
    }
    const absl::Time due = RunOnce();
    MutexLock lock(&mu_);
    working_ = false;
    if (closing_) changed_.SignalAll();
    due_ = std::min(due_, due);
    while (!stop_ && !woken_.load()) {
      const absl::Time now = clock_.Now();
      if (now >= due_) break;
      // CondVar's deadlines are wall time, the session's clock is steady.
      changed_.WaitWithDeadline(&mu_, due_ == absl::InfiniteFuture()
                                          ? due_
                                          : absl::Now() + (due_ - now));
    }
    if (stop_) return;
  }
}

absl::Time Session::RunOnce() {
  MutexLock work(&work_mu_);
  woken_ = false;
  while (true) {
    std::deque<Event> events;
    {
      MutexLock lock(&mu_);
      if (paused_ > 0 && !closing_) return absl::InfiniteFuture();
      events.swap(events_);
    }
    if (events.empty()) break;
    for (Event& event : events) {
      std::visit([&](auto& kind) { Process(std::move(kind)); }, event);
    }
  }
  absl::Time due = std::min(AskForMissing(), Reconnect());
  bool leave;
  {
    MutexLock lock(&mu_);
    leave = closing_;
  }
  // What leaves in the midst of resuming would not be heard.
  leave = leave && (away_ || open_by_ == absl::InfiniteFuture());
  bool left = leave;
  for (auto& pool : pools_) {
    if (leave) pool->Close();
    due = std::min(due, pool->Work());
    left = left && pool->left();
  }
  MutexLock lock(&mu_);
  pools_left_ = left;
  return due;
}

void Session::Pause() {
  MutexLock work(&work_mu_);
  ++paused_;
}

void Session::Unpause() {
  {
    MutexLock work(&work_mu_);
    --paused_;
  }
  Wake();
}

absl::Status Session::MakeRoom(Bytes declared_peak, absl::Duration timeout) {
  if (declared_peak < Bytes(0) || declared_peak > kMaxBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("what is declared must be from 0 to ", kMaxBytes.count(),
                     " bytes; got ", declared_peak.count()));
  }
  kvbroker::MakeRoom asked = {.sequence = NextSequence(),
                              .declared_peak = declared_peak,
                              .deadline = timeout};
  const absl::Time give_up = absl::Now() + timeout + kAnswerIsLate;
  {
    MutexLock lock(&mu_);
    unanswered_.erase(asked.sequence);  // asked and answered by itself
    if (room_) {
      return absl::FailedPreconditionError(
          "another thread waits for room already");
    }
    declared_peak_ = declared_peak;
    if (!health_.ok()) return health_;
    if (!opened_) {
      return absl::UnavailableError("the session is not open yet");
    }
    if ((opened_->feature_bits & kFeatureMakeRoom) == 0) {
      return absl::UnimplementedError(
          "the broker is too old to make room: upgrade it");
    }
    room_.emplace(RoomAsked{asked.sequence, std::nullopt});
  }
  Send(std::move(asked));
  MutexLock lock(&mu_);
  while (!room_->answer && !closing_) {
    if (changed_.WaitWithDeadline(&mu_, give_up)) break;
  }
  absl::Status answer =
      room_->answer.value_or(absl::UnavailableError(
          closing_ ? "the session is being closed"
                   : "the broker did not say that there is room"));
  room_.reset();
  return answer;
}

bool Session::AnswerRoom(Sequence sequence, absl::Status answer) {
  MutexLock lock(&mu_);
  if (!room_ || room_->sequence != sequence) return false;
  room_->answer = std::move(answer);
  changed_.SignalAll();
  return true;
}

Pool* Session::FindPool(PoolId id) {
  auto it = pool_by_id_.find(id);
  return it == pool_by_id_.end() ? nullptr : it->second;
}

void Session::Process(BrokerMessage message) {
  if (away_) return;  // said before the end, or by whom nobody believes
  if (auto* opened = std::get_if<Opened>(&message)) {
    Process(*opened);
  } else if (auto* granted = std::get_if<Granted>(&message)) {
    Pool* pool = FindPool(granted->pool);
    if (pool == nullptr || granted->credit > 0) {
      Answered(granted->sequence);
      if (pool != nullptr) pool->OnCredit(*granted);
      return;
    }
    const GrantId grant = granted->grant;
    if (std::find(delivered_.begin(), delivered_.end(), grant) !=
        delivered_.end()) {
      return;  // sent again
    }
    if (Incoming* incoming = IncomingOf(grant)) {
      incoming->granted = std::move(*granted);
      DeliverIfComplete(grant);
    }
  } else if (auto* made = std::get_if<RoomMade>(&message)) {
    AnswerRoom(made->sequence, absl::OkStatus());
  } else if (auto* refused = std::get_if<Refused>(&message)) {
    if (AnswerRoom(refused->sequence, InWords(*refused))) return;
    Answered(refused->sequence);
    for (auto& pool : pools_) pool->OnRefused(*refused);
  } else if (auto* reclaim = std::get_if<Reclaim>(&message)) {
    if (Pool* pool = FindPool(reclaim->pool)) pool->OnReclaim(*reclaim);
  } else if (auto* limits = std::get_if<LimitChanged>(&message)) {
    if (limits->revision > limit_revision_) {
      limit_revision_ = limits->revision;
      {
        MutexLock lock(&mu_);
        if (opened_) {
          opened_->min = limits->min;
          opened_->max = limits->max;
          opened_->limit_revision = limits->revision;
          changed_.SignalAll();
        }
      }
      for (auto& pool : pools_) pool->OnLimits(limits->max);
    }
    Send(LimitAck{limits->revision});
  } else if (auto* fenced = std::get_if<Fenced>(&message)) {
    if (options_.on_fenced) {
      options_.on_fenced(fenced->reason);
      return;
    }
    std::fprintf(stderr, "kvbroker: the broker ended this process: %s\n",
                 fenced->reason.c_str());
    _exit(kFencedExitStatus);
  }
}

void Session::Process(const Opened& opened) {
  if (!pool_by_id_.empty()) return BreakOff("it opened the session twice");
  if (opened.pools.size() != pools_.size()) {
    return BreakOff(absl::StrCat("it opened ", opened.pools.size(),
                                 " pools, not ", pools_.size()));
  }
  for (size_t i = 0; i < pools_.size(); ++i) {
    if (!pool_by_id_.emplace(opened.pools[i], pools_[i].get()).second) {
      return BreakOff("it gave two pools one id");
    }
  }
  const bool resumes = open_by_ != absl::InfiniteFuture();
  open_by_ = absl::InfiniteFuture();
  if (!options_.backend.empty() && opened.backend != options_.backend) {
    return LeaveAlone(absl::FailedPreconditionError(absl::StrCat(
        "the broker lends ", opened.backend, " memory, and this process maps ",
        options_.backend, " memory: name another broker, or the other kind")));
  }
  if (!resumes) {
    for (auto& pool : pools_) {
      const BlockGeometry blocks = pool->block_geometry();
      const Bytes page = blocks.page_bytes;
      const Bytes block = blocks.block_bytes;
      // Where the broker chooses places, it may choose such a page for ever.
      if (!opened.slab.empty() && page.count() % block.count() != 0 &&
          (block * 2 > page ||
           blocks.BlocksOn(PageIndex(blocks.max_pages - 1)) == 0)) {
        return LeaveAlone(absl::InvalidArgumentError(absl::StrCat(
            "in a slab (", opened.backend,
            ") each page has to hold a whole block: make pages a multiple of the "
            "block, ",
            block.count(), " bytes; they are ", page.count())));
      }
      if (absl::Status begun = pool->mapper().Begin(opened); !begun.ok()) {
        return LeaveAlone(std::move(begun));
      }
    }
  }
  if (resumes && (opened.feature_bits & kFeatureResume) == 0) {
    // Nobody would know whose the pages are that this process maps.
    return LeaveAlone(absl::FailedPreconditionError(
        "the new broker cannot take back what this process holds: restart this "
        "process, or upgrade the broker"));
  }
  limit_revision_ = opened.limit_revision;
  opened_at_ = clock_.Now();
  if (resumes) SayResume();
  for (const auto& [id, pool] : pool_by_id_) {
    pool->OnOpened(
        id, opened.max, opened.capacity,
        opened.slab.empty() ? Pool::Slots::kOwn : Pool::Slots::kBrokers);
  }
  // Last: who waits for it uses the pools at once.
  MutexLock lock(&mu_);
  opened_ = opened;
  health_ = absl::OkStatus();
  changed_.SignalAll();
}

void Session::SayResume() {
  Resume last;
  for (const auto& [id, pool] : pool_by_id_) {
    const std::vector<PageName> held = pool->HeldPages();
    for (size_t i = 0; i < held.size(); i += kPagesPerMessage) {
      if (!last.pages.empty()) Send(std::move(last));
      const auto first = held.begin() + static_cast<ptrdiff_t>(i);
      const size_t count = std::min(kPagesPerMessage, held.size() - i);
      last = Resume{.pool = id,
                    .pages = {first, first + static_cast<ptrdiff_t>(count)}};
    }
    if (last.pages.empty()) last.pool = id;
  }
  last.last = true;
  Send(std::move(last));
}

void Session::DropLink() {
  {
    std::unique_ptr<BrokerLink> link;
    MutexLock lock(&link_mu_);
    link = std::move(link_);
  }
  // What it said last.
  MutexLock lock(&mu_);
  events_.clear();
}

void Session::SayWhyAway(const absl::Status& attempt) {
  MutexLock lock(&mu_);
  health_ = absl::Status(
      away_why_.code(),
      absl::StrCat(away_why_.message(), "; ", attempt.message()));
}

absl::Time Session::PauseBeforeReconnect() {
  const absl::Time now = clock_.Now();
  return try_at_ = now + std::clamp((now - away_since_) / 4, kShortestPause,
                                    kLongestPause);
}

absl::Time Session::Reconnect() {
  if (connect_ == nullptr) return absl::InfiniteFuture();
  const absl::Time now = clock_.Now();
  if (!away_) {
    // A broker that took the connection and does not answer is none.
    if (now < open_by_) return open_by_;
    Queue(Disconnected{absl::DeadlineExceededError(
        "the broker did not open the session again in time")});
    open_by_ = absl::InfiniteFuture();
    return now;
  }
  Resuming resuming;
  {
    MutexLock lock(&mu_);
    // One that never was open is its opener's to try again.
    if (!opened_ || closing_) return absl::InfiniteFuture();
    resuming = {opened_->incarnation, opened_->session};
  }
  if (now < try_at_) return try_at_;
  DropLink();
  absl::StatusOr<Connection> connection = connect_();
  if (!connection.ok()) {
    SayWhyAway(connection.status());
    return PauseBeforeReconnect();
  }
  away_ = false;
  open_by_ = clock_.Now() + options_.open_timeout;
  {
    MutexLock lock(&link_mu_);
    link_ = std::move(connection->link);
  }
  SendOpen(connection->nonce, resuming);
  return open_by_;
}

void Session::Process(Descriptors descriptors) {
  if (away_) return;
  {
    MutexLock lock(&link_mu_);
    if (link_ != nullptr) {
      link_->AcknowledgeDescriptors(
          descriptors.grant,
          static_cast<uint32_t>(descriptors.descriptors.size()));
    }
  }
  if (std::find(delivered_.begin(), delivered_.end(), descriptors.grant) !=
      delivered_.end()) {
    return;
  }
  Incoming* incoming = IncomingOf(descriptors.grant);
  if (incoming == nullptr) return;
  uint64_t ordinal = descriptors.first_handle;
  for (UniqueFd& descriptor : descriptors.descriptors) {
    incoming->descriptors[ordinal++] = std::move(descriptor);
  }
  DeliverIfComplete(descriptors.grant);
}

Session::Incoming* Session::IncomingOf(GrantId grant) {
  auto [it, first] = incoming_.try_emplace(grant);
  if (first) {
    if (incoming_.size() > kMaxIncoming) {
      BreakOff("it left too many grants incomplete");
      return nullptr;
    }
    it->second.since = clock_.Now();
    MutexLock lock(&mu_);
    it->second.asked_by = Sequence(last_sequence_);
  }
  return &it->second;
}

void Session::DeliverIfComplete(GrantId grant) {
  auto it = incoming_.find(grant);
  Incoming& incoming = it->second;
  if (!incoming.granted) return;
  Pool* pool = FindPool(incoming.granted->pool);
  const size_t handles = incoming.granted->pages.size() *
                         pool->options().geometry.handles_per_page;
  if (!incoming.descriptors.empty() &&
      incoming.descriptors.rbegin()->first >= handles) {
    return BreakOff("it sent descriptors beyond their grant");
  }
  if (incoming.descriptors.size() < handles) return;
  Incoming complete = std::move(incoming);
  incoming_.erase(it);
  delivered_.push_back(grant);
  if (delivered_.size() > kRememberDelivered) delivered_.pop_front();
  Answered(complete.granted->sequence);
  std::vector<UniqueFd> descriptors;
  descriptors.reserve(handles);
  for (auto& [ordinal, descriptor] : complete.descriptors) {
    descriptors.push_back(std::move(descriptor));
  }
  pool->OnGranted(*complete.granted, std::move(descriptors));
}

absl::Time Session::AskForMissing() {
  const absl::Time now = clock_.Now();
  absl::Time due = absl::InfiniteFuture();
  for (auto it = incoming_.begin(); it != incoming_.end();) {
    Incoming& incoming = it->second;
    if (now >= incoming.since + kResendAfter) {
      // Descriptors do not say what question they belong to.
      const std::vector<Sequence> missing =
          incoming.granted ? std::vector{incoming.granted->sequence}
                           : Unanswered(incoming.asked_by);
      if (missing.empty()) {
        it = incoming_.erase(it);  // to none
        continue;
      }
      for (Sequence sequence : missing) Send(Resend{sequence});
      incoming.since = now;
    }
    due = std::min(due, incoming.since + kResendAfter);
    ++it;
  }
  return due;
}

void Session::Answered(Sequence sequence) {
  MutexLock lock(&mu_);
  unanswered_.erase(sequence);
}

std::vector<Sequence> Session::Unanswered(Sequence last) {
  MutexLock lock(&mu_);
  return {unanswered_.begin(), unanswered_.upper_bound(last)};
}

void Session::LeaveAlone(absl::Status why) {
  connect_ = nullptr;
  DropLink();
  Process(Disconnected{std::move(why)});
}

void Session::BreakOff(std::string_view what) {
  Process(Disconnected{absl::InternalError(
      absl::StrCat("the broker broke the protocol: ",
                   absl::string_view(what.data(), what.size())))});
}

void Session::Process(const Disconnected& disconnected) {
  if (away_) return;  // broken with before
  incoming_.clear();
  delivered_.clear();  // another broker counts its grants anew
  pool_by_id_.clear();
  away_ = true;
  open_by_ = absl::InfiniteFuture();
  const absl::Time now = clock_.Now();
  if (now - opened_at_ > kWasOpen || away_since_ == absl::InfinitePast()) {
    away_since_ = now;
  }
  PauseBeforeReconnect();
  absl::Status why = disconnected.why.ok()
                         ? absl::UnavailableError("the broker is gone")
                         : disconnected.why;
  bool memory_gone;
  {
    MutexLock lock(&mu_);
    memory_gone = opened_ && !opened_->slab.empty();
  }
  if (memory_gone) {
    connect_ = nullptr;
    why = absl::FailedPreconditionError(absl::StrCat(
        "the broker is gone, and the memory that it lent with it (its backend "
        "is ",
        opened().backend, "): restart this process; ", why.message()));
  }
  for (auto& pool : pools_) {
    pool->OnDisconnected(
        why, memory_gone ? Pool::Memory::kGone : Pool::Memory::kStays);
  }
  away_why_ = why;
  MutexLock lock(&mu_);
  health_ = why;
  if (room_ && !room_->answer) room_->answer = why;
  unanswered_.clear();
  changed_.SignalAll();
}

}  // namespace kvbroker::client
