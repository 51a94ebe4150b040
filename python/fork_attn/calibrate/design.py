"""Plans whose times tell the costs apart, and what the cost model says that each is made of.

A plan is made by the planner itself, for row blocks of one size at a time. Read through page tables
whose pages are all the same page, K and V come from the nearest cache: what is left is arithmetic
and the fixed costs of items, partial rows and the call. The same plans over memory many times any
cache give the bandwidth.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fork_attn import _C, costs
from fork_attn.cache import ForkedKVCache
from fork_attn.plan import Plan, PlanShape, build_plan
from fork_attn.plan_format import sections

HEADS, PAGE = 8, 16
GPU_ROWS, CPU_ROWS = (16, 32, 64, 128), (1, 4, 16, 32, 64, 128)
_ITEM_TILES = 2  # KV tiles of a short item


@dataclass(frozen=True)
class Work:
    """What the busiest worker does, in the units of the cost model; by rows of a block (tokens x
    group, padded), slots."""

    slots: dict[int, int]
    items: int
    partial_rows: int


@dataclass(frozen=True)
class Case:
    """One call to be timed."""

    name: str
    rows: int  # of a row block
    plan: Plan
    work: Work
    streamed: bool  # K and V from memory; else from the nearest cache
    overlaps: bool  # of the target: memory's time passes beside arithmetic's

    @property
    def shape(self) -> PlanShape:
        """Of its layer."""
        return self.plan.shape


@contextmanager
def blocks_of(target: str, rows: int) -> Iterator[None]:
    """Inside, row blocks of a target have at most so many rows; the costs are put back."""
    before = _C.target_costs(target)["max_rows"]
    _C.set_target_costs(target, {"max_rows": rows})
    try:
        yield
    finally:
        _C.set_target_costs(target, {"max_rows": int(before)})


def plan_rows(
    target: str,
    workers: int,
    rows: int,
    roots: int,
    slots: int,
    head_dim: int,
    *,
    pieces: int = 1,
    page_size: int = PAGE,
) -> Plan:
    """Contexts of `slots` slots, each read by one row block of `rows` rows; cut into `pieces` times
    as many spans as the workers want."""
    group = min(rows, 4)
    cache = ForkedKVCache(
        num_layers=1,
        num_pages=roots * (slots // page_size + 2 + rows // group),
        num_q_heads=HEADS * group,
        num_kv_heads=HEADS,
        head_dim=head_dim,
        page_size=page_size,
        device="meta",
    )
    contexts = [cache.new_branch() for _ in range(roots)]
    cache.step(dict.fromkeys(contexts, slots)).commit()
    readers = [child for context in contexts for child in context.fork(rows // group)]
    shape = PlanShape(HEADS * group, HEADS, head_dim, head_dim, 2)
    with blocks_of(target, rows), cache.step(dict.fromkeys(readers, 1)):
        return build_plan(cache._core, None, shape, page_size, target, workers * pieces)


def work_of(plan: Plan, target: str, workers: int) -> Work:
    """What the busiest worker does when free workers take (span, KV head) pairs."""
    quantum = int(_C.target_costs(target)["row_quantum"])
    parts = sections(plan.buffer)
    run_slots = parts.runs[:, 4].tolist()
    spans = parts.spans.tolist()
    done: list[Work] = []
    for begin, end in pairwise(spans):
        slots: dict[int, int] = {}
        partial_rows = 0
        for block, first, last, partial in parts.items[begin:end].tolist():
            rows = int(parts.blocks[block][1]) * plan.group
            padded = -(-rows // quantum) * quantum
            slots[padded] = slots.get(padded, 0) + sum(run_slots[first:last])
            partial_rows += rows if partial >= 0 else 0
        done.append(Work(slots, end - begin, partial_rows))
    loads = [(0.0, worker) for worker in range(workers)]
    taken: list[list[int]] = [[] for _ in range(workers)]
    for index, ns in enumerate(plan.span_ns):
        for _ in range(plan.shape.num_kv_heads):
            load, worker = loads[0]
            heapq.heapreplace(loads, (load + ns, worker))
            taken[worker].append(index)
    busiest = taken[max(loads)[1]]
    total: dict[int, int] = {}
    for index in busiest:
        for rows, count in done[index].slots.items():
            total[rows] = total.get(rows, 0) + count
    return Work(
        total,
        sum(done[i].items for i in busiest),
        sum(done[i].partial_rows for i in busiest),
    )


def _case(target: str, name: str, rows: int, plan: Plan, workers: int, streamed: bool) -> Case:
    overlaps = bool(_C.target_costs(target)["overlaps"])
    return Case(name, rows, plan, work_of(plan, target, workers), streamed, overlaps)


def slots_for(target: str, rows: int, head_dim: int, ns: float) -> int:
    """Slots that take a worker about `ns` by the costs at hand, whole tiles."""
    t = _C.target_costs(target)
    slot = (rows + t["load_rows"]) * 4 * head_dim / t["flops_per_ns_128"] + rows * t["ns_per_exp"]
    return max(4 * 64, int(ns / slot) // 64 * 64)


def resident_cases(target: str, workers: int, ns: float) -> Iterator[Case]:
    """Cases without memory traffic, of about `ns` nanoseconds each.

    For each number of rows: long items of two head dimensions, which part products from
    exponentials; the same slots cut into many items with partial rows; and short items without.
    """

    def case(name: str, rows: int, roots: int, slots: int, dim: int = 128, pieces: int = 1) -> Case:
        plan = plan_rows(target, workers, rows, roots, slots, dim, pieces=pieces)
        return _case(target, name, rows, plan, workers, False)

    yield case("one short item", 16 if target != "cpu" else 1, 1, 1)
    for rows in CPU_ROWS if target == "cpu" else GPU_ROWS:
        roots = max(1, -(-workers // HEADS))
        for dim in (64, 128):
            slots = slots_for(target, rows, dim, ns)
            each = max(256, slots * workers // (roots * HEADS) // 64 * 64)
            yield case(f"long, head_dim {dim}", rows, roots, each, dim)
        for pieces in (4, 16):
            yield case(f"cut into {pieces}", rows, roots, each, pieces=pieces)
        short = _ITEM_TILES * 64
        many = max(4, slots * workers // (short * HEADS) // 2)
        yield case("short", rows, min(many, 512), short)


def streamed_cases(target: str, workers: int, num_bytes: int) -> Iterator[Case]:
    """Contexts of `num_bytes` of K and V, and of half as many, read by the fewest rows."""
    rows = 1 if target == "cpu" else 16
    slot_bytes = HEADS * 2 * 128 * 2
    roots = max(4, -(-workers // HEADS))
    for part in (1, 2):
        slots = num_bytes // part // slot_bytes // roots // 64 * 64
        plan = plan_rows(target, workers, rows, roots, slots, 128)
        yield _case(target, f"from memory, 1/{part}", rows, plan, workers, True)


TREES = (
    ((1, 8), (4096, 64)),
    ((1, 32), (1024, 64)),
    ((1, 64), (2048, 128)),
    ((1, 4, 32), (1024, 256, 64)),
    ((16,), (1024,)),
    ((1,), (16384,)),
)
"""Held against the fitted model: nodes of each level and their tokens."""


class Tensors:
    """Queries, and K and V pages, for any case on a device."""

    def __init__(self, device: torch.device, num_pages: int, page_size: int = PAGE) -> None:
        self._device = device
        shape = (num_pages, HEADS, page_size, 128)
        self._k, self._v = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
        for cache in (self._k, self._v):
            cache.normal_()

    def arguments(self, plan: Plan, streamed: bool) -> tuple[Tensor, Tensor, Tensor, Plan]:
        """What `tree_attention` takes."""
        shape, tokens = plan.shape, plan.counts["num_tokens"]
        size = (tokens, shape.num_q_heads, shape.head_dim)
        q = torch.randn(size, device=self._device).bfloat16()
        pages = []
        for cache in (self._k, self._v):
            cut = cache[..., : shape.head_dim]
            if not streamed:
                cut = cut[:1].expand(plan.page_limit, -1, -1, -1)
            pages.append(cut.transpose(1, 2))
        return q, pages[0], pages[1], plan


def predicted_ns(case: Case, table: dict[str, float]) -> float:
    """The cost model's time of a call (csrc/core/costs.cpp), its memory term left out where nothing
    is streamed."""
    work, shape = case.work, case.shape
    dims = shape.head_dim + shape.head_dim_v
    ns = table["launch_ns"] + work.items * table["item_ns"]
    row_bytes = 2 * (shape.head_dim_v + 1) * 4
    ns += work.partial_rows * row_bytes / table["partial_bytes_per_ns"]
    for rows, slots in work.slots.items():
        compute = (rows + table["load_rows"]) * 2 * dims / table[rate_field(rows)]
        compute += rows * table["ns_per_exp"]
        memory = dims * shape.itemsize / table["bytes_per_ns"] if case.streamed else 0.0
        ns += slots * (max(compute, memory) if case.overlaps else compute + memory)
    return ns


def rate_field(rows: int) -> str:
    """The cost that holds the rate of row blocks of so many padded rows."""
    return next(f"flops_per_ns_{size}" for size in (128, 64, 32, 16) if rows >= size or size == 16)


def tree_cases(target: str, workers: int, capacity: int) -> Iterator[Case]:
    """Trees as they come, planned with the costs at hand; those that fit `capacity` pages."""
    from fork_attn.plan_report import TreeShape, plan_tree

    for nodes, tokens in TREES:
        tree = plan_tree(TreeShape(nodes, tokens), target=target, workers=workers)
        if tree.plan.page_limit > capacity:
            continue
        name = f"[{','.join(map(str, nodes))}]x[{','.join(map(str, tokens))}]"
        rows = int(costs.target_costs(target)["max_rows"])
        yield _case(target, name, rows, tree.plan, workers, True)
