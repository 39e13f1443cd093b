#!/usr/bin/env bash
# The package's tests against what Bazel has built.
#
#   engine_patches/tests/run.sh [--torch | --bench] [--python PYTHON] [TEST...]
#
# --torch: those that need torch, instead of the others. --bench: prints what calls
# cost, and tests nothing. TEST: a module, class or method, such as test_manager or
# test_manager.Limits.test_revisions.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=python3
KIND=plain
TESTS=()
while [ $# -gt 0 ]; do
  case $1 in
    --torch) KIND=torch ;;
    --bench) KIND=bench ;;
    --python) PYTHON=$2; shift ;;
    *) TESTS+=("$1") ;;
  esac
  shift
done

STAGE=$(mktemp -d /tmp/kvcached_tests.XXXXXX)
trap 'rm -rf "$STAGE"' EXIT
mkdir "$STAGE/kvcached" "$STAGE/bin"
ln -s "$ROOT"/engine_patches/kvcached/* "$STAGE/kvcached/"
for file in engine_patches/native/_C.abi3.so broker/server/kvbrokerd client/cli/kvctl \
  tests/fake_cuda/libfake_cuda.so; do
  [ -e "$ROOT/bazel-bin/$file" ] || {
    echo "not built: bazel build //${file%/*}:${file##*/}" >&2
    exit 1
  }
done
ln -sf "$ROOT/bazel-bin/engine_patches/native/_C.abi3.so" "$STAGE/kvcached/"
ln -s "$ROOT"/bazel-bin/{broker/server/kvbrokerd,client/cli/kvctl} "$STAGE/bin/"

cd "$ROOT/engine_patches/tests"
export KVBROKER_FAKE_CUDA=$ROOT/bazel-bin/tests/fake_cuda/libfake_cuda.so
export KVBROKER_BIN_DIR=$STAGE/bin PYTHONPATH=$STAGE:$PWD PYTHONDONTWRITEBYTECODE=1
if [ "$KIND" = bench ]; then
  "$PYTHON" bench.py
  exit
fi
if [ ${#TESTS[@]} = 0 ]; then
  for file in test_*.py; do
    case $KIND/$file in
      torch/test_torch_* | plain/test_[!t]* | plain/test_t[!o]*) TESTS+=("${file%.py}") ;;
    esac
  done
fi
"$PYTHON" -W error::DeprecationWarning -m unittest "${TESTS[@]}"
