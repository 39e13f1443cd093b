#!/bin/bash
# Builds kvbroker and runs all of its tests; needs no GPU.
set -euo pipefail

usage() {
  cat <<EOF
usage: deploy/test.sh [--quick]
Installs what is missing (as root), then runs one after the other
  plain    bazel test //...
  asan     the same under AddressSanitizer and UBSan, but for those tagged
           no_asan, whose reasons stand beside them
  tsan     the tests that link neither gRPC nor spdlog under ThreadSanitizer,
           and a check that exactly the others have the tag no_tsan
  clang    a build of everything with -Wthread-safety as an error
  python   the *_test.py files under deploy/, when there are any
  wheel    the Python package, as a wheel for this machine in an environment of
           its own; by the system's Python, without network
and ends with the line "N passed, N failed": test cases summed over the stages;
a build that fails counts as one failure. Exits 1 when anything failed.
  --quick  only plain, python and wheel
EOF
}

quick=false
for argument in "$@"; do
  case "${argument}" in
    --quick) quick=true ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
done

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
deploy/install_deps.sh

# Bazel wants a home folder, which CI does not always name.
export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"

work="$(mktemp -d)"
readonly work
trap 'rm -rf -- "${work}"' EXIT

passed=0
failed=0

# Bazel without a progress bar unless someone is watching.
bazel_flags=(--keep_going)
[[ -t 2 ]] || bazel_flags+=(--curses=no --color=no --show_progress_rate_limit=30)
readonly bazel_flags

# CI runs what it reports; elsewhere a pass of the same bytes is good enough.
test_flags=()
[[ -z "${CI:-}" ]] || test_flags+=(--nocache_test_results)

say() {
  printf '\n== %s: %s\n' "$1" "$2"
}

# count STAGE PASSED FAILED
count() {
  passed=$((passed + $2))
  failed=$((failed + $3))
  say "$1" "passed=$2 failed=$3 (${SECONDS} s since the start)"
}

# bazel_test STAGE [FLAG...]
bazel_test() {
  local stage="$1"
  shift
  say "${stage}" "bazel test $* //..."
  local events="${work}/${stage}.json" code=0
  : >"${events}"
  bazel test "${bazel_flags[@]}" "${test_flags[@]}" "$@" \
    "--build_event_json_file=${events}" //... </dev/null || code=$?

  local counted stage_passed stage_failed
  counted="$(python3 deploy/count_tests.py bazel "${events}")"
  grep '^FAILED ' <<<"${counted}" || true
  read -r stage_passed stage_failed <<<"${counted##*$'\n'}"

  case "${code}" in
    0 | 4) ;;  # 4: there is no test to run.
    3)
      # Tests failed, or one of them failed to build.
      if ((stage_failed == 0)); then stage_failed=1; fi
      ;;
    *)
      # 1: something does not build; others: bazel itself.
      echo "FAILED bazel test, with code ${code}"
      stage_failed=$((stage_failed + 1))
      ;;
  esac
  count "${stage}" "${stage_passed}" "${stage_failed}"
}

# TSan is to see every test that links nothing it cannot see into: exactly the
# others have the tag.
check_tsan_tags() {
  local blind="rdeps(//..., '@system//:grpc++' + '@system//:spdlog')"
  local all="tests(//...) except attr(tags, '\\bmanual\\b', //...)"
  local tagged="attr(tags, '\\bno_tsan\\b', //...)"
  local untagged needless
  if ! untagged="$(query "(${all}) intersect (${blind}) except (${tagged})")" ||
    ! needless="$(query "(${all}) intersect (${tagged}) except (${blind})")"; then
    echo "FAILED bazel query"
    count tsan-tags 0 1
    return
  fi
  report "${untagged}" "links gRPC or spdlog but lacks the tag no_tsan"
  report "${needless}" "links neither gRPC nor spdlog but has the tag no_tsan"
  if [[ -z "${untagged}${needless}" ]]; then
    count tsan-tags 1 0
  else
    count tsan-tags 0 1
  fi
}

# report LABELS WHY: one line a label.
report() {
  local label
  while IFS= read -r label; do
    [[ -z "${label}" ]] || echo "FAILED ${label} $2"
  done <<<"$1"
}

query() {
  bazel query --noshow_progress --ui_event_filters=-info "$1" </dev/null
}

# Prints the flags that the sanitizers of GCC 12 and clang 14 need: they do not
# start, or not always, where the kernel randomises more than 28 address bits.
sanitizer_flags() {
  local bits
  bits="$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 28)"
  if ((bits > 28)) && setarch -R true 2>/dev/null; then
    echo "--run_under=/usr/bin/setarch -R"
  fi
}

clang_build() {
  say clang "bazel build --config=clang //..."
  if bazel build "${bazel_flags[@]}" --config=clang //... </dev/null; then
    count clang 1 0
  else
    echo "FAILED build with clang -Wthread-safety"
    count clang 0 1
  fi
}

python_tests() {
  local folder log="${work}/unittest.log" stage_passed stage_failed
  while IFS= read -r folder; do
    say python "${folder}"
    PYTHONDONTWRITEBYTECODE=1 python3 -m unittest discover -s "${folder}" \
      -p '*_test.py' </dev/null 2>&1 | tee "${log}" || true
    read -r stage_passed stage_failed < <(python3 deploy/count_tests.py unittest "${log}")
    count python "${stage_passed}" "${stage_failed}"
  done < <(find deploy -name '*_test.py' -printf '%h\n' | sort -u)
}

# What plain has built, packed; all Pythons and torch: deploy/packaging/test_wheel.sh.
wheel_tests() {
  local log="${work}/wheel.log" stage_passed stage_failed
  say wheel "deploy/packaging/build_wheel.sh --unaudited, then test_wheel.sh"
  {
    bazel build --show_result=0 "${bazel_flags[@]}" //engine_patches/native:_C.abi3.so \
      //broker/server:kvbrokerd //client/cli:kvctl \
      //tests/fake_cuda:libfake_cuda.so </dev/null &&
      deploy/packaging/build_wheel.sh "${work}/wheel" --unaudited --no-install \
        --bin "$(bazel info bazel-bin </dev/null 2>/dev/null)" &&
      deploy/packaging/test_wheel.sh "${work}"/wheel/*.whl /usr/bin/python3
  } 2>&1 | tee "${log}" || true
  read -r stage_passed stage_failed < <(python3 deploy/count_tests.py summary "${log}")
  count wheel "${stage_passed}" "${stage_failed}"
}

bazel_test plain
if ! "${quick}"; then
  mapfile -t run_flags < <(sanitizer_flags)
  bazel_test asan --config=asan "${run_flags[@]}"
  check_tsan_tags
  bazel_test tsan --config=tsan "${run_flags[@]}"
  clang_build
fi
python_tests
wheel_tests

# A run that tested nothing is no success.
((passed > 0)) || failed=$((failed + 1))

printf '\n%d passed, %d failed\n' "${passed}" "${failed}"
((failed == 0))
