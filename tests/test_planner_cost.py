"""The planner's cost model: block choice against exhaustive search, break-evens, bytes, balance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fork_attn as fa
from fork_attn import _C
from fork_attn.branch import Branch
from fork_attn.plan import Plan, PlanShape, build_plan

GPU_TARGETS = ("sm_80", "sm_90", "sm_100")
TARGETS = ("cpu", *GPU_TARGETS)
HEADS = ((32, 8), (64, 8), (8, 1), (32, 32))


@dataclass
class Node:
    """Tokens that the whole subtree sees; a leaf is a branch with `new` tokens in the step."""

    slots: int
    new: int = 0
    children: list[Node] = field(default_factory=list)


@dataclass
class Costs:
    """The cost of work for one KV head in ns, from the table of the target: csrc/core/costs.h."""

    target: str
    shape: PlanShape

    def __post_init__(self) -> None:
        self.table = _C.target_costs(self.target)
        self.group = self.shape.num_q_heads // self.shape.num_kv_heads
        self.max_tokens = max(1, min(64, int(self.table["max_rows"]) // self.group))

    def slot(self, tokens: int) -> float:
        t, dims = self.table, self.shape.head_dim + self.shape.head_dim_v
        rows = -(-tokens * self.group // t["row_quantum"]) * t["row_quantum"]
        tile = next(size for size in (128, 64, 32, 16) if rows >= size or size == 16)
        rate = t[f"flops_per_ns_{tile}"]
        compute = (rows + t["load_rows"]) * 2 * dims / rate + rows * t["ns_per_exp"]
        memory = dims * self.shape.itemsize / t["bytes_per_ns"]
        return max(compute, memory) if t["overlaps"] else compute + memory

    def item(self, tokens: int, slots: int, *, partial: bool) -> float:
        row_bytes = (self.shape.head_dim_v + 1) * 4
        merge = 2 * tokens * self.group * row_bytes / self.table["partial_bytes_per_ns"]
        return self.table["item_ns"] + slots * self.slot(tokens) + partial * merge


def random_tree(rng: random.Random, depth: int, most_new: int) -> Node:
    slots = rng.choice([0, 1, 16, 40, 200, 1000, 5000]) if depth < 3 else rng.randint(0, 300)
    if depth == 3 or rng.random() < 0.3:
        return Node(slots, rng.choice([1, 1, 2, most_new]))
    children = [random_tree(rng, depth + 1, most_new) for _ in range(rng.randint(2, 3))]
    return Node(slots, children=children)


def grow(cache: fa.ForkedKVCache, roots: list[Node]) -> dict[Branch, int]:
    """Branches for the leaves, with as many new tokens as these have."""
    tokens: dict[Branch, int] = {}

    def visit(branch: Branch, node: Node) -> None:
        if node.slots:
            cache.step({branch: node.slots}).commit()
        if not node.children:
            tokens[branch] = node.new
        for child in node.children:
            visit(branch.fork(1)[0], child)

    for root in roots:
        visit(cache.new_branch(), root)
    return tokens


def make_cache(heads: tuple[int, int], num_pages: int = 400_000) -> fa.ForkedKVCache:
    return fa.ForkedKVCache(
        num_layers=1,
        num_pages=num_pages,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=128,
        device="meta",
    )


def plan_of(
    cache: fa.ForkedKVCache, tokens: dict[Branch, int], target: str, workers: int = 132
) -> Plan:
    shape = cache._layer(0).plan_shape(torch.bfloat16)
    with cache.step(tokens):
        return build_plan(cache._core, None, shape, cache.page_size, target, workers)


# --- exhaustive search


def leaves_of(roots: list[Node]) -> list[tuple[Node, tuple[Node, ...]]]:
    """Every leaf with its ancestors, oldest first, in order."""
    found = []

    def visit(node: Node, above: tuple[Node, ...]) -> None:
        if not node.children:
            found.append((node, above))
        for child in node.children:
            visit(child, (*above, node))

    for root in roots:
        visit(root, ())
    return found


def cuts(count: int) -> Iterator[list[range]]:
    """All ways to cut 0..count-1 into consecutive ranges."""
    for marks in product((False, True), repeat=count - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(marks) if cut), count]
        yield [range(a, b) for a, b in pairwise(bounds)]


def read_from(above: tuple[Node, ...], kept: set[int]) -> tuple[tuple[Node, ...], bool]:
    """The ancestors below the last kept one, and whether there is one."""
    last = max((i for i, node in enumerate(above) if id(node) in kept), default=-1)
    return above[last + 1 :], last >= 0


def exhaustive(roots: list[Node], costs: Costs, *, mixed: bool) -> float:
    """The least cost over all sets of ancestors read apart and all packs of neighbours.

    With `mixed` also over what the planner does not look at: packs of leaves below different
    ancestors that are read apart, and reading apart at nodes without slots of their own.
    """
    leaves = leaves_of(roots)
    inner = {
        id(node): (node, above[:i])
        for _, above in leaves
        for i, node in enumerate(above)
        if mixed or node.slots
    }
    best = float("inf")
    for chosen in product((False, True), repeat=len(inner)):
        kept = {key for key, keep in zip(inner, chosen, strict=True) if keep}
        cost = sum(kept_cost(*inner[key], leaves, kept, costs) for key in kept)
        if cost < best:
            best = min(best, cost + best_packs(leaves, kept, costs, mixed))
    return best


def kept_cost(
    node: Node,
    above: tuple[Node, ...],
    leaves: list[tuple[Node, tuple[Node, ...]]],
    kept: set[int],
    costs: Costs,
) -> float:
    tokens = sum(leaf.new for leaf, path in leaves if any(a is node for a in path))
    slots = node.slots + sum(a.slots for a in read_from(above, kept)[0])
    blocks = [costs.max_tokens] * (tokens // costs.max_tokens) + [tokens % costs.max_tokens]
    return sum(costs.item(b, slots, partial=True) for b in blocks if b)


def best_packs(
    leaves: list[tuple[Node, tuple[Node, ...]]], kept: set[int], costs: Costs, mixed: bool
) -> float:
    best = [0.0]
    nearest = [next((id(a) for a in reversed(path) if id(a) in kept), None) for _, path in leaves]
    for end in range(1, len(leaves) + 1):
        options = []
        for begin in range(end):
            if not mixed and len(set(nearest[begin:end])) > 1:
                continue
            pack = pack_cost(leaves[begin:end], kept, costs)
            if pack is not None:
                options.append(best[begin] + pack)
        best.append(min(options))
    return best[-1]


def pack_cost(
    pack: list[tuple[Node, tuple[Node, ...]]], kept: set[int], costs: Costs
) -> float | None:
    """None: too many tokens for one block. A single leaf may take several blocks."""
    read: dict[int, int] = {}
    partial = False
    for _, above in pack:
        nodes, below_kept = read_from(above, kept)
        read |= {id(node): node.slots for node in nodes}
        partial |= below_kept
    slots = sum(read.values()) + sum(leaf.slots for leaf, _ in pack)
    tokens = sum(leaf.new for leaf, _ in pack)
    if tokens <= costs.max_tokens:
        return costs.item(tokens, slots + tokens, partial=partial)
    if len(pack) > 1:
        return None
    cost = 0.0
    for begin in range(0, tokens, costs.max_tokens):
        end = min(tokens, begin + costs.max_tokens)
        cost += costs.item(end - begin, slots + end, partial=partial)
    return cost


@settings(max_examples=150, deadline=None)
@given(
    rng=st.randoms(use_true_random=False),
    target=st.sampled_from(TARGETS),
    heads=st.sampled_from((*HEADS, (128, 2), (6, 2))),
)
def test_block_choice_is_within_3_percent_of_the_best(
    rng: random.Random, target: str, heads: tuple[int, int]
) -> None:
    costs = Costs(target, PlanShape(*heads, 128, 128, 2))
    while True:
        roots = [random_tree(rng, 0, costs.max_tokens + 3) for _ in range(rng.randint(1, 2))]
        if len(leaves_of(roots)) <= 9:
            break
    cache = make_cache(heads)
    plan = plan_of(cache, grow(cache, roots), target)
    looked_at = exhaustive(roots, costs, mixed=False)
    assert looked_at * (1 - 1e-9) <= plan.cost_ns <= looked_at * 1.03
    best = exhaustive(roots, costs, mixed=True)
    assert best * (1 - 1e-9) <= plan.cost_ns <= best * 1.10


# --- absorb or keep


def siblings(costs: Costs, above: int, slots: int, families: int) -> list[Node]:
    """Families of 3 leaves too big to share a block, each below an ancestor of `slots` slots."""
    new = costs.max_tokens // 2 + 1
    family = [Node(slots, children=[Node(50_000, new) for _ in range(3)]) for _ in range(families)]
    return family if families == 1 else [Node(above, children=family)]


def break_even(costs: Costs, partials: int) -> float:
    """Slots from which reading a family's ancestor apart pays: 2 blocks instead of 3.

    Every row then writes a partial of its own (`partials` = 2: for the ancestor's block, and for
    the rest, which would have been written directly; 1: the rest is a partial anyway).
    """
    new = costs.max_tokens // 2 + 1
    blocks = (costs.max_tokens, 3 * new - costs.max_tokens)
    row = costs.item(1, 0, partial=True) - costs.item(1, 0, partial=False)
    saved = 3 * costs.slot(new) - sum(costs.slot(tokens) for tokens in blocks)
    return (2 * costs.table["item_ns"] + partials * 3 * new * row) / saved


@pytest.mark.parametrize("families", [1, 4])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (32, 32)])
@pytest.mark.parametrize("target", GPU_TARGETS)
def test_an_ancestor_is_read_apart_where_that_breaks_even(
    target: str, heads: tuple[int, int], families: int
) -> None:
    costs = Costs(target, PlanShape(*heads, 128, 128, 2))
    at = break_even(costs, partials=2 if families == 1 else 1)
    rows_above = 3 * (costs.max_tokens // 2 + 1) * families
    above = 0 if families == 1 else -(-rows_above // costs.max_tokens)
    blocks = {}
    for factor in (0.97, 1.03):
        cache = make_cache(heads)
        roots = siblings(costs, 500_000, round(factor * at), families)
        blocks[factor] = plan_of(cache, grow(cache, roots), target).num_row_blocks
    assert blocks == {0.97: above + 3 * families, 1.03: above + 5 * families}


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_break_even_in_bytes(target: str) -> None:
    """Without the fixed cost of items and where bytes bound: 2 r k / (k - 1) slots of bf16 KV for
    fp32 partials of k children of r rows, and twice that where they would be written directly."""
    costs = Costs(target, PlanShape(32, 8, 128, 128, 2))
    row = costs.item(1, 0, partial=True) - costs.item(1, 0, partial=False)
    k, rows = 3, 16
    tokens = rows // costs.group
    assert k * tokens * row / ((k - 1) * costs.slot(tokens)) == pytest.approx(
        2 * rows * k / (k - 1), rel=0.01
    )


# --- bytes and balance on the suite

SUITE = {
    "[1,10]x[4000,400]": ([1, 10], [4000, 400]),
    "[1,256]x[256,32]": ([1, 256], [256, 32]),
    "[1,1024]x[2048,32]": ([1, 1024], [2048, 32]),
    "[1,256]x[32768,256]": ([1, 256], [32768, 256]),
    "[1,8]x[4000,32]": ([1, 8], [4000, 32]),
    "[1,256]x[2048,32]": ([1, 256], [2048, 32]),
    "[1,16,64]x[1024,256,32]": ([1, 16, 64], [1024, 256, 32]),
    "[1,4,16,64]x[1024,256,128,32]": ([1, 4, 16, 64], [1024, 256, 128, 32]),
    "[1,4,16,512]x[1024,256,128,32]": ([1, 4, 16, 512], [1024, 256, 128, 32]),
    "[1,2,4,...,128]x[16 each]": ([1, 2, 4, 8, 16, 32, 64, 128], [16] * 8),
    "[1,2,4,...,1024]x[16 each]": ([1, 2, 4, 8, 16, 32, 64, 128, 1024], [16] * 9),
    "[8,16,32,256]x[512,512,256,32]": ([8, 16, 32, 256], [512, 512, 256, 32]),
    "[1,8,512]x[32,2048,256]": ([1, 8, 512], [32, 2048, 256]),
    "[256]x[1024]": ([256], [1024]),
    "[1]x[32768]": ([1], [32768]),
}
READ_ONCE = [
    "[1,256]x[2048,32]",
    "[1,4,16,64]x[1024,256,128,32]",
    "[1,2,4,...,128]x[16 each]",
    "[1,8,512]x[32,2048,256]",
]


def suite_plan(name: str, heads: tuple[int, int]) -> Plan:
    nodes, slots = SUITE[name]

    def level(index: int) -> Node:
        if index + 1 == len(nodes):
            return Node(slots[index], 1)
        children = nodes[index + 1] // nodes[index]
        return Node(slots[index], children=[level(index + 1) for _ in range(children)])

    cache = make_cache(heads)
    return plan_of(cache, grow(cache, [level(0) for _ in range(nodes[0])]), "sm_90")


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", READ_ONCE)
def test_bytes_read_are_the_tile_unique_bytes(name: str, heads: tuple[int, int]) -> None:
    plan = suite_plan(name, heads)
    assert plan.read_kv_bytes <= 1.05 * plan.tile_unique_kv_bytes


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", SUITE)
def test_workers_are_evenly_loaded_where_there_is_work_for_all(
    name: str, heads: tuple[int, int]
) -> None:
    """Work for all: each worker's share is at least 4 times the fixed cost of an item, below which
    a cut costs more than it gives."""
    plan = suite_plan(name, heads)
    share = plan.cost_ns * heads[1] / plan.num_workers
    if share < 4 * _C.target_costs("sm_90")["item_ns"]:
        assert plan.work_max_over_mean > 1.0
        pytest.skip(f"{share:.0f} ns of work per worker")
    assert plan.work_max_over_mean <= 1.10
