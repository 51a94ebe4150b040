"""Time of building a plan from Python: a 256-branch decode step, and a long prefill."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fork_attn as fa
from fork_attn.plan import build_plan

TREES = {
    "[1,256]x[1000,0]": ([1, 256], [1000, 0]),
    "[1,4,16,256]x[1024,256,128,32]": ([1, 4, 16, 256], [1024, 256, 128, 32]),
    "[1,2,4,...,256]x[16 each]": ([1, 2, 4, 8, 16, 32, 64, 128, 256], [16] * 9),
}


def make_cache() -> fa.ForkedKVCache:
    return fa.ForkedKVCache(
        num_layers=1, num_pages=20_000, num_q_heads=32, num_kv_heads=8, head_dim=128, device="meta"
    )


@pytest.mark.parametrize("target", ["cpu", "sm_90"])
@pytest.mark.parametrize("name", TREES)
def test_decode_step(benchmark: BenchmarkFixture, name: str, target: str) -> None:
    cache = make_cache()
    branches = [cache.new_branch()]
    for count, tokens in zip(*TREES[name], strict=True):
        fan = count // len(branches)
        if fan > 1:
            branches = [child for branch in branches for child in branch.fork(fan)]
        if tokens:
            cache.step(dict.fromkeys(branches, tokens)).commit()
    shape = cache._layer(0).plan_shape(torch.bfloat16)
    with cache.step(dict.fromkeys(branches, 1)):
        benchmark(build_plan, cache._core, None, shape, 16, target, 132)


def test_prefill_of_128k_tokens(benchmark: BenchmarkFixture) -> None:
    cache = make_cache()
    shape = cache._layer(0).plan_shape(torch.bfloat16)
    with cache.step({cache.new_branch(): 131_072}):
        benchmark(build_plan, cache._core, None, shape, 16, "sm_90", 132)
