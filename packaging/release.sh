#!/bin/sh
# Builds what the packages ship, for boxes as they are: linked by zig, which knows the symbols of every C library, against
# the version in packaging/glibc; packaging/symbols.sh checks what came of it.
# Usage: release.sh [ARCH [CARGO_COMMAND...]]: x86_64 or aarch64, this machine's without it; another command than to build
# the daemon and its plugin. The last line of the output is the folder of what is built.
# The same sources and compiler are the same bytes wherever they lie: no path of this machine stays in them.
set -eu
cd "$(dirname "$0")/.."
arch=${1:-$(uname -m)}
[ $# = 0 ] || shift
[ $# != 0 ] || set -- build -p sparsed -p sparsed-plugin-cpu
triple=$arch-unknown-linux-gnu
into=${CARGO_TARGET_DIR:-$PWD/target}
if [ "$arch" != "$(uname -m)" ]; then
  into=$into/$arch
  RUSTC=$(sh packaging/rustc.sh "$triple")
  export RUSTC
fi
zig=$PWD/target/zig
if ! cmp -s packaging/zig.txt "$zig/zig.txt"; then
  rm -rf "$zig"
  python3 -m pip install --quiet --disable-pip-version-check --target "$zig" -r packaging/zig.txt >&2
  cp packaging/zig.txt "$zig/"
fi
flags=
separator=$(printf '\037')
for path in "${CARGO_HOME:-$HOME/.cargo}/registry/src=/registry" "$PWD=/sparsed" "$into=/target"; do
  flags="$flags${flags:+$separator}--remap-path-prefix=$path"
done
CARGO_ENCODED_RUSTFLAGS=$flags CARGO_INCREMENTAL=0 CARGO_TARGET_DIR=$into CARGO_ZIGBUILD_ZIG_PATH=$zig/ziglang/zig \
  "$zig/bin/cargo-zigbuild" "$@" --release --locked --target "$triple.$(cat packaging/glibc)" >&2
echo "$into/$triple/release"
