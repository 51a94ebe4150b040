"""CPU attention against torch's ways, side by side in one run, and against the machine's limit.

    python benchmarks/cpu_attention.py --quick
    python benchmarks/cpu_attention.py --json benchmarks/results/cpu_attention.json

Every output is compared with float64 before it is timed. The limit of a case is
max(bytes of unique K and V / stream bandwidth, FLOPs / fp32 matmul rate at the same rows), both
measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_cases import SUFFIX, Case, Forked, Inputs, rivals
from cpu_machine import load_average, machine, matmul_rate, stream_bandwidth
from cpu_timing import Timer
from torch import Tensor

from fork_attn.bench import results

PREFIXES = (1024, 4096, 16384, 32768)
BRANCHES = (1, 2, 4, 8, 16, 32)
HEADS = ((32, 8, 128), (9, 3, 64))
DTYPES = (torch.float32, torch.bfloat16)
# Of the largest value of the exact result: products rounded to 8 bits of mantissa, or to 24.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def cases(quick: bool) -> Iterator[Case]:
    prefixes, branches = ((1024, 4096), (1, 8)) if quick else (PREFIXES, BRANCHES)
    for prefix, heads, dtype, n in itertools.product(prefixes, HEADS, DTYPES, branches):
        yield Case(prefix, n, *heads, dtype)


def available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def error_of(out: Tensor, exact: Tensor) -> float:
    """Largest error over the largest exact value."""
    return float((out.double() - exact).abs().max() / exact.abs().max())


def run_case(case: Case, timer: Timer, bandwidth: float, rate: float) -> dict[str, Any]:
    inputs = Inputs(case)
    forked = Forked(inputs)
    calls: dict[str, Callable[[], Tensor]] = {
        "fork_attn": forked.attend,
        "fork_attn_step": forked.whole_step,
    }
    absent: dict[str, str] = {}
    if case.layers * case.copied_bytes * 1.3 < available_bytes():
        calls |= rivals(inputs)
    else:
        absent["rivals"] = f"{case.layers} copies of {case.copied_bytes} bytes do not fit in memory"
    exact = inputs.oracle()
    errors = {name: error_of(call(), exact) for name, call in calls.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[case.dtype]:
            raise SystemExit(f"{name} is wrong by {error:.2e} in {case}: not measured")
    times = timer.measure(calls)
    memory_s, compute_s = case.unique_bytes / bandwidth, case.flops / rate
    return {
        "heads": [case.q_heads, case.kv_heads, case.head_dim],
        "dtype": str(case.dtype).removeprefix("torch."),
        "prefix": case.prefix,
        "suffix": SUFFIX,
        "branches": case.branches,
        "reuse": case.reuse,
        "layers": case.layers,
        "unique_bytes": case.unique_bytes,
        "flops": case.flops,
        "limit_seconds": max(memory_s, compute_s),
        "limit_by": "memory" if memory_s > compute_s else "compute",
        "matmul_flops_per_s": rate,
        "plan_items": forked.plan.num_items,
        "errors": errors,
        "absent": absent,
        "seconds": {name: dataclasses.asdict(t) for name, t in times.items()},
    }


def line(row: dict[str, Any]) -> str:
    seconds = {name: t["median"] for name, t in row["seconds"].items()}
    ours, step = seconds["fork_attn"], seconds["fork_attn_step"]
    heads = "{}/{}x{}".format(*row["heads"])
    name = f"{heads:9} {row['dtype']:8} {row['prefix']:6} x {row['branches']:2}"
    against = "  ".join(
        f"{rival} {seconds[rival] / step:5.2f}x"
        for rival in ("sdpa_per_branch", "sdpa_batched", "grouped_matmul")
        if rival in seconds
    )
    share = ours / row["limit_seconds"]
    return (
        f"{name}  {ours * 1e3:8.3f} ms, step {step * 1e3:8.3f} ms  "
        f"{share:4.2f} of {row['limit_by']:7} limit  {against}"
    )


def measure(quick: bool, seconds: float, save: Callable[[dict[str, Any]], None]) -> None:
    """Measures all cases, saving after each: what an interrupted run has done is not lost."""
    timer = Timer(seconds, min_rounds=7)
    result: dict[str, Any] = {"machine": machine(), "load_before": load_average()}
    stream = stream_bandwidth(Timer(2.0 if quick else 5.0))
    result["stream_bytes_per_s"] = stream
    bandwidth = max(stream.values())
    print("stream:", ", ".join(f"{k} {v / 1e9:.1f} GB/s" for k, v in stream.items()), flush=True)
    rates: dict[tuple[int, int, int], float] = {}
    todo = list(cases(quick))
    rows: list[dict[str, Any]] = []
    result |= {"cases_planned": len(todo), "cases": rows}
    for i, case in enumerate(todo):
        key = (case.kv_heads, case.rows, case.head_dim)
        if key not in rates:
            rates[key] = matmul_rate(Timer(1.0, min_rounds=50), *key)
        rows.append(run_case(case, timer, bandwidth, rates[key]))
        print(f"[{i + 1:2}/{len(todo)}] {line(rows[-1])}", flush=True)
        result["load_after"] = load_average()
        save(result)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small subset")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each case")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()

    measure(args.quick, args.seconds, partial(results.write, args.json))


if __name__ == "__main__":
    main()
