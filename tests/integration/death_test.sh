#!/usr/bin/env bash
# Engines are killed; what they held comes back, and the others stay whole.
. "$(dirname "$0")/broker_fixture.sh"

start_broker --capacity 48M
start steady "$REPLAY" --name steady --address "$ADDRESS" --speedup 40 \
  --trace builtin:conv --window 600 --json
STEADY=$LAST
for round in 1 2 3 4 5; do
  start_replay "victim$round" --trace builtin:conv --seed "$round"
  VICTIM=$LAST
  eventually 30 at_least "victim$round" held_bytes 1 ||
    fail "victim$round does not grow"
  kill -9 "$VICTIM"
  wait "$VICTIM" 2>/dev/null || true
  eventually 10 bash -c "! '$KVCTL' --address '$ADDRESS' list --json |
      grep -q 'victim$round'" || fail "victim$round is still listed"
done
wait "$STEADY" || fail "the survivor failed (see steady.log)"
grep -q '"integrity_errors":0' <(tr -d ' ' <"$WORK/steady.log") ||
  fail "the survivor's data is not whole"
kvctl list --json | grep -q steady && fail "an engine that left is listed"
echo PASSED
