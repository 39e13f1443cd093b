#!/bin/bash
# kvbrokerd as a program: exit statuses, readiness, signals.
set -u
readonly KVBROKERD="$PWD/broker/server/kvbrokerd"
readonly DIR="$(mktemp -d /tmp/kvbrokerd_test.XXXXXX)"
trap 'rm -rf "$DIR"' EXIT
failed=0

fail() {
  echo "FAILED: $*" >&2
  failed=1
}

# Starts one for device $1 with the other arguments; its line when ready is in
# $ready, its pid in $pid.
start() {
  local device="$1"
  shift
  rm -f "$DIR/ready"
  mkfifo "$DIR/ready"
  "$KVBROKERD" --backend host --capacity 16M --device-uuid "$device" \
    --socket-dir "$DIR/sockets" --lock-dir "$DIR/locks" \
    --state-dir "$DIR/state" --ready-fd 7 "$@" \
    7>"$DIR/ready" 2>>"$DIR/log" &
  pid=$!
  read -r ready <"$DIR/ready" || fail "no line on the ready descriptor"
}

start HOST-a
[[ "$ready" == "kvbrokerd ready: backend=host ("*"device=HOST-a capacity=16 MiB socket=$DIR/sockets/HOST-a.sock" ]] ||
  fail "ready line: $ready"
[[ -S "$DIR/sockets/HOST-a.sock" && -S "$DIR/sockets/HOST-a.fd.sock" ]] ||
  fail "no sockets"

# A second one for the same device is locked out and told by whom.
"$KVBROKERD" --backend host --device-uuid HOST-a --socket-dir "$DIR/other" \
  --lock-dir "$DIR/locks" 2>"$DIR/second"
status=$?
[[ $status == 3 ]] || fail "second broker: exit status $status"
grep -q "pid $pid" "$DIR/second" || fail "second broker: $(cat "$DIR/second")"

# Nobody is connected: nobody wakes up.
switches() { cat /proc/"$pid"/task/*/status | grep ^voluntary | awk '{s += $2} END {print s}'; }
# The log's and the loop's threads may still be on their way to sleep.
before="$(switches)"
for _ in $(seq 20); do
  sleep 0.1
  [[ "$(switches)" == "$before" ]] && break
  before="$(switches)"
done
sleep 3
[[ "$(switches)" == "$before" ]] || fail "woke up while idle: $before -> $(switches)"

for signal in TERM INT; do
  kill -s "$signal" "$pid"
  wait "$pid"
  status=$?
  [[ $status == 0 ]] || fail "SIG$signal: exit status $status"
  [[ -z "$(ls "$DIR/sockets")" ]] || fail "SIG$signal: sockets left"
  start HOST-a
done

# Killed: what is left is taken over.
kill -KILL "$pid"
wait "$pid" 2>/dev/null
start HOST-a
kill "$pid"
wait "$pid"

# Idle: leaves by itself.
start HOST-b --idle-exit 50ms
wait "$pid" || fail "idle exit: status $?"

# Detached: back when ready, and served by a process that is not ours.
detach() {
  "$KVBROKERD" --backend host --capacity 16M --device-uuid "$1" \
    --socket-dir "$DIR/sockets" --lock-dir "$DIR/locks" --state-dir "$DIR/detached" \
    --detach 7>"$DIR/held"
}
holder() { head -n 1 "$DIR/locks/$1.lock"; }
ready="$(detach HOST-d)"
status=$?
[[ $status == 0 && "$ready" == "kvbrokerd ready: "*"socket=$DIR/sockets/HOST-d.sock" ]] ||
  fail "detached: exit status $status, $ready"
detached="$(holder HOST-d)"
[[ "$(ps -o sid= -p "$detached")" != "$(ps -o sid= -p $$)" ]] || fail "detached: our session"
[[ "$(readlink "/proc/$detached/cwd")" == / ]] || fail "detached: directory"
ls -l "/proc/$detached/fd" | grep -q "$DIR/held" && fail "detached: our descriptor"
[[ "$(readlink "/proc/$detached/fd/2")" == "$DIR/detached/kvbrokerd.log" ]] ||
  fail "detached: stderr"
kill -HUP "$detached"
served="$(detach HOST-d 2>"$DIR/second")"
status=$?
[[ $status == 3 && "$served" == "served-at $DIR/sockets/HOST-d.sock" ]] ||
  fail "second detached: exit status $status, $served"
grep -q "^kvbrokerd: another broker.*pid $detached" "$DIR/second" ||
  fail "second detached: $(cat "$DIR/second")"
kill "$detached"
while kill -0 "$detached" 2>/dev/null; do sleep 0.02; done
# Relative paths are from where it was started.
(cd "$DIR" && "$KVBROKERD" --backend host --capacity 16M --device-uuid HOST-d \
  --socket-dir sockets --lock-dir locks --state-dir detached --detach >/dev/null) ||
  fail "detached with relative paths"
[[ -S "$DIR/sockets/HOST-d.sock" ]] || fail "detached with relative paths: no socket"
kill "$(holder HOST-d)"
while [[ -e "$DIR/sockets/HOST-d.sock" ]]; do sleep 0.02; done

# systemd is told, by a path and by an abstract name.
for name in "$DIR/notify" "@kvbrokerd_test.$$"; do
  : >"$DIR/notified"
  python3 -c '
import socket, sys
name = sys.argv[1]
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.settimeout(20)
s.bind("\0" + name[1:] if name[0] == "@" else name)
print("bound", flush=True)
print(s.recv(100).decode(), s.recv(100).decode())' "$name" >"$DIR/notified" &
  listener=$!
  until grep -q bound "$DIR/notified"; do sleep 0.05; done
  NOTIFY_SOCKET="$name" start HOST-c
  kill "$pid"
  wait "$pid"
  wait "$listener"
  grep -q "^READY=1 STOPPING=1$" "$DIR/notified" ||
    fail "systemd was told: $(cat "$DIR/notified")"
done

expect() {
  local want="$1" text="$2"
  shift 2
  "$KVBROKERD" "$@" >"$DIR/out" 2>&1
  status=$?
  [[ $status == "$want" ]] || fail "$*: exit status $status, not $want"
  grep -q -- "$text" "$DIR/out" || fail "$*: $(cat "$DIR/out")"
}
expect 0 "Usage: kvbrokerd" --help
expect 0 "^kvbrokerd [0-9]" --version
expect 0 "^capacity: 1073741824" --print-config --capacity 1G
expect 2 "did you mean --capacity" --capasity 1G
expect 2 "policy.hold_off must be a duration" --policy-hold-off soon
printf 'backend: host\ncapasity: 1G\n' >"$DIR/config.yaml"
expect 2 "config.yaml line 2: unknown key capasity; did you mean capacity?" \
  --config "$DIR/config.yaml"
expect 2 "do not go together" --detach --ready-fd 1
expect 1 "socket directory $DIR/no/such" --backend host --device-uuid HOST-c \
  --socket-dir "$DIR/no/such" --lock-dir "$DIR/locks"
expect 1 "^kvbrokerd: .*socket directory $DIR/no/such" --detach --backend host \
  --device-uuid HOST-c --socket-dir "$DIR/no/such" --lock-dir "$DIR/locks" \
  --state-dir "$DIR/detached"

[[ $failed == 0 ]] || cat "$DIR/log" >&2
exit $failed
