#!/bin/sh
# Installs the packages of FOLDER into the tree ROOT, before its systemd has ever run: Debian's by dpkg, or with
# PACKAGES=rpm the others by the tree's own rpm, which does not know what Debian's packages bring (--nodeps). Of these it
# makes another release to upgrade to, of what package.sh has left in target/package. The plugin for CUDA is put beside them.
set -eu
root=$1 folder=$2
cd "$(dirname "$0")/../.."
mkdir -p "$root/opt/packages" "$root/opt/plugin"
case ${PACKAGES:-deb} in
  deb)
    arch=$(dpkg --print-architecture)
    cp "$folder"/sparsed_*_"$arch".deb "$folder"/sparsed-model-*_"$arch".deb "$root/opt/packages/"
    cp "$folder"/sparsed-plugin-cuda_*_"$arch".deb "$root/opt/plugin/"
    install="dpkg --install /opt/packages/*.deb"
    ;;
  rpm)
    cp "$folder"/sparsed-[0-9]*.rpm "$folder"/sparsed-model-*.rpm "$root/opt/packages/"
    cp "$folder"/sparsed-plugin-cuda-*.rpm "$root/opt/plugin/"
    install="rpm --install --nodeps /opt/packages/*.rpm"
    newer=$(realpath -m target/systemd/newer)
    rm -rf "$newer"
    mkdir -p "$newer"
    cp -a --reflink=auto target/package/rpm "$newer/tree"
    python3 -B tests/systemd/upgrade.py "$newer/tree/sparsed"
    sh packaging/rpm.sh "$(uname -m)" "$newer/tree" "$newer" 999
    cp "$newer/$(uname -m)"/sparsed-999-*.rpm "$root/opt/newer.rpm"
    rm -rf "$newer"
    ;;
esac
# No service is started in a tree that does not run.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 0755 "$root/usr/sbin/policy-rc.d"
# systemd-sysusers wants /proc, and rpm a root that is a mount.
# shellcheck disable=SC2016 # the inner shell's
unshare -m sh -c 'mount --bind "$1" "$1" && mount -t proc proc "$1/proc" && exec chroot "$1" sh -c "$2"' sh "$root" "$install" >&2
rm "$root/usr/sbin/policy-rc.d"
# Two who may use it, one who may not but has a home for one of his own.
chroot "$root" useradd -G sparsed alice
chroot "$root" useradd -G sparsed bob
chroot "$root" useradd --create-home mallory
install -D -m 0644 -t "$root/opt/checks" tests/systemd/*.py
