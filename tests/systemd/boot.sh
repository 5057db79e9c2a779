#!/bin/sh
# Boots the tree ROOT with systemd as PID 1 and a cgroup tree of version 2 only, in a mount namespace of its own:
# `setsid unshare -m sh boot.sh ROOT NAME [OPTION...]`, options being systemd-nspawn's. Its first child is the PID 1 to enter.
set -eu
root=$1 name=$2
shift 2
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p "/sys/fs/cgroup/$name"
echo $$ >"/sys/fs/cgroup/$name/cgroup.procs"
exec systemd-nspawn -D "$root" --register=no --keep-unit --private-network -M "$name" --console=read-only "$@" --boot -- \
  systemd.log_target=journal systemd.show_status=0
