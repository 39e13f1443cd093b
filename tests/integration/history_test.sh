#!/usr/bin/env bash
# Engines under changing limits, some killed: what everybody did is recorded and
# checked afterwards against what is promised (tests/history).
. "$(dirname "$0")/broker_fixture.sh"
CHECK=$RUNFILES/tests/history/history_check

# engine NAME OPTION...: records what it maps in NAME.history.
engine() {
  local name=$1
  shift
  start_replay "$name" --history "$WORK/$name.history" "$@"
}

# exited PID: its end is recorded, once it is over.
exited() {
  wait "$1" 2>/dev/null || true
  python3 -c 'import sys, time
print("{\"event\":\"exited\",\"at\":%d,\"pid\":%s}" % (time.monotonic_ns(), sys.argv[1]))
' "$1" >>"$WORK/test.history"
}

# recorded EVENT N: the broker has recorded so many of them.
recorded() {
  [ "$(grep -c "\"event\":\"$1\"" "$WORK/broker.history")" -ge "$2" ]
}

start_broker --capacity 16M --history-file "$WORK/broker.history"
engine chat --trace builtin:conv --rate-scale 2
CHAT=$LAST
engine coder --trace builtin:code --rate-scale 4 --max 14M
CODER=$LAST
for round in 1 2 3 4; do
  engine "victim$round" --trace builtin:conv --seed "$round" --weight 2
  VICTIM=$LAST
  eventually 30 at_least "victim$round" held_bytes 2000000 ||
    fail "victim$round does not grow"
  kvctl limit chat $((round * 2))M >/dev/null
  kvctl policy coder --min $((round * 2))M >/dev/null
  eventually 30 at_most chat held_bytes $((round * 2 << 20)) ||
    fail "chat's limit does not hold"
  kvctl limit chat 16M >/dev/null
  eventually 60 recorded order $((round * 30)) || fail "nobody is asked to give"
  kill -9 "$VICTIM"
  exited "$VICTIM"
  kvctl policy coder --min 0 >/dev/null
done
kill -9 "$CODER"
exited "$CODER"
kill -TERM "$CHAT"
exited "$CHAT"
# The check judges a death once the broker lives a second longer.
until python3 - "$WORK/test.history" <<'PYTHON'
import json, sys, time
last = json.loads(open(sys.argv[1]).readlines()[-1])
sys.exit(0 if time.monotonic_ns() > last["at"] + 1_000_000_000 else 1)
PYTHON
do sleep 0.05; done
kill -TERM "$BROKER"
wait "$BROKER" || fail "the broker fails as it stops"

"$CHECK" "$WORK"/*.history || fail "the history breaks a promise"
"$CHECK" --json "$WORK"/*.history >"$WORK/checked.json"
# It is no use to check what did not happen.
python3 - "$WORK/checked.json" <<'PYTHON' || fail "too little was checked"
import json, sys
seen = json.load(open(sys.argv[1]))
assert not any(seen["violations"].values()), seen
assert seen["processes"] == 6 and seen["deaths"] == 6, seen
assert seen["unjudged_deaths"] == 0 and seen["unmatched_mappings"] == 0, seen
assert seen["mappings"] > 200 and seen["orders"] >= 120, seen
assert seen["passed_on"] > 0, seen
PYTHON

# doctored RULES PROGRAM [OPTION...]: with each line as PROGRAM (Python) makes it, the history
# breaks these rules. `line` is the object, or None for no line; `before` counts
# those of its kind so far.
doctored() {
  local rules=$1 program=$2
  shift 2
  mkdir -p "$WORK/doctored"
  python3 - "$program" "$WORK/doctored" "$WORK"/*.history <<'PYTHON'
import collections, json, os, sys
program = compile(sys.argv[1], "doctored", "exec")
for path in sys.argv[3:]:
    before = collections.Counter()
    with open(os.path.join(sys.argv[2], os.path.basename(path)), "w") as out:
        for text in open(path):
            if not text.endswith("\n"):
                break  # torn, as its writer was killed
            line = json.loads(text)
            scope = {"line": line, "before": before[line["event"]]}
            before[line["event"]] += 1
            exec(program, scope)
            if scope["line"] is not None:
                print(json.dumps(scope["line"]), file=out)
PYTHON
  exits 1 "$CHECK" --json "$@" "$WORK"/doctored/*.history
  python3 - "$rules" "$WORK/stdout" <<'PYTHON' || fail "does not break $rules"
import json, sys
broken = {rule for rule, n in json.load(open(sys.argv[2]))["violations"].items() if n}
assert set(sys.argv[1].split()) <= broken, broken
PYTHON
}
# Engines keep what they have returned.
doctored "lent one-owner" 'if line["event"] == "unmap": line = None'
# The broker does not notice a death, which is said of one that lives on.
doctored death "if line['event'] == 'exited' and before == 0: line['pid'] = $CHAT" \
  --free-within 0.1
# A decision of the broker is left out.
doctored complete 'if line["event"] == "grant" and before == 5: line = None'
# The broker lends more than an operator allows.
doctored max 'if line.get("instance") == "chat": line["max"] = 1 << 20'
echo PASSED
