#!/bin/sh
# Lays a built plugin out as the daemon looks for it: <profile>/plugins/<id>/{plugin.toml,library}, with its sha256.
# Usage: stage-plugin.sh ID LIBRARY MANIFEST_TEMPLATE DESTINATION [VERSION]
# Without VERSION it is that of the Cargo.toml here; ARCH is the architecture, this machine's without it.
set -eu
id=$1 library=$2 template=$3 destination=$4/$1
version=${5:-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)}
[ -n "$version" ] || { echo "stage-plugin.sh: no VERSION given, and no Cargo.toml here has one" >&2; exit 2; }
new=$destination.new.$$
rm -rf "$new"
mkdir -p "$new"
install -m 0644 "$library" "$new/$(basename "$library")"
sum=$(sha256sum "$library" | cut -d ' ' -f 1)
sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/${ARCH:-$(uname -m)}/" -e "s/@SHA256@/$sum/" "$template" >"$new/plugin.toml"
chmod 0644 "$new/plugin.toml"
chmod go-w "$4" "$new"
rm -rf "$destination"
mv "$new" "$destination"
echo "staged plugin $id in $destination" >&2
