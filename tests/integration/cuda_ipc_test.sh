#!/usr/bin/env bash
# Engines share one slab of a GPU without virtual memory management, on a fake
# driver with the symbols of CUDA 11.4.
. "$(dirname "$0")/broker_fixture.sh"

FAKE=$(realpath "$RUNFILES/tests/fake_cuda/libfake_cuda_11_4.so")
export KVBROKER_CUDA_DRIVER=$FAKE KVBROKER_NVML=$FAKE
export KVBROKER_FAKE_CUDA_DIR=$WORK/gpu KVBROKER_FAKE_CUDA_TOTAL=$((512 << 20))
mkdir "$WORK/gpu"

serve() {
  start broker "$KVBROKERD" --socket-dir "$ADDRESS" --lock-dir "$WORK/locks" \
    --state-dir "$WORK/state" "$@"
  BROKER=$LAST
  eventually 20 kvctl list >/dev/null 2>&1 || fail "the broker does not answer"
}
# Nothing says which backend: this GPU can be served in one way only.
serve --headroom 128M
grep -q "backend=cuda_ipc (cuda_ipc: Fake GPU .* has no virtual memory management" \
  "$WORK/broker.log" || fail "the log does not say which backend and why"
# A second broker leaves the GPU's memory alone.
exits 3 "$KVBROKERD" --socket-dir "$WORK/other" --lock-dir "$WORK/locks" \
  --state-dir none --headroom 16M
grep -q "another broker serves this device" "$WORK/stderr" || fail "unclear: $(cat "$WORK/stderr")"

# Two page sizes want more than there is, and a third engine is killed meanwhile.
replay() {
  local name=$1
  shift
  start "$name" "$REPLAY" --name "$name" --address "$ADDRESS" \
    --speedup 40 --json "$@"
}
replay chat --trace builtin:conv --scale 32 --window 200
CHAT=$LAST
replay code --trace builtin:code --model qwen3-8b --scale 24 --window 200 \
  --backend cuda_ipc
CODE=$LAST
replay victim --trace builtin:conv --scale 32 --window 200
VICTIM=$LAST
eventually 30 at_least victim held_bytes 1 || fail "victim does not grow"
kill -9 "$VICTIM"
wait "$VICTIM" 2>/dev/null || true
gone() { ! kvctl list --json | grep -q victim; }
eventually 10 gone || fail "victim is still listed"
kvctl list --json >"$WORK/list"
python3 - "$WORK/list" <<'PYTHON' || fail "the list does not say which backend and why"
import json, sys
listing = json.load(open(sys.argv[1]))
assert {instance["ipc"] for instance in listing} == {"chat", "code"}, listing
for instance in listing:
    assert instance["backend"] == "cuda_ipc", instance
    assert "has no virtual memory management" in instance["backend_reason"]
PYTHON
# Another tenant (here, another PID namespace) is refused in words.
if unshare --pid --fork true 2>/dev/null; then
  exits 1 unshare --pid --fork "$REPLAY" --name stranger --address "$ADDRESS" \
    --scale 32 --window 1
  grep -q "with cuda_ipc a GPU is for one tenant" "$WORK/stderr" ||
    fail "unclear: $(cat "$WORK/stderr")"
fi
# As is who maps another kind of memory, or sees no GPU.
exits 1 "$REPLAY" --name other --address "$ADDRESS" --backend host \
  --scale 32 --window 1
grep -q "lends cuda_ipc memory, and this process maps host memory" \
  "$WORK/stderr" || fail "unclear: $(cat "$WORK/stderr")"
CUDA_VISIBLE_DEVICES= exits 1 "$REPLAY" --name blind --address "$ADDRESS" \
  --scale 32 --window 1
grep -q "there is no GPU, or CUDA_VISIBLE_DEVICES hides it" "$WORK/stderr" ||
  fail "unclear: $(cat "$WORK/stderr")"
for engine in "$CHAT" "$CODE"; do
  wait "$engine" || fail "an engine failed"
done
for name in chat code; do
  tr -d ' ' <"$WORK/$name.log" >"$WORK/$name.json"
  grep -q '"integrity_errors":0' "$WORK/$name.json" ||
    fail "the data of $name is not whole"
  # It is no use to share what nobody is short of.
  grep -q '"reclaims":[1-9]' "$WORK/list" || grep -q "reclaim " "$WORK/broker.log" ||
    fail "nobody was asked to give"
done

# The memory goes with the broker: engines say so and do not wait for another,
# and another waits for none of them.
replay orphan --scale 32 --trace builtin:conv --window 4000
ORPHAN=$LAST
eventually 30 at_least orphan held_bytes 1 || fail "orphan does not grow"
kill -9 "$BROKER"
wait "$BROKER" 2>/dev/null || true
eventually 20 bash -c "grep -q 'the memory that it lent with it' '$WORK/orphan.log'" ||
  fail "unclear: $(cat "$WORK/orphan.log")"
kill "$ORPHAN" 2>/dev/null || true
wait "$ORPHAN" 2>/dev/null || true
serve --headroom 128M
replay again --scale 32 --trace builtin:conv --window 100
wait "$LAST" || fail "an engine of the new broker failed"
kvctl list --json >"$WORK/list"
! grep -q orphan "$WORK/list" || fail "the new broker knows engines of the last"
kill "$BROKER"
wait "$BROKER" || fail "the broker failed"
grep -q "engines have to be restarted" "$WORK/broker.log" ||
  fail "the log does not say what becomes of engines"

# All of the GPU's memory is free again.
python3 - "$WORK/gpu" <<'PYTHON' || fail "memory of the GPU is still in use"
import fcntl, os, pathlib, sys
for file in pathlib.Path(sys.argv[1]).glob("memory*"):
    descriptor = os.open(file, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    os.close(descriptor)
PYTHON
echo PASSED
