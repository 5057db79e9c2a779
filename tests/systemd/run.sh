#!/usr/bin/env bash
# Does sparsed serve as a service of systemd? Installs the packages in DEBS (default: target/debian) in a tree of Debian
# SUITE (default: trixie; bookworm and bullseye have older systemds) or Ubuntu SUITE (jammy, focal: with Ubuntu's keyring
# on this machine), boots it with systemd as PID 1, and runs check.py in it: one line "ok" or "not ok" for each claim.
# Where no tree can be made or booted it says "skipped: why" and succeeds; where it can, a claim that fails is exit 1.
# PACKAGES=rpm: those of target/rpm instead, by rpm. BUS=dbus-broker: with it for the system's bus. ROOT=read-only: nothing
# but the state folder and what is in memory can be written in the tree, and what it is like then is the only claim.
# Usage: run.sh [WORD...]: only the claims with such a word in their names. CHECKS_S: seconds for all of them together.
# LONG=1: claims that take minutes (long.py) before them.
# The bare tree is kept in target/systemd for the next run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
export PACKAGES=${PACKAGES:-deb}
case $PACKAGES in
  deb) folder=$(realpath -m "${DEBS:-target/debian}") ;;
  rpm) folder=$(realpath -m "${RPMS:-target/rpm/$(uname -m)}") ;;
esac
work=$(realpath -m target/systemd)
suite=${SUITE:-trixie}
bare=$work/$suite tree=$work/tree-$suite name=sparsed-check-$$
packages=systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,udev,curl,python3,rpm
# What some doors are tried with, where the suite has it.
case $suite in
  focal | jammy) packages=$packages,apt ;;
  bullseye) packages=$packages,policykit-1,mosquitto,mosquitto-clients ;;
  *) packages=$packages,polkitd,dbus-broker,mosquitto,mosquitto-clients,zsh,fish ;;
esac
components=main
case $suite in focal | jammy | noble) components=main,universe ;; esac
# Most seconds for the boot, and for all checks.
BOOT_S=60
CHECKS_S=${CHECKS_S:-540}

skip() {
  echo "skipped: $*" >&2
  echo "skipped: systemd as PID 1: $*"
  exit 0
}
[ "$(id -u)" = 0 ] || skip "only root can boot a tree"
if ! command -v systemd-nspawn >/dev/null || ! command -v mmdebstrap >/dev/null; then
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
    apt-get install -qy --no-install-recommends systemd-container mmdebstrap; } >&2 ||
    skip "systemd-container and mmdebstrap are not here and cannot be installed"
fi
unshare -m true 2>/dev/null || skip "no mount namespaces here"
ls "$folder"/sparsed[-_][0-9]*."$PACKAGES" "$folder"/sparsed-model-*."$PACKAGES" >/dev/null ||
  { echo "missing: packages; make package builds them" >&2; exit 1; }

mkdir -p "$work"
if [ "$(cat "$bare.packages" 2>/dev/null)" != "$packages" ]; then
  rm -rf "$bare.new" "$bare"
  mmdebstrap --quiet --variant=minbase --components="$components" --include="$packages" "$suite" "$bare.new" >&2 ||
    skip "mmdebstrap makes no tree of $suite (no network, or no keyring of its own?)"
  mv "$bare.new" "$bare"
  echo "$packages" >"$bare.packages"
fi
leader=
inside() { nsenter -t "$leader" -a "$@"; }
nspawn() { pgrep -f "^systemd-nspawn -D $tree .*-M $name " || true; }
# shellcheck disable=SC2317 # at the exit
end() {
  local pid
  if [ -n "$leader" ]; then timeout 20 nsenter -t "$leader" -a systemctl poweroff 2>/dev/null || true; fi
  for _ in $(seq 100); do
    pid=$(nspawn)
    [ -n "$pid" ] || break
    sleep 0.1
  done
  # shellcheck disable=SC2086 # none or one
  [ -z "$pid" ] || kill -KILL $pid
  rm -rf "$tree"
  for group in /sys/fs/cgroup/unified/"$name" /sys/fs/cgroup/"$name"; do
    [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null || true
  done
}
trap end EXIT
rm -rf "$tree"
cp -a --reflink=auto "$bare" "$tree"
sh "$here/install.sh" "$tree" "$folder"
# Brokers and buses that its packages start.
for unit in mosquitto.service dbus-broker.service; do
  systemctl --root="$tree" --quiet disable "$unit" 2>/dev/null || true
done
if [ -n "${BUS:-}" ]; then systemctl --root="$tree" --quiet enable --force "$BUS.service"; fi

options=()
if [ "${ROOT:-}" = read-only ]; then
  # As an image has it, for the partition to be mounted on.
  mkdir -p "$tree/var/lib/sparsed"
  options=(--read-only --tmpfs=/var/lib/sparsed:mode=0755)
fi
setsid unshare -m sh "$here/boot.sh" "$tree" "$name" "${options[@]}" >"$work/boot.log" 2>&1 </dev/null &
booting=$!
for _ in $(seq $((BOOT_S * 5))); do
  pid=$(nspawn)
  if [ -n "$pid" ]; then leader=$(pgrep -P "$pid" | head -n 1 || true); fi
  if [ -n "$leader" ]; then
    state=$(timeout 10 nsenter -t "$leader" -a systemctl is-system-running 2>/dev/null || true)
    [ "$state" = running ] || [ "$state" = degraded ] && break
  elif ! kill -0 "$booting" 2>/dev/null; then break; fi
  sleep 0.2
done
case "${state:-none}" in
  running) ;;
  degraded) # It boots: what failed is ours to say.
    inside systemctl --failed --no-legend ;;
  *) tail -n 5 "$work/boot.log" >&2; skip "the tree does not boot here (state: ${state:-none})" ;;
esac
status=0
timeout "$CHECKS_S" nsenter -t "$leader" -a env PACKAGES="$PACKAGES" ${BUS:+BUS="$BUS"} ${ROOT:+ROOT="$ROOT"} ${LONG:+LONG="$LONG"} \
  python3 -B /opt/checks/check.py "$@" || status=$?
if [ "$status" != 0 ]; then
  inside journalctl --no-pager -o short-precise -u sparsed.service -u sparsed.socket >"$work/journal.log" || true
  echo "the journal is in $work/journal.log" >&2
fi
exit "$status"
