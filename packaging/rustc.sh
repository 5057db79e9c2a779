#!/bin/sh
# Prints a Rust compiler that has a standard library for TRIPLE: the installed one if rustup has the target, else, for
# aarch64, Debian's packages, unpacked into target/ and not installed. Their version differs from the installed cargo's,
# which does not matter.
# Usage: rustc.sh TRIPLE
set -eu
triple=$1
if [ -d "$(rustc --print sysroot)/lib/rustlib/$triple" ]; then
  echo rustc
  exit
fi
[ "$triple" = aarch64-unknown-linux-gnu ] || { echo "rustc.sh: run  rustup target add $triple" >&2; exit 2; }
root=$PWD/target/aarch64
rustc=$root/rust/rustc
if [ ! -x "$rustc" ]; then
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
  cat >"$rustc" <<SH
#!/bin/sh
LD_LIBRARY_PATH=$root/rust/usr/lib/x86_64-linux-gnu exec $root/rust/usr/bin/rustc "\$@"
SH
  chmod +x "$rustc"
  "$rustc" --version >&2
fi
echo "$rustc"
