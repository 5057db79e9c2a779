#!/bin/sh
# A chat with the default model through a daemon of its own, on a private socket and state folder that go with it.
# Usage: chat.sh MODEL [PROMPT]: one answer at temperature 0, or a conversation without a prompt.
# BIN: the folder of the executables, target/release without it.
set -eu
model=$1
prompt=${2:-}
bin=${BIN:-target/release}
home=$(mktemp -d)
daemon=
end() {
  [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null || true; wait "$daemon" 2>/dev/null || true; }
  rm -rf "$home"
}
trap end EXIT
trap 'exit 130' HUP INT TERM
# In a session of its own, so that Ctrl-C on the terminal stops an answer and not the daemon.
setsid "$bin/sparsed" --set state_dir="$home/state" --set socket.path="$home/api.sock" \
  --set model.default.path="$model" 2>"$home/log" &
daemon=$!
until "$bin/sparsectl" status --ready --socket "$home/api.sock" >/dev/null 2>&1; do
  kill -0 "$daemon" 2>/dev/null || { cat "$home/log" >&2; exit 1; }
  sleep 0.1
done
if [ -n "$prompt" ]; then
  "$bin/sparsectl" run --socket "$home/api.sock" --temperature 0 -- default "$prompt"
else
  trap : INT # Ctrl-C stops an answer, not the conversation
  "$bin/sparsectl" run --socket "$home/api.sock" default
fi
