"""What thinking in threads costs the host: everything of a step but the model and the sampling.

pytest benchmarks/test_reason.py --benchmark-columns=min,median,max
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import fork_attn as fa
from fork_attn.reason import Limits, Protocol, Script, Thread, together
from fork_attn.reason.engine import Engine
from fork_attn.reason.run import Run
from fork_attn.reason.sampling import Sampler

PREFIX = 4096


class _Forever(Protocol):
    """n threads over one prompt that write without end."""

    def __init__(self, n: int) -> None:
        self.name, self.n = "forever", n

    def run(self, root: Thread) -> Script:
        threads = yield from root.fork(self.n)
        yield from together([thread.write() for thread in threads])


class _Vocabulary:
    pieces = None

    def stops(self, tags: tuple[str, ...]) -> dict[int, str]:
        return {}


class _FirstToken(Sampler):
    """No sampling at all: its cost is the vocabulary's, not coordination."""

    def pick(self, logits: torch.Tensor, threads: Any) -> tuple[list[int], list[float]]:
        return [7] * len(threads), [0.0] * len(threads)


def make_steps(threads: int) -> Iterator[None]:
    """A generation of SmolLM2-135M's shapes without its model, past its first steps."""
    cache = fa.ForkedKVCache(
        num_layers=30, num_pages=40_000, num_q_heads=9, num_kv_heads=3, head_dim=64, device="meta"
    )
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    logits = torch.zeros(threads, 8)
    model = LlamaForCausalLM(config)
    engine = Engine(model, cache, forward=lambda model, tokens, step: logits[: len(tokens)])
    sampler = _FirstToken(GenerationConfig())
    limits = Limits(max_new_tokens=10**9, max_fanout=threads, max_width=threads)
    vocabulary: Any = _Vocabulary()
    engine.add(
        Run(engine, 0, "", [1] * PREFIX, _Forever(threads), vocabulary, sampler, limits, 0,
            frozenset([0]), ())
    )  # fmt: skip
    steps = engine.run()
    for _ in range(20):
        next(steps)
    return steps


@pytest.mark.parametrize("threads", [1, 4, 16, 64])
def test_step(benchmark: Any, threads: int) -> None:
    """One step of all threads: slots, plan, records, stops."""
    steps = make_steps(threads)
    benchmark.pedantic(next, args=(steps,), rounds=500, warmup_rounds=20)
    steps.close()  # type: ignore[attr-defined]
