// Core: the history that it leaves, where somebody wants one.
#include "broker/core/core.h"

namespace kvbroker {

HistoryEvent* Core::Record(HistoryEvent::Kind kind, Actions& actions) {
  if (!options_.history) return nullptr;
  HistoryEvent& event = actions.history.emplace_back();
  event.kind = kind;
  event.number = ++recorded_;
  event.at = Now();
  event.lent = ledger_.lent();
  event.credit = ledger_.credit();
  event.stock = ledger_.stock() + ledger_.stocking();
  event.releasing = ledger_.releasing();
  return &event;
}

HistoryEvent* Core::Record(HistoryEvent::Kind kind,
                           const LedgerInstance& instance, Actions& actions) {
  HistoryEvent* event = Record(kind, actions);
  if (event == nullptr) return nullptr;
  event->tenant = instance.tenant;
  event->instance = instance.name;
  event->held = instance.held;
  event->instance_credit = instance.credit;
  event->min = instance.min;
  event->max = instance.max;
  return event;
}

HistoryEvent* Core::Record(HistoryEvent::Kind kind, const LedgerPool& pool,
                           Actions& actions) {
  HistoryEvent* event = Record(kind, ledger_.InstanceOf(pool), actions);
  if (event == nullptr) return nullptr;
  event->session = pool.session;
  event->pool = pool.id;
  return event;
}

}  // namespace kvbroker
