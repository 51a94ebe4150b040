#!/usr/bin/env bash
# Collects rival attention kernels for a side-by-side measurement on a Hopper machine that has no
# package index: wheels for Python 3.12, and FlashInfer's modules compiled here, where no GPU is needed.
#   usage: benchmarks/peers/collect.sh OUT [module…]
#   modules: decode fa2 fa3 cascade page attention (default: all of them, about 12 minutes on 2 cores)
# Needs nvcc 13, gcc, xz and a Python with venv. OUT ends at about 45 MiB; a second run goes on where the
# first stopped. On the GPU machine: PEERS=OUT make gpu, or `source OUT/activate.sh`.
# Environment: PEERS_WORK, the folder for downloads and objects; CUDA_HOME, the toolkit (default: nvcc's).
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit $(($# < 1))
fi
for tool in nvcc gcc xz python3; do
    command -v "$tool" >/dev/null || { echo "collect.sh needs $tool on PATH" >&2; exit 1; }
done

flashinfer=0.6.6
tvm_ffi=0.1.10
xformers=0.0.35
fa3=3.0.0.post20260810
curand=10.4.0.35

mkdir -p "$1"
out=$(realpath "$1")
shift
here=$(dirname "$(realpath "$0")")
work=${PEERS_WORK:-${TMPDIR:-/tmp}/fork-attn-peers}
mkdir -p "$work"
pip=(python3 -m pip --disable-pip-version-check download -q --no-deps)
target=(--only-binary=:all: --python-version 3.12 --implementation cp
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64)

echo "wheels"
"${pip[@]}" "${target[@]}" -d "$out" "flashinfer-python==$flashinfer" "apache-tvm-ffi==$tvm_ffi" \
    "xformers==$xformers"

if [ ! -f "$out/fa3.xz" ]; then
    echo "FlashAttention-3, prebuilt, packed smaller"
    "${pip[@]}" "${target[@]}" -d "$work/fa3" "tokenspeed-fa3==$fa3"
    python3 -m zipfile -e "$work"/fa3/*.whl "$work/fa3-wheel"
    cp "$work"/fa3-wheel/flash_attn_*.py "$out/"
    xz -T2 -6 -c "$work/fa3-wheel/flash_attn_3/_C.abi3.so" > "$work/fa3.xz"
    mv "$work/fa3.xz" "$out/fa3.xz"
fi

if [ ! -f "$work/venv/.ready" ]; then
    echo "an environment to compile FlashInfer in"
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install -q torch==2.13.0 'numpy<2.4' ninja einops tqdm requests tabulate click \
        packaging nvidia-ml-py
    "$work/venv/bin/pip" install -q --no-deps "flashinfer-python==$flashinfer" "apache-tvm-ffi==$tvm_ffi"
    touch "$work/venv/.ready"
fi
if [ ! -d "$work/curand" ]; then
    "${pip[@]}" -d "$work/curand-wheel" "nvidia-curand==$curand"
    python3 -m zipfile -e "$work"/curand-wheel/*.whl "$work/curand"
fi

# nvcc on PATH may be a wrapper script; its dry run tells the toolkit's root.
: > "$work/empty.cu"
root=$(nvcc -dryrun -c "$work/empty.cu" 2>&1 | sed -n 's/^#\$ TOP=//p')
export CUDA_HOME=${CUDA_HOME:-$(realpath "$root")}
curand_header=$(find "$work/curand" -name curand_kernel.h | head -1)
CPLUS_INCLUDE_PATH=$(dirname "$curand_header")
export CPLUS_INCLUDE_PATH
export LD_LIBRARY_PATH=$CUDA_HOME/lib64:${LD_LIBRARY_PATH:-} PATH=$work/venv/bin:$PATH
python "$here/flashinfer_prebuild.py" --work "$work/flashinfer" "$@"
tar c -C "$work/flashinfer/.cache/flashinfer/$flashinfer/90a/cached_ops" --exclude='*.o' --exclude=./tmp . |
    xz -T2 -6 > "$work/flashinfer-modules.tar.xz"
mv "$work/flashinfer-modules.tar.xz" "$out/"

cp "$here/activate.sh" "$out/"
cat > "$out/versions.json" <<JSON
{"flashinfer-python": "$flashinfer", "apache-tvm-ffi": "$tvm_ffi", "xformers": "$xformers", "tokenspeed-fa3": "$fa3"}
JSON
du -sh "$out"
