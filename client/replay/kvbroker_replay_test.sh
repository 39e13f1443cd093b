#!/bin/bash
# What scripts see of kvbroker-replay on a fixed share of memory: exit status,
# streams, files, signals. With a broker: tests/integration.
set -u

replay=$1
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
export KVBROKER_ADDRESS=$directory KVBROKER_AUTOSTART=0
failures=0

fail() {
  echo "FAILED: $1"
  cat "$directory/out" "$directory/err"
  failures=$((failures + 1))
}

# expect STATUS STREAM PATTERN ARGUMENT...: STREAM (out or err) has the pattern.
expect() {
  local status=$1 stream=$2 pattern=$3 actual
  shift 3
  "$replay" "$@" >"$directory/out" 2>"$directory/err"
  actual=$?
  if [[ $actual != "$status" ]] || ! grep -q -- "$pattern" "$directory/$stream"; then
    fail "kvbroker-replay $*: exit $actual, wanted $status and on std$stream: $pattern"
  fi
}

short=(--window 60 --speedup 100000)

expect 0 out '--static-share' --help
expect 0 out '"tokens_in_flight_p99":[1-9]' --print-capacity
expect 0 out '"requests":[1-9][0-9]*,"rejected":0,"unfinished":0,.*"integrity_errors":0' \
  --static-share 18M --json "${short[@]}"
expect 0 out '^replay (static): [1-9]' --static-share 18M "${short[@]}"
expect 0 err 'request can never fit: request 0 needs' --static-share 4K "${short[@]}"
expect 0 out '"mode":"static"' --static-share 18M --json --until 1 "${short[@]}"
expect 2 err 'Run kvbroker-replay --help' --speedup fast
expect 2 err '^kvbroker-replay: no such model preset' --model gpt-9
expect 1 err '^kvbroker-replay: cannot open trace /nowhere.csv' --trace /nowhere.csv
expect 1 err '^kvbroker-replay: ' --address "$directory" "${short[@]}"
expect 1 err 'cannot create /nowhere/r.csv' --static-share 18M --requests /nowhere/r.csv "${short[@]}"

"$replay" --static-share 18M --requests "$directory/requests" --status-fd 3 "${short[@]}" \
  3>"$directory/status" >"$directory/out" 2>"$directory/err"
head -1 "$directory/requests" | grep -q '^arrival_ms,wait_ms,first_token_ms,end_ms,preemptions,outcome$' ||
  fail "requests file"
tail -1 "$directory/status" | grep -q '^{"t_ms":.*"in_use_bytes":0,.*}$' || fail "status lines"

# A signal ends a run that would take days, with its summary. The first status
# line says that it runs.
mkfifo "$directory/status.pipe"
"$replay" --static-share 18M --speedup 0.001 --json --status-fd 3 \
  3>"$directory/status.pipe" >"$directory/out" 2>"$directory/err" &
pid=$!
exec 4<"$directory/status.pipe"
read -r -u 4 _
kill -TERM "$pid"
wait "$pid"
status=$?
if [[ $status != 0 ]] || ! grep -q '"unfinished":[1-9]' "$directory/out"; then
  fail "SIGTERM: exit $status"
fi

exit $((failures > 0))
