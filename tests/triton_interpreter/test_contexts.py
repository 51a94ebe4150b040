"""Tree attention on plans of random contexts, against who sees what by brute force."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from plan_cases import NAN, Shape
from test_planner import World, random_case
from triton_cases import TritonCase

import fork_attn as fa
from fork_attn.plan import Plan, build_plan
from fork_attn.plan_format import GATHER, header, sections
from fork_attn.reference import attention

TARGETS = ("sm_80", "sm_90", "sm_100", "cpu")


@dataclass
class ContextCase(TritonCase):
    seen: torch.Tensor | None = None  # (T, slots) bool: the oracle's mask, not the plan's

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.seen is not None
        k, v = (cache.flatten(0, 1).to(dtype) for cache in (self.k, self.v))
        options = {"softmax_scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        return attention(self.q, k, v, self.seen, dtype=dtype, **options)


def context_case(
    rng: random.Random, plan: Plan, seen: torch.Tensor, page_size: int, dtype: torch.dtype
) -> ContextCase:
    """Random K and V for a plan; slots that no row sees hold NaN."""
    heads = rng.choice([1, 2])
    shape = Shape(page_size, plan.group, heads, 16, 8, dtype=dtype)
    seen = seen[:, : plan.page_limit * page_size]
    caches = []
    for dim in (16, 8):
        data = torch.randn(plan.page_limit, heads, page_size, dim).to(dtype).transpose(1, 2)
        data[~seen.any(0).view(-1, page_size)] = NAN
        caches.append(data)
    q = torch.randn(len(seen), heads * plan.group, 16).to(dtype)
    case = ContextCase(shape, plan.buffer, q, *caches, 0.25, seen=seen, programs=rng.choice([1, 4]))
    case.sinks = torch.randn(q.shape[1]) if rng.random() < 0.3 else None
    return case


@pytest.mark.parametrize("seed", range(12))
def test_random_contexts(seed: int) -> None:
    """Forks, joins of joins, crops, excisions, windows, drafts, pages of 1, 3 and 16."""
    rng = random.Random(seed)
    case = random_case(rng)
    while case.plan("cpu", 1).group > 16 or int(case.seen.sum()) > 200_000:
        case = random_case(rng)
    plan = case.plan(rng.choice(TARGETS), rng.choice([2, 8, 40]))
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    context_case(rng, plan, case.seen, case.cache.page_size, dtype).check()


def grow(
    levels: list[tuple[int, int]],
    *,
    window: int | None = None,
    draft: list[int] | None = None,
    page_size: int = 4,
) -> tuple[Plan, torch.Tensor, int]:
    """A tree, `fan` children a node with `length` tokens each a level; the leaves add one token, or
    a draft. Its plan for sm_90, who sees what, and the page size."""
    world = World(random.Random(0))
    world.window = window
    world.cache = fa.ForkedKVCache(
        num_layers=1, num_pages=3000, num_q_heads=4, num_kv_heads=1, head_dim=16, head_dim_v=8,
        page_size=page_size, device="meta",
    )  # fmt: skip
    live = [world.cache.new_branch()]
    for fan, length in levels:
        live = [child for branch in live for child in (branch.fork(fan) if fan > 1 else [branch])]
        world.cache.step(dict.fromkeys(live, length)).commit()
    tokens = dict.fromkeys(live, 1 if draft is None else fa.Draft(draft))
    contexts = {
        b: (world.cache._core.slots(b._handle), world.cache._core.positions(b._handle))
        for b in tokens
    }
    step = world.cache.step(tokens)
    seen, _ = world.brute_force(step, tokens, contexts)
    shape = world.cache._layer(0).plan_shape(torch.bfloat16)
    return build_plan(world.cache._core, window, shape, page_size, "sm_90", 8), seen, page_size


@pytest.mark.parametrize("window", [None, 30])
def test_a_tree_twenty_deep_shares_tiles(window: int | None) -> None:
    """Twenty nodes of five tokens: one gather run in place of twenty tiles."""
    levels = [(2 if depth in (3, 9, 15) else 1, 5) for depth in range(20)]
    plan, seen, page_size = grow(levels, window=window)
    s = sections(plan.buffer)
    assert (s.runs[:, 6] & GATHER != 0).any() and header(plan.buffer).num_runs <= 4
    context_case(random.Random(1), plan, seen, page_size, torch.bfloat16).check()


def test_wide_and_thin() -> None:
    plan, seen, page_size = grow([(1, 130), (40, 3)], page_size=16)
    context_case(random.Random(2), plan, seen, page_size, torch.float16).check()


@pytest.mark.parametrize("nodes", [60, 256])
def test_drafts_beyond_a_block(nodes: int) -> None:
    """Ancestors in other row blocks; a block has 32 tokens here."""
    rng = random.Random(nodes)
    parents = [rng.randint(max(-1, i - 9), i - 1) for i in range(nodes)]
    plan, seen, page_size = grow([(1, 70)], draft=parents, window=50, page_size=16)
    assert plan.counts["num_blocks"] >= nodes // 32
    context_case(rng, plan, seen, page_size, torch.bfloat16).check()
