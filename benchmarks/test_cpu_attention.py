"""The planner and CPU attention, a few shapes each.

pytest benchmarks/test_cpu_attention.py --benchmark-columns=min,median,max
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fork_attn as fa

# Levels of a tree of branches: how many, and tokens of each.
TREES = {
    "flat": ((1, 2048), (256, 32)),
    "nested": ((1, 1024), (4, 256), (16, 128), (64, 32), (256, 16)),
    "alone": ((1, 4096),),
}


def tree(levels: tuple[tuple[int, int], ...], **kwargs: Any) -> tuple[fa.ForkedKVCache, list[Any]]:
    """A cache with a tree of branches, and its leaves."""
    tokens = sum(count * (length + 16) for count, length in levels)
    cache = fa.ForkedKVCache(num_layers=1, num_pages=tokens // 16 + 512, **kwargs)
    leaves = [cache.new_branch()]
    for count, length in levels:
        leaves = [child for leaf in leaves for child in leaf.fork(count // len(leaves))]
        with cache.step(dict.fromkeys(leaves, length)) as step:
            if cache.device.type == "cpu":
                k, v = (torch.randn(step.num_tokens, *cache.layer(0)[0].shape[2:]) for _ in "kv")
                kv = (k.to(cache.dtype), v.to(cache.dtype))
                torch.ops.fork_attn.store_kv(*kv, *cache.layer(0), step.slot_mapping)
    return cache, leaves


@pytest.mark.parametrize("name", TREES)
def test_plan(benchmark: Any, name: str) -> None:
    """One decode step's plan for 32 query and 8 KV heads of 128."""
    heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    cache, leaves = tree(TREES[name], device="meta", **heads)
    tokens = dict.fromkeys(leaves, 1)
    steps: list[fa.Step] = []

    def setup() -> tuple[tuple[fa.Step], dict[str, Any]]:
        while steps:
            steps.pop().rollback()
        steps.append(cache.step(tokens))
        return (steps[0],), {}

    benchmark.pedantic(lambda step: step.plan, setup=setup, rounds=200, warmup_rounds=5)
    assert steps[0].plan.counts["num_tokens"] == len(leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("prefix", "branches"), [(1024, 1), (4096, 8), (4096, 32)], ids=["1kx1", "4kx8", "4kx32"]
)
def test_attention(benchmark: Any, prefix: int, branches: int, dtype: torch.dtype) -> None:
    """One decode step's attention for 9 query and 3 KV heads of 64, plan ready."""
    heads = {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64}
    cache, leaves = tree(((1, prefix), (branches, 63)), dtype=dtype, **heads)
    step = cache.step(dict.fromkeys(leaves, 1))
    q, k, v = (torch.randn(branches, n, 64, dtype=dtype) for n in (9, 3, 3))
    cache.attend(0, q, k, v, step)
    plan = step.plan
    step.rollback()
    out, _ = benchmark(fa.tree_attention, q, *cache.layer(0), plan)
    assert out.isfinite().all()
