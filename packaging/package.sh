#!/usr/bin/env bash
# Makes the Debian packages of what is built in target/release, in target/debian. The same release is the same bytes: all
# times are the last commit's.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo-deb >/dev/null || cargo install --quiet --locked cargo-deb --version 3.8.0
built=target/release work=target/package
rm -rf "$work"
mkdir -p "$work/bin" "$work/plugins"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.toml)}
export SOURCE_DATE_EPOCH
# Without line tables, which are most of a file; the names of functions stay for whoever reads a crash.
for name in sparsed sparsectl; do strip --strip-debug "$built/$name" -o "$work/bin/$name"; done
strip --strip-debug "$built/libsparsed_plugin_cpu.so" -o "$work/libsparsed_plugin_cpu.so"
sh packaging/stage-plugin.sh cpu "$work/libsparsed_plugin_cpu.so" plugins/cpu/plugin.toml.in "$work/plugins"
"$built/sparsectl" generate "$work"
find "$work" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
mkdir -p target/debian
for variant in "" model dev; do
  cargo deb --quiet --package sparsed --no-build --no-strip --locked --output target/debian/ ${variant:+--variant "$variant"}
done
ls -l target/debian/*.deb
