"""PlanBuffers: a call that is fixed once serves steps of any topology, one upload each."""

from __future__ import annotations

import random

import pytest
import torch
from cache_pair import CachePair
from captured_pair import Captured
from kv_table import KVTable, Model

import fork_attn as fa
from fork_attn import Branch, Draft, OutOfPages, PlanCapacityExceeded, StalePlan, Unsupported
from fork_attn.plan_buffers import PlanBuffers

MODEL = Model()
TABLE = KVTable(MODEL)
# Layers of one window with and without RoPE share a plan.
SHIFTED = Model(windows=(None, 5, None))
SHIFTED_TABLE = KVTable(SHIFTED)


def make(num_pages: int = 60, tail: str = "seal", page_size: int = 3) -> CachePair:
    return CachePair(MODEL, num_pages=num_pages, page_size=page_size, tail=tail, table=TABLE)


def test_one_call_serves_growth_forks_joins_and_frees() -> None:
    pair = make()
    captured = Captured(pair)
    root = pair.new_branch()
    captured.step({root: 10})
    kids = pair.fork(root, 5)
    captured.step(dict.fromkeys(kids, 2))
    captured.step({kids[0]: 1})  # narrower: rows of the step before must not linger
    captured.step({kids[1]: Draft([-1, 0, 0]), kids[2]: 1}, {kids[1]: [0, 2]})
    pair.join(kids[0], kids[1:3])
    captured.step({kids[0]: 3, kids[3]: 1})
    pair.free(kids[3])
    captured.step({kids[4]: 7, root: 1})
    pair.crop(root, 5)
    captured.step({root: 9, kids[4]: 1})


@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_random_steps_and_verbs(tail: str) -> None:
    seed = int(torch.randint(2**31, ()))
    rng = random.Random(seed)
    pair = make(50, tail)
    captured = Captured(pair)
    pair.new_branch()
    for _ in range(150):
        live = list(pair.ids)
        some = rng.sample(live, rng.randint(1, min(4, len(live))))
        verb = rng.choice(["step", "step", "step", "fork", "join", "crop", "free", "eager", "drop"])
        try:
            if verb == "step":
                captured.step({b: rng.randint(1, 4) for b in some})
            elif verb == "eager":
                pair.step({b: rng.randint(1, 5) for b in some}, attend=True)
            elif verb == "drop":  # planned, sent and rolled back
                step = pair.open(dict.fromkeys(some, 4))
                if rng.random() < 0.5:
                    captured.buffers.update(step)
                step.rollback()
            elif verb == "fork" and len(live) < 8:
                pair.fork(some[0], rng.randint(1, 3))
            elif verb == "join" and len(some) > 1:
                pair.join(some[0], some[1:])
            elif verb == "crop":
                pair.crop(some[0], rng.randint(0, some[0].length))
            elif verb == "free" and len(live) > len(some):
                pair.free(*some)
        except OutOfPages:
            pair.free(*live[1::2])
            pair.crop(live[0], live[0].length // 2)
    assert captured.buffers.uploads > 20, f"seed {seed}"


def make_shifted(num_pages: int = 60, tail: str = "seal") -> CachePair:
    options = {"page_size": 3, "tail": tail, "table": SHIFTED_TABLE}
    return CachePair(SHIFTED, num_pages=num_pages, **options)


@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_one_call_serves_contexts_that_were_joined_end_to_end(tail: str) -> None:
    pair = make_shifted(tail=tail)
    captured = Captured(pair)
    root = pair.new_branch()
    captured.step({root: 7})
    kids = pair.fork(root, 4)
    captured.step({kid: 2 + i for i, kid in enumerate(kids)})
    assert not captured.buffers.shifted
    pair.join(root, kids[:3], rebase=True)
    captured.step({root: 3, kids[3]: 1})
    assert captured.buffers.shifted
    more = pair.fork(root, 4)
    captured.step(dict.fromkeys(more, 5))  # many rotated rows
    captured.step({more[0]: 1})  # few: none of the step before may linger
    captured.step({kids[3]: 2})
    assert not captured.buffers.shifted
    pair.join(more[0], more[1:3], rebase=True)
    captured.step({more[3]: Draft([-1, 0, 0]), more[0]: 1}, {more[3]: [0, 2]})


@pytest.mark.parametrize("lag", [0, 1])
def test_one_call_serves_branches_that_watch_each_other(lag: int) -> None:
    pair = make_shifted(90)
    captured = Captured(pair)
    root = pair.new_branch()
    captured.step({root: 7})
    workers = pair.fork(root, 3)
    for worker in workers:
        for other in workers:
            if other is not worker:
                pair.watch(worker, other, lag=lag)
    places = None
    for i in range(8):  # all shifts grow with each step
        captured.step({worker: 1 + (i + j) % 2 for j, worker in enumerate(workers)})
        assert captured.buffers.shifted
        here = {key: [t.data_ptr() for t in tables] for key, tables in captured.tables().items()}
        places = places or here
        assert here == places
    captured.step({workers[1]: 2})
    pair.free(workers[2])
    captured.step(dict.fromkeys(workers[:2], 1))


@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_random_steps_and_shifts(tail: str) -> None:
    seed = int(torch.randint(2**31, ()))
    rng = random.Random(seed)
    pair = make_shifted(60, tail)
    captured = Captured(pair)
    pair.new_branch()
    shifted = 0
    for _ in range(100):
        live = list(pair.ids)
        some = rng.sample(live, rng.randint(1, min(4, len(live))))
        verb = rng.choice(["step", "step", "step", "fork", "join", "watch", "free"])
        try:
            if verb == "step":
                captured.step({b: rng.randint(1, 3) for b in some})
                shifted += captured.buffers.shifted
            elif verb == "fork" and len(live) < 6:
                pair.fork(some[0], rng.randint(1, 3))
            elif verb == "join" and len(some) > 1 and not watched(pair, some):
                join_end_to_end(pair, some[0], some[1:])
            elif verb == "watch" and len(some) > 1 and not pair.watches(some[0], some[1]):
                pair.watch(some[0], some[1], rng.randint(0, 1))
            elif verb == "free" and len(live) > len(some):
                pair.free(*some)
        except OutOfPages:
            pair.free(*live[1:])
    assert shifted > 5, f"seed {seed}"


def join_end_to_end(pair: CachePair, parent: Branch, children: list[Branch]) -> None:
    """Joins, or is refused as children are that hold one token at two positions."""
    before = pair.digest()
    try:
        pair.join(parent, children, rebase=True)
    except ValueError as error:
        assert "stands at two different positions" in str(error) and pair.digest() == before


def watched(pair: CachePair, branches: list[Branch]) -> bool:
    """Whether some branch watches one of these, or one of these watches at all."""
    return any(
        pair.watches(a, b) or pair.watches(b, a) for a in pair.ids for b in branches if a is not b
    )


def test_more_rotated_rows_than_there_is_room_for_are_refused() -> None:
    pair = make_shifted()
    root = pair.new_branch()
    pair.step({root: 4}, attend=True)
    kids = pair.fork(root, 3)
    pair.step(dict.fromkeys(kids, 2), attend=True)
    pair.join(root, kids, rebase=True)
    captured = Captured(pair)
    captured.step({root: 1})
    before = captured.buffers._block.clone()
    small = PlanBuffers(pair.cache, max_tokens=4, max_rotations=1)
    want = "rotated query rows of a plan: expected at most 1, got 2"
    with pair.unchanged(), pair.open({root: 1}) as step:
        with pytest.raises(PlanCapacityExceeded, match=want):
            small.update(step)
        assert torch.equal(captured.buffers._block, before) and not small._block[:32].any()
        step.rollback()
    captured.step({root: 2})
    with pytest.raises(ValueError, match="max_rotations: expected 0"):
        PlanBuffers(pair.cache, max_tokens=4, max_rotations=-1)


def nested_tree(page_size: int, own: int, levels: tuple[int, ...]) -> tuple[fa.ForkedKVCache, list]:
    """256 leaves below nested prefixes, each with `own` tokens; books only matter here."""
    cache = fa.ForkedKVCache(
        num_layers=1,
        num_pages=256 * (own // page_size + 8) + 1000,
        num_q_heads=4,
        num_kv_heads=1,
        head_dim=2,
        page_size=page_size,
        dtype=torch.float32,
        num_workers=132,
    )
    cache._target = "sm_90"
    branches = [cache.new_branch()]
    for fan in levels:
        cache.step(dict.fromkeys(branches, 112)).commit()  # whole pages
        branches = [child for branch in branches for child in branch.fork(fan)]
    for begin in range(0, own, 4096):
        cache.step(dict.fromkeys(branches, min(4096, own - begin))).commit()
    return cache, branches


@pytest.mark.parametrize("own", [2040, 8184, 20])
def test_one_small_upload_a_step_of_256_branches(own: int) -> None:
    cache, branches = nested_tree(16, own, (4, 4, 16))
    assert len(branches) == 256
    buffers = PlanBuffers(cache, max_tokens=256, max_partial_rows=20_000)
    sizes = []
    crossed = set()
    for _ in range(40):  # across page ends and the doubling of places
        live = cache.stats().pages_live
        with cache.step(dict.fromkeys(branches, 1)) as step:
            before = buffers.num_bytes, buffers.uploads
            buffers.update(step, range(256))
            sizes.append(buffers.num_bytes - before[0])
            assert buffers.uploads == before[1] + 1
        crossed.add(cache.stats().pages_live - live)
    assert crossed == {0, 256}  # all branches cross in the same step
    assert max(sizes[1:]) <= 64 * 1024, f"{max(sizes[1:])} bytes"  # the first brings all lists
    assert sizes[0] <= 64 * 1024  # apart from those


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    pair = make()
    captured = Captured(pair, width=4)
    root = pair.new_branch()
    captured.step({root: 4})
    buffers = captured.buffers
    small = PlanBuffers(pair.cache, max_tokens=4, max_plan_bytes=208)
    few = PlanBuffers(pair.cache, max_tokens=4, max_partial_rows=1)
    with pair.open({root: 5}) as step, pytest.raises(PlanCapacityExceeded, match="rows: expected"):
        buffers.update(step)
    pair.crop(root, 4)
    before = buffers._block.clone()
    with pair.unchanged(), pair.open({root: 3}) as step:
        with pytest.raises(PlanCapacityExceeded, match="bytes of a plan: expected at most 208"):
            small.update(step)
        few._plan = lambda key: (_ for _ in ()).throw(PlanCapacityExceeded("partial"))  # type: ignore
        with pytest.raises(PlanCapacityExceeded):
            few.update(step)
        assert torch.equal(buffers._block, before)
        step.rollback()
    with pytest.raises(StalePlan):
        buffers.update(step)
    captured.step({root: 3})


def test_bad_input() -> None:
    pair = make()
    buffers = PlanBuffers(pair.cache, max_tokens=4)
    root = pair.new_branch()
    with pytest.raises(ValueError, match="max_tokens: expected 1"):
        PlanBuffers(pair.cache, max_tokens=0)
    with pair.open({root: 2}) as step:
        with pytest.raises(ValueError, match="input_ids: expected 2, got 1"):
            buffers.update(step, [1])
        buffers.update(step, [7, 8])
        assert buffers.input_ids.tolist() == [7, 8, 0, 0]
        assert buffers.slot_mapping.tolist() == [*step.slot_mapping.tolist(), -1, -1]
        q, k, v = (torch.zeros(1, h, d) for h, d in ((4, 8), (2, 8), (2, 8)))
        with pytest.raises(ValueError, match="q: expected 2 to 4 rows, got 1"):
            buffers.attend(0, q, k, v)
        step.rollback()
    meta = fa.ForkedKVCache(
        num_layers=1, num_pages=4, num_q_heads=1, num_kv_heads=1, head_dim=8, device="meta"
    )
    with pytest.raises(Unsupported, match="PlanBuffers: backends cpu and triton"):
        PlanBuffers(meta, max_tokens=4)
