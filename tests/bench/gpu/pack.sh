#!/bin/bash
# Collects the programs that want a GPU, and the libraries that another machine
# may not have, into build/gpu_bundle:
#
#   tests/bench/gpu/pack.sh
#   build/gpu_bundle/run.sh cuda_floor
#   KVBROKER_TEST_REAL_GPU=1 build/gpu_bundle/run.sh cuda_conformance_test
#   build/gpu_bundle/run.sh --fake cuda_floor      # the same, without a GPU
#   build/gpu_bundle/tests/bench/gpu/run.sh        # the table of figures
#   build/gpu_bundle/tests/bench/gpu/mps_fault.sh  # who survives a fault
#   python3 -B tests/chaos/kill_engines.py --backend cuda --bin build/gpu_bundle
#
# kvcached's source distribution, which the last of them builds where the GPU
# is, comes along: build/kvcached-*.tar.gz, or what fetch_kvcached.sh finds.
# The C and C++ runtimes are the other machine's: glibc 2.34 and GCC 12's or
# newer.
set -euo pipefail
cd "$(dirname "$0")/../../.."

targets=(
  //tests/bench/gpu:bench_gpu
  //tests/bench/gpu:cuda_floor
  //broker/server:kvbrokerd
  //client/cli:kvctl
  //client/replay:kvbroker-replay
  //tests/history:history_check
  //broker/device/cuda:cuda_conformance_test
  //client/arena:cuda_mapper_test
  //tests/fake_cuda:libfake_cuda.so
)
bazel build -c opt --strip=always "${targets[@]}"
bin=$(bazel info -c opt bazel-bin)

out=build/gpu_bundle
rm -rf "$out"
mkdir -p "$out/bin" "$out/lib" "$out/tests/fake_cuda"
for target in "${targets[@]}"; do
  path=${target#//}
  path=${path/://}
  case $path in
    *.so) cp "$bin/$path" "$out/tests/fake_cuda/" ;;
    *) cp "$bin/$path" "$out/bin/" ;;
  esac
done
chmod -R u+w "$out"
strip "$out"/bin/* "$out"/tests/fake_cuda/*

ldd "$out"/bin/* | awk '/=> \// {print $3}' | sort -u |
  grep -Ev '/(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+)\.so' |
  xargs -r cp -Lt "$out/lib"
# For what the libraries load in turn, too; that is what RUNPATH is not.
for program in "$out"/bin/*; do
  patchelf --force-rpath --set-rpath '$ORIGIN/../lib' "$program"
done

mkdir -p "$out/tests/bench/gpu"
cp tests/bench/gpu/{run.sh,bench_gpu.py,bench_kvcached.py,mps_fault.{sh,py}} \
  "$out/tests/bench/gpu/"
cp tests/bench/processes.py "$out/tests/bench/"
compgen -G 'build/kvcached-*.tar.gz' >/dev/null ||
  tests/bench/gpu/fetch_kvcached.sh ||
  echo "pack.sh: without kvcached, which could not be fetched" >&2
cp build/kvcached-*.tar.gz "$out/" 2>/dev/null || true

# As bazel-bin has them, for tests/chaos with --bin build/gpu_bundle.
for program in broker/server/kvbrokerd client/cli/kvctl \
  client/replay/kvbroker-replay tests/history/history_check; do
  mkdir -p "$out/${program%/*}"
  ln -rs "$out/bin/${program##*/}" "$out/$program"
done

cat > "$out/run.sh" <<'RUN'
#!/bin/bash
# run.sh [--fake] PROGRAM [ARGUMENTS]
here=$(cd "$(dirname "$0")" && pwd)
if [[ ${1-} == --fake ]]; then
  shift
  export KVBROKER_CUDA_DRIVER=$here/tests/fake_cuda/libfake_cuda.so
  export KVBROKER_NVML=$KVBROKER_CUDA_DRIVER
fi
program=$here/bin/$1
shift
cd "$here"  # where tests look for the fake driver
exec "$program" "$@"
RUN
chmod +x "$out/run.sh"
du -sh "$out"
