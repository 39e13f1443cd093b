#!/bin/bash
# Shows what kvbroker is for: installs what is missing, builds, and runs engines
# beside each other on a static split of memory and on the broker.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
readonly root
readonly demo="${root}/deploy/demo/demo.py"
readonly PROGRAMS=(//broker/server:kvbrokerd //client/cli:kvctl //client/replay:kvbroker-replay)
started="$(date +%s)"
readonly started
export PYTHONDONTWRITEBYTECODE=1

install=true
for argument in "$@"; do
  case "${argument}" in
    -h | --help)
      if command -v python3 >/dev/null; then exec python3 "${demo}" --help; fi
      echo "usage: deploy/demo.sh [OPTIONS]; run it once without, which installs" \
        "python3, for the options (also in docs/demo.md)"
      exit 0
      ;;
    --no-install) install=false ;;
  esac
done

# Wrong usage is told before minutes of work, where there is a Python to tell it.
if command -v python3 >/dev/null; then
  python3 "${demo}" "$@"
fi

if "${install}"; then
  "${root}/deploy/install_deps.sh"
fi

# Bazel wants a home folder, which CI does not always name.
export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"

# Bazel without a progress bar unless someone is watching.
bazel_flags=()
[[ -t 2 ]] || bazel_flags+=(--curses=no --color=no --show_progress_rate_limit=30)
readonly bazel_flags

printf '== Building %s\n' "${PROGRAMS[*]##*:}"
cd -- "${root}"
bazel build "${bazel_flags[@]}" "${PROGRAMS[@]}" </dev/null
bin="$(bazel info bazel-bin </dev/null 2>/dev/null)"
cd -- "${OLDPWD}"

exec python3 "${demo}" "--bin=${bin}" "--started=${started}" "$@"
