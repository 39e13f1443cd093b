#!/bin/bash
# Collects the programs that want a GPU, and the libraries that another machine
# may not have, into build/gpu_bundle:
#
#   tests/bench/gpu/pack.sh
#   build/gpu_bundle/run.sh cuda_floor
#   KVBROKER_TEST_REAL_GPU=1 build/gpu_bundle/run.sh cuda_conformance_test
#   build/gpu_bundle/run.sh --fake cuda_floor      # the same, without a GPU
#
# The C and C++ runtimes are the other machine's: glibc 2.34 and GCC 12's or
# newer.
set -euo pipefail
cd "$(dirname "$0")/../../.."

targets=(
  //tests/bench/gpu:cuda_floor
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

cat > "$out/run.sh" <<'RUN'
#!/bin/bash
# run.sh [--fake] PROGRAM [ARGUMENTS]
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
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
