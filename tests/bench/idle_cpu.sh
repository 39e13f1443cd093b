#!/usr/bin/env bash
# What an idle broker costs: CPU of kvbrokerd over a minute, from /proc, first
# without any session and then with eight engines connected that do nothing.
#
#   tests/bench/idle_cpu.sh [SECONDS]      (after `bazel build //...`)
set -euo pipefail
cd "$(dirname "$0")/../.."
SECONDS_EACH=${1:-60}
WORK=$(mktemp -d /tmp/kvbXXXXXX)
trap 'kill $(jobs -p) 2>/dev/null; wait 2>/dev/null; rm -rf "$WORK"' EXIT

bazel-bin/broker/server/kvbrokerd --backend host --device-uuid "IDLE-$$" \
  --capacity 256M --socket-dir "$WORK/sockets" --lock-dir "$WORK/locks" \
  --state-dir none \
  2>"$WORK/broker.log" &
BROKER=$!
until bazel-bin/client/cli/kvctl --address "$WORK/sockets" list >/dev/null 2>&1; do
  sleep 0.1
done

ticks() { awk '{print $14 + $15}' "/proc/$BROKER/stat"; }
switches() {
  awk '/ctxt_switches/ {n += $2} END {print n}' /proc/"$BROKER"/task/*/status
}
measure() {
  local label=$1 ticks_before switches_before ticks_after switches_after
  ticks_before=$(ticks)
  switches_before=$(switches)
  sleep "$SECONDS_EACH"
  ticks_after=$(ticks)
  switches_after=$(switches)
  awk -v label="$label" -v t=$((ticks_after - ticks_before)) \
    -v hz="$(getconf CLK_TCK)" -v s="$SECONDS_EACH" \
    -v w=$((switches_after - switches_before)) 'BEGIN {
      printf "%s: %.3f %% CPU, %.2f context switches/s over %d s\n",
             label, 100 * t / hz / s, w / s, s }'
}

measure "no session"
for i in 1 2 3 4 5 6 7 8; do
  # Connected at once; its first request comes after the measurement.
  bazel-bin/client/replay/kvbroker-replay --name "idle$i" \
    --address "$WORK/sockets" --trace builtin:code --seed "$i" \
    --start-at "$(($(date +%s) + SECONDS_EACH + 30))" >/dev/null 2>&1 &
done
sleep 3
measure "8 idle engines"
