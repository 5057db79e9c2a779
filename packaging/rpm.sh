#!/bin/sh
# Makes the RPM packages of the release VERSION, in INTO/ARCH, of the folder TREE, which has what Debian's have unpacked.
# Usage: rpm.sh ARCH TREE INTO VERSION
set -eu
cd "$(dirname "$0")/.."
rpmbuild --quiet -bb packaging/sparsed.spec --target "$1" --define "_topdir $(realpath -m target/package/rpmbuild)" \
  --define "tree $(realpath "$2")" --define "_rpmdir $(realpath -m "$3")" --define "version_of_sparsed $4" \
  --define "glibc $(cat packaging/glibc)"
