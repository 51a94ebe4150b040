"""Between forks and joins plans keep what was chosen for them, as long as contexts hardly grow."""

from __future__ import annotations

import random

import pytest

import fork_attn as fa
from fork_attn.plan import Plan, PlanShape, build_plan
from fork_attn.plan_format import expand_plan

SHAPE = PlanShape(32, 8, 128, 128, 2)


def forked(prefix: int, branches: int, own: list[int]) -> tuple[fa.ForkedKVCache, list[fa.Branch]]:
    """A prefix and branches of `own` tokens over it."""
    cache = fa.ForkedKVCache(
        num_layers=1, num_pages=3000, num_q_heads=32, num_kv_heads=8, head_dim=128, device="meta"
    )
    root = cache.new_branch()
    with cache.step({root: prefix}):
        pass
    kids = root.fork(branches)
    root.free()
    grow(cache, dict(zip(kids, own, strict=True)))
    return cache, kids


def grow(cache: fa.ForkedKVCache, tokens: dict[fa.Branch, int]) -> None:
    tokens = {branch: n for branch, n in tokens.items() if n > 0}
    if tokens:
        with cache.step(tokens):
            pass


def decode(cache: fa.ForkedKVCache, kids: list[fa.Branch], target: str) -> Plan:
    with cache.step(dict.fromkeys(kids, 1)):
        return build_plan(cache._core, None, SHAPE, 16, target, 8)


@pytest.mark.parametrize("target", ["cpu", "sm_90"])
def test_growing_contexts_keep_good_plans(target: str) -> None:
    prefix, branches = 300, 24
    cache, kids = forked(prefix, branches, [0] * branches)
    blocks = set()
    for length in range(1, 401):
        plan = decode(cache, kids, target)
        blocks.add(plan.num_row_blocks)
        if length not in (1, 30, 77, 160, 400):
            continue
        fresh, others = forked(prefix, branches, [length - 1] * branches)
        wanted = decode(fresh, others, target)
        assert plan.unique_kv_bytes == wanted.unique_kv_bytes
        assert sum(plan.work) <= 1.03 * sum(wanted.work)
    if target == "cpu":  # whose products of hidden pairs cost: growth calls for other choices
        assert len(blocks) > 1


def check_rows(cache: fa.ForkedKVCache, branches: list[fa.Branch]) -> None:
    with cache.step(dict.fromkeys(branches, 1)) as step:
        seen = expand_plan(build_plan(cache._core, None, SHAPE, 16, "cpu", 3).buffer)
        for row, branch in enumerate(branches):
            slots = [*cache._core.slots(branch._handle), int(step.slot_mapping[row])]
            assert seen[row].nonzero()[:, 0].tolist() == sorted(slots)


def test_other_rows_over_the_same_groups() -> None:
    """What was chosen names places in an order of rows, and rows may change places."""
    rng = random.Random(0)
    cache, kids = forked(50, 6, [3] * 6)
    for _ in range(30):
        rng.shuffle(kids)
        check_rows(cache, kids[: rng.randint(1, 6)])


def test_groups_of_the_same_sizes_with_other_readers() -> None:
    cache, (middle, d, e) = forked(2000, 3, [2000, 0, 0])
    a, b, c = middle.fork(3)
    middle.free()
    grow(cache, dict.fromkeys((a, b, c, d, e), 300))
    for _ in range(2):
        check_rows(cache, [a, b, d, e])
        check_rows(cache, [a, b, c, d])
