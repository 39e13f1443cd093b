#!/bin/bash
# Installs a wheel into clean environments and tests it there.
set -euo pipefail

usage() {
  cat <<EOF2
usage: deploy/packaging/test_wheel.sh WHEEL [--torch VERSION]... [--fake-cuda FILE]
                                       [PYTHON...]
For each PYTHON (a program; by default python3.9 to python3.13, as far as they are
on PATH or pyenv has them), in a new environment without torch: installs WHEEL,
imports it, asks a broker of its own with kvctl, runs \`python -m kvcached\` and the
package's tests, and looks what is left after it is uninstalled.
  --torch VERSION   besides, in an environment with torch from PyPI, on the
                    newest PYTHON that has that version: the tests that need torch
  --fake-cuda FILE  the driver of test_gpu, //tests/fake_cuda:libfake_cuda.so; by
                    default that under bazel-bin. Without it test_gpu is left out
Needs no network without --torch. The last line is "N passed, N failed", which
counts steps and test cases; exits 1 when anything failed.
EOF2
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
readonly root

wheel=""
torches=()
pythons=()
fake_cuda="${root}/bazel-bin/tests/fake_cuda/libfake_cuda.so"
while (($# > 0)); do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --torch=*) torches+=("${1#*=}") ;;
    --fake-cuda=*) fake_cuda="${1#*=}" ;;
    --fake-cuda)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      fake_cuda="$2"
      shift
      ;;
    --torch)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      torches+=("$2")
      shift
      ;;
    -*)
      usage >&2
      exit 2
      ;;
    *)
      if [[ -z "${wheel}" ]]; then wheel="$1"; else pythons+=("$1"); fi
      ;;
  esac
  shift
done
if [[ ! -f "${wheel}" ]]; then
  usage >&2
  exit 2
fi
wheel="$(realpath -- "${wheel}")"
fake_cuda="$(realpath --canonicalize-missing -- "${fake_cuda}")"

# Short: sockets are made below, whose paths may not be longer than 107 bytes.
work="$(mktemp -d /tmp/kvwXXXXXX)"
broker=""
cleanup() {
  [[ -z "${broker}" ]] || kill "${broker}" 2>/dev/null || true
  rm -rf -- "${work}"
}
trap cleanup EXIT

# Nothing of this checkout, nor of the caller's settings.
unset PYTHONPATH PYTHONHOME
for name in $(compgen -e | grep -E '^(KVBROKER|KVBROKERD|KVCACHED)_|^ENABLE_KVCACHED$'); do
  unset "${name}"
done
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

passed=0
failed=0
# step WHO WHAT COMMAND...: its output is shown where it fails.
step() {
  local who="$1" what="$2"
  shift 2
  if "$@" >"${work}/step.log" 2>&1; then
    printf 'ok      %-12s %s\n' "${who}" "${what}"
    passed=$((passed + 1))
  else
    printf 'FAILED  %-12s %s\n' "${who}" "${what}"
    sed 's/^/        | /' "${work}/step.log" | tail -n 60
    failed=$((failed + 1))
    return 1
  fi
}

# find_pythons: prints those that run, oldest first.
find_pythons() {
  local minor found
  for minor in 9 10 11 12 13; do
    for found in "$(type -P "python3.${minor}" || true)" \
      "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}/versions/3.${minor}".*/bin/python3; do
      # A pyenv shim of a version that is not chosen is found, but does not run.
      if [[ -x "${found}" ]] && "${found}" -c '' 2>/dev/null; then
        echo "${found}"
        break
      fi
    done
  done
}

name_of() {
  "$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'
}

# suite WHO VENV PATTERN: runs the package's test modules of that name.
suite() {
  local who="$1" venv="$2" pattern="$3" modules=() file counts
  # Where the package's sources are not beside them.
  rm -rf -- "${work}/tree"
  mkdir -p -- "${work}/tree/engine_patches" "${work}/tree/docs"
  cp -r -- "${root}/engine_patches/tests" "${work}/tree/engine_patches/"
  cp -r -- "${root}/docs/api" "${work}/tree/docs/"
  for file in "${work}"/tree/engine_patches/tests/test_*.py; do
    file="${file##*/}"
    case "${pattern}/${file}" in
      plain/test_gpu.py)
        if [[ -r "${fake_cuda}" ]]; then
          modules+=(test_gpu)
        else
          printf 'left out %s\n' "test_gpu: there is no ${fake_cuda}"
        fi
        ;;
      torch/test_torch_* | plain/test_[!t]* | plain/test_t[!o]*) modules+=("${file%.py}") ;;
    esac
  done
  if ((${#modules[@]} == 0)); then
    printf 'FAILED  %-12s there are no %s tests\n' "${who}" "${pattern}"
    failed=$((failed + 1))
    return
  fi
  (
    cd -- "${work}/tree/engine_patches/tests"
    export KVBROKER_FAKE_CUDA="${fake_cuda}"
    exec "${venv}/bin/python" -m unittest "${modules[@]}"
  ) </dev/null >"${work}/unittest.log" 2>&1 || true
  counts="$("${venv}/bin/python" "${root}/deploy/count_tests.py" unittest "${work}/unittest.log")"
  passed=$((passed + ${counts% *}))
  failed=$((failed + ${counts#* }))
  if [[ "${counts#* }" == 0 ]]; then
    printf 'ok      %-12s %s tests: %s passed\n' "${who}" "${pattern}" "${counts% *}"
  else
    printf 'FAILED  %-12s %s tests: %s passed, %s failed\n' \
      "${who}" "${pattern}" "${counts% *}" "${counts#* }"
    sed 's/^/        | /' "${work}/unittest.log" | tail -n 120
  fi
}

install_wheel() {
  local venv="$1" python="$2"
  rm -rf -- "${venv}"
  "${python}" -m venv "${venv}" &&
    "${venv}/bin/python" -m pip install --no-index --no-deps --quiet "${wheel}"
}

start_broker() {
  local program="$1"
  mkdir -p -- "${work}/broker"
  mkfifo "${work}/ready"
  "${program}" --backend host --device-uuid WHEEL-TEST --capacity 64M \
    --socket-dir "${work}/broker/sockets" --lock-dir "${work}/broker/locks" \
    --state-dir none --log-level error --ready-fd 3 3>"${work}/ready" &
  broker=$!
  read -r -t 30 _ <"${work}/ready"
}

stop_broker() {
  [[ -z "${broker}" ]] || kill "${broker}" 2>/dev/null || true
  wait "${broker}" 2>/dev/null || true
  broker=""
  rm -rf -- "${work}/broker" "${work}/ready"
}

readonly IMPORT='
import sys
import kvcached
assert "torch" not in sys.modules and "numpy" not in sys.modules
from kvcached import _C
assert _C.VERSION == kvcached.__version__, (_C.VERSION, kvcached.__version__)
import kvcached.vmm_ops
assert kvcached.vmm_ops.is_available() is True
assert "torch" not in sys.modules
'

without_torch() {
  local python="$1" venv="${work}/venv" who
  who="$(name_of "${python}")"
  step "${who}" "installs" install_wheel "${venv}" "${python}" || return 0
  cd -- "${work}"
  step "${who}" "imports without torch" "${venv}/bin/python" -c "${IMPORT}" || true
  local kvbrokerd
  kvbrokerd="$("${venv}/bin/python" -c '
from kvcached import programs
print(programs.find("kvbrokerd"))')"
  if step "${who}" "starts its kvbrokerd" start_broker "${kvbrokerd}"; then
    export KVBROKER_ADDRESS="${work}/broker/sockets"
    step "${who}" "kvctl list" "${venv}/bin/kvctl" list || true
    ln -sf "${venv}/bin/kvctl" "${work}/a link"
    step "${who}" "kvctl list, through a link" "${work}/a link" list || true
    step "${who}" "python -m kvcached.cli.kvctl list" \
      "${venv}/bin/python" -m kvcached.cli.kvctl list || true
    step "${who}" "kvtop" "${venv}/bin/kvtop" --once || true
    step "${who}" "python -m kvcached" "${venv}/bin/python" -m kvcached || true
    unset KVBROKER_ADDRESS
  fi
  stop_broker
  step "${who}" "has man pages" \
    test -s "${venv}/share/man/man1/kvctl.1" -a -s "${venv}/share/man/man1/kvtop.1" \
    -a -s "${venv}/share/man/man8/kvbrokerd.8" || true
  suite "${who}" "${venv}" plain
  step "${who}" "is gone once uninstalled" uninstalled "${venv}" || true
  cd -- "${root}"
  rm -rf -- "${venv}"
}

uninstalled() {
  "$1/bin/python" -m pip uninstall --yes kvcached
  local left
  left="$(find "$1" -iname '*kvcached*' -o -name 'kvctl*' -o -name 'kvtop*')"
  [[ -z "${left}" ]] || {
    echo "${left}"
    return 1
  }
}

with_torch() {
  local version="$1" venv="${work}/venv" number who python=""
  for ((number = ${#pythons[@]} - 1; number >= 0; --number)); do
    rm -rf -- "${venv}"
    "${pythons[number]}" -m venv "${venv}"
    if "${venv}/bin/python" -m pip install --quiet --no-cache-dir numpy "torch==${version}" \
      >"${work}/pip.log" 2>&1; then
      python="${pythons[number]}"
      break
    fi
  done
  if [[ -z "${python}" ]]; then
    printf 'FAILED  torch %s cannot be installed\n' "${version}"
    sed 's/^/        | /' "${work}/pip.log" | tail -n 10
    failed=$((failed + 1))
    return
  fi
  who="torch ${version}"
  step "${who}" "installs beside it, $(name_of "${python}")" \
    "${venv}/bin/python" -m pip install --no-index --no-deps --quiet "${wheel}" || return 0
  suite "${who}" "${venv}" torch
  rm -rf -- "${venv}"
}

if ((${#pythons[@]} == 0)); then
  mapfile -t pythons < <(find_pythons)
fi
for python in "${pythons[@]}"; do
  without_torch "${python}"
done
for version in "${torches[@]}"; do
  with_torch "${version}"
done

# A run that tested nothing is no success.
((passed > 0)) || failed=$((failed + 1))
printf '\n%d passed, %d failed\n' "${passed}" "${failed}"
((failed == 0))
