#!/bin/sh
# Puts into the tree ROOT what a package would: executables, plugin, units, user, model. BUILD has the built files.
set -eu
root=$1 build=$2
cd "$(dirname "$0")/../.."
install -D -m 0755 -t "$root/usr/bin" "$build/sparsed" "$build/sparsectl"
plugins=$root/usr/lib/sparsed/plugins
mkdir -p "$plugins"
sh packaging/stage-plugin.sh cpu "$build/libsparsed_plugin_cpu.so" plugins/cpu/plugin.toml.in "$plugins"
install -D -m 0644 -t "$root/usr/lib/systemd/system" systemd/sparsed.service systemd/sparsed.socket
install -D -m 0644 systemd/sysusers.conf "$root/usr/lib/sysusers.d/sparsed.conf"
install -D -m 0644 packaging/dbus/org.sparsed1.conf -t "$root/usr/share/dbus-1/system.d"
install -D -m 0644 packaging/dbus/org.sparsed1.service -t "$root/usr/share/dbus-1/system-services"
install -D -m 0644 packaging/dbus/org.sparsed1.policy -t "$root/usr/share/polkit-1/actions"
install -D -m 0644 packaging/dbus/interfaces/*.xml -t "$root/usr/share/dbus-1/interfaces"
install -D -m 0644 -t "$root/var/lib/sparsed/models" models/smollm2-135m-dsa.gguf
# What a maintainer script does; the checks start the service when they want it.
systemd-sysusers --root="$root" sparsed.conf
systemctl --root="$root" --quiet enable sparsed.socket
# Two who may use it, one who may not.
chroot "$root" useradd -G sparsed alice
chroot "$root" useradd -G sparsed bob
chroot "$root" useradd mallory
install -D -m 0644 -t "$root/opt/checks" tests/systemd/box.py tests/systemd/check.py
