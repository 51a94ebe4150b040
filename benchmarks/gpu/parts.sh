# The parts of `make gpu`, for run.sh to source: each a function, in whose scope are
#   dry, gpu, key, python, out, work, here, kept   as run.sh's `main` sets them
#   name, deadline, status                         the part, when it has to end, what came of it so far
# and that calls run.sh's limited, within, also, say and measured.
# shellcheck shell=bash disable=SC2154

peers() {
    if [ -z "${PEERS:-}" ]; then
        echo "PEERS is not set: only what torch brings is measured"
        return
    fi
    local module code=0
    # shellcheck source=/dev/null
    source "$PEERS/activate.sh" || code=$?
    [ "$code" = 0 ] || say "!!! $PEERS/activate.sh failed with status $code"
    also "$code"
    for module in flashinfer flash_attn_interface xformers; do
        code=0
        "$python" -c "import $module" || code=1
        [ "$code" = 0 ] || say "!!! $module cannot be imported; PEERS carries it"
        also "$code"
    done
}

first_file() {  # FILE…: the first that exists
    local file
    for file in "$@"; do
        [ -f "$file" ] && echo "$file" && return
    done
}

build() {
    if [ -n "$dry" ]; then
        command -v nvcc >/dev/null || echo "no nvcc on PATH: device code is not built"
        limited "$python" benchmarks/gpu/plans.py
        also $?
    elif [ "$(cat "$(installed_sources 2>/dev/null)" 2>/dev/null)" = "$key" ]; then
        echo "these sources are installed"
    else
        local archs code=0 install=(-m pip install -q --no-build-isolation --no-deps --force-reinstall .)
        rm -f "$(installed_sources 2>/dev/null)"
        archs=$("$python" -c "import torch
print('90a-real' if torch.cuda.get_device_capability() == (9, 0) else '')")
        export FORK_ATTN_CUDA_ARCHS=${FORK_ATTN_CUDA_ARCHS:-$archs}
        FORK_ATTN_CUDA=ON limited "$python" "${install[@]}" || code=$?
        also "$code"
        if [ "$code" = 0 ]; then
            echo "$key" >"$(installed_sources)"
        else
            say "!!! device code was not built; without it, so that Triton's kernels are tested:"
            FORK_ATTN_CUDA=OFF limited "$python" "${install[@]}"
        fi
    fi
    limited "$python" -m fork_attn info
    also $?
}

run_pytest() {  # NAME PROCESSES ARGUMENT…: its results are in build/gpu/NAME.xml
    local xml=$work/$1.xml processes=$2
    shift 2
    rm -f "$xml"
    # A test that hangs ends its process, and pytest-xdist goes on with another.
    limited "$python" -m pytest -q -p no:cacheprovider -n "$processes" --dist worksteal --tb=short -rf \
        --timeout=120 --timeout-method=thread --junitxml="$xml" "$@"
}

tests() {
    # Bodies are compiled on many cores; tests with streams that sleep have the GPU to themselves.
    local alone=(tests/gpu/test_streams.py tests/gpu/test_attend.py) cores
    cores=$(nproc)
    if [ -n "$dry" ]; then
        run_pytest tests "$cores" tests/gpu tests/test_gpu_bodies.py
        also $?
        measured sanitizer "$work/tests.xml"
        return
    fi
    local end=$deadline
    deadline=$((SECONDS + (end - SECONDS) * 3 / 4))
    run_pytest tests $((cores > 12 ? 10 : cores > 3 ? cores - 2 : 1)) tests/gpu "${alone[@]/#/--ignore=}"
    also $?
    deadline=$end
    run_pytest alone 1 "${alone[@]}"
    also $?
    measured tests "$work/tests.xml"
    measured tests "$work/alone.xml"
}

sanitizer_path() {  # or nothing
    command -v compute-sanitizer && return
    local path
    path=$(first_file "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer)
    [ -n "$path" ] && echo "$path" && return
    "$python" - <<'EOF'
import pathlib, site
found = [p for s in site.getsitepackages() for p in pathlib.Path(s).glob("nvidia/**/compute-sanitizer")]
print(found[0] if found else "", end="")
EOF
}

sanitizer() {
    local tool check
    tool=$(sanitizer_path)
    if [ -n "$dry" ]; then
        say "no GPU: ${tool:-compute-sanitizer, which is not installed,} is not run"
        return
    fi
    if [ -z "$tool" ]; then
        say "!!! compute-sanitizer is not installed: memory and races are not checked"
        also 1
        return
    fi
    # Races only of our own .cu kernels, and of those move_slots alone has shared memory: of Triton's,
    # which wait by mbarriers, it would report races that are none.
    local -A options=([racecheck]="--kernel-name kns=fork_attn" [memcheck]="--report-api-errors no")
    local -A chosen=([racecheck]="-k move_slots tests/gpu/test_cache_kernels.py" [memcheck]="tests/gpu")
    for check in racecheck memcheck; do
        echo "--- compute-sanitizer $check, small shapes"
        rm -f "$work/$check.xml"
        # Each tensor is an allocation of its own, so that reads behind its end are seen.
        # shellcheck disable=SC2086
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$tool" --tool "$check" ${options[$check]} \
            --error-exitcode 9 --target-processes all "$python" -m pytest -q -p no:cacheprovider \
            --tb=short -m sanitized --junitxml="$work/$check.xml" ${chosen[$check]}
        also $?
        measured sanitizer "$work/$check.xml"
    done
}

baseline() {
    local rounds file="$out/baseline-$gpu.json"
    [ -n "$dry" ] && rounds="--rounds 5"
    rm -f "$file"
    peers
    # shellcheck disable=SC2086
    limited "$python" benchmarks/gpu/baseline.py $dry ${rounds:-} --json "$file"
    also $?
    # shellcheck disable=SC2086
    limited "$python" benchmarks/gpu/cache_kernels.py $dry ${rounds:-} --json "$file"
    also $?
    measured baseline "$file"
    [ -n "$dry" ] || [ ! -f "$file" ] || cp "$file" "$here/"
}

calibrate_dry() {  # on a busy machine it finds no costs, which is no fault of a dry run
    local code=0 file="$out/costs.json"
    limited "$python" -m fork_attn calibrate --target cpu --quick --out "$file" 2>&1 |
        tee "$kept/calibrate.txt" || code=$?
    if [ "$code" = 2 ] && grep -q 'too busy to measure' "$kept/calibrate.txt"; then
        say "calibrate ran, and found the machine too busy to fit costs"
        return
    fi
    also "$code"
    measured costs "$file"
}

tune() {
    rm -f "$out/costs.json"
    if [ -n "$dry" ]; then
        calibrate_dry
        rm -f "$out/sweep.json"
        TRITON_INTERPRET=1 limited "$python" benchmarks/gpu/sweep.py --dry --out "$out"
        also $?
    else
        within $(((deadline - SECONDS) * 2 / 3)) \
            "$python" -m fork_attn calibrate --quick --out "$out/costs.json"
        also $?
        [ ! -f "$out/costs.json" ] || cp "$out/costs.json" "$here/"
        [ ! -f "$kept/sweep.json" ] || cp "$kept/sweep.json" "$out/"
        limited "$python" benchmarks/gpu/sweep.py --out "$out" --seconds $((deadline - SECONDS - 10))
        also $?
        [ ! -f "$out/sweep.json" ] || cp "$out/sweep.json" "$kept/"
    fi
    [ -n "$dry" ] || measured costs "$out/costs.json"
    measured sweep "$out/sweep.json"
}

follow_costs() {  # plans follow what `tune` measured, where it did
    local file
    [ -z "$dry" ] || return
    if [ -n "${COSTS:-}" ] && [ ! -f "$COSTS" ]; then
        say "!!! COSTS: there is no file $COSTS"
        also 1
    fi
    file=$(first_file "${COSTS:-}" "$out/costs.json" "$here/costs.json")
    if [ -n "$file" ]; then
        FORK_ATTN_COSTS=$(realpath "$file")
        export FORK_ATTN_COSTS
    else
        say "!!! no costs.json of this GPU: plans follow the datasheet; tune measures, COSTS names a file"
    fi
    say "$("$python" -m fork_attn info | grep '^costs')"
}

suite() {  # OPTION…: `fork-attn bench` with the settings of this call; goes on where it was cut off
    # shellcheck disable=SC2086
    limited "$python" -m fork_attn bench --json "$file" ${HEADS:+--heads $HEADS} \
        --seconds "${SECONDS_EACH:-0.3}" --budget $((deadline - SECONDS - 15)) "$@"
    also $?
}

cases_left() {  # FILE: how many a suite did not reach
    "$python" - "$1" <<'EOF'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
held = json.loads(path.read_text()) if path.exists() else {}
print(len(held.get("not_reached", [])))
EOF
}

bench() {
    local file="$kept/suite_$gpu.json" base options="" left before=1000000
    peers
    follow_costs
    # Quick shapes come first; alone there is time for the others too.
    if [ -n "${SHAPES:-}" ]; then
        options="--shapes $SHAPES"
    elif [ "$part" = all ]; then
        options=--quick
    fi
    # shellcheck disable=SC2086
    if [ -n "$dry" ]; then
        rm -f "$file"
        HEADS="4/2x32" SECONDS_EACH=0.1 suite --device cpu --dtypes bf16 --shapes S7a U3s
    else
        suite --device cuda $options
        # A case that lost the GPU ends its process; another goes on with the others.
        left=$(cases_left "$file")
        while [ "$left" -gt 0 ] && [ "$left" -lt "$before" ] && [ $((deadline - SECONDS)) -gt 60 ]; do
            before=$left
            suite --device cuda $options
            left=$(cases_left "$file")
        done
    fi
    measured suite "$file"
    [ -f "$file" ] || return
    cp "$file" "$out/"
    base=$(first_file "${BASE:-}" "$out/baseline-$gpu.json" "$here/baseline-$gpu.json")
    if [ -z "$base" ]; then
        say "!!! no picture: baseline measures the roofs, BASE names its file"
        return
    fi
    deadline=$((SECONDS + 30)) limited \
        "$python" benchmarks/gpu/roofline.py "$file" "$base" "$out/roofline.svg"
    also $?
}

end_to_end() {
    local file="$out/end_to_end_$gpu.json" options="--device cuda --model ${MODEL:-llama-3-8b}"
    [ -n "$dry" ] && options="--quick --model tiny"
    follow_costs
    rm -f "$file"
    # shellcheck disable=SC2086
    limited "$python" benchmarks/end_to_end.py $options --json "$file"
    also $?
    measured end_to_end "$file"
}
