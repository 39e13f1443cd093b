#!/bin/bash
# Installs the Debian 12 packages that building and testing kvbroker needs.
# Quick and without network when they are all there.
set -euo pipefail

readonly PACKAGES=(
  # Bazel 4.2.3 and the rules it loads.
  bazel-bootstrap
  bazel-platforms
  bazel-rules-java
  bazel-rules-proto
  bazel-skylib
  # Compilers; clang for -Wthread-safety and TSan, whose reports llvm symbolizes.
  clang
  g++
  libclang-rt-14-dev
  llvm
  pkg-config
  # Code generators.
  protobuf-compiler
  protobuf-compiler-grpc
  # Libraries.
  libabsl-dev
  libbenchmark-dev
  libcli11-dev
  libfmt-dev
  libgmock-dev
  libgrpc++-dev
  libgtest-dev
  libprotobuf-dev
  libpython3-dev
  libreadline-dev
  libspdlog-dev
  libyaml-cpp-dev
  nlohmann-json3-dev
  # Scripts.
  git
  patchelf
  procps
  python3
  # The Python package: a wheel, and an environment to try it in.
  python3-setuptools
  python3-venv
  python3-wheel
)

usage() {
  cat <<EOF
usage: deploy/install_deps.sh [--list]
Installs what kvbroker needs to build, as root, with apt-get.
  --list   print the packages instead
EOF
}

case "${1:-}" in
  "") ;;
  --list)
    printf '%s\n' "${PACKAGES[@]}"
    exit 0
    ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac

missing_packages() {
  local installed
  # Fails when it does not know one of them, which is an answer as well.
  installed="$(dpkg-query --show --showformat '${Package} ${db:Status-Status}\n' \
    "${PACKAGES[@]}" 2>/dev/null || true)"
  local package
  for package in "${PACKAGES[@]}"; do
    grep -Fqx -- "${package} installed" <<<"${installed}" || echo "${package}"
  done
}

if ! command -v dpkg-query >/dev/null; then
  echo "install_deps.sh: needs Debian 12: there is no dpkg-query here" >&2
  exit 1
fi

mapfile -t missing < <(missing_packages)
if [[ ${#missing[@]} -eq 0 ]]; then
  exit 0
fi

echo "install_deps.sh: to install: ${missing[*]}"
if [[ "${EUID}" -ne 0 ]]; then
  echo "install_deps.sh: this needs root; run: sudo $(realpath -- "$0")" >&2
  exit 1
fi

export DEBIAN_FRONTEND=noninteractive
readonly APT=(apt-get --quiet --quiet -o Acquire::Retries=3 -o Dpkg::Use-Pty=0)
"${APT[@]}" update
"${APT[@]}" install --yes --no-install-recommends "${missing[@]}" </dev/null

mapfile -t missing < <(missing_packages)
if [[ ${#missing[@]} -ne 0 ]]; then
  echo "install_deps.sh: still missing: ${missing[*]}" >&2
  exit 1
fi
