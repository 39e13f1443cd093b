#!/bin/bash
# What becomes of a broker and its engines when another process on the GPU makes
# a fault: under MPS, where all processes share what the fault hits, and without.
set -uo pipefail

usage() {
  cat <<END
usage: tests/bench/gpu/mps_fault.sh [--fake] [--bin DIR] [--gpu UUID] [--seconds N]
Starts a broker and two engines that check their data, then a process whose
kernel writes where nothing is mapped, and prints who went on and what each was
told; first under an MPS daemon of its own, then without one. Asserts nothing.
Nobody else may use the GPU. About a minute. Needs python3.
  --fake       on the fake driver, to try it without a GPU: no MPS, and the third
               process is an engine whose context is poisoned
  --bin DIR    the programs, under the paths they have in bazel-bin; default: the
               bundle's, or they are built
  --gpu UUID   which one [the first]
  --seconds N  of load before the fault, and again after it [5]
END
}

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../../.." && pwd)
fake=false
bin=
gpu=
seconds=5
while (($# > 0)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --fake) fake=true ;;
    --bin | --gpu | --seconds)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      declare "${1#--}=$2"
      shift
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done

if [[ -z $bin && -d $root/bin ]]; then
  bin=$root # a bundle
elif [[ -z $bin ]]; then
  cd -- "$root" || exit 1
  bazel build -c opt --experimental_convenience_symlinks=ignore \
    //broker/server:kvbrokerd //client/cli:kvctl \
    //client/replay:kvbroker-replay //tests/fake_cuda:libfake_cuda.so \
    </dev/null || exit 1
  bin=$(bazel info -c opt bazel-bin </dev/null 2>/dev/null)
  cd -- "$OLDPWD" || exit 1
fi
for program in broker/server/kvbrokerd client/cli/kvctl client/replay/kvbroker-replay; do
  if [[ ! -x $bin/$program ]]; then
    echo "mps_fault.sh: $bin/$program is not there" >&2
    exit 1
  fi
done
bin=$(cd -- "$bin" && pwd)

# Short: sockets are in it.
work=$(mktemp -d /tmp/kvbm_XXXXXX)
pids=()    # of what runs now
daemon=no  # an MPS daemon is ours

# Not `timeout`: who ignores TERM is killed.
within() { timeout -k 5 "$@"; }

is_alive() { kill -0 "$1" 2>/dev/null && [[ $(ps -o stat= -p "$1") != Z* ]]; }

# end PID: TERM, after 10 s KILL. Its exit status is in `status`.
end() {
  kill -CONT "$1" 2>/dev/null
  kill "$1" 2>/dev/null
  for ((i = 0; i < 100; ++i)); do
    is_alive "$1" || break
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null
  wait "$1" 2>/dev/null
  status=$?
}

stop_mps() {
  [[ $daemon == yes ]] || return 0
  daemon=no
  local servers
  servers=$(echo get_server_list | within 10 nvidia-cuda-mps-control 2>/dev/null)
  echo "quit -t 5" | within 20 nvidia-cuda-mps-control >/dev/null 2>&1
  # Those of this daemon, where they have not gone by themselves.
  local pid
  for pid in $(cat "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid" 2>/dev/null) $servers; do
    [[ $pid =~ ^[0-9]+$ && $(cat "/proc/$pid/comm" 2>/dev/null) == nvidia-cuda-mps* ]] &&
      kill -KILL "$pid" 2>/dev/null
  done
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

clean_up() {
  local pid
  for pid in "${pids[@]}"; do
    end "$pid"
  done
  pids=()
  stop_mps
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

start_mps() {
  if ! command -v nvidia-cuda-mps-control >/dev/null; then
    echo "  nvidia-cuda-mps-control is not there: not tried"
    return 1
  fi
  mkdir -p "$work/mps/pipe" "$work/mps/log"
  export CUDA_MPS_PIPE_DIRECTORY=$work/mps/pipe CUDA_MPS_LOG_DIRECTORY=$work/mps/log
  if ! within 20 nvidia-cuda-mps-control -d >"$work/mps/start" 2>&1; then
    echo "  the MPS daemon does not start: $(tail -1 "$work/mps/start")"
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    return 1
  fi
  daemon=yes
}

kvctl() { within 10 "$bin/client/cli/kvctl" --address "$folder/sockets" "$@"; }

# engine NAME [FLAGS]: in the background; its pid is in `last`.
engine() {
  "$bin/client/replay/kvbroker-replay" --name "$1" --address "$folder/sockets" \
    --scale 64 --speedup 40 --json "${@:2}" >"$folder/$1.log" 2>&1 &
  last=$!
  pids+=("$last")
}

grants() {
  kvctl list --json 2>/dev/null | python3 -c '
import json, sys
try:
    print(sum(i["counters"]["grants"] for i in json.load(sys.stdin)))
except ValueError:
    print("?")'
}

holds() { kvctl list "$1" --json 2>/dev/null | grep -q '"held_bytes": *[1-9]'; }

await_holds() {
  for ((i = 0; i < 300; ++i)); do
    holds "$1" && return 0
    is_alive "$2" || return 1
    sleep 0.1
  done
  return 1
}

say_engine() { # NAME PID
  local was=alive
  is_alive "$2" || was="ended by itself"
  end "$2"
  echo "  engine $1: $was; exit status at its end $status: $(tail -1 "$folder/$1.log" | cut -c1-600)"
}

one() { # WORDS
  echo "=== $1"
  folder=$work/$RANDOM
  mkdir -p "$folder"
  local flags=(--backend=cuda --capacity=2G "--socket-dir=$folder/sockets"
    "--lock-dir=$folder/locks" --state-dir=none)
  [[ -z $gpu ]] || flags+=("--gpu=$gpu")
  "$bin/broker/server/kvbrokerd" "${flags[@]}" >"$folder/broker.log" 2>&1 &
  local broker=$!
  pids+=("$broker")
  local i
  for ((i = 0; i < 300; ++i)); do
    kvctl list >/dev/null 2>&1 && break
    is_alive "$broker" || break
    sleep 0.1
  done
  if ! kvctl list >/dev/null 2>&1; then
    echo "  the broker does not answer: $(tail -1 "$folder/broker.log")"
    end "$broker"
    return
  fi
  engine first
  local first=$last
  engine second --trace builtin:code
  local second=$last
  local name pid
  for name in first second; do
    pid=${!name}
    await_holds "$name" "$pid" ||
      echo "  engine $name got no memory before the fault: $(tail -1 "$folder/$name.log")"
  done
  sleep "$seconds"
  echo "  before the fault: grants $(grants)"
  if $fake; then
    KVBROKER_FAKE_CUDA_FAIL=cuMemMap:3:700 within 60 \
      "$bin/client/replay/kvbroker-replay" --name third --scale 64 --speedup 40 \
      --address "$folder/sockets" --window 400 >"$folder/fault.log" 2>&1 </dev/null
  else
    CUDA_VISIBLE_DEVICES=${gpu:-${CUDA_VISIBLE_DEVICES-0}} \
      within 60 python3 "$here/mps_fault.py" >"$folder/fault.log" 2>&1 </dev/null
  fi
  echo "  the fault's own process: exit status $?"
  sed 's/^/    /' "$folder/fault.log" | cut -c1-600
  echo "  right after it: first $(is_alive "$first" && echo alive || echo ended)," \
    "second $(is_alive "$second" && echo alive || echo ended)," \
    "broker $(is_alive "$broker" && echo alive || echo ended)"
  sleep "$seconds"
  echo "  $seconds s later: grants $(grants)"
  echo "  the broker says:"
  (kvctl list 2>&1 || echo "nothing: it does not answer") | sed 's/^/    /' | cut -c1-600
  say_engine first "$first"
  say_engine second "$second"
  engine later --window 200
  if await_holds later "$last"; then
    echo "  a new engine is served"
  else
    echo "  a new engine is not served"
  fi
  say_engine later "$last"
  echo "  the broker's lines of failures: $(grep -c 'failed\|device-lost' "$folder/broker.log")"
  grep 'failed\|device-lost\|device-back' "$folder/broker.log" | head -5 | sed 's/^/    /' | cut -c1-600
  end "$broker"
  echo "  the broker's exit status $status"
  pids=()
}

if $fake; then
  export KVBROKER_CUDA_DRIVER=$bin/tests/fake_cuda/libfake_cuda.so
  export KVBROKER_NVML=$KVBROKER_CUDA_DRIVER
  export KVBROKER_FAKE_CUDA_DIR=$work/gpu KVBROKER_FAKE_CUDA_TOTAL=$((16 << 30))
  mkdir "$work/gpu"
  one "on the fake driver"
  exit 0
fi
if start_mps; then
  one "under MPS"
  echo "  MPS's own log:"
  tail -n 8 "$work"/mps/log/*.log 2>/dev/null | sed 's/^/    /' | cut -c1-300
  stop_mps
fi
one "without MPS"
