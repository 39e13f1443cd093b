#!/bin/bash
# What the import hook's .pth file costs each Python that starts.
#
#   tests/bench/python_startup.sh [PYTHON...] [-- OPTION...]
set -euo pipefail

case "${1:-}" in
  -h | --help)
    sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
pythons=()
while (($# > 0)) && [[ "$1" != -- ]]; do
  pythons+=("$1")
  shift
done
(($# == 0)) || shift
((${#pythons[@]} > 0)) || pythons=(python3)
for python in "${pythons[@]}"; do
  "${python}" "${here}/python_startup.py" "$@"
done
