"""Thinking in threads with a model: what coordination costs, and how fast threads decode beside
stock `generate`.

    python benchmarks/reasoning.py --model tiny --quick
    python benchmarks/reasoning.py --json benchmarks/results/reasoning_cpu.json

After a small generation by each, all ways run in turn, round after round, each round beginning with
another one.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from e2e_ways import Stock, StockBatch
from reason_scripts import PROMPT, TAGGED, Fan, Script, load, run_told, tagged_script
from test_reason import make_steps
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from fork_attn import hf
from fork_attn.bench import results
from fork_attn.bench.machine import clocks, load_average, machine
from fork_attn.bench.timing import Times, count
from fork_attn.demo.baseline import plain_copy
from fork_attn.reason import Limits, Trace, generate

SCHEMA = 1
FIRST_TOKEN = 30
NO_TOKEN = 2**31 - 1
"""As the end token: nobody stops early, and no token is forbidden."""
# Prompt tokens, threads, tokens that each writes.
FANS = {"full": ((4096, 8, 8), (1024, 1, 24)), "quick": ((64, 3, 4), (48, 1, 4))}
# Threads, tokens of each, forks.
COORDINATION = {"full": (16, 16, 1), "quick": (3, 4, 1)}
JOINS = {"full": (4, 12, 1), "quick": (2, 4, 1)}

# Seconds; tokens of each thread; bytes of K and V at most.
Run = Callable[[], tuple[float, list[list[int]], int]]


class Measurement:
    """A model in both forms: attached, and stock over the same weights.

    Args:
        name: "smollm2" or "tiny".
        rounds: of all ways.
        quick: tiny sizes.
    """

    def __init__(self, name: str, rounds: int, quick: bool) -> None:
        self.rounds, self.size = rounds, "quick" if quick else "full"
        self.model, self.tokenizer = load(name)
        self.stock = plain_copy(self.model)
        longest = max(fan[0] for fan in FANS[self.size])
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, 60, (longest,), generator=generator).tolist()
        self.cache = hf.attach(self.model, num_pages=longest // 16 + 512)
        for protocol in TAGGED:
            self.told(protocol, tagged_script(self.tokenizer, protocol, 2, 2, 1))

    def told(self, protocol: str, script: Script) -> Trace:
        return run_told(self.model, self.tokenizer, protocol, script)

    def page_bytes(self) -> int:
        return sum(
            x[0].numel() * x.element_size()
            for layer in range(self.cache.num_layers)
            for x in self.cache.layer(layer)
        )

    def in_turn(self, runs: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
        """What each returned, round by round."""
        found: dict[str, list[Any]] = {name: [] for name in runs}
        names = list(runs)
        for turn in range(self.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(runs[name]())
        return found

    # --- beside stock generate

    def fan(self, length: int, threads: int, tokens: int) -> dict[str, Any]:
        """Decoding of threads, the prompt's reading left out: `generate` here, stock `generate`
        thread by thread, and in one batch over copies of the prompt's cache."""
        prompt = self.prompt[:length]
        firsts = [FIRST_TOKEN + i for i in range(threads)]
        read = Stock.read(self.stock, prompt)
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0
        )
        way = StockBatch(self.stock, read)

        def stock(groups: list[list[int]]) -> tuple[float, list[list[int]], int]:
            seconds, written, held = 0.0, [], 0
            for group in groups:
                way.begin(len(group))
                began = time.perf_counter()
                written += stock_generate(self.stock, prompt, group, way.caches[0], config)
                seconds += time.perf_counter() - began
                held = max(held, way.kv_bytes())
                way.end()
            return seconds, written, held

        def own() -> tuple[float, list[list[int]], int]:
            protocol = Fan(prompt, firsts, tokens)
            limits = Limits(max_fanout=max(threads, 2), max_width=max(threads, 2))
            began = time.perf_counter()
            trace = generate(
                self.model,
                self.tokenizer,
                PROMPT,
                protocol=protocol,
                limits=limits,
                sampling=config,
            )
            seconds = time.perf_counter() - began - trace.steps[0].seconds
            return seconds, protocol.written(trace), self.peak_bytes(trace)

        runs: dict[str, Run] = {"fork_attn": own, "stock_generate": lambda: stock([firsts])}
        if threads > 1:
            runs = {
                "fork_attn": own,
                "stock_one_by_one": lambda: stock([[first] for first in firsts]),
                "stock_batch": lambda: stock([firsts]),
            }
        found = self.in_turn(runs)
        written = {name: rounds[-1][1] for name, rounds in found.items()}
        return {
            "prefix": length,
            "threads": threads,
            "tokens": tokens,
            "same_tokens": all(w == written["fork_attn"] for w in written.values()),
            "ways": {
                name: {
                    "seconds": asdict(Times.of([r[0] for r in rounds])),
                    "tokens_per_s": threads * tokens / Times.of([r[0] for r in rounds]).median,
                    "kv_bytes": rounds[-1][2],
                }
                for name, rounds in found.items()
            },
        }

    def peak_bytes(self, trace: Trace) -> int:
        return max(step.pages_live for step in trace.steps) * self.page_bytes()

    # --- coordination

    def coordination(self) -> dict[str, Any]:
        """The share of a whole generation that forks, joins, plans and protocols take; and a step's
        without any model."""
        threads, tokens, forks = COORDINATION[self.size]
        script = tagged_script(self.tokenizer, "multiverse", threads, tokens, forks)
        traces = [self.told("multiverse", script) for _ in range(self.rounds)]
        wide = [s for t in traces for s in t.steps if s.width == threads]
        return {
            "protocol": "multiverse",
            "threads": threads,
            "forks": forks,
            "tokens": traces[0].total_tokens,
            "steps": len(traces[0].steps),
            "seconds": asdict(Times.of([t.seconds for t in traces])),
            "share": asdict(Times.of([t.coordination_share for t in traces])),
            "step": asdict(Times.of([s.coordination_seconds for s in wide])),
            "step_without_model": asdict(self.host_step(threads)),
        }

    def host_step(self, threads: int) -> Times:
        """Of SmolLM2's shapes over 4,096 tokens, in a loop of its own."""
        steps = make_steps(threads)
        taken = []
        for _ in itertools.islice(steps, 40 if self.size == "quick" else 1000):
            taken.append(time.perf_counter())
        return Times.of([b - a for a, b in itertools.pairwise(taken)])

    # --- joins

    def joins(self) -> dict[str, Any]:
        """ThreadWeaver's join, which reads all threads but the first again, and the one that moves
        their K and V instead: the same tokens."""
        threads, tokens, forks = JOINS[self.size]
        script = tagged_script(self.tokenizer, "threadweaver", threads, tokens, forks)
        names = ("threadweaver", "threadweaver_rebase")
        found: dict[str, list[Trace]] = self.in_turn(
            {name: partial(self.told, name, script) for name in names}
        )
        return {
            "threads": threads,
            "forks": forks,
            "tokens": found[names[0]][0].total_tokens,
            "ways": {name: self.join_facts(traces) for name, traces in found.items()},
        }

    def join_facts(self, traces: list[Trace]) -> dict[str, Any]:
        """Seconds of all and of the step behind a join; tokens read again; K and V at most and
        after the last join."""
        after = [t.steps[e.step] for t in traces for e in t.events_of("join")]
        copies = [i for r in traces[0].threads for i in r.injections if i.kind == "copy"]
        return {
            "seconds": asdict(Times.of([t.seconds for t in traces])),
            "after_join": asdict(Times.of([step.seconds for step in after])),
            "prefilled_tokens": sum(i.end - i.start for i in copies),
            "peak_kv_bytes": self.peak_bytes(traces[0]),
            "joined_kv_bytes": after[-1].pages_live * self.page_bytes(),
        }


def stock_generate(
    model: PreTrainedModel,
    prompt: list[int],
    firsts: list[int],
    cache: DynamicCache,
    config: GenerationConfig,
) -> list[list[int]]:
    """Stock `generate` over a cache that holds the prompt for each row."""
    ids = torch.tensor([[*prompt, first] for first in firsts])
    out: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, generation_config=config
    )
    return [row[len(prompt) + 1 :] for row in out.tolist()]


def measure(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures everything, saving after each part."""
    device = torch.device("cpu")
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine(device),
        "device": device.type,
        "load_before": load_average(),
        "clocks_before": clocks(),
        "model": args.model,
    }
    begun = time.monotonic()
    own = Measurement(args.model, args.rounds, args.quick)
    result |= {"dtype": str(own.model.dtype).removeprefix("torch."), "fans": []}

    def done(text: str) -> None:
        print(f"[{time.monotonic() - begun:4.0f} s] {text}", flush=True)
        result.update(load_after=load_average(), clocks_after=clocks())
        save(result)

    for length, threads, tokens in FANS[own.size]:
        fan = own.fan(length, threads, tokens)
        result["fans"].append(fan)
        rates = ", ".join(f"{k} {w['tokens_per_s']:.1f}" for k, w in fan["ways"].items())
        same = "the same tokens" if fan["same_tokens"] else "NOT the same tokens"
        done(f"{threads} threads over {length} tokens: {rates} tokens/s, {same}")
    result["coordination"] = found = own.coordination()
    done(
        f"coordination at {found['threads']} threads: {found['share']['median']:.2%} of the time, "
        f"{found['step']['median'] * 1e6:.0f} us a step, without a model "
        f"{found['step_without_model']['median'] * 1e6:.0f} us"
    )
    result["joins"] = found = own.joins()
    ways = found["ways"].items()
    done(
        "joins: "
        + ", ".join(
            f"{name} {way['seconds']['median']:.2f} s, {way['prefilled_tokens']} tokens read again"
            for name, way in ways
        )
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try this program")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()

    measure(args, partial(results.write, args.json))


if __name__ == "__main__":
    main()
