#!/usr/bin/env bash
# What `make gpu` runs on a GPU machine. It needs no package index: the machine brings Python with
# torch, and pybind11, cmake, ninja and nvcc to build with.
#   usage: benchmarks/gpu/run.sh [all|build|test|baseline|dry]
# Environment:
#   OUT     folder of results (default benchmarks/results; build/results for dry)
#   PEERS   folder made by benchmarks/peers/collect.sh; rivals that it lacks are named as absent
#   PYTHON  the interpreter (default python3)
#   COMMIT  what to record where the tree has no .git
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."

part=${1:-all}
python=${PYTHON:-python3}
default=benchmarks/results
[ "$part" = dry ] && default=build/results
out=${OUT:-$default}
mkdir -p "$out"

build() {
    FORK_ATTN_CUDA=ON "$python" -m pip install -q --no-build-isolation --no-deps .
    "$python" -m fork_attn info | tee "$out/info.txt"
}

run_tests() {  # the CPU tests, on this machine's torch and Python
    OMP_NUM_THREADS=2 "$python" -m pytest -n 8 --dist loadfile -p no:cacheprovider tests 2>&1 | tee "$out/pytest.txt"
}

baseline() {
    if [ -n "${PEERS:-}" ]; then
        # shellcheck source=/dev/null
        source "$PEERS/activate.sh"
    else
        echo "PEERS is not set: only what torch brings is measured"
    fi
    "$python" benchmarks/gpu/baseline.py --out "$out"
}

case $part in
    build) build ;;
    test) run_tests ;;
    baseline) baseline ;;
    dry) "$python" benchmarks/gpu/baseline.py --dry --rounds 5 --out "$out" ;;
    all)
        build
        status=0
        run_tests || status=$?  # a failing test must not cost the measurements
        baseline
        exit "$status"
        ;;
    *)
        echo "part: expected all, build, test, baseline or dry, got '$part'" >&2
        exit 2
        ;;
esac
