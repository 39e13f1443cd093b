#!/bin/bash
# Line coverage of the CUDA backend and the CUDA mapper by their tests on the
# fake driver:
#
#   tests/fake_cuda/coverage.sh        # a line a file, then lines not reached
set -euo pipefail
cd "$(dirname "$0")/../.."

# The notes that the compiler writes beside each object are no outputs that
# bazel knows of: the disk cache would not bring them back.
flags=(
  --platform_suffix=-cov --experimental_convenience_symlinks=ignore
  --copt=--coverage --linkopt=--coverage --copt=-O0 --disk_cache=
)
tests=(
  broker/device/cuda/cuda_backend_test
  broker/device/cuda/cuda_conformance_test
  broker/device/cuda/cuda_ipc_backend_test
  client/arena/cuda_mapper_test
  client/arena/cuda_ipc_mapper_test
  client/arena/make_mapper_test
)
files=(
  broker/device/cuda/{cuda_status,driver,nvml_device,probe,cuda_backend,cuda_ipc_backend}.cc
  client/arena/{stream_fence,cuda_mapper,cuda_slab,cuda_ipc_mapper,gpu_mapper,cuda_driver}.cc
)

targets=()
for test in "${tests[@]}"; do targets+=("//${test%/*}:${test##*/}"); done
bazel build "${flags[@]}" "${targets[@]}"
bin=$(bazel info "${flags[@]}" bazel-bin)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for test in "${tests[@]}"; do
  # Counters go to $scratch/data, by the path of the object they count for.
  (cd "$bin/$test.runfiles/kvbroker" &&
    GCOV_PREFIX=$scratch/data "$bin/$test" --gtest_brief=1)
done

for file in "${files[@]}"; do
  data=$(find "$scratch/data" -path "*/${file%/*}/*" \
    -name "$(basename "$file" .cc)*.gcda")
  notes=$(find "$bin/${file%/*}/" -name "$(basename "$file" .cc)*.gcno" |
    grep -v _test)
  for one in $data; do
    case $one in *_test*) ;; *) cp "$one" "$scratch/" ;; esac
  done
  cp "$notes" "$scratch/"
  gcov -t "$scratch/$(basename "$notes")" 2>/dev/null |
    awk -v file="$file" '
      /^ *[^:]*: *0:Source:/ { ours = index($0, file) > 0 }
      !ours { next }
      / *-: / { next }
      { lines++ }
      /^ *(#####|=====)/ { missed++; text = text $0 "\n" }
      END { printf "%6.1f %% of %d lines: %s\n%s",
            100 * (lines - missed) / lines, lines, file, text }'
done
