#!/bin/sh
# Builds the daemon and the CPU plugin for aarch64 and tries them under qemu as three CPUs, each with the level that it
# must find: the plugin's tests, the conformance kit, one chat with the default model. Root has what is missing
# installed by apt. Needs models/ (make models). Emulation says whether answers are right, nothing about speed.
# Usage: aarch64.sh [build|try]: without an argument both.
set -eu
target=aarch64-unknown-linux-gnu
root=$PWD/target/aarch64
model=models/smollm2-135m-dsa.gguf

needs() {
  missing=
  command -v aarch64-linux-gnu-gcc >/dev/null || missing="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
  command -v qemu-aarch64-static >/dev/null || missing="$missing qemu-user-static"
  [ -n "$missing" ] || return 0
  if [ "$(id -u)" != 0 ]; then
    echo "missing: run  sudo apt-get install $missing" >&2
    exit 2
  fi
  apt-get update -q >&2
  # shellcheck disable=SC2086 # a list of packages
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing >&2
}

# A compiler with a standard library for aarch64: the installed one if rustup has the target, else Debian's packages,
# unpacked into target/ and not installed. Its version differs from the installed cargo's, which does not matter.
compiler() {
  [ ! -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || return 0
  RUSTC=$root/rust/rustc
  export RUSTC
  [ ! -x "$RUSTC" ] || return 0
  mkdir -p "$root/lists/partial" "$root/debs" "$root/rust"
  set -- -o "Dir::State::Lists=$root/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
    -o APT::Architectures::=amd64 -o APT::Architectures::=arm64
  apt-get "$@" update -q >&2
  depends() { apt-cache "$@" | sed -n "s/^ *Depends: \($wanted\)$/\1/p" | head -n 1; }
  wanted='libstd-rust-web-[0-9.]*'
  std=$(depends "$@" depends libstd-rust-web-dev)
  wanted='libllvm[0-9]*'
  llvm=$(depends "$@" depends "$std")
  (cd "$root/debs" && rm -f ./*.deb && apt-get "$@" download \
    rustc-web "$std" "$llvm" libstd-rust-web-dev libstd-rust-web-dev:arm64 >&2)
  for deb in "$root"/debs/*.deb; do dpkg -x "$deb" "$root/rust"; done
  cat >"$RUSTC" <<SH
#!/bin/sh
LD_LIBRARY_PATH=$root/rust/usr/lib/x86_64-linux-gnu exec $root/rust/usr/bin/rustc "\$@"
SH
  chmod +x "$RUSTC"
  "$RUSTC" --version >&2
}

build() {
  needs
  compiler
  cargo build --release --locked -p sparsed -p sparsed-plugin-cpu
  cargo test --release --locked -p sparsed-plugin-cpu --no-run
  ARCH=aarch64 sh packaging/stage-plugin.sh cpu "$bin/libsparsed_plugin_cpu.so" plugins/cpu/plugin.toml.in \
    "$bin/plugins"
}

# The kit starts itself again for each rule, so the kernel must know who runs aarch64 programs. Linux 6.7 lets a user
# namespace have a list of its own; the machine's stays as it is.
inside() {
  if [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
    mount -t binfmt_misc none /proc/sys/fs/binfmt_misc || {
      echo "aarch64.sh: Linux 6.7 is needed, or qemu-aarch64 registered with binfmt_misc" >&2
      exit 2
    }
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    printf '%s' ":qemu-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >/proc/sys/fs/binfmt_misc/register
  fi
  export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
  for cpu in cortex-a57:neon cortex-a76:dotprod max:i8mm; do
    QEMU_CPU=${cpu%:*} SPARSED_TEST_LEVEL=${cpu#*:}
    export QEMU_CPU SPARSED_TEST_LEVEL
    echo "== $QEMU_CPU: level $SPARSED_TEST_LEVEL"
    cargo test --release --locked -p sparsed-plugin-cpu
    "$bin/sparsectl" conform --deadline 900 "$bin/plugins/cpu"
    said=$(BIN=$bin sh packaging/chat.sh "$model" "What is the capital of France?")
    echo "$said"
    [ "$(echo "$said" | tail -n 1)" = "The capital of France is Paris." ]
  done
}

bin=$root/$target/release
export CARGO_TARGET_DIR="$root" CARGO_BUILD_TARGET=$target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
case ${1:-both} in
  build) build ;;
  try)
    needs
    compiler
    exec unshare --user --map-root-user --mount sh "$0" inside
    ;;
  inside) inside ;;
  both)
    sh "$0" build
    sh "$0" try
    ;;
  *) echo "usage: aarch64.sh [build|try]" >&2; exit 2 ;;
esac
