"""The planner's cost model: block choice against exhaustive search, break-evens, bytes, balance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

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
        rate = t["flops_per_ns_small"] if rows < 64 else t["flops_per_ns"]
        compute = (rows + t["load_rows"]) * 2 * dims / rate + rows * t["ns_per_exp"]
        return max(compute, dims * self.shape.itemsize / t["bytes_per_ns"])

    def item(self, tokens: int, slots: int, *, partial: bool) -> float:
        row_bytes = (self.shape.head_dim_v + 1) * 4
        merge = 2 * tokens * self.group * row_bytes / self.table["bytes_per_ns"]
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
        yield [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def read_from(above: tuple[Node, ...], kept: set[int]) -> tuple[tuple[Node, ...], bool]:
    """The ancestors below the last kept one, and whether there is one."""
    last = max((i for i, node in enumerate(above) if id(node) in kept), default=-1)
    return above[last + 1 :], last >= 0


def exhaustive(roots: list[Node], costs: Costs) -> float:
    """The least cost over all sets of ancestors read apart and all packs of neighbours."""
    leaves = leaves_of(roots)
    inner = {id(node): (node, above[:i]) for _, above in leaves for i, node in enumerate(above)}
    best = float("inf")
    for chosen in product((False, True), repeat=len(inner)):
        kept = {key for key, keep in zip(inner, chosen, strict=True) if keep}
        cost = sum(kept_cost(*inner[key], leaves, kept, costs) for key in kept)
        if cost < best:
            best = min(best, cost + best_packs(leaves, kept, costs))
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
    leaves: list[tuple[Node, tuple[Node, ...]]], kept: set[int], costs: Costs
) -> float:
    best = [0.0]
    for end in range(1, len(leaves) + 1):
        options = []
        for begin in range(end):
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
    best = exhaustive(roots, costs)
    assert best * (1 - 1e-9) <= plan.cost_ns <= best * 1.03
