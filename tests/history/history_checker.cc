#include "tests/history/history_checker.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace kvbroker {
namespace {

// What several threads of a broker that was killed may have decided, written
// and not written: more events behind a gap are a hole in the history.
constexpr int64_t kCutOff = 256;

std::string Text(PageName page) {
  return absl::StrCat("page ", page.index.value(), " (generation ",
                      page.generation.value(), ")");
}

}  // namespace

std::string_view NameOf(Rule rule) {
  switch (rule) {
    case Rule::kOneOwner:
      return "one-owner";
    case Rule::kTenant:
      return "tenant";
    case Rule::kLent:
      return "lent";
    case Rule::kMax:
      return "max";
    case Rule::kMin:
      return "min";
    case Rule::kCapacity:
      return "capacity";
    case Rule::kSums:
      return "sums";
    case Rule::kGeneration:
      return "generation";
    case Rule::kDeath:
      return "death";
    case Rule::kComplete:
      return "complete";
  }
  return "?";
}

void HistoryChecker::Break(Rule rule, std::string what,
                           std::vector<EventRef> events) {
  const int64_t count = ++statistics_.violations[static_cast<size_t>(rule)];
  if (static_cast<size_t>(count) > options_.keep) return;
  violations_.push_back({rule, std::move(what), std::move(events)});
}

// ---- the broker -------------------------------------------------------------

void HistoryChecker::Add(EventRef ref, const HistoryEvent& event) {
  ++statistics_.events;
  if (!InOrder(ref, event)) return;
  CheckDeadlines(ref, event.at);
  switch (event.kind) {
    case HistoryEvent::Kind::kStart:
      break;
    case HistoryEvent::Kind::kOpen:
      Open(ref, event);
      break;
    case HistoryEvent::Kind::kLimits:
      Limits(ref, event);
      break;
    case HistoryEvent::Kind::kGrant:
      Grant(ref, event);
      break;
    case HistoryEvent::Kind::kBack:
      Back(ref, event);
      break;
    case HistoryEvent::Kind::kResume:
      Resume(ref, event);
      break;
    case HistoryEvent::Kind::kCredit:
      Credit(ref, event);
      break;
    case HistoryEvent::Kind::kOrder:
      Order(ref, event);
      break;
    case HistoryEvent::Kind::kGone:
      Gone(ref, event);
      break;
    case HistoryEvent::Kind::kRefuse:
    case HistoryEvent::Kind::kHangUp:
    case HistoryEvent::Kind::kReleased:
    case HistoryEvent::Kind::kDrain:
      break;
  }
  NoteReleased(event);
  CheckSums(ref, event);
}

bool HistoryChecker::InOrder(EventRef ref, const HistoryEvent& event) {
  if (event.kind == HistoryEvent::Kind::kStart) {
    Start(event);
  } else if (!known_) {
    ++after_gap_;
    if (after_gap_ == kCutOff || event.kind == HistoryEvent::Kind::kDrain) {
      Break(Rule::kComplete,
            absl::StrCat("events of the broker are missing after number ",
                         last_number_, ", though it went on"),
            {last_event_, ref});
    }
    return false;
  } else if (event.number != last_number_ + 1) {
    known_ = false;
    after_gap_ = 1;
    statistics_.unjudged_deaths += static_cast<int64_t>(deadlines_.size());
    deadlines_.clear();
    if (event.kind == HistoryEvent::Kind::kDrain) {
      Break(Rule::kComplete,
            absl::StrCat("events of the broker are missing after number ",
                         last_number_, ", though it went on"),
            {last_event_, ref});
    }
    return false;
  }
  last_number_ = event.number;
  last_event_ = ref;
  return true;
}

void HistoryChecker::Start(const HistoryEvent& event) {
  statistics_.unjudged_deaths += static_cast<int64_t>(deadlines_.size());
  known_ = true;
  after_gap_ = 0;
  capacity_ = event.capacity;
  lent_ = credit_ = used_ = Bytes(0);
  instances_.clear();
  sessions_.clear();
  pools_.clear();
  freeing_.clear();
  deadlines_.clear();
  for (auto& [pid, process] : processes_) process.session.reset();
}

void HistoryChecker::Open(EventRef ref, const HistoryEvent& event) {
  Limits(ref, event);
  const InstanceKey key(event.tenant, event.instance);
  Instance& instance = instances_[key];
  ++instance.sessions;
  instance.pools += static_cast<int>(event.pools.size());
  Session& session = sessions_[event.session];
  session.instance = key;
  session.pid = event.pid;
  session.opened = ref;
  for (const HistoryEvent::Pool& opened : event.pools) {
    session.pools.push_back(opened.id);
    Pool& pool = pools_[opened.id];
    pool.session = event.session;
    pool.page = opened.page_bytes;
  }
  if (auto it = processes_.find(event.pid); it != processes_.end()) {
    it->second.session = event.session;
  }
}

void HistoryChecker::Limits(EventRef ref, const HistoryEvent& event) {
  Instance& instance = instances_[{event.tenant, event.instance}];
  instance.min = event.min;
  instance.max = event.max;
  instance.limits = ref;
}

HistoryChecker::Session* HistoryChecker::FindSession(
    EventRef ref, const HistoryEvent& event) {
  auto it = sessions_.find(event.session);
  if (it != sessions_.end()) return &it->second;
  Break(Rule::kComplete,
        absl::StrCat("session ", event.session.value(),
                     " was not opened, or has ended"),
        {ref});
  return nullptr;
}

HistoryChecker::Pool* HistoryChecker::FindPool(EventRef ref,
                                               const HistoryEvent& event) {
  if (FindSession(ref, event) == nullptr) return nullptr;
  auto it = pools_.find(event.pool);
  if (it != pools_.end() && it->second.session == event.session) {
    return &it->second;
  }
  Break(Rule::kComplete,
        absl::StrCat("pool ", event.pool.value(), " is none of session ",
                     event.session.value()),
        {ref});
  return nullptr;
}

void HistoryChecker::Grant(EventRef ref, const HistoryEvent& event) {
  Pool* pool = FindPool(ref, event);
  if (pool == nullptr) return;
  Instance& instance = instances_[sessions_.at(event.session).instance];
  ++statistics_.grants;
  for (PageName page : event.pages) {
    ++statistics_.pages;
    auto [it, first] = pool->slots.try_emplace(page.index);
    Slot& slot = it->second;
    if (slot.lent) {
      Break(Rule::kGeneration,
            absl::StrCat(Text(page), " of pool ", event.pool.value(),
                         " is granted, though its slot is not empty"),
            {slot.event, ref});
    } else if (!first && page.generation <= slot.generation) {
      Break(Rule::kGeneration,
            absl::StrCat(Text(page), " of pool ", event.pool.value(),
                         " has had this generation before"),
            {slot.event, ref});
    }
    if (!slot.lent) {
      ++pool->held;
      instance.lent += pool->page;
      lent_ += pool->page;
    }
    slot = {true, page.generation, ref};
  }
  instance.credit -= event.drawn;
  credit_ -= event.drawn;
  CheckAbove(ref, instance, event);
}

void HistoryChecker::CheckAbove(EventRef ref, const Instance& instance,
                                const HistoryEvent& event) {
  if (instance.held() <= instance.max) return;
  Break(
      Rule::kMax,
      absl::StrCat(event.instance, " gets more than its max: then it holds ",
                   instance.held().count(), " bytes of ", instance.max.count()),
      {instance.limits, ref});
}

absl::flat_hash_map<PageIndex, HistoryChecker::Mapping>*
HistoryChecker::MappingsOf(const Session& session, PoolId pool) {
  auto process = processes_.find(session.pid);
  if (process == processes_.end() || !process->second.session ||
      &sessions_.at(*process->second.session) != &session) {
    return nullptr;
  }
  const auto place =
      std::find(session.pools.begin(), session.pools.end(), pool);
  auto found = process->second.pools.find(
      static_cast<uint32_t>(place - session.pools.begin()));
  return found == process->second.pools.end() ? nullptr : &found->second;
}

void HistoryChecker::Back(EventRef ref, const HistoryEvent& event) {
  Pool* pool = FindPool(ref, event);
  if (pool == nullptr) return;
  const Session& session = sessions_.at(event.session);
  Instance& instance = instances_[session.instance];
  const auto* mappings = MappingsOf(session, event.pool);
  for (PageName page : event.pages) {
    Slot& slot = pool->slots[page.index];
    if (!slot.lent || slot.generation != page.generation) {
      Break(Rule::kGeneration,
            absl::StrCat(Text(page), " of pool ", event.pool.value(),
                         " is taken back, though it is not lent"),
            {slot.event, ref});
      continue;
    }
    slot.lent = false;
    slot.event = ref;
    --pool->held;
    instance.lent -= pool->page;
    lent_ -= pool->page;
    if (mappings == nullptr) continue;
    if (auto it = mappings->find(page.index); it != mappings->end()) {
      Break(Rule::kLent,
            absl::StrCat(Text(page), " of pool ", event.pool.value(),
                         " is taken back, though pid ", session.pid,
                         " maps it still"),
            {it->second.event, ref});
    }
  }
}

void HistoryChecker::Resume(EventRef ref, const HistoryEvent& event) {
  Pool* pool = FindPool(ref, event);
  if (pool == nullptr) return;
  const Session& session = sessions_.at(event.session);
  Instance& instance = instances_[session.instance];
  for (PageName page : event.pages) {
    Slot& slot = pool->slots[page.index];
    if (slot.lent) {
      Break(Rule::kGeneration,
            absl::StrCat(Text(page), " of pool ", event.pool.value(),
                         " is resumed, though its slot is not empty"),
            {slot.event, ref});
      continue;
    }
    slot = {true, page.generation, ref};
    ++pool->held;
    instance.lent += pool->page;
    lent_ += pool->page;
    if (event.from == PoolId()) continue;
    auto from = pools_.find(event.from);
    const Session* earlier =
        from == pools_.end() ? nullptr : &sessions_.at(from->second.session);
    auto found = from == pools_.end()
                     ? absl::flat_hash_map<PageIndex, Slot>::iterator()
                     : from->second.slots.find(page.index);
    if (earlier == nullptr || earlier->pid != session.pid ||
        found == from->second.slots.end() || !found->second.lent ||
        found->second.generation != page.generation) {
      Break(Rule::kGeneration,
            absl::StrCat(Text(page), " is resumed out of pool ",
                         event.from.value(), ", which did not lend it to pid ",
                         session.pid),
            {ref});
      continue;
    }
    Instance& loser = instances_[earlier->instance];
    found->second.lent = false;
    found->second.event = ref;
    --from->second.held;
    loser.lent -= from->second.page;
    lent_ -= from->second.page;
  }
}

void HistoryChecker::Credit(EventRef ref, const HistoryEvent& event) {
  Instance& instance = instances_[{event.tenant, event.instance}];
  const bool more = event.instance_credit > instance.credit;
  credit_ += event.instance_credit - instance.credit;
  instance.credit = event.instance_credit;
  if (more) CheckAbove(ref, instance, event);
}

void HistoryChecker::Order(EventRef ref, const HistoryEvent& event) {
  const Pool* pool = FindPool(ref, event);
  if (pool == nullptr || event.hold_at_most == kHoldAny) return;
  ++statistics_.orders;
  const Instance& instance = instances_[sessions_.at(event.session).instance];
  // What others get, by the broker's word, which knows for whom it asks.
  const Bytes left_by_others = instance.held() - event.for_others;
  if (event.for_others > Bytes(0) && left_by_others < instance.min) {
    Break(Rule::kMin,
          absl::StrCat(event.instance, " is asked to give others ",
                       event.for_others.count(), " bytes, which leaves ",
                       left_by_others.count(), " of its min of ",
                       instance.min.count()),
          {instance.limits, ref});
    return;
  }
  // What the order itself leaves. An instance gives for its own sake, too: from
  // one of its pools to another, and to come down to its `max`, which takes
  // less than a page too much.
  if (instance.pools > 1) return;
  const Bytes left =
      instance.held() -
      pool->page * std::max<PageCount>(pool->held - event.hold_at_most, 0);
  const bool to_its_max =
      instance.held() > instance.max && left + pool->page > instance.max;
  if (left < instance.held() && left < instance.min && !to_its_max) {
    Break(Rule::kMin,
          absl::StrCat(event.instance, " is ordered down to ", left.count(),
                       " bytes, below its min of ", instance.min.count()),
          {instance.limits, ref});
  }
}

void HistoryChecker::Gone(EventRef ref, const HistoryEvent& event) {
  Session* session = FindSession(ref, event);
  if (session == nullptr) return;
  Instance& instance = instances_[session->instance];
  Bytes held;
  for (PoolId id : session->pools) {
    held += pools_.at(id).page * pools_.at(id).held;
  }
  if (held != event.bytes) {
    Break(
        Rule::kSums,
        absl::StrCat("session ", event.session.value(), " ends with ",
                     event.bytes.count(), " bytes, it was lent ", held.count()),
        {session->opened, ref});
  }
  if (event.why == "resumed") CheckLeftBehind(ref, *session);
  // The session may end with nothing lent before its process does.
  const bool process_gone = event.why == "process gone";
  if (auto it = processes_.find(session->pid);
      it != processes_.end() && it->second.session == event.session) {
    for (auto& [number, mappings] : it->second.pools) {
      if (!process_gone && !mappings.empty()) {
        Break(Rule::kLent,
              absl::StrCat("pid ", session->pid,
                           " maps pages, though its session has ended"),
              {mappings.begin()->second.event, ref});
      }
      if (process_gone) EndMappings(mappings);
    }
    it->second.session.reset();
  }
  instance.lent -= held;
  lent_ -= held;
  --instance.sessions;
  instance.pools -= static_cast<int>(session->pools.size());
  if (instance.sessions == 0) {
    credit_ -= instance.credit;
    instance.credit = Bytes(0);
  }
  if (held > Bytes(0) && event.releasing > Bytes(0)) {
    freeing_.push_back({event.session, session->pid, event.releasing, ref});
  }
  for (PoolId id : session->pools) pools_.erase(id);
  sessions_.erase(event.session);
}

void HistoryChecker::CheckLeftBehind(EventRef ref, const Session& earlier) {
  auto process = processes_.find(earlier.pid);
  if (process == processes_.end() || !process->second.session) return;
  const Session& later = sessions_.at(*process->second.session);
  for (auto& [number, mappings] : process->second.pools) {
    if (number >= earlier.pools.size() || number >= later.pools.size())
      continue;
    const Pool& kept = pools_.at(later.pools[number]);
    for (const auto& [index, slot] : pools_.at(earlier.pools[number]).slots) {
      auto mapping = mappings.find(index);
      if (!slot.lent || mapping == mappings.end()) continue;
      auto now = kept.slots.find(index);
      if (now != kept.slots.end() && now->second.lent) continue;
      Break(Rule::kLent,
            absl::StrCat("page ", index.value(), " of pid ", earlier.pid,
                         " is given up at its resumption, though it is mapped"),
            {mapping->second.event, ref});
    }
  }
}

void HistoryChecker::NoteReleased(const HistoryEvent& event) {
  for (Freeing& freeing : freeing_) {
    if (event.kind == HistoryEvent::Kind::kReleased) {
      freeing.ahead -= event.bytes;
    }
  }
  std::erase_if(freeing_, [&](const Freeing& freeing) {
    return freeing.ahead <= Bytes(0) || event.releasing == Bytes(0);
  });
  std::erase_if(deadlines_, [&](const Deadline& deadline) {
    const bool freed =
        !sessions_.contains(deadline.session) &&
        std::none_of(freeing_.begin(), freeing_.end(),
                     [&](const Freeing& freeing) {
                       return freeing.session == deadline.session;
                     });
    statistics_.deaths += freed;
    return freed;
  });
}

void HistoryChecker::CheckDeadlines(EventRef ref, absl::Time now) {
  std::erase_if(deadlines_, [&](const Deadline& deadline) {
    if (now <= deadline.due) return false;
    ++statistics_.deaths;
    Break(Rule::kDeath,
          absl::StrCat("what session ", deadline.session.value(),
                       " held is not free ",
                       absl::FormatDuration(options_.free_within),
                       " after its process's end"),
          {deadline.exited, ref});
    return true;
  });
}

void HistoryChecker::CheckSums(EventRef ref, const HistoryEvent& event) {
  if (lent_ != event.lent || credit_ != event.credit) {
    Break(Rule::kSums,
          absl::StrCat("the broker counts ", event.lent.count(),
                       " bytes lent and ", event.credit.count(),
                       " set aside; its grants and returns come to ",
                       lent_.count(), " and ", credit_.count()),
          {ref});
    lent_ = event.lent;
    credit_ = event.credit;
  }
  const Bytes used = lent_ + credit_ + event.stock + event.releasing;
  const bool grew = used > used_ && event.kind != HistoryEvent::Kind::kResume;
  used_ = used;
  if ((used > capacity_ && grew) || event.stock < Bytes(0) ||
      event.releasing < Bytes(0)) {
    Break(Rule::kCapacity,
          absl::StrCat(lent_.count(), " lent, ", credit_.count(),
                       " set aside, ", event.stock.count(), " in stock, ",
                       event.releasing.count(), " being released: ",
                       used.count(), " bytes of ", capacity_.count()),
          {ref});
  }
  if (event.instance.empty()) return;
  Instance& instance = instances_[{event.tenant, event.instance}];
  if (instance.held() != event.held ||
      instance.credit != event.instance_credit || instance.min != event.min ||
      instance.max != event.max) {
    Break(Rule::kSums,
          absl::StrCat("by the broker's word ", event.instance, " holds ",
                       event.held.count(), " bytes with min ",
                       event.min.count(), " and max ", event.max.count(),
                       "; by what it did, ", instance.held().count(), " with ",
                       instance.min.count(), " and ", instance.max.count()),
          {instance.limits, ref});
    instance.credit = event.instance_credit;
    instance.lent = event.held - event.instance_credit;
    instance.min = event.min;
    instance.max = event.max;
  }
}

// ---- the processes ----------------------------------------------------------

void HistoryChecker::EndMapping(const Mapping& mapping) {
  for (const client::MemoryIdentity& identity : mapping.memory) {
    Memory& memory = memory_[identity];
    // Where it was mapped twice the second one counts.
    if (memory.mapped_by == mapping.event) memory.mapped = false;
  }
}

void HistoryChecker::EndMappings(
    absl::flat_hash_map<PageIndex, Mapping>& mappings) {
  for (const auto& [page, mapping] : mappings) EndMapping(mapping);
  mappings.clear();
}

void HistoryChecker::Add(EventRef ref, const client::MappingEvent& event) {
  ++statistics_.events;
  Process& process = processes_[event.pid];
  switch (event.kind) {
    case client::MappingEvent::Kind::kPool:
      // The kernel gives a number to another process only after the end of the
      // one that had it.
      if (event.pool == 0) {
        for (auto& [number, mappings] : process.pools) EndMappings(mappings);
        process = Process();
      }
      process.pools[event.pool];
      break;
    case client::MappingEvent::Kind::kMap:
      Map(ref, event);
      break;
    case client::MappingEvent::Kind::kUnmap: {
      auto& mappings = process.pools[event.pool];
      auto it = mappings.find(event.page);
      if (it == mappings.end()) {
        Break(Rule::kComplete,
              absl::StrCat("page ", event.page.value(), " of pid ", event.pid,
                           " is unmapped, though it was not mapped"),
              {ref});
        break;
      }
      EndMapping(it->second);
      mappings.erase(it);
      break;
    }
    case client::MappingEvent::Kind::kClosed:
      EndMappings(process.pools[event.pool]);
      break;
  }
}

void HistoryChecker::Map(EventRef ref, const client::MappingEvent& event) {
  ++statistics_.intervals;
  statistics_.processes += mapped_once_.insert(event.pid).second;
  Process& process = processes_[event.pid];
  auto& mappings = process.pools[event.pool];
  if (auto it = mappings.find(event.page); it != mappings.end()) {
    Break(Rule::kOneOwner,
          absl::StrCat("pid ", event.pid, " maps two pages at ",
                       event.page.value()),
          {it->second.event, ref});
    EndMapping(it->second);
  }
  const Session* session = nullptr;
  if (process.session) session = &sessions_.at(*process.session);
  const std::string* tenant =
      session == nullptr
          ? nullptr
          : &tenants_.try_emplace(session->instance.first).first->first;
  for (const client::MemoryIdentity& identity : event.memory) {
    Memory& memory = memory_[identity];
    if (memory.mapped) {
      Break(Rule::kOneOwner,
            absl::StrCat("memory ", absl::Hex(identity.device), ":",
                         absl::Hex(identity.inode),
                         " is mapped in two places at the same time"),
            {memory.mapped_by, ref});
    }
    statistics_.passed_on += memory.pid != 0 && memory.pid != event.pid;
    memory.mapped = true;
    memory.mapped_by = ref;
    memory.pid = event.pid;
    if (tenant == nullptr || memory.tenant == tenant) continue;
    if (memory.tenant != nullptr) {
      Break(Rule::kTenant,
            absl::StrCat("memory ", absl::Hex(identity.device), ":",
                         absl::Hex(identity.inode), " passes from tenant ",
                         *memory.tenant, " to ", *tenant),
            {memory.first_of_tenant, ref});
    }
    memory.tenant = tenant;
    memory.first_of_tenant = ref;
  }
  mappings[event.page] = {event.memory, ref};

  if (session == nullptr) {
    ++statistics_.unmatched_mappings;
    return;
  }
  if (!known_) return;
  if (event.pool >= session->pools.size()) {
    Break(Rule::kLent,
          absl::StrCat("pid ", event.pid, " maps into pool ", event.pool,
                       ", its session has ", session->pools.size()),
          {session->opened, ref});
    return;
  }
  const Pool& pool = pools_.at(session->pools[event.pool]);
  auto slot = pool.slots.find(event.page);
  if (slot != pool.slots.end() && slot->second.lent) return;
  std::vector<EventRef> events = {ref};
  if (slot != pool.slots.end())
    events.insert(events.begin(), slot->second.event);
  Break(Rule::kLent,
        absl::StrCat("pid ", event.pid, " maps page ", event.page.value(),
                     " of pool ", session->pools[event.pool].value(),
                     ", which is not lent to it"),
        std::move(events));
}

void HistoryChecker::Add(EventRef ref, const ProcessExited& event) {
  ++statistics_.events;
  if (auto it = processes_.find(event.pid); it != processes_.end()) {
    for (auto& [number, mappings] : it->second.pools) EndMappings(mappings);
  }
  if (!known_) {
    ++statistics_.unjudged_deaths;
    return;
  }
  const absl::Time due = event.at + options_.free_within;
  bool waits = false;
  for (const auto& [id, session] : sessions_) {
    if (session.pid != event.pid) continue;
    deadlines_.push_back({id, due, ref});
    waits = true;
  }
  for (const Freeing& freeing : freeing_) {
    if (freeing.pid != event.pid) continue;
    deadlines_.push_back({freeing.session, due, ref});
    waits = true;
  }
  statistics_.deaths += !waits;  // free already
}

void HistoryChecker::Finish() {
  statistics_.unjudged_deaths += static_cast<int64_t>(deadlines_.size());
  deadlines_.clear();
}

}  // namespace kvbroker
