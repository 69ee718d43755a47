#!/bin/sh
# Makes a CUDA build of torch import on a machine that has none of its CUDA libraries, so that the tests can run on the
# version that GPU machines have:
#
#     python -m venv /tmp/torch211
#     /tmp/torch211/bin/pip install --no-deps torch==2.11.0        # half a GB; its CUDA packages are several more
#     pip freeze | grep -v "^torch==" > /tmp/rest.txt              # of an environment with tests/requirements.txt
#     /tmp/torch211/bin/pip install --no-deps -r /tmp/rest.txt
#     sh tests/torch_without_cuda.sh /tmp/torch211/bin/python /tmp/stubs
#     LD_LIBRARY_PATH=/tmp/stubs /tmp/torch211/bin/python -m pytest -q tests/test_rollout.py
#
# Every missing library becomes one whose functions do nothing. torch then finds no CUDA device and calls none of them.
# Linux with gcc, readelf and nm.
set -e
python=$1
stubs=$2
lib=$("$python" -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')/lib
mkdir -p "$stubs"
nm -D --undefined-only "$lib"/*.so* | awk 'NF == 2 { sub(/@.*/, "", $2); print $2 }' |
    grep -E '^(cu|nv|nccl|pnccl|__cuda)' | grep -vx cuInit | sort -u | sed 's/.*/void &(void) {}/' > "$stubs/functions.c"
echo 'int cuInit(unsigned flags) { return 100; }  // no device' >> "$stubs/functions.c"
# Symbols are asked for with a version, which the library has to have.
for file in "$lib"/*.so*; do readelf -V "$file"; done |
    sed -n 's/.*File: \([^ ]*\).*/file \1/p; s/.*Name: \([^ ]*\).*/name \1/p' |
    awk '$1 == "file" { file = $2 } $1 == "name" { print file, $2 }' | sort -u > "$stubs/versions"
for missing in $(for file in "$lib"/*.so*; do ldd "$file"; done | awk '/not found/ { print $1 }' | sort -u); do
    version=$(awk -v file="$missing" '$1 == file { print $2; exit }' "$stubs/versions")
    echo "${version:-NONE} { global: *; };" > "$stubs/map"
    gcc -w -fno-builtin -shared -fPIC "-Wl,-soname,$missing" ${version:+"-Wl,--version-script=$stubs/map"} \
        -o "$stubs/$missing" "$stubs/functions.c"
done
LD_LIBRARY_PATH=$stubs "$python" -c 'import torch; print("torch", torch.__version__, "imports")'
