#!/bin/bash
# Builds the fuzz targets with libFuzzer, AddressSanitizer and UBSan, and runs
# them one after the other.
set -euo pipefail

usage() {
  cat <<END
usage: tests/fuzz/run.sh [TARGET...] [--seconds N] [--corpus-out DIR]
Runs each TARGET (all, where none is named) for N seconds, 60 by default, and
prints how many inputs it tried and how many of them failed. Exits 1 if any did.
  --corpus-out DIR  keep what was found under DIR/TARGET, and begin with it; an
                    input that fails is DIR/TARGET-crash-..., or below the
                    current folder where no DIR is given
Targets: $(targets | xargs)
END
}

targets() {
  local source
  for source in "${HERE}"/*_fuzz.cc; do
    basename "${source}" _fuzz.cc
  done
}

fail() {
  echo "run.sh: $1" >&2
  exit 2
}

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
readonly HERE
seconds=60
out=""
chosen=()
while (($# > 0)); do
  case "$1" in
    --seconds | --corpus-out)
      (($# > 1)) || fail "$1 needs a value"
      if [[ "$1" == --seconds ]]; then seconds="$2"; else out="$2"; fi
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) fail "unknown option $1; see --help" ;;
    *)
      [[ -f "${HERE}/$1_fuzz.cc" ]] ||
        fail "no such target: $1; there are: $(targets | xargs)"
      chosen+=("$1")
      ;;
  esac
  shift
done
[[ "${seconds}" =~ ^[1-9][0-9]*$ ]] || fail "--seconds: not a number: ${seconds}"
((${#chosen[@]} > 0)) || mapfile -t chosen < <(targets)

work="$(mktemp -d)"
readonly work
trap 'rm -rf -- "${work}"' EXIT
artifacts="${PWD}"
if [[ -n "${out}" ]]; then
  mkdir -p "${out}"
  out="$(realpath -- "${out}")"
  artifacts="${out}"
fi

# Sanitizers do not always start where the kernel randomises more address bits.
launcher=()
bits="$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 28)"
if ((bits > 28)) && setarch -R true 2>/dev/null; then
  launcher=(setarch -R)
fi

cd -- "${HERE}/../.."
labels=()
for target in "${chosen[@]}"; do labels+=("//tests/fuzz:${target}_fuzz"); done
# gold has a warning for each of ASan's symbols.
bazel build --config=fuzz "${labels[@]}" </dev/null \
  2> >(sed -u '/Cannot export local symbol/d' >&2)
bin="$(bazel info --config=fuzz bazel-bin 2>/dev/null)"

# run TARGET: its line of the summary; false where an input failed.
run() {
  local target="$1" log="${work}/$1.log" found="${out:-${work}}/$1" code=0
  mkdir -p "${found}"
  "${launcher[@]}" "${bin}/tests/fuzz/${target}_fuzz" \
    -max_total_time="${seconds}" -timeout=10 -rss_limit_mb=2048 \
    -print_final_stats=1 -artifact_prefix="${artifacts}/${target}-" \
    "${found}" "${HERE}/corpus/${target}" >"${log}" 2>&1 || code=$?
  local tried rate
  tried="$(sed -n 's/^stat::number_of_executed_units: *//p' "${log}")"
  rate="$(sed -n 's/^stat::average_exec_per_sec: *//p' "${log}")"
  # Without its statistics it ended before it began, or by a sanitizer.
  printf '%-18s %12s inputs %8s/s  %d crashes\n' "${target}" \
    "${tried:-?}" "${rate:-?}" "$((code != 0))"
  ((code == 0)) && return
  tail -n 60 "${log}"
  return 1
}

failed=0
for target in "${chosen[@]}"; do
  run "${target}" || failed=1
done
exit "${failed}"
