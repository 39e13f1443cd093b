#!/usr/bin/env bash
# Upgrades under load: the broker is replaced, by turns, by this checkout's and
# by an earlier commit's, while three engines of this checkout replay.
set -euo pipefail

usage() {
  cat <<EOF2
usage: tests/chaos/upgrade.sh [REVISION] [--kills N] [--seed N] [--json FILE]
Builds kvbrokerd of REVISION [HEAD~1] in a work tree beside this one, then runs
kill_broker.py with every other broker of that revision: engines must resume
with either, limits must outlive both directions, no byte may be wrong.
EOF2
}

revision=HEAD~1
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  "" | --*) ;;
  *)
    revision=$1
    shift
    ;;
esac

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d /tmp/kvbXXXXXX)
cleanup() {
  (cd "${work}/tree" 2>/dev/null && bazel shutdown >/dev/null 2>&1) || true
  git worktree remove --force "${work}/tree" 2>/dev/null || true
  rm -rf -- "${work}"
}
trap cleanup EXIT
git worktree add --quiet --detach "${work}/tree" "${revision}"
echo "the earlier broker is of $(git -C "${work}/tree" log -1 --format='%h %s')"
(cd "${work}/tree" && bazel build --show_result=0 //broker/server:kvbrokerd </dev/null)
cp -L "${work}/tree/bazel-bin/broker/server/kvbrokerd" "${work}/kvbrokerd"
bazel build --show_result=0 //broker/server:kvbrokerd //client/cli:kvctl \
  //client/replay:kvbroker-replay //tests/history:history_check </dev/null
python3 -B tests/chaos/kill_broker.py --upgrade-from "${work}/kvbrokerd" "$@"
