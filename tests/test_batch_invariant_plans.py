"""Batch-invariant plans: tiles, chunks and merge order are those of each row's own context."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import check_structure, expand

import fork_attn as fa
from fork_attn import _C
from fork_attn.branch import Branch
from fork_attn.plan import Plan, build_plan
from fork_attn.plan_format import header, run_at, run_slots, run_visibility, sections

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

    contexts: list[list[int]]  # per row: slots in the order of its context, window or not

    def plan(self, target: str, workers: int, batch_invariant: bool = False) -> Plan:
        shape = self.cache._layer(0).plan_shape(self.cache.dtype)
        size = self.cache.page_size
        core = self.cache._core
        return build_plan(core, self.window, shape, size, target, workers, batch_invariant)


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
    ) -> tuple[torch.Tensor, Counter[int], list[list[int]]]:
        window = self.window or 2**40
        num_slots = self.cache.num_pages * self.cache.page_size
        seen = torch.zeros(step.num_tokens, num_slots, dtype=torch.bool)
        readers: Counter[int] = Counter()
        ordered = []
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
                path = []
                while token >= 0:
                    path.append(new_slots[begin + token])
                    if at - new_positions[begin + token] < window:
                        seen[row, new_slots[begin + token]] = True
                    token = parents[token]
                ordered.append(old_slots + path[::-1])
            begin = end
        return seen, readers, ordered


def random_case(rng: random.Random) -> Case:
    world = World(rng)
    for _ in range(rng.randint(0, 25)):
        world.act()
    return world.open()


def check_tiles(case: Case, plan: Plan, target: str) -> None:
    """Tiles, chunks and their order are those of each row's own context."""
    h, s = header(plan.buffer), sections(plan.buffer)
    costs = _C.target_costs(target)
    tile, chunk_tiles = costs["tile_slots"], costs["chunk_slots"] // costs["tile_slots"]
    assert h.tile_slots == tile
    found: list[list[tuple[int, list[int], list[bool]]]] = [[] for _ in range(h.num_tokens)]
    chunks: list[list[list[int]]] = [[] for _ in range(h.num_tokens)]  # per row: of each item
    for block, run_begin, run_end, _ in s.items.tolist():
        begin, count = s.blocks[block].tolist()
        rows = s.tokens[begin : begin + count].tolist()
        in_item: list[list[int]] = [[] for _ in rows]
        for index in range(run_begin, run_end):
            run = run_at(s, index)
            slots = run_slots(s, run, h.page_size).tolist()
            seen = run_visibility(s, run, s.positions[begin : begin + count], h.window)
            for at in range(0, run.num_slots, tile):
                for t, row in enumerate(rows):
                    lanes = seen[t, at : at + tile].tolist()
                    if any(lanes):
                        found[row].append((run.chunk, slots[at : at + tile], lanes))
                        in_item[t].append(run.chunk)
        for t, row in enumerate(rows):
            if in_item[t]:
                chunks[row].append(in_item[t])
    for row, context in enumerate(case.contexts):
        visible = set(case.seen[row].nonzero().flatten().tolist())
        expected = []
        for at in range(0, len(context), tile):
            slots = context[at : at + tile]
            lanes = [slot in visible for slot in slots]
            if any(lanes):
                expected.append((at // tile // chunk_tiles, slots, lanes))
        assert len(found[row]) == len(expected)
        for (chunk, slots, lanes), (at, own_slots, own_lanes) in zip(
            found[row], expected, strict=True
        ):
            assert chunk == at
            hidden = lanes[len(own_lanes) :]  # lanes behind the row's end: others' or none
            assert lanes[: len(own_lanes)] == own_lanes and not any(hidden)
            assert all(
                x == y for x, y, see in zip(slots, own_slots, own_lanes, strict=False) if see
            )
        for at, item in enumerate(chunks[row]):  # several only from the context's beginning on
            assert at == 0 or len(set(item)) == 1
        wholes = [sorted(set(item)) for item in chunks[row]]
        order = [chunk for item in wholes for chunk in item]
        assert order == sorted(set(order)), "a chunk is cut, or out of order"


@settings(max_examples=80, deadline=None)
@given(
    rng=st.randoms(use_true_random=False),
    target=st.sampled_from(TARGETS),
    workers=st.sampled_from([1, 2, 16, 132]),
)
def test_random_plans(rng: random.Random, target: str, workers: int) -> None:
    case = random_case(rng)
    plan = case.plan(target, workers, batch_invariant=True)
    assert torch.equal(expand(plan, case.seen.shape[1]), case.seen.int())
    check_structure(plan)
    check_tiles(case, plan, target)
    again = case.plan(target, workers, batch_invariant=True)
    assert torch.equal(plan.buffer, again.buffer)
    case.step.rollback()
    case.cache.check()


@pytest.mark.parametrize("workers", [1, 300])
def test_batch_invariant_parts_read_apart_are_whole_chunks(workers: int) -> None:
    world = World(random.Random(5))
    world.window = None
    world.cache = fa.ForkedKVCache(
        num_layers=1, num_pages=700, num_q_heads=8, num_kv_heads=2, head_dim=128, device="meta"
    )
    root = world.cache.new_branch()
    world.cache.step({root: 1700}).commit()
    leaves = root.fork(6)
    world.cache.step(dict.fromkeys(leaves, 900)).commit()
    core = world.cache._core
    contexts = {b: (core.slots(b._handle), core.positions(b._handle)) for b in leaves}
    tokens: dict[Branch, int | fa.Draft] = dict.fromkeys(leaves, 1)
    with world.cache.step(tokens) as step:
        case = Case(world.cache, step, None, *world.brute_force(step, tokens, contexts))
        plan = case.plan("cpu", workers, batch_invariant=True)
    assert max(len(set(blocks)) for blocks in blocks_of_rows(plan)) > 1, "expected a part apart"
    assert torch.equal(expand(plan, case.seen.shape[1]), case.seen.int())
    check_structure(plan)
    check_tiles(case, plan, "cpu")


def blocks_of_rows(plan: Plan) -> list[list[int]]:
    s = sections(plan.buffer)
    blocks: list[list[int]] = [[] for _ in range(plan.counts["num_tokens"])]
    for block in s.items[:, 0].tolist():
        begin, count = s.blocks[block].tolist()
        for row in s.tokens[begin : begin + count].tolist():
            blocks[row].append(block)
    return blocks
