#!/usr/bin/env bash
# Engines borrow a GPU's memory, on a fake driver that keeps it in files.
. "$(dirname "$0")/broker_fixture.sh"

FAKE=$(realpath "$RUNFILES/tests/fake_cuda/libfake_cuda.so")
export KVBROKER_CUDA_DRIVER=$FAKE KVBROKER_NVML=$FAKE
export KVBROKER_FAKE_CUDA_DIR=$WORK/gpu KVBROKER_FAKE_CUDA_TOTAL=$((1536 << 20))
mkdir "$WORK/gpu"
GPU=GPU-fa6e0000-0000-4000-8000-000000000000

# Nothing says which backend: a GPU that can serve is taken.
start broker "$KVBROKERD" --socket-dir "$ADDRESS" --lock-dir "$WORK/locks" \
  --state-dir none --headroom 64M
BROKER=$LAST
eventually 20 kvctl list >/dev/null 2>&1 || fail "the broker does not answer"
grep -q "backend=cuda (cuda: the best here; Fake GPU" "$WORK/broker.log" ||
  fail "the log does not say which backend and why"

# Two want more than there is, and a third is killed meanwhile.
replay() {
  start "$1" "$REPLAY" --name "$1" --address "$ADDRESS" --scale 64 \
    --speedup 40 --window 400 --trace "builtin:$2" --json "${@:3}"
}
replay chat conv
CHAT=$LAST
# With memory behind the addresses of pages that it does not hold.
replay code code --guard
CODE=$LAST
replay victim conv
VICTIM=$LAST
eventually 30 at_least victim held_bytes 1 || fail "victim does not grow"
kill -9 "$VICTIM"
wait "$VICTIM" 2>/dev/null || true
gone() { ! kvctl list --json | grep -q victim; }
eventually 10 gone || fail "victim is still listed"
# One that needs memory of its own, besides what it borrows: the others make room.
start active "$REPLAY" --name active --address "$ADDRESS" --scale 64 \
  --speedup 40 --window 200 --activations 256M
ACTIVE=$LAST
for engine in "$CHAT" "$CODE" "$ACTIVE"; do
  wait "$engine" || fail "an engine failed"
done
grep -q "activations: [1-9][0-9]* taken, 0 failed" "$WORK/active.log" ||
  fail "activations were not there"
grep -q "make-room .*declared=$((1280 << 20))" "$WORK/broker.log" ||
  fail "no room was asked for"
for name in chat code; do
  grep -q '"integrity_errors":0' <(tr -d ' ' <"$WORK/$name.log") ||
    fail "the data of $name is not whole"
done

# Whose context is poisoned says so and ends; the broker has its pages back.
KVBROKER_FAKE_CUDA_FAIL=cuMemMap:3:700 exits 1 "$REPLAY" --name poisoned \
  --address "$ADDRESS" --scale 64 --speedup 40 --window 400
grep -q "does not work for this process any more, restart it: .*ILLEGAL_ADDRESS" \
  "$WORK/stderr" || fail "unclear: $(cat "$WORK/stderr")"
left() { ! kvctl list --json | grep -q poisoned; }
eventually 10 left || fail "who is poisoned is still listed"

# A GPU that is lost: everybody is told, and the broker goes on when it is back.
lose() {
  python3 -c "import ctypes, sys
ctypes.CDLL(sys.argv[1]).fakeCudaLose(int(sys.argv[2]))" "$FAKE" "$1"
}
if [[ -z ${ASAN_OPTIONS:-} ]]; then # Python does not load what has ASan in it
  start idle "$REPLAY" --name idle --address "$ADDRESS" --scale 64
  IDLE=$LAST
  eventually 30 at_least idle held_bytes 1 || fail "idle does not grow"
  kill -STOP "$IDLE"
  lose 100
  lost() { kvctl list | grep -q "GPU_IS_LOST\|NO_DEVICE"; }
  eventually 20 lost || fail "kvctl does not say that the GPU is lost"
  kvctl list --json | grep -q '"broker_state": *"lost"' || fail "nor as JSON"
  lose 0
  back() { kvctl list --json | grep -q '"broker_state": *"serving"'; }
  eventually 20 back || fail "the GPU does not come back"
  kill -CONT "$IDLE"
  kill "$IDLE"
  wait "$IDLE" || fail "idle failed"
fi

# Who maps another kind of memory is told so.
exits 1 "$REPLAY" --name other --address "$ADDRESS" --backend host \
  --scale 64 --window 1
grep -q "lends cuda memory, and this process maps host memory" "$WORK/stderr" ||
  fail "unclear: $(cat "$WORK/stderr")"
# As is who does not see the GPU.
CUDA_VISIBLE_DEVICES= exits 1 "$REPLAY" --name blind --address "$ADDRESS" \
  --scale 64 --window 1
grep -q "there is no GPU, or CUDA_VISIBLE_DEVICES hides it" "$WORK/stderr" ||
  fail "unclear: $(cat "$WORK/stderr")"
# And whose pages do not fit the GPU's granularity.
exits 1 "$REPLAY" --name small --address "$ADDRESS" --scale 512 --window 1
grep -q "multiple of the device's granularity, 2097152 bytes" "$WORK/stderr" ||
  fail "unclear: $(cat "$WORK/stderr")"

# The GPU has everything back once the stock is gone: of no allocation (a file)
# is there a handle, a descriptor or a mapping any more.
unused() {
  python3 - "$WORK/gpu" <<'END'
import fcntl, os, pathlib, sys
for file in pathlib.Path(sys.argv[1]).glob("memory*"):
    descriptor = os.open(file, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    os.close(descriptor)
END
}
eventually 20 unused 2>/dev/null || fail "memory of the GPU is still in use"
kill "$BROKER"
wait "$BROKER" || fail "the broker failed"
echo PASSED
