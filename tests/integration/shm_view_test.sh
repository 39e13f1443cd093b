#!/usr/bin/env bash
# The shared-memory view of real sessions with a real broker, as programs made
# for kvcached use it: shm_view_test.py.
. "$(dirname "$0")/broker_fixture.sh"

start_broker --capacity 64M
mkdir "$WORK/shm"
python3 "$RUNFILES/tests/integration/shm_view_test.py" \
  "$RUNFILES/tests/integration/view_program" "$KVCTL" "$ADDRESS" "$WORK/shm"
