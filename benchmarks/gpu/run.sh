#!/usr/bin/env bash
# What `make gpu` runs on a GPU machine. It needs no package index: the machine brings Python with
# torch, and pybind11, cmake, ninja, nvcc and pytest.
#   usage: benchmarks/gpu/run.sh [all|build|tests|baseline|tune|bench|dry]
# `all` goes through the parts in that order, each within its own seconds, ten minutes together; what
# was done at this commit on this machine is not done again (build/gpu holds the marks). `dry` goes
# through every part on a CPU as far as that goes; its numbers mean nothing.
# Results, eight files at most: log.txt, baseline-*.json, cache_kernels.json, costs.json, sweep.json,
# suite_*.json, end_to_end_*.json, roofline.svg.
# Environment:
#   OUT     folder of results (default benchmarks/results; build/results for dry)
#   PEERS   folder made by benchmarks/peers/collect.sh; rivals that it lacks are named as absent
#   PYTHON  the interpreter (default python3)
#   SHAPES, HEADS, SECONDS_EACH   for bench: a part of `fork-attn bench --list`; seconds of timing a case
#   MODEL   for bench: llama-3-8b (default) or qwen3-8b, with random weights
#   COMMIT  what to record where the tree has no .git
set -uo pipefail
cd "$(dirname "$(realpath "$0")")/../.."

part=${1:-all}
python=${PYTHON:-python3}
dry=""
default=benchmarks/results
if [ "$part" = dry ]; then
    dry=--dry
    default=build/results
fi
out=${OUT:-$default}
work=build/gpu
mkdir -p "$out" "$work"

declare -A budget=([build]=120 [tests]=150 [baseline]=50 [tune]=120 [bench]=150)

limited() {  # runs a command within what is left of its part's seconds
    local left=$((deadline - SECONDS)) status=0
    if [ "$left" -le 0 ]; then
        echo "no time left for: $*"
        return 124
    fi
    timeout --kill-after=10 "$left" "$@" || status=$?
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        echo "cut off after $left s, what was written is kept: $*"
    fi
    return "$status"
}

gpu_name() {
    "$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))"
}

build() {
    if [ -n "$dry" ]; then
        command -v nvcc >/dev/null || echo "no nvcc on PATH: device code is not built"
    else
        FORK_ATTN_CUDA=ON limited "$python" -m pip install -q --no-build-isolation --no-deps . || return
    fi
    limited "$python" -m fork_attn info
}

sanitizer() {  # its path, or nothing
    command -v compute-sanitizer && return
    local path
    for path in "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer; do
        [ -x "$path" ] && echo "$path" && return
    done
    "$python" - <<'EOF'
import pathlib, site
found = [p for s in site.getsitepackages() for p in pathlib.Path(s).glob("nvidia/**/compute-sanitizer")]
print(found[0] if found else "", end="")
EOF
}

tests() {
    local status=0 tool check
    limited "$python" -m pytest -q -p no:cacheprovider tests/gpu ${dry:+tests/test_gpu_bodies.py} || status=$?
    tool=$(sanitizer)
    if [ -z "$tool" ]; then
        echo "compute-sanitizer is not installed: memory and races are not checked"
        return "$status"
    fi
    if [ -n "$dry" ]; then
        echo "no GPU: $tool is not run"
        return "$status"
    fi
    for check in memcheck racecheck; do
        echo "--- compute-sanitizer $check, small shapes"
        # Each tensor is an allocation of its own, so that reads behind its end are seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$tool" --tool "$check" --error-exitcode 9 \
            --target-processes all "$python" -m pytest -q -x -p no:cacheprovider -m sanitized tests/gpu || status=$?
    done
    return "$status"
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
    local rounds
    [ -n "$dry" ] && rounds="--rounds 5"
    peers
    # shellcheck disable=SC2086
    limited "$python" benchmarks/gpu/baseline.py $dry ${rounds:-} --out "$out" || return
    # shellcheck disable=SC2086
    limited "$python" benchmarks/gpu/cache_kernels.py $dry ${rounds:-} --out "$out"
}

tune() {
    local status=0
    if [ -n "$dry" ]; then
        limited "$python" -m fork_attn calibrate --target cpu --quick --out "$out/costs.json" || status=$?
        TRITON_INTERPRET=1 limited "$python" benchmarks/gpu/sweep.py --dry --out "$out" || status=$?
        return "$status"
    fi
    limited "$python" -m fork_attn calibrate --quick --out "$out/costs.json" || status=$?
    limited "$python" benchmarks/gpu/sweep.py --out "$out" --seconds $((deadline - SECONDS - 15)) || status=$?
    return "$status"
}

bench() {  # SHAPES, HEADS: of `fork-attn bench --list`, to measure a part
    local name=dry device=cpu status=0 shapes=${SHAPES:-} heads=${HEADS:-} each=${SECONDS_EACH:-0.3}
    peers
    if [ -n "$dry" ]; then
        shapes="S7a U3s" heads="4/2x32" each=0.1
    else
        name=$(gpu_name) device=cuda || return
    fi
    # Plans follow what `tune` measured, where it did.
    [ -f "$out/costs.json" ] && [ -z "$dry" ] && export FORK_ATTN_COSTS="$out/costs.json"
    # shellcheck disable=SC2086
    limited "$python" -m fork_attn bench --device $device --json "$work/suite_$name.json" \
        ${shapes:+--shapes $shapes} ${heads:+--heads $heads} --seconds "$each" || status=$?
    [ -f "$work/suite_$name.json" ] || return "$status"
    cp "$work/suite_$name.json" "$out/"
    local base
    base=$(find "$out" -maxdepth 1 -name 'baseline-*.json' | head -n 1)
    if [ -n "$base" ]; then
        deadline=$((deadline + 20)) limited "$python" benchmarks/gpu/roofline.py \
            "$out/suite_$name.json" "$base" "$out/roofline.svg" || status=$?
    else
        echo "no picture: the part baseline measures the roofs"
    fi
    if ! "$python" -c "import transformers" 2>/dev/null; then
        echo "transformers is not installed: nothing is measured end to end"
    elif [ -z "$dry" ]; then
        limited "$python" benchmarks/end_to_end.py --device cuda --model "${MODEL:-llama-3-8b}" \
            --json "$out/end_to_end_$name.json" || status=$?
    fi
    return "$status"
}

run() {  # one part
    local name=$1 status=0
    echo "=== $name: $(date -u '+%Y-%m-%d %H:%M:%S') UTC, at most ${budget[$name]} s"
    local begin=$SECONDS
    deadline=$((SECONDS + budget[$name]))
    "$name" || status=$?
    echo "=== $name: status $status after $((SECONDS - begin)) s"
    return "$status"
}

measured_commit() {  # and what differs from it, results aside
    git rev-parse --short HEAD >/dev/null 2>&1 || { echo unknown; return; }
    echo "$(git rev-parse --short HEAD)-$(git diff HEAD -- ':!benchmarks/results' | sha1sum | cut -c1-8)"
}

everything() {
    local failed=0 name mark commit
    commit=${COMMIT:-$(measured_commit)}
    for name in build tests baseline tune bench; do
        mark="$work/$commit-$(uname -n)-$name.done"
        if [ -z "$dry" ] && [ "$commit" != unknown ] && [ -f "$mark" ]; then
            echo "=== $name: done at $commit before; $mark says so"
            continue
        fi
        if run "$name"; then
            [ -n "$dry" ] || touch "$mark"
        else
            failed=1  # one part must not cost the others
        fi
    done
    return "$failed"
}

case $part in
    build | tests | baseline | tune | bench) run "$part" 2>&1 | tee -a "$out/log.txt" ;;
    all | dry) everything 2>&1 | tee -a "$out/log.txt" ;;
    *)
        echo "part: expected all, build, tests, baseline, tune, bench or dry, got '$part'" >&2
        exit 2
        ;;
esac
