"""Decoding with a model end to end: threads over one prefix, and replays of published traces.

    python benchmarks/end_to_end.py --model tiny --quick
    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end_cpu.json

All ways run in turn, a block of steps each, every block from the same prefix, its first step not
timed. Before that their logits are compared, which warms up. A replay feeds the same tokens to all.
The longest prompt is read once, and is cut for shorter ones: longest first. A way that runs out of
memory is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import e2e_models
import torch
from e2e_traces import TRACES, Fork, Trace
from e2e_ways import Forked, Stock, StockBatch, StockCopies, Way
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from fork_attn.bench import results
from fork_attn.bench.machine import clocks, load_average, machine
from fork_attn.bench.timing import Times, count
from fork_attn.demo.baseline import plain_copy

SCHEMA = 1
# Prompt tokens and threads; real widths first, then best-of-64.
_REAL = ((1024, 2), (1024, 5), (4096, 1), (4096, 5), (1024, 64))
CELLS: dict[str, tuple[tuple[int, int], ...]] = {
    "cpu": _REAL,
    "cuda": (*_REAL, (16384, 5), (4096, 64), (4096, 128)),
    "quick": ((64, 1), (64, 3)),
}
# Of a trace's published lengths: what is decoded in seconds.
SCALE = {"cpu": 1 / 160, "cuda": 1 / 40, "quick": 1 / 800}
MOST_COPIES = 8  # threads that are decoded one after another: more take minutes
PAGE = 16
OUT_OF_MEMORY = "out of memory"
FIRST_TOKEN = 7
LOGIT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def pages_needed(
    cells: Iterable[tuple[int, int]], traces: Iterable[Trace], steps: int
) -> dict[str, int]:
    """Pages of the prompt, and of what threads add to it."""

    def pages(tokens: int) -> int:
        return -(-tokens // PAGE) + 1  # a part of a page at each end

    longest = max([cell[0] for cell in cells] + [trace.prefix for trace in traces])
    added = [threads * pages(steps + 2) for _, threads in cells]
    for trace in traces:
        phases = (p.lengths if isinstance(p, Fork) else (p.tokens,) for p in trace.phases)
        added.append(sum(pages(n) for lengths in phases for n in lengths) + pages(trace.tokens))
    # A second prompt beside the first: `run_continuous`.
    return {"prompt": 2 * pages(longest), "added": max(added)}


def make_ways(model: PreTrainedModel, prompt: list[int], pages: int) -> dict[str, Way]:
    """All ways over one model's weights, the prompt read by each."""
    stock = plain_copy(model)
    read = Stock.read(stock, prompt)
    return {
        "fork_attn": Forked(model, prompt, pages),
        "stock_batch": StockBatch(stock, read),
        "stock_copies": StockCopies(stock, read),
    }


def compare_logits(ways: Mapping[str, Way], threads: int) -> dict[str, float]:
    """Largest difference of the first step's logits from those of copies decoded one by one."""
    logits = {}
    for name, way in ways.items():
        way.begin(threads)
        logits[name] = way.step([FIRST_TOKEN + i for i in range(threads)]).float()
        way.end()
    exact = logits["stock_copies"]
    differences = {name: float((x - exact).abs().max()) for name, x in logits.items()}
    stock = ways["stock_batch"]
    assert isinstance(stock, Stock)
    limit = LOGIT_TOLERANCE[stock.model.dtype]
    if wrong := {name: d for name, d in differences.items() if not d <= limit}:
        raise SystemExit(f"logits differ from stock's: {wrong}; not measured")
    return differences


def narrow(ways: Mapping[str, Way], length: int) -> None:
    for way in ways.values():
        way.narrow(length)


def fits(way: Way, work: Callable[[], None]) -> bool:
    """Does it; whether memory was enough."""
    try:
        work()
    except torch.OutOfMemoryError:
        return False
    finally:
        way.end()
    return True


def run_cell(
    ways: Mapping[str, Way],
    threads: int,
    blocks: int,
    steps: int,
    device: torch.device,
) -> dict[str, Any]:
    """Seconds of one greedy step of all threads, in blocks; and of the fork that begins a block."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    forks: dict[str, list[float]] = {name: [] for name in ways}
    held: dict[str, int] = {}
    absent: dict[str, str] = {}

    def one_block(name: str, way: Way) -> None:
        synchronize(device)
        began = time.perf_counter()
        way.begin(threads)
        synchronize(device)
        forked = time.perf_counter() - began
        tokens = way.step([FIRST_TOKEN] * threads).argmax(-1).tolist()
        began = time.perf_counter()
        for _ in range(steps):
            tokens = way.step(tokens).argmax(-1).tolist()
        seconds = (time.perf_counter() - began) / steps
        held[name] = way.kv_bytes()
        taken[name].append(seconds)
        forks[name].append(forked)

    for _ in range(blocks):
        for name, way in ways.items():
            if name not in absent and not fits(way, partial(one_block, name, way)):
                absent[name] = OUT_OF_MEMORY
                taken.pop(name)
    return {
        "threads": threads,
        "absent": absent,
        "ways": {
            name: {
                "step": asdict(Times.of(seconds)),
                "fork": asdict(Times.of(forks[name])),
                "tokens_per_s": threads / Times.of(seconds).median,
                "kv_bytes": held[name],
            }
            for name, seconds in taken.items()
        },
    }


def run_trace(
    ways: Mapping[str, Way], trace: Trace, blocks: int, device: torch.device
) -> dict[str, Any]:
    """Wall time, tokens a second, peak K and V, and tokens read again at joins."""
    found: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    taken: dict[str, list[float]] = {name: [] for name in ways}

    def one_replay(name: str, way: Way) -> None:
        way.begin(1)
        synchronize(device)
        began = time.perf_counter()
        way.replay(trace)
        synchronize(device)
        taken[name].append(time.perf_counter() - began)
        found[name] = {"peak_kv_bytes": way.peak_bytes, "prefilled_tokens": way.prefilled}

    for _ in range(blocks):
        for name, way in ways.items():
            if name not in absent and not fits(way, partial(one_replay, name, way)):
                absent[name] = OUT_OF_MEMORY
                taken.pop(name)
                found.pop(name, None)
    for name, seconds in taken.items():
        times = Times.of(seconds)
        found[name] |= {"wall": asdict(times), "tokens_per_s": trace.tokens / times.median}
    return {
        "name": trace.name,
        "source": trace.source,
        "prefix": trace.prefix,
        "tokens": trace.tokens,
        "critical_path": trace.critical_path,
        "joined_tokens": trace.joined_tokens,
        "absent": absent,
        "ways": found,
    }


def run_continuous(
    model: PreTrainedModel, ways: Mapping[str, Way], prompt: list[int], threads: int, steps: int
) -> dict[str, Any]:
    """Prompt and decoding together: transformers' continuous batching (paged, blocks shared by
    prefix) with a request for each thread, and this package with one prompt that forks."""
    block = 32
    config = ContinuousBatchingConfig(
        num_blocks=threads * (-(-(len(prompt) + steps) // block) + 2),
        block_size=block,
        max_batch_tokens=512,
    )
    options = GenerationConfig(
        max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    requests = [[*prompt[:-1], FIRST_TOKEN + i] for i in range(threads)]
    began = time.perf_counter()
    generate: Any = model.generate_batch
    answers = generate(
        requests, generation_config=options, continuous_batching_config=config, warmup=False
    )
    stock = time.perf_counter() - began
    if sorted(len(a.generated_tokens) for a in answers.values()) != [steps] * threads:
        return {"absent": {"hf_continuous_batching": "did not return all tokens of all requests"}}
    own = ways["fork_attn"]
    assert isinstance(own, Forked)
    began = time.perf_counter()
    own.begin_from(prompt[:-1], threads)
    tokens = [FIRST_TOKEN + i for i in range(threads)]
    for _ in range(steps):
        tokens = own.step(tokens).argmax(-1).tolist()
    mine = time.perf_counter() - began
    own.end()
    return {
        "prompt": len(prompt),
        "threads": threads,
        "steps": steps,
        "seconds": {"fork_attn": mine, "hf_continuous_batching": stock},
    }


def plan_parts(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[tuple[int, int]], list[Trace]]:
    """Cells (prompt tokens, threads) and traces to measure."""
    size = "quick" if args.quick else device.type
    cells = [cell for cell in CELLS[size] if cell[1] <= args.most_threads]
    traces = [make().scaled(SCALE[size]) for make in TRACES.values()]
    # Longest prompts first: the one that was read is cut.
    return sorted(cells, key=lambda c: -c[0]), sorted(traces, key=lambda t: -t.prefix)


def measure(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Measures everything, saving after each part."""
    device = torch.device(args.device)
    cells, traces = plan_parts(args, device)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine(device),
        "device": device.type,
        "load_before": load_average(),
        "clocks_before": clocks(),
        "model": args.model,
    }
    longest = max([cell[0] for cell in cells] + [trace.prefix for trace in traces])
    model = e2e_models.load(args.model, device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 190, (longest,), generator=generator).tolist()
    ways = make_ways(model, prompt, sum(pages_needed(cells, traces, args.steps).values()))
    stock = ways["stock_batch"]
    assert isinstance(stock, Stock)
    result |= {"dtype": str(model.dtype).removeprefix("torch."), "cells": [], "traces": []}
    begun = time.monotonic()

    def done(text: str, found: dict[str, Any]) -> None:
        rates = ", ".join(f"{k} {w['tokens_per_s']:.1f}" for k, w in found["ways"].items())
        print(f"[{time.monotonic() - begun:4.0f} s] {text}: {rates} tokens/s", flush=True)
        result.update(load_after=load_average(), clocks_after=clocks())
        save(result)

    for length, threads in cells:
        narrow(ways, length)
        some, left_out = dict(ways), {}
        if threads > MOST_COPIES:
            del some["stock_copies"]
            left_out["stock_copies"] = f"one thread after another: up to {MOST_COPIES}"
        steps = args.steps if threads <= 8 else max(2, args.steps // 2)
        compare = compare_logits(ways, min(threads, 5))
        cell = {"prefix": length, **run_cell(some, threads, args.blocks, steps, device)}
        cell["absent"] |= left_out
        result["cells"].append({**cell, "logit_differences": compare})
        done(f"{threads} threads over {length} tokens", cell)
    for trace in traces:
        narrow(ways, trace.prefix)
        result["traces"].append(run_trace(ways, trace, max(1, args.blocks // 3), device))
        done(f"replay of {trace.name}, {trace.tokens} tokens", result["traces"][-1])
    length = cells[-1][0]
    threads = max(n for prefix, n in cells if prefix == length and n <= MOST_COPIES)
    continuous = run_continuous(stock.model, ways, prompt[:length], threads, 4 * args.steps)
    result["continuous"] = continuous
    print(f"[{time.monotonic() - begun:4.0f} s] from the prompt on: {continuous}", flush=True)
    save(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=e2e_models.NAMES, default="smollm2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try this program")
    parser.add_argument("--blocks", type=count, default=3)
    parser.add_argument("--steps", type=count, default=4, help="of a block")
    parser.add_argument("--most-threads", type=count, default=128)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()

    measure(args, partial(results.write, args.json))


if __name__ == "__main__":
    main()
