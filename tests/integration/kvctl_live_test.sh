#!/usr/bin/env bash
# kvctl against two live engines: what operators type, and what happens then.
. "$(dirname "$0")/broker_fixture.sh"

start_broker --capacity 64M
start_replay chat --trace builtin:conv
start_replay coder --trace builtin:code
eventually 30 at_least chat used_bytes 8000000 || fail "chat does not grow"
eventually 30 at_least coder limit_bytes 1 || fail "coder is not listed"

# A limit holds under load, whatever is in use; and growth resumes.
kvctl limit chat 4,000,000 >"$WORK/limited"
grep -q '4,\?000,\?000' "$WORK/limited" || fail "limit does not echo the bytes"
[ "$(field chat limit_bytes)" = 4000000 ] || fail "the limit is not to the byte"
eventually 10 at_most chat held_bytes 4000000 || fail "the limit does not hold"
for _ in 1 2 3 4 5 6 7 8 9 10; do
  at_most chat held_bytes 4000000 || fail "chat grew above its limit"
  sleep 0.05
done
kvctl limit chat 64M >/dev/null
eventually 30 at_least chat held_bytes 4500000 || fail "growth does not resume"

kvctl limit chat 0 >/dev/null
[ "$(field chat limit_bytes)" = 0 ] || fail "0 is not a limit"
eventually 10 at_most chat held_bytes 0 || fail "a limit of 0 leaves memory"
kvctl limit-percent chat 50 >/dev/null
eventually 30 at_least chat held_bytes 1 || fail "percent does not lift the limit"

kvctl policy chat --min 16M --weight 2 >/dev/null
[ "$(field chat min_bytes)" = 16777216 ] || fail "min is not set"
kvctl explain chat >"$WORK/explained"
grep -q 'min 16 MiB' "$WORK/explained" || fail "explain does not explain"
kvctl list >"$WORK/list"
grep -q chat "$WORK/list" && grep -q coder "$WORK/list" || fail "list lacks one"

# What is wrong is said, on stderr, with the status that scripts look at.
exits 2 kvctl limit chat 12parsecs
exits 2 kvctl limit chat -5
exits 2 kvctl limit-percent chat 101
exits 2 kvctl limit chat
exits 2 kvctl frobnicate
exits 1 kvctl limit nobody 1G
grep -q chat "$WORK/stderr" && grep -q coder "$WORK/stderr" ||
  fail "an unknown name does not list those that exist"
exits 1 kvctl explain nobody
exits 1 kvctl delete chat
grep -q "live" "$WORK/stderr" || fail "delete does not say why not"
exits 1 "$KVCTL" --address "$WORK/nowhere" list

# Guarantees that do not fit are refused.
exits 1 kvctl policy coder --min 60M
grep -qi "guaranteed" "$WORK/stderr" || fail "min above capacity: unclear"

# A limit for an engine that comes later, by whom it is set.
exits 1 kvctl limit later 8,000,000
kvctl limit later 8,000,000 --preset >/dev/null || fail "preset is refused"
start_replay later --trace builtin:conv
LATER=$LAST
eventually 30 at_least later held_bytes 1 || fail "later gets nothing"
[ "$(field later limit_bytes)" = 8000000 ] || fail "the preset is not its limit"
at_most later held_bytes 8000000 || fail "later has more than its preset"
kill -9 "$LATER"

# An operator's limit outlives the process; then it can be forgotten.
kill -9 "${CHILDREN[1]}"
eventually 10 at_most chat held_bytes 0 || fail "a killed engine keeps memory"
[ "$(field chat pids)" = "[]" ] || fail "a dead process is listed"
exits 0 kvctl delete chat
[ -z "$(field chat limit_bytes)" ] || fail "delete does not forget"

# The broker leaves at once when told to, and the engine runs on.
kill -TERM "$BROKER"
eventually 10 bash -c "! kill -0 $BROKER 2>/dev/null" || fail "SIGTERM is ignored"
kill -0 "${CHILDREN[2]}" || fail "the engine died with its broker"
echo PASSED
