#!/bin/sh
# Prints the table of PARITY.md: how far llama.cpp's logits are from ours. Run by hand, never by a test.
#
#   tests/golden/parity_llama_cpp.sh FOLDER
#
# FOLDER lies outside the repository; it gets llama.cpp's sources from the sdist of llama-cpp-python, their build and up
# to 600 MB of models in F32, and is used again as it is. Needs `make build models`, the oracle
# (`cargo build --release -p sparsed-oracle`), cmake, a C++ compiler, pip and numpy.
# PYTHON: another python3, CMAKE_BUILD_PARALLEL_LEVEL: jobs of the build.
set -eu
version=0.3.36
sum=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
[ $# = 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
python=${PYTHON:-python3}
name=llama_cpp_python-$version
source=$PWD/$name/vendor/llama.cpp
if ! [ -f "$name.tar.gz" ]; then
  # pip prepares what it downloads, for which it fetches the package's build tools.
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    "llama-cpp-python==$version" >&2
fi
echo "$sum  $name.tar.gz" | sha256sum --check --quiet >&2
[ -d "$name" ] || tar xzf "$name.tar.gz"
if ! [ -f "$source/build/bin/libllama.so" ]; then
  cmake -S "$source" -B "$source/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF >&2
  cmake --build "$source/build" --target llama >&2
fi
ln -sfn "$source/gguf-py" gguf-py
"${CXX:-c++}" -O2 -std=c++17 -Wall -Wextra -I"$source/include" -I"$source/ggml/include" \
  "$here/parity_llama_cpp.cpp" -L"$source/build/bin" -Wl,-rpath,"$source/build/bin" -lllama -lggml -lggml-base -o dump
exec "$python" "$here/parity_llama_cpp.py" "$PWD"
