# Sourced by the integration tests: a broker of its own and what to ask it.
#
# Starts nothing by itself. After `start_broker --capacity 64M`, $ADDRESS is the
# broker's socket directory and `kvctl ...` asks it. Everything started with
# `start` is ended when the test ends.

set -euo pipefail

WORK=$(mktemp -d /tmp/kvbXXXXXX)
RUNFILES=${TEST_SRCDIR:?run by bazel test}/${TEST_WORKSPACE:?}
KVBROKERD=$RUNFILES/broker/server/kvbrokerd
KVCTL=$RUNFILES/client/cli/kvctl
REPLAY=$RUNFILES/client/replay/kvbroker-replay
ADDRESS=$WORK/sockets
CHILDREN=()

cleanup() {
  local status=$?
  for child in "${CHILDREN[@]:-}"; do
    [ -n "$child" ] && kill -9 "$child" 2>/dev/null || true
  done
  if [ "$status" != 0 ]; then
    for log in "$WORK"/*.log; do
      echo "---- $log"
      tail -n 40 "$log"
    done >&2
  fi
  rm -rf "$WORK"
}
trap cleanup EXIT

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# start NAME COMMAND...: in the background, its output in NAME.log, pid in $LAST.
start() {
  local name=$1
  shift
  "$@" >"$WORK/$name.log" 2>&1 &
  LAST=$!
  CHILDREN+=("$LAST")
}

# eventually SECONDS COMMAND...: until it succeeds; the time is for giving up only.
eventually() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.05
  done
}

kvctl() { "$KVCTL" --address "$ADDRESS" "$@"; }

start_broker() {
  start broker "$KVBROKERD" --backend host --device-uuid "TEST-$$" \
    --socket-dir "$ADDRESS" --lock-dir "$WORK/locks" \
    --state-dir "$WORK/state" "$@"
  BROKER=$LAST
  eventually 20 kvctl list >/dev/null 2>&1 || fail "the broker does not answer"
}

# An engine on the broker; endless for a test's purposes.
start_replay() {
  local name=$1
  shift
  start "$name" "$REPLAY" --name "$name" --address "$ADDRESS" --speedup 40 "$@"
}

# field NAME FIELD: of one instance, from `kvctl list --json`.
field() {
  kvctl list --json | python3 -c '
import json, sys
for instance in json.load(sys.stdin):
    if instance["ipc"] == sys.argv[1]:
        print(instance[sys.argv[2]])
' "$1" "$2"
}

# at_least NAME FIELD N, at_most NAME FIELD N
at_least() {
  local value
  value=$(field "$1" "$2")
  [ -n "$value" ] && [ "$value" -ge "$3" ]
}
at_most() {
  local value
  value=$(field "$1" "$2")
  [ -n "$value" ] && [ "$value" -le "$3" ]
}

# exits STATUS COMMAND...: its stderr is in $WORK/stderr.
exits() {
  local want=$1 got=0
  shift
  "$@" >"$WORK/stdout" 2>"$WORK/stderr" || got=$?
  [ "$got" = "$want" ] ||
    fail "\`$*\` exits $got instead of $want: $(cat "$WORK/stderr")"
}
