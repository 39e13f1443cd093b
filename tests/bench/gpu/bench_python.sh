#!/bin/bash
# Times a block manager from Python: kvbroker's package, and kvcached beside it.
set -euo pipefail

usage() {
  cat <<END
usage: tests/bench/gpu/bench_python.sh PACKAGES [KVCACHED]
  PACKAGES  a folder with kvbroker's package (an unpacked wheel)
  KVCACHED  a folder with kvcached, built in place; without it, ours alone
Prints three rounds, one after the other in turns, and the ratio of their medians;
asserts nothing. KVBROKER_BENCH_DEVICE=cpu measures ours on host memory.
END
}

if (($# < 1 || $# > 2)) || [[ $1 == -* ]]; then
  usage >&2
  exit 2
fi
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
device=${KVBROKER_BENCH_DEVICE:-cuda:0}
results=$(mktemp)
trap 'rm -f "$results"' EXIT
for _ in 1 2 3; do
  for who in ours "${2:+kvcached}"; do
    [[ -n $who ]] || continue
    packages=$1
    [[ $who == ours ]] || packages=$2
    line=$(PYTHONPATH=$packages "$python" "$here/bench_python.py" \
      --device "$device" 2>/dev/null | tail -n 1) || line=
    echo "{\"who\": \"$who\", \"figures\": ${line:-null}}" | tee -a "$results"
  done
done
"$python" - "$results" <<'END'
import json
import statistics
import sys

rounds = [json.loads(line) for line in open(sys.argv[1])]
for figure in ("alloc_free_16_us", "available_size_us"):
    medians = {}
    for who in ("ours", "kvcached"):
        of = [r["figures"][figure] for r in rounds if r["who"] == who and r["figures"]]
        if of:
            medians[who] = statistics.median(of)
    text = ", ".join(f"{who} {value:.2f} us" for who, value in medians.items())
    if len(medians) == 2:
        text += f", ratio {medians['kvcached'] / medians['ours']:.1f}"
    print(f"{figure}: {text}")
END
