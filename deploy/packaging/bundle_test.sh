#!/usr/bin/env bash
# The tarball is unpacked, moved, and used on its own.
. "$TEST_SRCDIR/$TEST_WORKSPACE/tests/integration/broker_fixture.sh"
. "$RUNFILES/deploy/packaging/shared_libraries.sh"
unset LD_LIBRARY_PATH

"$RUNFILES/deploy/packaging/build_bundle.sh" --no-install --bin "$RUNFILES" \
  --output "$WORK/made" >"$WORK/build.log" 2>&1 || fail "it is not made"
version=$("$KVBROKERD" --version)
tarball=$WORK/made/kvbroker-${version#kvbrokerd }-linux-$(uname -m).tar.gz
mkdir "$WORK/unpacked" "$WORK/elsewhere"
tar -xzf "$tarball" -C "$WORK/unpacked" || fail "no $tarball"
BUNDLE=$WORK/unpacked/$(basename "$tarball" .tar.gz)

[ "$("$BUNDLE/bin/kvbrokerd" --version)" = "$version" ] || fail "another version"
mv "$BUNDLE" "$WORK/elsewhere/kvbroker"
BUNDLE=$WORK/elsewhere/kvbroker
(cd "$BUNDLE" && sha256sum --quiet --check MANIFEST) || fail "sums differ"
for file in lib/libkvbroker.so bin/kvctl; do
  grep -q "  $file\$" "$BUNDLE/MANIFEST" || fail "MANIFEST lacks $file"
done

# What each file asks for is beside it or a runtime, by its own headers and by
# what the loader finds.
FILES=("$BUNDLE"/bin/* "$BUNDLE"/lib/*)
for file in "${FILES[@]}"; do
  readelf -dW "$file" >"$WORK/dynamic"
  while read -r name; do
    is_runtime "$name" || [ -f "$BUNDLE/lib/$name" ] ||
      fail "$file needs $name, which is not in lib/"
  done < <(sed -n 's/.*(NEEDED).*\[\(.*\)\]$/\1/p' "$WORK/dynamic")
  # Before LD_LIBRARY_PATH, which RUNPATH would come after.
  grep -q 'RPATH.*\[\$ORIGIN' "$WORK/dynamic" || fail "$file has no \$ORIGIN"
  grep -q RUNPATH "$WORK/dynamic" && fail "$file has a RUNPATH"
  libraries_of "$file" >"$WORK/libraries" || fail "$file: libraries are missing"
  while read -r name path; do
    is_runtime "$name" || [ "$(realpath "$path")" = "$BUNDLE/lib/$name" ] ||
      fail "$file loads $path"
  done <"$WORK/libraries"
done
# The check above sees something.
libraries_of "$BUNDLE/bin/kvbrokerd" | grep -q '^libgrpc++' ||
  fail "kvbrokerd does not load gRPC"
grep -q '^# lib/libgrpc++.* is of libgrpc++' "$BUNDLE/MANIFEST" ||
  fail "MANIFEST does not say which gRPC"
needed_symbols "${FILES[@]}" >"$WORK/symbols"
grep -q '^GLIBC ' "$WORK/symbols" || fail "no file needs glibc"
while read -r name newest; do
  grep -q "^# needs $name $newest\$" "$BUNDLE/MANIFEST" ||
    fail "MANIFEST does not say that $name $newest is needed"
done <"$WORK/symbols"

# A broker, an engine and kvctl from there. The fixture's names are the
# bundle's from here on.
KVBROKERD=$BUNDLE/bin/kvbrokerd
KVCTL=$BUNDLE/bin/kvctl
REPLAY=$BUNDLE/bin/kvbroker-replay
cd /
start_broker --capacity 48M --history-file "$WORK/broker.history"
start_replay chat --trace builtin:conv --window 60 --json \
  --history "$WORK/engine.history"
ENGINE=$LAST
eventually 30 at_least chat held_bytes 1 || fail "the engine has no memory"
grep -q "$BUNDLE/lib/libgrpc" "/proc/$ENGINE/maps" ||
  fail "the engine does not run on the bundle's libraries"
wait "$ENGINE" || fail "the engine failed"
grep -q '"integrity_errors":0' <(tr -d ' ' <"$WORK/chat.log") ||
  fail "its data is not whole"
kill "$BROKER"
wait "$BROKER" || fail "the broker failed"
"$BUNDLE/bin/history_check" "$WORK"/*.history || fail "the history"

# The C library, for a program that is built with the bundle alone. Where the
# library has a sanitizer, the program would need it too.
if ! compgen -G "$BUNDLE/lib/libasan.so.*" >/dev/null; then
  sed 's|"client/capi/kvbroker.h"|<kvbroker.h>|' "$RUNFILES/client/capi/example.c" \
    >"$WORK/example.c"
  "${CC:-cc}" -I "$BUNDLE/include" "$WORK/example.c" -o "$WORK/example" \
    -L "$BUNDLE/lib" -lkvbroker "-Wl,-rpath,$BUNDLE/lib,--allow-shlib-undefined" ||
    fail "the example does not build"
  "$WORK/example" "$ADDRESS" 2>"$WORK/stderr" && fail "a session with nobody"
  grep -q '^opening a session: ' "$WORK/stderr" || fail "$(cat "$WORK/stderr")"
fi
echo PASSED
