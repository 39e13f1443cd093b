#!/bin/bash
# What scripts see of kvctl where no broker is: exit status, and which stream
# speaks. With a broker: tests/integration.
set -u

kvctl=$1
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
export KVBROKER_ADDRESS=$directory
failures=0

# expect STATUS STREAM PATTERN ARGUMENT...: STREAM (out or err) has the pattern,
# the other one is empty.
expect() {
  local status=$1 stream=$2 pattern=$3 quiet=out actual
  shift 3
  [[ $stream == out ]] && quiet=err
  "$kvctl" "$@" >"$directory/out" 2>"$directory/err"
  actual=$?
  if [[ $actual != "$status" ]] || ! grep -q -- "$pattern" "$directory/$stream" ||
    [[ -s $directory/$quiet ]]; then
    echo "FAILED: kvctl $*: exit $actual, wanted $status and on std$stream: $pattern"
    cat "$directory/out" "$directory/err"
    failures=$((failures + 1))
  fi
}

expect 0 out '^kvctl [0-9]' --version
expect 0 out 'limit-percent' --help
expect 0 out 'NAME SIZE' limit --help
expect 2 err 'limit-percent'
expect 2 err '^kvctl: unknown verb: "lst"' lst
expect 2 err '^kvctl: SIZE is required' limit conv
expect 2 err '^kvctl: not a size' limit conv much
expect 2 err '^kvctl: not a percent' limit-percent conv 101
expect 2 err '^kvctl: nothing to set' policy conv
expect 2 err '^kvctl: not a number of seconds' watch -n 0
for verb in list watch 'limit conv 1G' 'limit-percent conv 5' 'policy conv --min 0' \
  'delete conv' 'explain conv'; do
  # shellcheck disable=SC2086
  expect 1 err "^kvctl: no broker found: no socket in $directory" $verb
  expect 1 err 'kvbrokerd --help' $verb
done
KVCACHED_IPC_TIMEOUT=soon expect 2 err '^kvctl: KVCACHED_IPC_TIMEOUT is no number' list

exit $((failures > 0))
