"""Host verbs from Python: fork, free and the bookkeeping of a step, at short and long prefixes.

pytest benchmarks/test_host_verbs.py --benchmark-columns=min,median,max
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fork_attn as fa

BRANCHES = 256
PREFIXES = pytest.mark.parametrize("prefix", [1_000, 1_000_000], ids=["1k", "1M"])


def make_cache(prefix: int) -> tuple[fa.ForkedKVCache, fa.Branch]:
    """A Llama-3-8B-shaped cache that keeps its books only, and a branch with `prefix` tokens."""
    cache = fa.ForkedKVCache(
        num_layers=32,
        num_pages=80_000,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        device="meta",
    )
    root = cache.new_branch()
    cache.step({root: prefix}).commit()
    return cache, root


def timed(benchmark: Any, verb: Callable[..., Any], setup: Callable[[], Any]) -> None:
    benchmark.pedantic(verb, setup=setup, rounds=1000)


@PREFIXES
@pytest.mark.parametrize("n", [1, BRANCHES])
def test_fork(benchmark: Any, prefix: int, n: int) -> None:
    cache, root = make_cache(prefix)
    before = cache.stats().pages_live
    forks: list[fa.Branch] = []

    def setup() -> None:
        cache.free(forks)
        forks.clear()

    timed(benchmark, lambda: forks.extend(root.fork(n)), setup)
    assert len(forks) == n and cache.stats().pages_live == before


@PREFIXES
def test_free_256(benchmark: Any, prefix: int) -> None:
    cache, root = make_cache(prefix)
    timed(benchmark, cache.free, lambda: ((root.fork(BRANCHES),), {}))
    assert cache.branches == (root,)


@PREFIXES
def test_select_of_256(benchmark: Any, prefix: int) -> None:
    cache, root = make_cache(prefix)
    # Held, since a dropped branch would be freed before the clock starts.
    children: list[fa.Branch] = []

    def setup() -> tuple[tuple[fa.Branch], dict[str, Any]]:
        children[:] = root.fork(BRANCHES)
        return (children[7],), {}

    timed(benchmark, root.select, setup)
    assert cache.branches == (root,)


@PREFIXES
def test_step_of_256(benchmark: Any, prefix: int) -> None:
    """Reserve and commit one token for each of 256 branches, without the plan."""
    cache, root = make_cache(prefix)
    tokens = dict.fromkeys(root.fork(BRANCHES), 1)
    benchmark.pedantic(lambda: cache.step(tokens).commit(), rounds=500, warmup_rounds=5)
    assert cache.stats().branches == BRANCHES + 1


@PREFIXES
def test_plan_of_256(benchmark: Any, prefix: int) -> None:
    """The plan of one layer for 256 branches over one prefix, without bookkeeping."""
    cache, root = make_cache(prefix)
    tokens = dict.fromkeys(root.fork(BRANCHES), 1)
    cache.step(tokens).commit()
    steps: list[fa.Step] = []

    def setup() -> tuple[tuple[fa.Step], dict[str, Any]]:
        while steps:
            steps.pop().rollback()
        steps.append(cache.step(tokens))
        return (steps[0],), {}

    benchmark.pedantic(lambda step: step.plan, setup=setup, rounds=200, warmup_rounds=5)
    assert steps[0].plan.counts["num_tokens"] == BRANCHES
