#!/bin/bash
# Measures what the broker and the client library cost on the host backend.
set -euo pipefail

usage() {
  cat <<EOF
usage: deploy/bench.sh [--json FILE] [--seconds N] [--no-install]
Installs what is missing (as root), builds with optimisation, runs the
benchmarks and prints a table. Takes some minutes; asserts nothing.
  --json FILE    also write the figures, with facts of the machine, to FILE
  --seconds N    how long each figure is measured, 5 by default
  --no-install   do not look for missing packages
What each figure means: docs/benchmarks/host.md.
EOF
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
readonly root
readonly PROGRAMS=(
  //broker/server:kvbrokerd //client/cli:kvctl //client/replay:kvbroker-replay
  //tests/bench:bench_broker //tests/bench:bench_engine
  //tests/bench:pool_benchmark
)

install=true
passed_on=()
while (($# > 0)); do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --no-install) install=false ;;
    --json | --seconds)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      passed_on+=("$1" "$2")
      shift
      ;;
    --json=* | --seconds=*) passed_on+=("$1") ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done

if "${install}"; then
  "${root}/deploy/install_deps.sh"
fi

# Bazel wants a home folder, which CI does not always name.
export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"
export PYTHONDONTWRITEBYTECODE=1

# bazel-bin keeps naming the plain build.
bazel_flags=(--config=opt --experimental_convenience_symlinks=ignore)
[[ -t 2 ]] || bazel_flags+=(--curses=no --color=no --show_progress_rate_limit=30)
readonly bazel_flags

cd -- "${root}"
bazel build "${bazel_flags[@]}" "${PROGRAMS[@]}" </dev/null
bin="$(bazel info --config=opt bazel-bin </dev/null 2>/dev/null)"
cd -- "${OLDPWD}"

exec python3 "${root}/tests/bench/bench.py" "--bin=${bin}" "${passed_on[@]}"
