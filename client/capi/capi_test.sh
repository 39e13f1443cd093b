#!/usr/bin/env bash
# The C program against a broker of its own; afterwards nothing is lent.
. "$TEST_SRCDIR/$TEST_WORKSPACE/tests/integration/broker_fixture.sh"
CAPI=$RUNFILES/client/capi

start_broker --capacity 8M
"$CAPI/capi_program" "$ADDRESS" || fail "the C program"
"$CAPI/example" "$ADDRESS" >"$WORK/stdout" || fail "the example"
grep -q '^example: 64 blocks in use' "$WORK/stdout" || fail "the example's words"
kvctl delete c-admin >/dev/null # what an operator has set stays
[ "$(kvctl list --json)" = "[]" ] || fail "an instance is left"
"$CAPI/capi_program" "$ADDRESS" "$BROKER" || fail "without a broker"
"$CAPI/example" "$ADDRESS" 2>"$WORK/stderr" && fail "a session with nobody"
grep -q '^opening a session: ' "$WORK/stderr" || fail "$(cat "$WORK/stderr")"

# Templates of the standard library may be shared with other objects; nothing
# of ours but kvb_* is seen from outside, and all that the header declares is.
nm -D --defined-only "$CAPI/libkvbroker.so" >"$WORK/symbols"
if grep -v ' kvb_' "$WORK/symbols" | grep kvbroker; then
  fail "libkvbroker.so exports C++ of ours"
fi
declared=$(grep -o '\bkvb_[a-z_]*(' "$CAPI/kvbroker.h" | tr -d '(' | sort -u)
[ "$(wc -l <<<"$declared")" -gt 30 ] || fail "the header declares: $declared"
for function in $declared; do
  grep -q " T $function\$" "$WORK/symbols" || fail "$function is not exported"
done
ldd "$CAPI/capi_program" >"$WORK/needed"
grep -q libkvbroker.so "$WORK/needed" ||
  fail "the C program does not use the shared object"

# The reference quotes the example as it is.
awk '/^```c$/ {on = 1; next} /^```$/ {on = 0} on' "$RUNFILES/docs/api/c.md" |
  diff - "$CAPI/example.c" || fail "docs/api/c.md quotes another example"
echo PASSED
