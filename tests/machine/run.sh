#!/usr/bin/env bash
# Does the service keep its promises on a machine of its own, with a kernel of its own: limits of memory, the kernel's OOM
# killer, and power cuts? Installs the packages of target/debian in a tree of Debian SUITE with that system's kernel
# (default: bullseye, Linux 5.10; trixie has 6.12), makes a disk of it, and has machine.py boot it in qemu.
# Where that cannot be it says "skipped: why" and succeeds; where it can, a claim that fails is exit 1.
# ACCEL: qemu's accelerator, tcg by default, which emulates (minutes).
# Usage: run.sh. The bare tree is kept in target/machine for the next run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
suite=${SUITE:-bullseye}
work=$(realpath -m target/machine)
bare=$work/$suite tree=$work/tree-$suite disk=$work/disk-$suite.img
packages=systemd,systemd-sysv,dbus,udev,curl,python3,linux-image-cloud-amd64
DISK_SIZE=3G

skip() {
  echo "skipped: $*" >&2
  echo "skipped: a machine of its own: $*"
  exit 0
}
[ "$(id -u)" = 0 ] || skip "only root can make a tree"
[ "$(uname -m)" = x86_64 ] || skip "machines of this kind are not tried yet"
if ! command -v qemu-system-x86_64 >/dev/null || ! command -v mmdebstrap >/dev/null; then
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
    apt-get install -qy --no-install-recommends qemu-system-x86 mmdebstrap e2fsprogs; } >&2 ||
    skip "qemu-system-x86 and mmdebstrap are not here and cannot be installed"
fi
unshare -m true 2>/dev/null || skip "no mount namespaces here"
ls target/debian/sparsed_*.deb >/dev/null || { echo "missing: packages; make package builds them" >&2; exit 1; }

mkdir -p "$work"
if [ "$(cat "$bare.packages" 2>/dev/null)" != "$packages" ]; then
  rm -rf "$bare.new" "$bare"
  # The release as it was published: updates bring another kernel.
  # shellcheck disable=SC2016 # apt's own variable
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
  mmdebstrap --quiet --variant=minbase --include="$packages" "$suite" "$bare.new" "deb $mirror $suite main" >&2 ||
    skip "mmdebstrap makes no tree (no network?)"
  mv "$bare.new" "$bare"
  echo "$packages" >"$bare.packages"
fi
trap 'rm -rf "$tree" "$disk"' EXIT
rm -rf "$tree"
cp -a --reflink=auto "$bare" "$tree"
sh tests/systemd/install.sh "$tree" target/debian
install -m 0644 "$here"/check.py "$tree/opt/checks/legs.py"
install -m 0644 "$here"/legs.service "$tree/etc/systemd/system/"
chroot "$tree" systemctl enable --quiet legs.service
rm -f "$disk"
mke2fs -q -t ext4 -d "$tree" "$disk" "$DISK_SIZE"
python3 -B "$here/machine.py" --accel "${ACCEL:-tcg}" --disk "$disk" \
  --kernel "$(ls "$bare"/boot/vmlinuz-*)" --initrd "$(ls "$bare"/boot/initrd.img-*)"
