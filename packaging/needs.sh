#!/bin/sh
# What the build (and with the argument `test` the tests, with `package` the packages) need from the system. Root gets
# it installed by apt; anybody else is told the one line that does, and the exit status is 2.
set -eu
missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need cc gcc
need python3 python3
python3 -m pip --version >/dev/null 2>&1 || missing="$missing python3-pip"
if [ "${1:-build}" = test ]; then
  need c++ g++
  need dbus-daemon dbus-daemon
  need dbus-broker-launch dbus-broker
  need gdbus libglib2.0-bin
  need busctl systemd
  need unshare util-linux
  need mosquitto_rr mosquitto-clients
  need openssl openssl
  need pkg-config pkgconf
  need faketime faketime
  need node nodejs
  need npm npm
  [ -x /usr/sbin/mosquitto ] || need mosquitto mosquitto
fi
if [ "${1:-build}" = package ]; then
  need rpmbuild rpm
  need objdump binutils
  need pkg-config pkgconf
fi
# A C compiler without the C library's headers links nothing.
echo 'int main(void) { return 0; }' | cc -x c - -o /dev/null 2>/dev/null || missing="$missing libc6-dev"
if [ -n "$missing" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -q >&2
    # shellcheck disable=SC2086 # a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing >&2
  else
    echo "missing: run  sudo apt-get install$missing" >&2
    exit 2
  fi
fi
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
found=$(cargo --version 2>/dev/null | cut -d' ' -f2 || true)
if [ "$(printf '%s\n' "$wanted" "${found:-0}" | sort -V | head -n 1)" != "$wanted" ]; then
  echo "missing: Rust $wanted or newer (found: ${found:-none}); install it with rustup, then try again" >&2
  exit 2
fi
