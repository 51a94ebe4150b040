#!/usr/bin/env bash
# What `make gpu` runs on a GPU machine. It needs no package index: the machine brings Python with
# torch, and pybind11, cmake, ninja and nvcc to build with.
#   usage: benchmarks/gpu/run.sh [all|build|test|baseline|bench|dry]
# Environment:
#   OUT     folder of results (default benchmarks/results; build/results for dry)
#   PEERS   folder made by benchmarks/peers/collect.sh; rivals that it lacks are named as absent
#   PYTHON  the interpreter (default python3)
#   SHAPES, HEADS, SECONDS_EACH   for bench: a part of `fork-attn bench --list`; seconds of timing a case
#   MODEL   for bench: llama-3-8b (default) or qwen3-8b, with random weights
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

peers() {
    if [ -n "${PEERS:-}" ]; then
        # shellcheck source=/dev/null
        source "$PEERS/activate.sh"
    else
        echo "PEERS is not set: only what torch brings is measured"
    fi
}

baseline() {
    peers
    "$python" benchmarks/gpu/baseline.py --out "$out"
}

bench() {  # SHAPES, HEADS: of `fork-attn bench --list`, to measure a part
    peers
    name=$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")
    # shellcheck disable=SC2086
    "$python" -m fork_attn bench --device cuda --json "$out/suite_$name.json" \
        ${SHAPES:+--shapes $SHAPES} ${HEADS:+--heads $HEADS} ${SECONDS_EACH:+--seconds $SECONDS_EACH}
    if "$python" -c "import transformers" 2>/dev/null; then
        "$python" benchmarks/end_to_end.py --device cuda --model "${MODEL:-llama-3-8b}" \
            --json "$out/end_to_end_$name.json"
    else
        echo "transformers is not installed: nothing is measured end to end"
    fi
}

case $part in
    build) build ;;
    test) run_tests ;;
    baseline) baseline ;;
    bench) bench ;;
    dry)
        "$python" benchmarks/gpu/baseline.py --dry --rounds 5 --out "$out"
        "$python" -m fork_attn bench --device cpu --shapes S7a U3s --heads 4/2x32 --seconds 0.1 \
            --json "$out/suite_dry.json"
        ;;
    all)
        build
        status=0
        run_tests || status=$?  # a failing test must not cost the measurements
        baseline
        bench
        exit "$status"
        ;;
    *)
        echo "part: expected all, build, test, baseline, bench or dry, got '$part'" >&2
        exit 2
        ;;
esac
