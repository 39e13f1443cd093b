# Sourced: makes programs carry the shared libraries that they need.
#
#   collect_libraries LIB FILE...   copies what the files need into LIB
#   find_beside RPATH FILE...       lets the files find it there: '$ORIGIN/../lib'
#   needed_symbols FILE...          the newest GLIBC and GLIBCXX that they ask for
#
# The C and C++ runtimes stay the other machine's: they belong to its kernel, its
# name services and whatever else is in the process. needed_symbols says how
# new they have to be. Wants patchelf and binutils.

# is_runtime NAME: whether a library is taken from the machine.
is_runtime() {
  case "$1" in
    ld-linux*.so.* | linux-vdso.so.*) ;;
    libc.so.* | libm.so.* | libdl.so.* | librt.so.* | libpthread.so.* | libresolv.so.*) ;;
    libstdc++.so.* | libgcc_s.so.*) ;;
    *) return 1 ;;
  esac
}

# libraries_of FILE...: what they need, directly or not, as "NAME PATH" lines.
# Fails where one is not found.
libraries_of() {
  local listed missing
  listed="$(ldd -- "$@")" || return
  if missing="$(grep 'not found' <<<"${listed}")"; then
    printf 'missing shared libraries:\n%s\n' "${missing}" >&2
    return 1
  fi
  awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}' <<<"${listed}" | sort -u
}

collect_libraries() {
  local into="$1" listed name path
  shift
  listed="$(libraries_of "$@")" || return
  mkdir -p -- "${into}"
  while read -r name path; do
    is_runtime "${name}" || install -m 644 -- "$(realpath -- "${path}")" "${into}/${name}" || return
  done <<<"${listed}"
}

# As RPATH, not RUNPATH: it comes before LD_LIBRARY_PATH, where Python
# environments keep other builds of the same libraries.
find_beside() {
  local rpath="$1" file
  shift
  for file in "$@"; do
    patchelf --force-rpath --set-rpath "${rpath}" "${file}" || return
  done
}

# Prints "GLIBC 2.34" and "GLIBCXX 3.4.30", one a line.
needed_symbols() {
  readelf --version-info --wide -- "$@" 2>/dev/null |
    grep --only-matching --extended-regexp '\b(GLIBC|GLIBCXX)_[0-9.]+' |
    sort -u -t_ -k1,1 -k2,2V |
    awk -F_ '{newest[$1] = $2} END {for (name in newest) print name, newest[name]}' | sort
}
