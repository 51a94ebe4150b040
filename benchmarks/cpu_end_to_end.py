"""Decoding with a real model on a CPU: threads over one prefix, and one branch alone, against stock
transformers over copied caches.

    python benchmarks/cpu_end_to_end.py --model tiny
    python benchmarks/cpu_end_to_end.py --json benchmarks/results/cpu_end_to_end.json

The four ways run in turn, a block of greedy steps each, every block from the same prefix; the first
block warms up. Before that their logits are compared.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from cpu_machine import load_average, machine
from cpu_timing import Times
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fork_attn as fa
from fork_attn import hf
from fork_attn.demo import weights
from fork_attn.demo.baseline import plain_copy

PREFILL_TOKENS = 512
LOGIT_TOLERANCE = 1e-2


class Way(ABC):
    """One way to decode some threads from the prefix."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def begin(self) -> None:
        """Goes back to the prefix."""

    @abstractmethod
    def step(self, tokens: list[int]) -> Tensor:
        """Feeds one token to each thread; (threads, vocab) logits."""


class Forked(Way):
    def __init__(self, model: PreTrainedModel, root: fa.Branch, threads: int) -> None:
        super().__init__(threads)
        self.model, self.root = model, root
        self.branches: list[fa.Branch] = []

    def begin(self) -> None:
        self.root.cache.free(self.branches)
        self.branches = self.root.fork(self.threads)

    def step(self, tokens: list[int]) -> Tensor:
        rows = {b: [token] for b, token in zip(self.branches, tokens, strict=True)}
        return hf.forward(self.model, rows)


class Stock(Way):
    """A batch with a row for each thread; no row is padded, so that it needs no mask."""

    def __init__(self, model: PreTrainedModel, prefix: DynamicCache, threads: int) -> None:
        super().__init__(threads)
        self.model, self.length = model, prefix.get_seq_length()
        self.cache = copy.deepcopy(prefix)
        if threads > 1:
            self.cache.batch_repeat_interleave(threads)

    def begin(self) -> None:
        grown = self.cache.get_seq_length() - self.length
        if grown > 0:
            self.cache.crop(-grown)

    def step(self, tokens: list[int]) -> Tensor:
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor(tokens)[:, None], past_key_values=self.cache, use_cache=True
            )
        return output.logits[:, -1]


def load_model(name: str) -> PreTrainedModel:
    if name == "smollm2":
        return weights.load()[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


def prefill_stock(model: PreTrainedModel, ids: list[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for i in range(0, len(ids), PREFILL_TOKENS):
            part = torch.tensor([ids[i : i + PREFILL_TOKENS]])
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def prefill_forked(model: PreTrainedModel, cache: fa.ForkedKVCache, ids: list[int]) -> fa.Branch:
    root = cache.new_branch()
    for i in range(0, len(ids), PREFILL_TOKENS):
        hf.forward(model, {root: ids[i : i + PREFILL_TOKENS]})
    return root


def make_ways(name: str, prefix: int, threads: int) -> dict[str, Way]:
    stock = load_model(name)
    model = plain_copy(stock)
    cache = hf.attach(model, num_pages=prefix // 16 + 64 * threads)
    ids = torch.randint(0, 190, (prefix,), generator=torch.Generator().manual_seed(0)).tolist()
    started = time.perf_counter()
    root = prefill_forked(model, cache, ids)
    forked_s = time.perf_counter() - started
    copied = prefill_stock(stock, ids)
    stock_s = time.perf_counter() - started - forked_s
    print(f"prefill: fork_attn {forked_s:.1f} s, stock {stock_s:.1f} s", flush=True)
    return {
        "fork_attn_threads": Forked(model, root, threads),
        "stock_batch": Stock(stock, copied, threads),
        "fork_attn_serial": Forked(model, root, 1),
        "stock_serial": Stock(stock, copied, 1),
    }


def compare_logits(ways: dict[str, Way]) -> dict[str, float]:
    """Largest difference of the first step's logits from the stock serial way's."""
    logits = {}
    for name, way in ways.items():
        way.begin()
        logits[name] = way.step([7] * way.threads)
    exact = logits["stock_serial"]
    differences = {name: float((x - exact).abs().max()) for name, x in logits.items()}
    wrong = {name: d for name, d in differences.items() if not d <= LOGIT_TOLERANCE}
    if wrong:
        raise SystemExit(f"logits differ from stock's: {wrong}; not measured")
    return differences


def run_block(way: Way, steps: int) -> float:
    """Seconds of one greedy step, over a block of them."""
    way.begin()
    tokens = way.step([7] * way.threads).argmax(-1).tolist()
    started = time.perf_counter()
    for _ in range(steps):
        tokens = way.step(tokens).argmax(-1).tolist()
    return (time.perf_counter() - started) / steps


def measure(ways: dict[str, Way], blocks: int, steps: int) -> dict[str, Times]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(blocks + 1):
        for name, way in ways.items():
            seconds = run_block(way, steps)
            if block > 0:
                taken[name].append(seconds)
        shown = ", ".join(f"{k} {v[-1] * 1e3:.1f} ms" for k, v in taken.items() if v)
        print(f"[{block}/{blocks}] {shown or 'warm'}", flush=True)
    return {name: Times.of(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "load_before": load_average()}
    ways = make_ways(args.model, args.prefix, args.threads)
    result["logit_differences"] = compare_logits(ways)
    times = measure(ways, args.blocks, args.steps)
    median = {name: t.median for name, t in times.items()}
    result |= {
        "load_after": load_average(),
        "model": args.model,
        "prefix": args.prefix,
        "threads": args.threads,
        "steps_per_block": args.steps,
        "seconds_per_step": {name: dataclasses.asdict(t) for name, t in times.items()},
        "tokens_per_s": {name: ways[name].threads / m for name, m in median.items()},
        "throughput_over_stock": median["stock_batch"] / median["fork_attn_threads"],
        "serial_time_over_stock": median["fork_attn_serial"] / median["stock_serial"],
    }
    print(
        f"{args.threads} threads: {result['throughput_over_stock']:.2f} x stock's throughput; "
        f"serial: {result['serial_time_over_stock']:.2f} x stock's time"
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
