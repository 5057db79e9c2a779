#!/bin/sh
# Builds the daemon and the CPU plugin for aarch64, tries them under qemu as three CPUs, each with the level that it must
# find (the plugin's tests, the conformance kit, one chat with the default model), and packs them. Root has what is
# missing installed by apt. Needs models/ (make models). Emulation says whether answers are right, nothing about speed.
# Usage: aarch64.sh [build|try|package]: without an argument all.
set -eu
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

build() {
  needs
  sh packaging/release.sh aarch64
  sh packaging/release.sh aarch64 test -p sparsed-plugin-cpu --no-run
  ARCH=aarch64 sh packaging/stage-plugin.sh cpu "$bin/libsparsed_plugin_cpu.so" plugins/cpu/plugin.toml.in \
    "$bin/plugins"
}

# The conformance kit, every rule but one: qemu 7.2 keeps 280 KiB of each thread that has ended, which the kit takes for
# memory that a closed device has left behind. And it may hang when it forks while a thread of its own holds a lock of
# its allocator: a kit that takes longer than ten minutes begins anew.
kit() {
  for _ in 1 2 3 4 5; do
    status=0
    timeout 600 "$bin/sparsectl" conform --deadline 300 "$bin/plugins/cpu" >"$bin/conform.tap" || status=$?
    [ "$status" = 124 ] || break
    echo "the emulator hangs, once more"
  done
  grep -v '^ok [0-9]* - [a-z_.0-9]*$' "$bin/conform.tap"
  grep -q '^1\.\.[0-9]*$' "$bin/conform.tap"
  ! grep '^not ok' "$bin/conform.tap" | grep -v ' - life.open_close: resident memory'
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
  # Debian's libraries for aarch64, where its dynamic linker looks for them. A prefix for qemu (-L) would turn every path
  # that is also below it, "/" among them, into another one, and a folder is opened from "/" on.
  mount -t overlay -o lowerdir=/usr/aarch64-linux-gnu/lib:/usr/lib overlay /usr/lib
  for cpu in cortex-a57:neon cortex-a76:dotprod max:i8mm; do
    QEMU_CPU=${cpu%:*} SPARSED_TEST_LEVEL=${cpu#*:}
    export QEMU_CPU SPARSED_TEST_LEVEL
    echo "== $QEMU_CPU: level $SPARSED_TEST_LEVEL"
    sh packaging/release.sh aarch64 test -p sparsed-plugin-cpu
    kit
    said=$(BIN=$bin sh packaging/chat.sh "$model" "What is the capital of France?")
    echo "$said"
    [ "$(echo "$said" | tail -n 1)" = "The capital of France is Paris." ]
  done
}

# The packages, and whether the executables in them start.
package() {
  needs
  BUILT=$bin bash packaging/package.sh aarch64
  for deb in target/debian/*_arm64.deb; do lintian --allow-root --fail-on error,warning "$deb"; done
  rm -rf target/aarch64/unpacked
  dpkg-deb --extract target/debian/sparsed_*_arm64.deb target/aarch64/unpacked
  for name in sparsed sparsectl; do
    QEMU_CPU=cortex-a57 qemu-aarch64-static -L /usr/aarch64-linux-gnu target/aarch64/unpacked/usr/bin/$name --version
  done
}

bin=$PWD/target/aarch64/aarch64-unknown-linux-gnu/release
case ${1:-all} in
  build) build ;;
  try)
    needs
    exec unshare --user --map-root-user --mount sh "$0" inside
    ;;
  inside) inside ;;
  package) package ;;
  all)
    sh "$0" build
    sh "$0" try
    sh "$0" package
    ;;
  *) echo "usage: aarch64.sh [build|try|package]" >&2; exit 2 ;;
esac
