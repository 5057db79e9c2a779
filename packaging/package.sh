#!/usr/bin/env bash
# Makes the packages: Debian's in target/debian, and of what is in them RPM's in target/rpm. The same release is the same
# bytes: all times are the last commit's.
# Usage: package.sh [ARCH]: x86_64 or aarch64, this machine's without it. BUILT: a folder with what release.sh has built,
# instead of building it. INTO: instead of target.
set -euo pipefail
cd "$(dirname "$0")/.."
arch=${1:-$(uname -m)}
into=$(realpath -m "${INTO:-target}")
built=${BUILT:-$(sh packaging/release.sh "$arch" | tail -n 1)}
work=target/package glibc=$(cat packaging/glibc)
command -v cargo-deb >/dev/null || cargo install --quiet --locked cargo-deb --version 3.8.0
sh packaging/needs.sh package
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.toml)}
export SOURCE_DATE_EPOCH
umask 022
MODEL=smollm2-135m-dsa.gguf

# Lays out the plugin ID. Its library is named by its digest, so that an upgrade that is cut off leaves the old manifest the
# old library, and the new one the new: dpkg gives files their names one by one, this one before its manifest (looks_right).
plugin() {
  local id=$1 file=libsparsed_plugin_$1.so library
  "$strip" --strip-debug "$built/$file" -o "$work/$file"
  library=$file.$(sha256sum "$work/$file" | cut -c 1-8)
  mv "$work/$file" "$work/$library"
  sh packaging/symbols.sh "$work/$library"
  sed "s/${file//./\\.}/$library/" "plugins/$id/plugin.toml.in" >"$work/plugin.toml.in"
  ARCH=$arch sh packaging/stage-plugin.sh "$id" "$work/$library" "$work/plugin.toml.in" "$work/plugins"
}

stage() {
  local digest strip run=
  strip=$(command -v "$arch-linux-gnu-strip" || command -v strip)
  [ "$arch" = "$(uname -m)" ] || run="qemu-$arch-static -L /usr/$arch-linux-gnu"
  rm -rf "$work"
  mkdir -p "$work/bin" "$work/plugins" "$work/models"
  # Without line tables, which are most of a file; the names of functions stay for whoever reads a crash.
  for name in sparsed sparsectl; do "$strip" --strip-debug "$built/$name" -o "$work/bin/$name"; done
  sh packaging/symbols.sh "$work"/bin/*
  for id in cpu cuda; do plugin "$id"; done
  # Named by its digest too, by which the daemon verifies it; the link is sorted behind it.
  cp "models/$MODEL" "$work/models/$MODEL"
  digest=$(sha256sum "$work/models/$MODEL" | cut -d ' ' -f 1)
  mv "$work/models/$MODEL" "$work/models/$digest"
  ln -s "$digest" "$work/models/$MODEL"
  $run "$built/sparsectl" generate "$work"
  find "$work" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

# What the package VARIANT in DEB must have, which no tool looks for.
looks_right() {
  local variant=$1 deb=$2 order depends version
  case ${variant:-cpu} in
    cpu | cuda)
      order=$(dpkg-deb --contents "$deb" | sed -n "s|.*/plugins/${variant:-cpu}/\(.\).*|\1|p" | tr -d '\n')
      [ "$order" = lp ] || { echo "$deb: the plugin's manifest comes before its library" >&2; exit 1; }
      depends=$(dpkg-deb --field "$deb" Depends) version=$(dpkg-deb --field "$deb" Version)
      [[ $depends == *"libc6 (>= $glibc)"* ]] || { echo "$deb: depends on another C library than $glibc" >&2; exit 1; }
      [ -z "$variant" ] || [[ $depends == *"sparsed (= $version)"* ]] ||
        { echo "$deb: does not depend on the sparsed of its own version, $version" >&2; exit 1; }
      ;;
    model)
      order=$(dpkg-deb --contents "$deb" | sed -n 's|.*/models/\([^ ]\).*|\1|p' | tr -d '\n')
      [ "${order#?}" = s ] || { echo "$deb: the model's link comes before its file" >&2; exit 1; }
      ;;
  esac
}

debian() {
  local deb unpacked
  mkdir -p "$into/debian"
  for variant in "" model dev cuda; do
    deb=$(cargo deb --quiet --package sparsed --target "$arch-unknown-linux-gnu" --no-build --no-strip --locked \
      --output "$into/debian/" ${variant:+--variant "$variant"})
    looks_right "$variant" "$deb"
    unpacked=$work/rpm/$(basename "$deb" | cut -d _ -f 1)
    mkdir -p "$unpacked"
    dpkg-deb --extract "$deb" "$unpacked"
  done
}

# What a plugin's author does first, with what the package has: the example is built where pkg-config says.
example() {
  local usr=$PWD/$work/rpm/sparsed-dev/usr
  # shellcheck disable=SC2046 # flags
  cc -std=c11 -Wall -Wextra -Wpedantic -Werror -shared -fPIC -pthread \
    -DPLUGIN_VERSION='"0.1.0"' \
    $(PKG_CONFIG_PATH=$usr/share/pkgconfig pkg-config --define-variable=prefix="$usr" --cflags sparsed-plugin) \
    "$usr/share/doc/sparsed-dev/examples/minimal.c" -o "$work/example.so" -lm
}

stage
debian
example
sh packaging/rpm.sh "$arch" "$work/rpm" "$into/rpm" "$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)"
ls -l "$into"/debian/*.deb "$into"/rpm/"$arch"/*.rpm
