#!/usr/bin/env bash
# Are the packages the same bytes when they are made again? From the same executables, and with LONG=1 from those of a
# second build from nothing in another folder, at the same path of the sources, which stays in the executables.
set -euo pipefail
cd "$(dirname "$0")/.."
first=$PWD/target/first again=$PWD/target/again
rm -rf "$first" "$again/debian" "$again/rpm"
# cargo-deb deletes what it has made before, wherever it is told to put the new ones.
mkdir -p "$first" && cp -a target/debian target/rpm "$first/"
if [ -n "${LONG:-}" ]; then
  built=$(CARGO_TARGET_DIR=$again sh packaging/release.sh | tail -n 1)
else
  built=$(sh packaging/release.sh | tail -n 1)
fi
BUILT=$built INTO=$again bash packaging/package.sh >/dev/null
cp -a "$first/debian" "$first/rpm" target/
differ=0
for package in "$first"/debian/*_"$(dpkg --print-architecture)".deb "$first/rpm/$(uname -m)"/*.rpm; do
  if cmp "$package" "$again/${package#"$first/"}"; then
    echo "the same: $(basename "$package")"
  else
    differ=1
  fi
done
exit "$differ"
