#!/bin/sh
# Do the FILEs run with the C library of packaging/glibc? Fails where one wants a later version of a symbol, a library
# that is no part of the C library, or has a memcpy of its own: the C library's is made for the processor that it finds.
# Usage: symbols.sh FILE...
set -eu
limit=$(cat "$(dirname "$0")/glibc")
[ $# != 0 ] || { echo "usage: symbols.sh FILE..." >&2; exit 2; }
wrong=0
for file in "$@"; do
  symbols=$(objdump -T "$file" 2>/dev/null || aarch64-linux-gnu-objdump -T "$file")
  latest=$(echo "$symbols" | sed -n 's/.*\*UND\*.*GLIBC_\([0-9.]*\).*/\1/p' | sort -V | tail -n 1)
  [ -n "$latest" ] || { echo "$file: no symbol of a C library" >&2; exit 1; }
  if [ "$(printf '%s\n' "$latest" "$limit" | sort -V | tail -n 1)" != "$limit" ]; then
    echo "$file: wants glibc $latest, not $limit:" >&2
    echo "$symbols" | grep "GLIBC_$latest" >&2
    wrong=1
  fi
  for name in memcpy memset memmove; do
    echo "$symbols" | grep -q "\*UND\*.* $name\$" || { echo "$file: $name is not the C library's" >&2; wrong=1; }
  done
  strange=$(readelf -d "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' |
    grep -vE '^(libc|libm|libdl|libpthread|librt|ld-linux-x86-64|ld-linux-aarch64)\.so\.[0-9]+$' || true)
  [ -z "$strange" ] || { echo "$file: wants $strange" >&2; wrong=1; }
  echo "$file: glibc $latest"
done
exit "$wrong"
