"""Plans of random contexts against brute force: who sees what, the accounting, the structure."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fork_attn as fa
from fork_attn import _C
from fork_attn.branch import Branch
from fork_attn.plan import Plan, PlanShape, build_plan
from fork_attn.plan_format import (
    GATHER,
    PlanHeader,
    PlanSections,
    header,
    run_at,
    run_slots,
    run_visibility,
    sections,
)

TARGETS = ("cpu", "sm_80", "sm_90", "sm_100")
WINDOWS = (None, None, 1, 7, 300)


@dataclass
class Case:
    """An open step of random branches, and what its rows see by brute force."""

    cache: fa.ForkedKVCache
    step: fa.Step
    window: int | None
    seen: torch.Tensor  # (T, slots of the pool) bool
    readers: Counter[int]  # per slot: new tokens of the branches whose context holds it

    def plan(self, target: str, workers: int) -> Plan:
        shape = self.cache._layer(0).plan_shape(self.cache.dtype)
        size = self.cache.page_size
        return build_plan(self.cache._core, self.window, shape, size, target, workers)


class World:
    """A cache whose branches fork, join, crop and excise at random; children outlive joins."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        kv_heads = rng.choice([1, 2])
        self.window = rng.choice(WINDOWS)
        self.cache = fa.ForkedKVCache(
            num_layers=1,
            num_pages=3000,
            num_q_heads=kv_heads * rng.choice([1, 3, 4, 8, 40]),
            num_kv_heads=kv_heads,
            head_dim=rng.choice([16, 128]),
            head_dim_v=rng.choice([8, 128]),
            page_size=rng.choice([1, 3, 16]),
            tail=rng.choice(["seal", "copy"]),
            device="meta",
        )
        self.live = [self.cache.new_branch()]

    def act(self) -> None:
        rng, branch = self.rng, self.rng.choice(self.live)
        verb = rng.choice(["grow"] * 4 + ["fork"] * 4 + ["fork_at", "join", "crop", "excise", "at"])
        if verb == "grow":
            most = min(400, 200 * self.cache.page_size)
            self.cache.step({branch: rng.choice([1, 2, 17, most])}).commit()
        elif verb == "fork" and len(self.live) < 12:
            self.live += branch.fork(rng.choice([1, 2, 4]))
        elif verb == "fork_at" and len(self.live) < 12:
            self.live.append(branch.fork_at(rng.randint(0, branch.length)))
        elif verb == "join":
            children = [b for b in self.live if b is not branch and rng.random() < 0.4]
            if children:
                branch.join(children, position=rng.choice(["max", "sum"]))
                self.live = [b for b in self.live if b.alive]
        elif verb == "crop":
            branch.crop(rng.randint(branch.length // 2, branch.length))
        elif verb == "excise":
            start = rng.randint(0, branch.length)
            branch.excise(start, rng.randint(start, branch.length))
        elif verb == "at":
            branch.position = rng.randint(0, branch.position + 5)

    def open(self) -> Case:
        rng = self.rng
        chosen = [b for b in self.live if rng.random() < 0.8] or self.live[:1]
        tokens: dict[Branch, int | fa.Draft] = {}
        for branch in chosen:
            count = rng.choice([1, 1, 1, 2, 5, 40, 90])
            draft = fa.Draft([rng.randint(-1, i - 1) for i in range(count)])
            tokens[branch] = draft if rng.random() < 0.25 else count
        contexts = {
            b: (self.cache._core.slots(b._handle), self.cache._core.positions(b._handle))
            for b in tokens
        }
        step = self.cache.step(tokens)
        case = Case(self.cache, step, self.window, *self.brute_force(step, tokens, contexts))
        return case

    def brute_force(
        self,
        step: fa.Step,
        tokens: dict[Branch, int | fa.Draft],
        contexts: dict[Branch, tuple[list[int], list[int]]],
    ) -> tuple[torch.Tensor, Counter[int]]:
        window = self.window or 2**40
        num_slots = self.cache.num_pages * self.cache.page_size
        seen = torch.zeros(step.num_tokens, num_slots, dtype=torch.bool)
        readers: Counter[int] = Counter()
        new_slots, new_positions = step.slot_mapping.tolist(), step.position_ids.tolist()
        begin = 0
        for branch, entry in tokens.items():
            parents = entry.parents if isinstance(entry, fa.Draft) else range(-1, entry - 1)
            old_slots, old_positions = contexts[branch]
            end = begin + len(parents)
            readers.update(dict.fromkeys([*old_slots, *new_slots[begin:end]], len(parents)))
            old, old_at = torch.tensor(old_slots).long(), torch.tensor(old_positions).long()
            for row in range(begin, end):
                at = new_positions[row]
                seen[row, old[at - old_at < window]] = True
                token = row - begin
                while token >= 0:
                    if at - new_positions[begin + token] < window:
                        seen[row, new_slots[begin + token]] = True
                    token = parents[token]
            begin = end
        return seen, readers


def random_case(rng: random.Random) -> Case:
    world = World(rng)
    for _ in range(rng.randint(0, 25)):
        world.act()
    return world.open()


def expand(plan: Plan, num_slots: int) -> torch.Tensor:
    """How many times each row is shown each slot: (T, slots) int."""
    h, s = header(plan.buffer), sections(plan.buffer)
    times = torch.zeros(h.num_tokens, num_slots, dtype=torch.int32)
    for block, run_begin, run_end, _ in s.items.tolist():
        begin, count = s.blocks[block].tolist()
        rows = s.tokens[begin : begin + count].long()
        for index in range(run_begin, run_end):
            run = run_at(s, index)
            slots = run_slots(s, run, h.page_size)
            positions = s.positions[begin : begin + count]
            times[rows[:, None], slots] += run_visibility(s, run, positions, h.window).int()
    return times


def check_counts(case: Case, plan: Plan) -> None:
    s = sections(plan.buffer)
    block_tokens = plan.counts["max_block_tokens"]
    slots = case.seen.any(0).nonzero().flatten().tolist()
    item_tokens = [int(s.blocks[block, 1]) for block in s.items[:, 0].tolist()]
    item_slots = [int(s.runs[a:b, 4].sum()) for a, b in s.items[:, 1:3].tolist()]
    shape = plan.shape
    slot_bytes = shape.num_kv_heads * (shape.head_dim + shape.head_dim_v) * shape.itemsize
    pair_flops = 2 * shape.num_q_heads * (shape.head_dim + shape.head_dim_v)
    tile_unique = sum(-(-case.readers[slot] // block_tokens) for slot in slots)
    pairs = sum(t * n for t, n in zip(item_tokens, item_slots, strict=True))
    partial_rows = sum(
        t for t, begin in zip(item_tokens, s.items[:, 3].tolist(), strict=True) if begin >= 0
    )
    assert plan.unique_kv_bytes == len(slots) * slot_bytes
    assert plan.tile_unique_kv_bytes == tile_unique * slot_bytes
    assert plan.read_kv_bytes == sum(item_slots) * slot_bytes
    assert plan.flops == int(case.seen.sum()) * pair_flops
    assert plan.executed_flops == pairs * pair_flops
    assert plan.partial_bytes == 2 * partial_rows * shape.num_q_heads * (shape.head_dim_v + 1) * 4
    assert (plan.num_items, plan.num_row_blocks) == (len(s.items), len(s.blocks))


def check_structure(plan: Plan) -> None:
    h, s = header(plan.buffer), sections(plan.buffer)
    block_tokens = plan.counts["max_block_tokens"]
    assert h.page_limit <= plan.page_limit
    assert h.max_block_tokens == int(s.blocks[:, 1].max()) <= block_tokens
    assert s.items[:, 1].tolist() == [0, *s.items[:-1, 2].tolist()]
    assert int(s.items[-1, 2]) == h.num_runs
    for block, run_begin, run_end, _ in s.items.tolist():
        assert run_begin < run_end
        for index in range(run_begin, run_end):
            run = run_at(s, index)
            assert run.mask and run.mask >> int(s.blocks[block, 1]) == 0
            assert run.num_slots >= 1 and 0 <= run.first_slot < h.page_size
            if run.kind & GATHER:
                assert (run.kind, run.first_slot) == (GATHER, 0)
                assert 0 <= run.page_begin <= h.num_gather - run.num_slots
                assert 0 <= run.words_begin <= h.num_words - run.num_slots
                continue
            last = run.page_begin + (run.first_slot + run.num_slots - 1) // h.page_size
            assert 0 <= run.page_begin <= last < h.num_pages
            assert int(s.pages[run.page_begin : last + 1].min()) >= 0
    check_merges(h, s)
    check_spans(plan, s)


def check_merges(h: PlanHeader, s: PlanSections) -> None:
    """A row of one item is its item's output, or all of the item's rows are partials."""
    rows: list[list[tuple[int, int]]] = [[] for _ in range(h.num_tokens)]
    for block, _, _, partial in s.items.tolist():
        begin, count = s.blocks[block].tolist()
        for t, row in enumerate(s.tokens[begin : begin + count].tolist()):
            rows[row].append((partial, t))
    used: list[int] = []
    for row, entries in enumerate(rows):
        merged = s.merge_rows[int(s.merge_indptr[row]) : int(s.merge_indptr[row + 1])].tolist()
        partials = [begin + t for begin, t in entries if begin >= 0]
        assert merged == partials
        assert len(entries) == 1 or len(partials) == len(entries) > 1
        used += partials
    assert sorted(used) == list(range(h.num_partial_rows))


def check_spans(plan: Plan, s: PlanSections) -> None:
    spans = s.spans.tolist()
    assert spans == sorted(set(spans))
    assert (spans[0], spans[-1]) == (0, plan.num_items)
    assert len(plan.span_ns) == len(spans) - 1
    assert len(plan.work) == plan.num_workers
    heads = plan.shape.num_kv_heads
    assert sum(plan.work) == pytest.approx(sum(plan.span_ns) * heads / 1000)
    assert plan.work_max_over_mean >= 1 - 1e-9


@settings(max_examples=120, deadline=None)
@given(
    rng=st.randoms(use_true_random=False),
    target=st.sampled_from(TARGETS),
    workers=st.sampled_from([1, 2, 16, 132]),
)
def test_random_plans(rng: random.Random, target: str, workers: int) -> None:
    case = random_case(rng)
    plan = case.plan(target, workers)
    assert torch.equal(expand(plan, case.seen.shape[1]), case.seen.int())
    check_structure(plan)
    check_counts(case, plan)
    again = case.plan(target, workers)
    assert torch.equal(plan.buffer, again.buffer)
    assert (plan.counts, plan.span_ns) == (again.counts, again.span_ns)
    case.step.rollback()
    case.cache.check()


@pytest.mark.parametrize("target", TARGETS)
def test_spans_cost_what_the_table_says(target: str) -> None:
    cache = fa.ForkedKVCache(
        num_layers=1, num_pages=9000, num_q_heads=8, num_kv_heads=2, head_dim=128, device="meta"
    )
    root = cache.new_branch()
    cache.step({root: 100_000}).commit()
    t = _C.target_costs(target)
    with cache.step(dict.fromkeys(root.fork(70), 1)):
        plan = build_plan(cache._core, None, PlanShape(8, 2, 128, 128, 2), 16, target, 7)
    s = sections(plan.buffer)
    ns = []
    for block, run_begin, run_end, _ in s.items.tolist():
        rows = -(-int(s.blocks[block, 1]) * 4 // t["row_quantum"]) * t["row_quantum"]
        rate = t["flops_per_ns_small"] if rows < 64 else t["flops_per_ns"]
        compute = (rows + t["load_rows"]) * 512 / rate + rows * t["ns_per_exp"]
        slots = int(s.runs[run_begin:run_end, 4].sum())
        ns.append(t["item_ns"] + slots * max(compute, 512 / t["bytes_per_ns"]))
    bounds = s.spans.tolist()
    expected = [sum(ns[a:b]) for a, b in pairwise(bounds)]
    assert plan.span_ns == pytest.approx(expected)


def test_only_the_pages_of_a_window_are_named() -> None:
    cache = fa.ForkedKVCache(
        num_layers=2,
        num_pages=70_000,
        num_q_heads=4,
        num_kv_heads=1,
        head_dim=128,
        sliding_window=[None, 100],
        device="meta",
    )
    root = cache.new_branch()
    cache.step({root: 1_000_000}).commit()
    with cache.step({root: 1}) as step:
        full, window = step.plan_for(0), step.plan_for(1)
    assert header(full.buffer).num_pages == 62_501
    assert header(window.buffer).num_pages <= 8


def test_the_plan_of_a_long_prefill_is_small() -> None:
    cache = fa.ForkedKVCache(
        num_layers=1, num_pages=9000, num_q_heads=32, num_kv_heads=8, head_dim=128, device="meta"
    )
    shape = cache._layer(0).plan_shape(torch.bfloat16)
    with cache.step({cache.new_branch(): 131_072}):
        for target in TARGETS:
            plan = build_plan(cache._core, None, shape, 16, target, 132)
            assert plan.buffer.nbytes < 2 * 10**6, target


class TestBadInput:
    SHAPE = PlanShape(4, 2, 16, 16, 2)

    @pytest.fixture
    def cache(self) -> fa.ForkedKVCache:
        return self.make()

    @staticmethod
    def make(**options: object) -> fa.ForkedKVCache:
        sizes = {"num_layers": 1, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
        options = {"num_pages": 8, "device": "meta", **sizes, **options}
        return fa.ForkedKVCache(**options)  # type: ignore[arg-type]

    def test_workers(self, cache: fa.ForkedKVCache) -> None:
        with pytest.raises(ValueError, match=r"num_workers: expected 1 to .*, got 0"):
            self.make(num_workers=0)
        with (
            cache.step({cache.new_branch(): 1}),
            pytest.raises(ValueError, match="workers: expected at least 1, got 0"),
        ):
            build_plan(cache._core, None, self.SHAPE, 16, "cpu", 0)

    def test_target(self, cache: fa.ForkedKVCache) -> None:
        message = "target: expected cpu, sm_80, sm_90 or sm_100, got 'sm_91'"
        with (
            cache.step({cache.new_branch(): 1}),
            pytest.raises(ValueError, match=message),
        ):
            build_plan(cache._core, None, self.SHAPE, 16, "sm_91", 1)
        with pytest.raises(ValueError, match=message):
            _C.target_costs("sm_91")

    @pytest.mark.parametrize("window", [0, -1])
    def test_window(self, cache: fa.ForkedKVCache, window: int) -> None:
        with pytest.raises(ValueError, match=f"sliding_window: expected 1 to .*, got {window}"):
            self.make(sliding_window=window)
        with (
            cache.step({cache.new_branch(): 1}),
            pytest.raises(ValueError, match=f"window: expected None or at least 1, got {window}"),
        ):
            build_plan(cache._core, window, self.SHAPE, 16, "cpu", 1)

    def test_contexts_beyond_2_31_slots(self, cache: fa.ForkedKVCache) -> None:
        with pytest.raises(ValueError, match=r"num_pages: expected fewer than 2\*\*31 slots"):
            self.make(num_pages=2**27)
        branch = cache.new_branch()
        digest = cache._core.digest()
        with pytest.raises(ValueError, match=r"tokens: expected 1 to 2\*\*31 - 1"):
            cache.step({branch: 2**31})
        branch.position = 2**31 - 2
        with pytest.raises(ValueError, match=r"must stay below 2\*\*31"):
            cache.step({branch: 2})
        branch.position = 0
        assert cache._core.digest() == digest

    def test_no_open_step(self, cache: fa.ForkedKVCache) -> None:
        step = cache.step({cache.new_branch(): 1})
        step.rollback()
        with pytest.raises(fa.StalePlan, match="expected an open step"):
            build_plan(cache._core, None, self.SHAPE, 16, "cpu", 1)
