#!/usr/bin/env bash
# Does packaging/Containerfile build, and does what it makes answer? buildah builds it from the packages in target/debian,
# on a Debian tree that mmdebstrap makes here in the place of the published image; then the daemon runs in it, and the tool
# asks it over the socket as compose.yaml's app does. It runs by chroot, so without a read-only root and limits.
# Where there is no buildah, or no root, it says "skipped: why" and succeeds.
# Usage: run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
ANSWER="The capital of France is Paris."

skip() {
  echo "skipped: $*" >&2
  echo "skipped: the container: $*"
  exit 0
}
[ "$(id -u)" = 0 ] || skip "only root can make a tree"
if ! command -v buildah >/dev/null || ! command -v mmdebstrap >/dev/null; then
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends buildah mmdebstrap; } >&2 ||
    skip "buildah and mmdebstrap are not here and cannot be installed"
fi
unshare -m true 2>/dev/null || skip "no mount namespaces here"
ls target/debian/sparsed_*.deb >/dev/null || { echo "missing: packages; make package builds them" >&2; exit 1; }
work=$(mktemp -d)
buildah=(buildah --root "$work/root" --runroot "$work/run" --storage-driver vfs)
store() { "${buildah[@]}" "$@"; }
# shellcheck disable=SC2317 # at the exit
end() {
  [ -z "${daemon:-}" ] || kill -- -"$daemon" 2>/dev/null || true
  wait
  store rm --all >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap end EXIT

mmdebstrap --quiet --variant=minbase trixie "$work/tree.tar" >&2 || skip "mmdebstrap makes no tree (no network?)"
bare=$(store from scratch)
store add --quiet "$bare" "$work/tree.tar" / >/dev/null
store commit --quiet --rm "$bare" docker.io/library/debian:trixie-slim >/dev/null
rm "$work/tree.tar"
store bud --isolation chroot --pull-never --format docker --tag sparsed --file packaging/Containerfile . >"$work/log" 2>&1 ||
  { cat "$work/log"; echo "not ok: the image is built"; exit 1; }
echo "ok: the image is built"

box=$(store from --pull-never localhost/sparsed)
run=(run --isolation chroot --user sparsed "$box" --)
inside() { store "${run[@]}" "$@"; }
# buildah does not run it by itself.
entry=$(store inspect --type container --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$box")
[ "$entry" = "sparsed " ] || { echo "not ok: the image's entry point is $entry"; exit 1; }
# Starts what the image starts, and waits for a model on a socket, by what HEALTHCHECK runs.
start() {
  # shellcheck disable=SC2086 # words
  setsid "${buildah[@]}" "${run[@]}" $entry >"$work/log" 2>&1 &
  daemon=$!
  for _ in $(seq 60); do
    inside sparsectl status --ready --socket "$1" >/dev/null 2>&1 && break
    kill -0 "$daemon" 2>/dev/null || break
    sleep 1
  done
}
# The claim $2, if the one that listens on $1 answers.
answers() {
  said=$(inside sparsectl run --socket "$1" --temperature 0 "What is the capital of France?" 2>&1) || true
  if [ "$said" = "$ANSWER" ]; then echo "ok: $2"; else
    cat "$work/log"
    echo "not ok: $2: $said"
    exit 1
  fi
}
stop() {
  kill -- -"$daemon" 2>/dev/null || true
  wait "$daemon" 2>/dev/null || true
  daemon=
}
start /run/sparsed/api.sock
answers /run/sparsed/api.sock "the container answers"
stop
# A file that an operator mounts there, as far as it says something: nothing of the image's goes before it.
mounted=$(store mount "$box")
mkdir -p "$mounted/etc/sparsed/conf.d"
printf '[socket]\npath = "/run/sparsed/other.sock"\n' >"$mounted/etc/sparsed/conf.d/socket.toml"
start /run/sparsed/other.sock
answers /run/sparsed/other.sock "a file in conf.d is heeded"
