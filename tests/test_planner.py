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
from fork_attn.reference_cache import DeepCopyCache, Rows, Token

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
    """A cache whose branches fork, join, watch, crop and excise at random; children outlive joins.

    The oracle beside it says who sees which token, and where.
    """

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
        self.oracle = DeepCopyCache()
        self.ids = {self.cache.new_branch(): self.oracle.new_branch()}
        self.tokens = 0

    def rows(self, counts: dict[Branch, int | fa.Draft]) -> dict[int, Rows]:
        rows = {}
        for branch, count in counts.items():
            parents = count.parents if isinstance(count, fa.Draft) else None
            n = count if isinstance(count, int) else len(count.parents)
            new = [Token(self.tokens + i, 0) for i in range(n)]
            self.tokens += n
            rows[self.ids[branch]] = Rows(new, parents)
        return rows

    def act(self) -> None:
        rng = self.rng
        live = list(self.ids)
        branch = rng.choice(live)
        oracle, i = self.oracle, self.ids[branch]
        verb = rng.choice(
            ["grow"] * 4 + ["fork"] * 4 + ["fork_at", "join", "crop", "excise", "at", "watch"]
        )
        if verb == "grow":
            most = min(400, 200 * self.cache.page_size)
            count = rng.choice([1, 2, 17, most])
            self.cache.step({branch: count}).commit()
            oracle.step(self.rows({branch: count}))
        elif verb == "fork" and len(live) < 12:
            n = rng.choice([1, 2, 4])
            self.ids.update(zip(branch.fork(n), oracle.fork(i, n), strict=True))
        elif verb == "fork_at" and len(live) < 12:
            length = rng.randint(0, branch.length)
            self.ids[branch.fork_at(length)] = oracle.fork_at(i, length)
        elif verb == "at":
            branch.position = rng.randint(0, branch.position + 5)
            oracle.set_position(i, branch.position)
        elif verb == "watch":
            other = rng.choice(live)
            if other is not branch and other.id not in self.cache._core.watched(branch._handle):
                options = {"lag": rng.choice([0, 0, 1, 5]), "rebase": rng.random() < 0.7}
                branch.watch(other, **options)
                oracle.watch(i, self.ids[other], **options)
        elif not oracle.is_watched(i):
            self.change(branch, verb)

    def change(self, branch: Branch, verb: str) -> None:
        rng, oracle, i = self.rng, self.oracle, self.ids[branch]
        start = rng.randint(0, branch.length)
        if verb == "join":
            children = [b for b in self.ids if b is not branch and rng.random() < 0.4]
            ids = [self.ids[b] for b in children]
            if children and not oracle.conflict(i, ids):
                position, rebase = rng.choice(["max", "sum"]), rng.random() < 0.5
                branch.join(children, position=position, rebase=rebase)
                oracle.join(i, ids, position, rebase)
                self.ids = {b: k for b, k in self.ids.items() if b.alive}
        elif verb == "crop":
            length = max(start, branch.length // 2)
            branch.crop(length)
            oracle.crop(i, length)
        elif verb == "excise":
            end = rng.randint(start, branch.length)
            rebase = rng.random() < 0.5
            try:
                branch.excise(start, end, rebase=rebase)
            except ValueError:  # to negative positions
                return
            oracle.excise(i, start, end, rebase)

    def open(self) -> Case:
        rng, live = self.rng, list(self.ids)
        chosen = [b for b in live if rng.random() < 0.8] or live[:1]
        watched = {(a, b) for a in chosen for b in chosen if self.watches(a, b)}
        tokens: dict[Branch, int | fa.Draft] = {}
        for branch in chosen:
            count = rng.choice([1, 1, 1, 2, 5, 40, 90])
            draft = fa.Draft([rng.randint(-1, i - 1) for i in range(count)])
            alone = not any(branch in pair for pair in watched)
            tokens[branch] = draft if alone and rng.random() < 0.25 else count
        return self.open_with(tokens)

    def open_with(self, tokens: dict[Branch, int | fa.Draft]) -> Case:
        slots: dict[int, dict[int, int]] = {}  # of each branch's tokens: some may be copies
        for branch in tokens:
            seen, _ = self.oracle.view(self.ids[branch])
            at, _ = self.cache._core.view(branch._handle)
            slots[self.ids[branch]] = dict(zip((t.identity for t in seen), at, strict=True))
        step = self.cache.step(tokens)
        rows = self.rows(tokens)
        identities = [t.identity for r in rows.values() for t in r.tokens]
        new = dict(zip(identities, step.slot_mapping.tolist(), strict=True))
        for of_branch in slots.values():
            of_branch.update(new)
        return Case(self.cache, step, self.window, *self.brute_force(step, rows, slots))

    def watches(self, branch: Branch, other: Branch) -> bool:
        return other.id in self.cache._core.watched(branch._handle)

    def brute_force(
        self, step: fa.Step, rows: dict[int, Rows], slots_of: dict[int, dict[int, int]]
    ) -> tuple[torch.Tensor, Counter[int]]:
        window = self.window or 2**40
        num_slots = self.cache.num_pages * self.cache.page_size
        seen = torch.zeros(step.num_tokens, num_slots, dtype=torch.bool)
        readers: Counter[int] = Counter()
        at = 0
        for i, new in rows.items():
            placed, slot_of = self.oracle.place(i, new), slots_of[i]
            own = [slot_of[t.identity] for t in placed]
            parents = range(-1, len(own) - 1) if new.parents is None else new.parents
            readers.update(dict.fromkeys(own, len(own)))
            past, total = self.oracle.view(i, rows, 0)
            for row, token in enumerate(placed):
                if row and self.oracle.places(i):
                    past, total = self.oracle.view(i, rows, row)
                slots = torch.tensor([slot_of[t.identity] for t in past]).long()
                positions = torch.tensor([t.position for t in past]).long()
                readers.update(slots.tolist())
                seen[at, slots[token.position + total - positions < window]] = True
                line = row
                while line >= 0:
                    if token.position - placed[line].position < window:
                        seen[at, own[line]] = True
                    line = parents[line]
                at += 1
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
            visible = run_visibility(s, run, positions, h.window).int()
            where = (rows[:, None].expand_as(visible), slots.expand_as(visible))
            times.index_put_(where, visible, accumulate=True)  # a row may stand in a block twice
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
        rate = t["flops_per_ns_16"] if rows < 64 else t["flops_per_ns_128"]
        compute = (rows + t["load_rows"]) * 512 / rate + rows * t["ns_per_exp"]
        slots = int(s.runs[run_begin:run_end, 4].sum())
        memory = 512 / t["bytes_per_ns"]
        each = max(compute, memory) if t["overlaps"] else compute + memory
        ns.append(t["item_ns"] + slots * each)
    bounds = s.spans.tolist()
    expected = [sum(ns[a:b]) for a, b in pairwise(bounds)]
    assert plan.span_ns == pytest.approx(expected)


def test_branches_that_share_nothing_share_no_block_on_a_cpu() -> None:
    cache = fa.ForkedKVCache(
        num_layers=1, num_pages=600, num_q_heads=32, num_kv_heads=8, head_dim=128, device="meta"
    )
    branches = [cache.new_branch() for _ in range(8)]
    cache.step(dict.fromkeys(branches, 1024)).commit()
    for itemsize in (1, 2, 4):
        with cache.step(dict.fromkeys(branches, 1)):
            plan = build_plan(cache._core, None, PlanShape(32, 8, 128, 128, itemsize), 16, "cpu", 2)
        assert plan.num_row_blocks == 8 and plan.executed_flops == plan.flops


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


def test_short_runs_share_tiles() -> None:
    """On GPUs, short pieces of an item go to one run at its end."""
    rng = random.Random(0)
    gathered = 0
    for _ in range(30):
        case = random_case(rng)
        for target in ("sm_80", "sm_90"):
            s = sections(case.plan(target, 1).buffer)  # one worker: items are whole
            for begin, end in s.items[:, 1:3].tolist():
                runs = [run_at(s, i) for i in range(begin, end)]
                rests = [r for r in runs if r.kind != GATHER and 0 < r.num_slots % 64 <= 48]
                assert len(rests) <= 1
                gathered += sum(r.kind == GATHER for r in runs)
                assert all(r.kind != GATHER for r in runs[:-1])
        assert not header(case.plan("cpu", 1).buffer).num_gather
    assert gathered > 10


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
