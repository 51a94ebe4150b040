"""Bandwidth of the cache's kernels against a plain copy measured in turn with them.

    python benchmarks/gpu/cache_kernels.py --json FILE [--rounds N] [--dry]

Adds `cache_kernels` to what the file holds: per case the bytes that have to be read and written,
the median time with a cold L2, and the fraction of the copy's bytes per second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import commit, machine, versions
from timing import measure
from torch import Tensor

from fork_attn import merge_states, ops_cache
from fork_attn.bench import results

FP8 = torch.float8_e4m3fn
HEADS, DIM, PAGE = 8, 128, 16
COPY_BYTES = 512 << 20  # read, and as many written
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def paged(num_pages: int, dtype: torch.dtype) -> Tensor:
    shape = (num_pages, HEADS, PAGE, DIM)
    return torch.zeros(shape, dtype=dtype, device=DEVICE).transpose(1, 2)


def store_case(rows: int, cached: torch.dtype, rope: bool) -> tuple[Callable[[], object], int]:
    pages = rows // PAGE + 1
    caches = (paged(pages, cached), paged(pages, cached))
    k, v = (torch.randn(rows, HEADS, DIM, device=DEVICE).bfloat16() for _ in range(2))
    options: dict[str, Any] = {}
    if cached == FP8:
        ones = torch.ones(HEADS, device=DEVICE)
        options |= {"k_scale": ones, "v_scale": ones}
    size = 2 * k.numel() * (2 + cached.itemsize) + rows * 8
    if rope:
        angle = torch.rand(rows, DIM // 2, device=DEVICE)
        positions = torch.arange(rows, device=DEVICE)
        options |= {"cos": angle.cos(), "sin": angle.sin(), "position_ids": positions}
        size += 2 * 4 * angle.numel() + rows * 8
    slots = torch.randperm(rows, device=DEVICE)
    return lambda: ops_cache.store_kv(k, v, *caches, slots, **options), size


def copy_case(num_copies: int, num_layers: int) -> tuple[Callable[[], object], int]:
    caches = [paged(2 * num_copies, torch.bfloat16) for _ in range(2 * num_layers)]
    pages = torch.randperm(2 * num_copies, device=DEVICE).to(torch.int32)
    src, dst = pages[:num_copies].clone(), pages[num_copies:].clone()
    size = 2 * num_copies * sum(cache[0].numel() * 2 for cache in caches)
    return lambda: ops_cache.copy_pages(caches, src, dst), size


def gather_case(rows: int, cached: torch.dtype) -> tuple[Callable[[], object], int]:
    caches = (paged(rows // PAGE, cached), paged(rows // PAGE, cached))
    slots = torch.randperm(rows, device=DEVICE)
    options: dict[str, Any] = {}
    if cached == FP8:
        ones = torch.ones(HEADS, device=DEVICE)
        options = {"k_scale": ones, "v_scale": ones, "dtype": torch.bfloat16}
    size = 2 * rows * HEADS * DIM * (cached.itemsize + 2) + rows * 8
    return lambda: ops_cache.gather_kv(*caches, slots, **options), size


def shift_case(rows: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    k_cache, v_cache = (paged(2 * rows // PAGE, dtype) for _ in range(2))
    slots = torch.randperm(2 * rows, device=DEVICE)
    src, dst = slots[:rows].clone(), slots[rows:].clone()
    angle = torch.rand(1, DIM // 2, device=DEVICE)
    zeros = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    arguments = (k_cache, v_cache, src, dst, angle.cos(), angle.sin(), zeros)
    size = 4 * rows * HEADS * DIM * dtype.itemsize + 3 * rows * 8
    return lambda: ops_cache.shift_rope(*arguments), size


def move_case(count: int, num_layers: int) -> tuple[Callable[[], object], int]:
    caches = [paged(8, torch.bfloat16) for _ in range(2 * num_layers)]
    src = torch.arange(1, count + 1, device=DEVICE)
    size = 2 * count * len(caches) * HEADS * DIM * 2
    return lambda: ops_cache.move_slots(caches, src, src - 1), size


def merge_case(states: int, rows: int) -> tuple[Callable[[], object], int]:
    out = torch.randn(states, rows, HEADS, DIM, device=DEVICE)
    lse = torch.randn(states, rows, HEADS, device=DEVICE)
    size = (out.numel() + lse.numel()) * 4 * (states + 1) // states
    return lambda: merge_states(out, lse), size


def cases(dry: bool) -> dict[str, tuple[Callable[[], object], int]]:
    """Name to call and bytes that it has to move."""
    found: dict[str, tuple[Callable[[], object], int]] = {}
    many, layers = (256, 2) if dry else (32768, 32)
    for rows in (64, many):
        for cached, label in ((torch.bfloat16, "bf16"), (FP8, "e4m3")):
            for rope in (False, True):
                name = f"store_kv {rows} rows to {label}{' with RoPE' if rope else ''}"
                found[name] = store_case(rows, cached, rope)
    for pages in (256, 8):
        found[f"copy_pages {pages} pages x {layers} layers"] = copy_case(pages, layers)
    for cached, label in ((torch.bfloat16, "bf16"), (FP8, "e4m3 to bf16")):
        found[f"gather_kv {many} slots, {label}"] = gather_case(many, cached)
    for dtype, label in ((torch.bfloat16, "bf16"), (FP8, "e4m3")):
        found[f"shift_rope {many} slots, {label}"] = shift_case(many, dtype)
    found[f"move_slots 8 slots x {layers} layers"] = move_case(8, layers)
    found[f"merge_states 8 states of {many // 8} rows"] = merge_case(8, many // 8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file of results to add to")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    if args.dry == (DEVICE.type == "cuda"):
        parser.error("expected a CUDA device, or --dry where there is none")
    device = DEVICE
    copy_bytes = COPY_BYTES // 512 if args.dry else COPY_BYTES
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows = []
    for name, (call, size) in cases(args.dry).items():
        times = measure(
            {"copy": lambda: target.copy_(source), "call": call}, device, rounds=args.rounds
        )
        copy_rate = 2 * copy_bytes / times["copy"].median
        rate = size / times["call"].median
        rows.append(
            {
                "case": name,
                "bytes": size,
                "seconds": times["call"].median,
                "p20": times["call"].p20,
                "p95": times["call"].p95,
                "bytes_per_second": rate,
                "copy_bytes_per_second": copy_rate,
                "fraction_of_copy": rate / copy_rate,
            }
        )
        microseconds = times["call"].median * 1e6
        print(f"{name:44} {microseconds:9.1f} us {rate / 1e9:8.0f} GB/s {rate / copy_rate:6.1%}")
    held = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    held["cache_kernels"] = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rounds": args.rounds,
        "cases": rows,
    }
    results.write(args.json, held)
    print(f"added to {args.json}")


if __name__ == "__main__":
    main()
