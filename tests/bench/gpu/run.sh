#!/bin/bash
# Measures the driver, kvcached and kvbroker on this machine's GPU.
set -euo pipefail

usage() {
  cat <<END
usage: tests/bench/gpu/run.sh [--fake] [--json FILE] [--kvcached SDIST]
                              [--seconds N] [--limit N]
Prints a table; asserts nothing. In a checkout it builds what it runs; in a
bundle that pack.sh made everything is there. At most 5 minutes.
  --fake            on the fake driver, to try it without a GPU; not kvcached
  --json FILE       also write the figures, with facts of the machine, to FILE
  --kvcached SDIST  kvcached's source distribution, to build and measure here;
                    default: build/kvcached-*.tar.gz, or the bundle's
  --seconds N       how long what runs for a while runs, 3 by default
  --limit N         seconds in all, after which nothing is begun any more, 285
                    by default
What each figure means: docs/benchmarks/gpu.md.
END
}

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../../.." && pwd)
fake=false
sdist=
passed_on=()
while (($# > 0)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --fake) fake=true ;;
    --kvcached | --json | --seconds | --limit)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      if [[ $1 == --kvcached ]]; then
        sdist=$2
      else
        passed_on+=("$1" "$2")
      fi
      shift
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done

export PYTHONDONTWRITEBYTECODE=1
if [[ -d $root/bin ]]; then  # a bundle
  bin=$root/bin
  fake_driver=$root/tests/fake_cuda/libfake_cuda.so
  folder=$root
else
  export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"
  flags=(--config=opt --experimental_convenience_symlinks=ignore --strip=always)
  cd -- "$root"
  bazel build "${flags[@]}" //broker/server:kvbrokerd \
    //tests/bench/gpu:bench_gpu //tests/bench/gpu:cuda_floor \
    //tests/fake_cuda:libfake_cuda.so </dev/null
  bin=$(bazel info --config=opt bazel-bin </dev/null 2>/dev/null)
  cd -- "$OLDPWD"
  fake_driver=$bin/tests/fake_cuda/libfake_cuda.so
  folder=$root/build
fi
if $fake; then
  passed_on+=("--fake=$fake_driver")
fi
if [[ -z $sdist ]]; then
  for file in "$folder"/kvcached-*.tar.gz; do
    [[ -e $file ]] && sdist=$file
  done
fi
[[ -z $sdist ]] || passed_on+=("--kvcached=$sdist")
exec python3 "$here/bench_gpu.py" "--bin=$bin" "${passed_on[@]}"
