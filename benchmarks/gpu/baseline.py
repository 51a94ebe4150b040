"""The machine's roofs: bandwidth, the dense matmul rate, and dense attention.

Run by `make gpu`. `--dry` runs small shapes on the CPU, to try this program where there is no GPU.
Attention over trees is measured by `fork-attn bench`.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import commit, machine, versions
from timing import measure

from fork_attn.bench import results
from fork_attn.bench.machine import clocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each kernel")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry runs small shapes on the CPU")
    device = torch.device("cpu" if args.dry else "cuda")

    before = clocks()
    roofs = measure_roofs(device, args.rounds)
    report = {
        "what": "baseline",
        "dry": args.dry,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "clocks_before": before,
        "roofs": roofs,
        "dense_attention": measure_dense_attention(device, args.rounds),
        "clocks_after": clocks(),
    }
    results.write(args.json, report)
    print(f"\nwritten to {args.json}")


def measure_roofs(device: torch.device, rounds: int) -> dict[str, float]:
    """Bandwidth of a copy (bytes read and written) and of a read; the dense bf16 matmul rate."""
    dry = device.type == "cpu"
    source = torch.randn((1 << 20) if dry else (1 << 29), device=device)
    target = torch.empty_like(source)
    size = 256 if dry else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = measure(
        {
            "copy": lambda: target.copy_(source),
            "read": lambda: source.sum(),
            "matmul": lambda: a @ b,
        },
        device,
        rounds,
    )
    num_bytes = source.numel() * source.element_size()
    roofs = {
        "copy_bytes_per_second": 2 * num_bytes / times["copy"].median,
        "read_bytes_per_second": num_bytes / times["read"].median,
        "matmul_bf16_flops_per_second": 2 * size**3 / times["matmul"].median,
    }
    for name, value in roofs.items():
        print(f"{name:<32}{value / 1e12:10.3f} T/s", flush=True)
    return roofs


def measure_dense_attention(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Prefill rates, bf16, 32 query and 8 KV heads of 128: the compute roof of attention."""
    rows = []
    for length in (128,) if device.type == "cpu" else (4096, 16384):
        for causal in (False, True):
            q, k, v = (
                torch.randn(1, length, heads, 128, device=device, dtype=torch.bfloat16)
                for heads in (32, 8, 8)
            )
            calls, absent = _dense_calls(q, k, v, causal)
            flops = 4 * length * length * 32 * 128 * (0.5 if causal else 1.0)
            row: dict[str, Any] = {"length": length, "causal": causal, "absent": absent}
            for name, times in measure(calls, device, rounds).items():
                row[name] = {**asdict(times), "flops_per_second": flops / times.median}
                print(
                    f"dense attention {length} causal={causal!s:<6}{name:<8}"
                    f"{flops / times.median / 1e12:8.1f} TFLOP/s",
                    flush=True,
                )
            rows.append(row)
    return rows


def _dense_calls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    q1, k1, v1 = (t.transpose(1, 2) for t in (q, k, v))
    calls: dict[str, Callable[[], object]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(
            q1, k1, v1, is_causal=causal, enable_gqa=True
        )
    }
    if q.device.type != "cuda":
        return calls, {"fa3": "flash_attn_interface needs a CUDA device"}
    try:
        from flash_attn_interface import flash_attn_func

        flash_attn_func(q, k, v, causal=causal)
        torch.cuda.synchronize()
    except Exception as error:  # a rival that cannot run is named, the others go on
        return calls, {"fa3": f"{type(error).__name__}: {error}"}
    calls["fa3"] = lambda: flash_attn_func(q, k, v, causal=causal)
    return calls, {}


if __name__ == "__main__":
    main()
