#!/bin/bash
# Makes the tarball that users unpack: programs, C library, and the shared
# libraries that their machine may not have.
set -euo pipefail

usage() {
  cat <<EOF2
usage: deploy/packaging/build_bundle.sh [--output DIR] [--bin DIR] [--no-install]
Installs what is missing (as root), builds with optimisation, and makes
kvbroker-VERSION-linux-ARCH.tar.gz, which holds one folder:
  bin/       kvbrokerd, kvctl, kvbroker-replay, history_check
  lib/       libkvbroker.so and what all of these need
  include/   kvbroker.h
  licenses/  of the libraries
  MANIFEST   versions, and sums for: sha256sum --check MANIFEST
It runs from wherever it is unpacked. The machine has to have the C and C++
runtimes that MANIFEST names; CUDA's driver is looked for at run time.
  --output DIR   where the tarball goes [build]
  --bin DIR      take programs that are built already, in bazel-bin's layout
  --no-install   do not look for missing packages
EOF2
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
readonly root
. "${root}/deploy/packaging/shared_libraries.sh"

readonly PROGRAMS=(
  broker/server/kvbrokerd
  client/cli/kvctl
  client/replay/kvbroker-replay
  tests/history/history_check
)
readonly LIBRARY=client/capi/libkvbroker.so

output="${root}/build"
bin=""
install=true
while (($# > 0)); do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --no-install) install=false ;;
    --output=*) output="${1#*=}" ;;
    --bin=*) bin="${1#*=}" ;;
    --output | --bin)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done
mkdir -p -- "${output}"
output="$(realpath -- "${output}")"
readonly output

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
  for path in "${PROGRAMS[@]}" "${LIBRARY}"; do
    targets+=("//${path%/*}:${path##*/}")
  done
  cd -- "${root}"
  bazel build "${bazel_flags[@]}" "${targets[@]}" </dev/null
  bin="$(bazel info --config=opt bazel-bin </dev/null 2>/dev/null)"
  cd -- "${OLDPWD}"
fi

work="$(mktemp -d)"
readonly work
trap 'rm -rf -- "${work}"' EXIT

version="$("${bin}/broker/server/kvbrokerd" --version)"
version="${version#kvbrokerd }"
name="kvbroker-${version}-linux-$(uname -m)"
readonly folder="${work}/${name}"

mkdir -p "${folder}"/{bin,lib,include,licenses}
for path in "${PROGRAMS[@]}"; do
  install -m 755 -- "${bin}/${path}" "${folder}/bin/"
done
install -m 644 -- "${bin}/${LIBRARY}" "${folder}/lib/"
install -m 644 -- "${root}/client/capi/kvbroker.h" "${folder}/include/"
install -m 644 -- "${root}/LICENSE" "${folder}/LICENSE"

# Stripped first: what patchelf has moved, strip may damage.
strip "${folder}"/bin/* "${folder}"/lib/*
collect_libraries "${folder}/lib" "${folder}"/bin/* "${folder}"/lib/*
find_beside '$ORIGIN/../lib' "${folder}"/bin/*
find_beside '$ORIGIN' "${folder}"/lib/*

# Where each library is from: "NAME PACKAGE VERSION" lines. dpkg knows some by
# the folder that they were in before /lib became a link.
libraries_of "${bin}/${LIBRARY}" "${PROGRAMS[@]/#/${bin}/}" >"${work}/found"
declare -A soname_of
while read -r library path; do
  ! is_runtime "${library}" || continue
  path="$(realpath -- "${path}")"
  soname_of["${path}"]="${library}"
  soname_of["${path#/usr}"]="${library}"
done <"${work}/found"
# Fails for those that it does not know.
dpkg-query --search -- "${!soname_of[@]}" >"${work}/owners" 2>/dev/null || true
while IFS=: read -r package _ path; do
  echo "${soname_of["${path# }"]}" \
    "$(dpkg-query --show --showformat '${Package} ${Version}' -- "${package}")"
done <"${work}/owners" >"${work}/packages"

{
  echo "# kvbroker ${version}"
  commit="$(git -C "${root}" rev-parse --verify --quiet HEAD 2>/dev/null)" || commit="unknown"
  [[ -z "$(git -C "${root}" status --porcelain 2>/dev/null)" ]] || commit+=" with changes"
  echo "# commit ${commit}"
  needed_symbols "${folder}"/bin/* "${folder}"/lib/* | sed 's/^/# needs /'
  sed -E 's/^([^ ]*)/# lib\/\1 is of/' "${work}/packages" | LC_ALL=C sort -u
  while read -r _ package _; do
    notice="/usr/share/doc/${package}/copyright"
    [[ ! -r "${notice}" ]] || install -m 644 -- "${notice}" "${folder}/licenses/${package}"
  done <"${work}/packages"
  cd -- "${folder}"
  find . -type f ! -name MANIFEST -printf '%P\n' | LC_ALL=C sort | xargs sha256sum --
} >"${work}/MANIFEST"
install -m 644 -- "${work}/MANIFEST" "${folder}/MANIFEST"

# The same bytes for the same input.
tar --create --directory "${work}" --sort=name --owner=0 --group=0 --numeric-owner \
  --mtime="@$(git -C "${root}" log -1 --format=%ct 2>/dev/null || echo 0)" "${name}" |
  gzip --no-name --best >"${work}/tarball"
mv -- "${work}/tarball" "${output}/${name}.tar.gz"
du -h -- "${output}/${name}.tar.gz"
