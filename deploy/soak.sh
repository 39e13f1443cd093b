#!/bin/bash
# Installs and builds what it needs, then lets engines and the broker suffer for
# a while: tests/chaos/soak.py says what, and prints what was survived.
set -euo pipefail

usage() {
  cat <<EOF2
usage: deploy/soak.sh MINUTES [--json FILE] [--seed N] [--round SECONDS] [--phase ROUNDS]
                      [--capacity SIZE] [--backend NAME] [--keep]
Engines come and go, are killed and stopped, limits move, the broker is killed
and restarted. Everything that was granted and mapped is recorded and checked
afterwards. Ends with a JSON object of what was survived and PASSED, exit status
0; or with what broke, exit status 1. Ctrl-C ends it at once.
  --json FILE       the object goes there, too
  --seed N          of all chance [the clock]; printed at the start
  --round SECONDS   after each everybody leaves and nothing may be left [20]
  --phase ROUNDS    after each the history is checked; the broker is killed in
                    the last third of it [24]
  --backend NAME    host, fake-cuda, or cuda: a GPU that nobody else uses [host]
  --capacity SIZE   what the broker lends [48M; fake-cuda: 256M, cuda: 8G]
  --keep            leave logs and histories where they are
EOF2
}

for argument in "$@"; do
  case "${argument}" in
    -h | --help)
      usage
      exit 0
      ;;
  esac
done
if [[ $# -eq 0 ]]; then
  usage >&2
  exit 2
fi

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
deploy/install_deps.sh
export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"
bazel build --show_result=0 //broker/server:kvbrokerd //client/cli:kvctl \
  //client/replay:kvbroker-replay //tests/history:history_check \
  //tests/fake_cuda:libfake_cuda.so </dev/null
exec python3 -B tests/chaos/soak.py "$@"
