#!/usr/bin/env bash
# What `make gpu` runs on a GPU machine. It needs no package index: the machine brings Python with
# torch, pybind11, cmake, ninja, nvcc, and pytest with pytest-xdist and pytest-timeout.
#   usage: benchmarks/gpu/run.sh [all|build|tests|sanitizer|baseline|tune|bench|end_to_end|dry]
# `all` goes through the parts in that order; each has a share of the seconds that are left. One part
# alone has all of them, but for a build where these sources are not installed. What was done with
# these sources and settings on this kind of GPU is not done again by `all` (build/gpu holds the
# marks). `dry` goes through every part on a CPU as far as that goes, and plans what a card would get.
# The exit status is 0 if every part is done; a summary says what each has measured.
# Results, seven files: log.txt, baseline-*.json, costs.json, sweep.json, suite_*.json, roofline.svg,
# end_to_end_*.json.
# Environment:
#   OUT     folder of results (default benchmarks/results; build/results for dry)
#   LIMIT   seconds of the whole call (default 550; a command may take 20 more to end)
#   PEERS   folder made by benchmarks/peers/collect.sh; rivals that it lacks are named as absent
#   PYTHON  the interpreter (default python3)
#   COSTS, BASE   costs.json and baseline-*.json of a call before (default: OUT's, then build/gpu's)
#   SHAPES, HEADS, SECONDS_EACH   for bench: a part of `fork-attn bench --list`; seconds of timing a case
#   MODEL   for end_to_end: llama-3-8b (default) or qwen3-8b, with random weights
#   COMMIT  what to record where the tree has no .git
set -uo pipefail
# shellcheck source=benchmarks/gpu/parts.sh
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/parts.sh"

parts=(build tests sanitizer baseline tune bench end_to_end)
declare -A share=([build]=50 [tests]=170 [sanitizer]=55 [baseline]=40 [tune]=85 [bench]=110 [end_to_end]=50)
declare -A state took facts
dry=""

limited() {  # COMMAND…: within what is left of its part's seconds; 124 if it was cut off
    local left=$((deadline - SECONDS)) status=0
    if [ "$left" -le 0 ]; then
        echo "no time left for: $*"
        return 124
    fi
    # SIGINT, so that pytest tells its failures; a shell may have left it ignored.
    timeout --signal=INT --kill-after=20 "$left" env --default-signal=INT "$@" || status=$?
    if [ "$status" = 124 ] || [ "$status" = 137 ] && [ "$SECONDS" -ge "$deadline" ]; then
        echo "cut off after $left s, what was written is kept: $*"
        return 124
    fi
    return "$status"
}

within() {  # SECONDS COMMAND…: as limited, in no more than so many seconds
    local deadline=$((SECONDS + $1 < deadline ? SECONDS + $1 : deadline))
    shift
    limited "$@"
}

also() {  # STATUS: a part's status is the worst: failed, then cut off, then done
    case $1 in
        0) ;;
        124) [ "$status" != 0 ] || status=124 ;;
        *) status=$1 ;;
    esac
}

say() {  # into the summary too
    echo "$*"
    facts[$name]+="$*"$'\n'
}

measured() {  # KIND FILE: what a file holds, for the summary too
    local text code=0
    if [ ! -f "$2" ] && [ "$status" = 124 ]; then
        say "cut off before it wrote $2"
        return
    fi
    text=$("$python" benchmarks/gpu/measured.py "$@" 2>&1) || code=$?
    say "$text"
    also "$code"
}

# --- what is measured: sources, machine

source_key() {  # changes with anything that is built, tested or run
    find csrc python kernels benchmarks tests setup.py pyproject.toml CMakeLists.txt -type f \
        -not -path 'benchmarks/results/*' -not -path '*/__pycache__/*' -not -path '*.egg-info/*' \
        -not -name '*.so' -print0 | sort -z | xargs -0 sha1sum | sha1sum | cut -c1-12
}

gpu_name() {
    "$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))"
}

installed_sources() {  # the file in the installed package that says what it was built of
    "$python" -c "import fork_attn, pathlib; print(pathlib.Path(fork_attn.__file__).parent / '.sources')"
}

mark_of() {  # NAME: a file that says that a part was done with these settings
    local settings="${PEERS:-}|${SHAPES:-}|${HEADS:-}|${SECONDS_EACH:-}|${MODEL:-}"
    echo "$kept/$1-$(sha1sum <<<"$settings" | cut -c1-8).done"
}

# --- all of them

run() {  # NAME SECONDS
    local name=$1 deadline=$((SECONDS + $2)) begin=$SECONDS status=0
    echo "=== $name: $(date -u '+%Y-%m-%d %H:%M:%S') UTC, at most $2 s"
    "$name"
    took[$name]=$((SECONDS - begin))
    case $status in
        0) state[$name]=done ;;
        124) state[$name]="cut off" ;;
        *) state[$name]="failed" ;;
    esac
    echo "=== $name: ${state[$name]}, status $status, after ${took[$name]} s"
    [ -n "$dry" ] || [ "$status" != 0 ] || touch "$(mark_of "$name")"
}

go() {  # PART…: each with its share of the seconds that are left
    local name other weights
    for name in "$@"; do
        if [ -z "$dry" ] && [ "$part" = all ] && [ "$name" != build ] && [ -f "$(mark_of "$name")" ]; then
            state[$name]="done before" took[$name]=0 facts[$name]="$(mark_of "$name") says so"
        fi
    done
    for name in "$@"; do
        [ -z "${state[$name]:-}" ] || continue
        weights=0
        for other in "$@"; do
            [ -n "${state[$other]:-}" ] || weights=$((weights + share[$other]))
        done
        if [ "$SECONDS" -ge "$limit" ]; then
            state[$name]="not run" took[$name]=0 facts[$name]="no time left"
        else
            run "$name" $(((limit - SECONDS) * share[$name] / weights))
        fi
    done
}

summary() {  # PART…
    local name failed=0
    echo "=== summary of $COMMIT, sources $key, on $gpu, after $SECONDS s"
    for name in "$@"; do
        printf '%-12s%-12s%5s s\n' "$name" "${state[$name]:-not run}" "${took[$name]:-0}"
        [ -z "${facts[$name]:-}" ] || sed '/^$/d; s/^/    /; s/\(.\{300\}\).*/\1 …/' <<<"${facts[$name]}"
        case ${state[$name]:-not run} in
            done*) ;;
            *) failed=1 ;;
        esac
    done
    return "$failed"
}

everything() {
    local chosen=(build "$part")
    case $part in
        all | dry) chosen=("${parts[@]}") ;;
        build) chosen=(build) ;;
        *) share[build]=120 share[$part]=440 ;;
    esac
    go "${chosen[@]}"
    summary "${chosen[@]}"
}

commit() {  # as the results name it, and whether anything but results and documents differs
    local found
    found=$(git describe --always --abbrev=12 2>/dev/null) || { echo "sources-$key" && return; }
    [ -z "$(git status --porcelain -uno -- . ':!benchmarks/results' ':!docs' ':!*.md')" ] || found+=-dirty
    echo "$found"
}

main() {
    part=${1:-all}
    case " ${parts[*]} all dry " in
        *" $part "*) ;;
        *)
            echo "part: expected all, $(sed 's/ /, /g' <<<"${parts[*]}") or dry, got '$part'" >&2
            exit 2
            ;;
    esac
    cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../.." || exit
    python=${PYTHON:-python3}
    work=build/gpu limit=${LIMIT:-550} out=${OUT:-benchmarks/results}
    command -v nvcc >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    if [ "$part" = dry ]; then
        dry=--dry gpu=dry limit=${LIMIT:-3600} out=${OUT:-build/results}
    else
        gpu=$(gpu_name) || exit
    fi
    key=$(source_key)
    here=$work/$gpu  # of this kind of GPU
    kept=$here/$key  # and of these sources
    mkdir -p "$out" "$kept"
    COMMIT=${COMMIT:-$(commit)}
    export COMMIT PYTHONUNBUFFERED=1
    everything 2>&1 | tee -a "$out/log.txt"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
