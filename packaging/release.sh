#!/bin/sh
# Builds what the packages ship, for boxes as they are: linked by zig, which knows the symbols of every C library,
# against the version in packaging/glibc; packaging/symbols.sh checks what came of it. For this machine only the linking differs
# from `make build`, whose crates are used: what is shipped is what was tested.
# Usage: release.sh [ARCH [CARGO_COMMAND...]]: x86_64 or aarch64, this machine's without it; for another machine's also
# something else than to build the daemon and its plugins. The last line of the output is the folder of what is built.
set -eu
cd "$(dirname "$0")/.."
arch=${1:-$(uname -m)}
[ $# = 0 ] || shift
into=${CARGO_TARGET_DIR:-$PWD/target}
built=$into/release
zig=$PWD/target/zig
if ! cmp -s packaging/zig.txt "$zig/zig.txt"; then
  rm -rf "$zig"
  python3 -m pip install --quiet --disable-pip-version-check --target "$zig" -r packaging/zig.txt >&2
  cp packaging/zig.txt "$zig/"
fi
# cargo-zigbuild's linker: it takes what rustc tells a C compiler, and tells zig.
linker=$zig/$arch-cc
cat >"$linker.new" <<SH
#!/bin/sh
CARGO_ZIGBUILD_ZIG_PATH=$zig/ziglang/zig \
  exec $zig/bin/cargo-zigbuild zig cc -- -g -target $arch-linux-gnu.$(cat packaging/glibc) "\$@"
SH
chmod 0755 "$linker.new"
mv "$linker.new" "$linker"
if [ "$arch" = "$(uname -m)" ]; then
  for crate in "sparsed --bin sparsed" "sparsed --bin sparsectl" "sparsed-plugin-cpu --lib" "sparsed-plugin-cuda --lib"; do
    # shellcheck disable=SC2086 # a package and its target
    cargo rustc --release --locked -p $crate -- -C "linker=$linker" >&2
  done
else
  [ "$arch" = aarch64 ] || { echo "release.sh: no $arch here" >&2; exit 2; }
  [ $# != 0 ] || set -- build -p sparsed -p sparsed-plugin-cpu -p sparsed-plugin-cuda
  RUSTC=$(sh packaging/rustc.sh aarch64-unknown-linux-gnu)
  export RUSTC CARGO_TARGET_DIR="$into/aarch64" CARGO_BUILD_TARGET=aarch64-unknown-linux-gnu
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER="$linker" CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
  cargo "$@" --release --locked >&2
  built=$into/aarch64/aarch64-unknown-linux-gnu/release
fi
echo "$built"
