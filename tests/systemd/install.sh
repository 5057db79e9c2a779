#!/bin/sh
# Installs the packages of DEBS into the tree ROOT, before its systemd has ever run.
set -eu
root=$1 debs=$2
cd "$(dirname "$0")/../.."
mkdir -p "$root/opt/debs"
cp "$debs"/sparsed_*.deb "$debs"/sparsed-model-*.deb "$root/opt/debs/"
# No service is started in a tree that does not run.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 0755 "$root/usr/sbin/policy-rc.d"
# systemd-sysusers wants /proc.
# shellcheck disable=SC2016 # the inner shell's
unshare -m sh -c 'mount -t proc proc "$1/proc" && exec chroot "$1" sh -c "dpkg --install /opt/debs/*.deb"' sh "$root" >&2
rm "$root/usr/sbin/policy-rc.d"
# Two who may use it, one who may not but has a home for one of his own.
chroot "$root" useradd -G sparsed alice
chroot "$root" useradd -G sparsed bob
chroot "$root" useradd --create-home mallory
install -D -m 0644 -t "$root/opt/checks" tests/systemd/*.py
