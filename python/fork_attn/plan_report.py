"""The plan of one decode step over a tree of contexts: built without KV, reported in figures."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch

from fork_attn.cache import ForkedKVCache
from fork_attn.costs import describe, target_costs
from fork_attn.plan import Plan, build_plan
from fork_attn.plan_format import PlanSections, header, run_at, run_slots, sections

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
MAX_BRANCHES = 2**16


@dataclass(frozen=True)
class TreeShape:
    """`nodes[i]` contexts on level i, each adding `tokens[i]` tokens to its parent's.

    Every branch of the last level adds one new token in the step.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class TreePlan:
    """A plan, and where the slots that it names stand in the tree."""

    shape: TreeShape
    plan: Plan
    target: str
    level: torch.Tensor  # (slots of the pool,) int64: level of the slot's node
    node: torch.Tensor  # (slots,) int64: its index on that level
    rank: torch.Tensor  # (slots,) int64: the slot's place, depth first; -1: of no context


def parse_shape(text: str) -> TreeShape:
    """Reads `[1,256]x[2048,32]`: nodes per level, then tokens per node of each level.

    Raises:
        ValueError: not of that form, or a level does not divide among its parents.
    """
    match = re.fullmatch(r"\s*\[([\d,\s]+)\]\s*[x×*]\s*\[([\d,\s]+)\]\s*", text)
    if match is None:
        raise ValueError(f"shape: expected like [1,256]x[2048,32], got {text!r}")
    try:
        nodes, tokens = (tuple(int(n) for n in part.split(",")) for part in match.groups())
    except ValueError:
        raise ValueError(f"shape: expected numbers between commas, got {text!r}") from None
    if len(nodes) != len(tokens):
        raise ValueError(
            f"shape: expected as many levels in both lists, got {len(nodes)} and {len(tokens)}"
        )
    for above, below in zip((1, *nodes), nodes, strict=False):
        if below < 1 or below % above:
            raise ValueError(f"shape: expected a multiple of {above} nodes, got {below} in {text}")
    if nodes[-1] > MAX_BRANCHES:
        raise ValueError(f"shape: expected at most {MAX_BRANCHES} branches, got {nodes[-1]}")
    return TreeShape(nodes, tokens)


def parse_heads(text: str) -> tuple[int, int]:
    """Reads `32/8`: query heads and KV heads.

    Raises:
        ValueError: not of that form, or no multiple.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    heads = (int(match[1]), int(match[2])) if match else (0, 0)
    if heads[1] < 1 or heads[0] < 1 or heads[0] % heads[1]:
        raise ValueError(
            f"heads: expected query heads/KV heads, a multiple like 32/8, got {text!r}"
        )
    return heads


def default_workers(target: str) -> int:
    """The workers of the target's machine; a CPU's are the cores that this process may use.

    Raises:
        ValueError: unknown target.
    """
    return int(target_costs(target)["workers"]) or len(os.sched_getaffinity(0))


def plan_tree(
    shape: TreeShape,
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    target: str = "sm_90",
    workers: int | None = None,
    window: int | None = None,
) -> TreePlan:
    """Plans one decode step over a tree, every branch of its last level adding one token.

    Args:
        shape: of the tree.
        heads: query heads and KV heads.
        head_dim: of Q, K and V.
        dtype: of K and V.
        page_size: slots in a page.
        target: "cpu", "sm_80", "sm_90" or "sm_100".
        workers: workers to balance for; None means the target's.
        window: sliding window in positions; None means all.

    Raises:
        ValueError, TypeError: an argument is off, or the tree has 2**31 slots or more.
    """
    workers = default_workers(target) if workers is None else workers
    levels = zip(shape.nodes, shape.tokens, strict=True)
    pages = sum(nodes * (tokens // page_size + 2) for nodes, tokens in levels) if page_size else 1
    cache = ForkedKVCache(
        num_layers=1,
        num_pages=pages + shape.nodes[-1],
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        sliding_window=window,
        page_size=page_size,
        dtype=dtype,
        device="meta",
        num_workers=workers,
    )
    slots = cache.num_pages * page_size
    level, node, rank = (torch.full((slots,), -1) for _ in range(3))
    branches = [cache.new_branch() for _ in range(shape.nodes[0])]
    starts = torch.arange(shape.nodes[0]) * _subtree(shape, 0)
    for depth, (count, tokens) in enumerate(zip(shape.nodes, shape.tokens, strict=True)):
        if depth:
            fan = count // len(branches)
            branches = [child for branch in branches for child in branch.fork(fan)]
            starts = starts.repeat_interleave(fan) + shape.tokens[depth - 1]
            starts += torch.arange(count) % fan * _subtree(shape, depth)
        if tokens:
            with cache.step(dict.fromkeys(branches, tokens)) as step:
                at = step.slot_mapping
            level[at], node[at] = depth, torch.arange(count).repeat_interleave(tokens)
            rank[at] = (starts[:, None] + torch.arange(tokens)).flatten()
    with cache.step(dict.fromkeys(branches, 1)) as step:
        at = step.slot_mapping
        level[at], node[at] = len(shape.nodes) - 1, torch.arange(len(branches))
        rank[at] = starts + shape.tokens[-1]
        layer = cache._layer(0).plan_shape(dtype)
        plan = build_plan(cache._core, window, layer, page_size, target, workers)
    return TreePlan(shape, plan, target, level, node, rank)


def _subtree(shape: TreeShape, depth: int) -> int:
    """Slots of a node of that level and all below it, the new tokens included."""
    size = shape.tokens[-1] + 1
    for level in range(len(shape.nodes) - 2, depth - 1, -1):
        size = shape.tokens[level] + shape.nodes[level + 1] // shape.nodes[level] * size
    return size


def item_slots(plan: Plan, parts: PlanSections, item: int) -> torch.Tensor:
    """The slots of the pool that an item reads, run after run: (n,) int64."""
    _, run_begin, run_end, _ = parts.items[item].tolist()
    slots = []
    for index in range(run_begin, run_end):
        run = run_at(parts, index)
        slots.append(run_slots(parts, run, plan.page_size))
    return torch.cat(slots)


def report(tree: TreePlan) -> dict[str, Any]:
    """The plan in figures, as plain JSON values; times in microseconds, sizes in bytes.

    Floors are the unique K and V bytes over the target's memory bandwidth, and the useful FLOPs
    over its dense rate.
    """
    plan = tree.plan
    costs = target_costs(tree.target)
    bandwidth = costs["bytes_per_ns"] * plan.num_workers * 1000
    rate = costs["flops_per_ns_128"] * plan.num_workers * 1000
    return {
        "nodes": list(tree.shape.nodes),
        "tokens": list(tree.shape.tokens),
        "heads": [plan.shape.num_q_heads, plan.shape.num_kv_heads],
        "head_dim": plan.shape.head_dim,
        "page_size": plan.page_size,
        "window": header(plan.buffer).window or None,
        "target": tree.target,
        "workers": plan.num_workers,
        "unique_kv_bytes": plan.unique_kv_bytes,
        "tile_unique_kv_bytes": plan.tile_unique_kv_bytes,
        "read_kv_bytes": plan.read_kv_bytes,
        "partial_bytes": plan.partial_bytes,
        "partial_rows": plan.counts["num_partial_rows"],
        "flops": plan.flops,
        "executed_flops": plan.executed_flops,
        "row_blocks": plan.num_row_blocks,
        "items": plan.num_items,
        "spans": len(plan.span_ns),
        "plan_bytes": plan.buffer.nbytes,
        "costs": describe(tree.target),
        "predicted_us": plan.work[0] + costs["launch_ns"] / 1000,
        "mean_worker_us": sum(plan.work) / plan.num_workers,
        "work_max_over_mean": plan.work_max_over_mean,
        "memory_floor_us": plan.unique_kv_bytes / bandwidth,
        "compute_floor_us": plan.flops / rate,
        "blocks": _blocks(tree),
    }


def _blocks(tree: TreePlan) -> list[dict[str, Any]]:
    """What each row block reads: slots and nodes of each level."""
    parts = sections(tree.plan.buffer)
    slots: list[list[torch.Tensor]] = [[] for _ in range(len(parts.blocks))]
    for item, block in enumerate(parts.items[:, 0].tolist()):
        slots[block].append(item_slots(tree.plan, parts, item))
    found = []
    for (begin, count), pieces in zip(parts.blocks.tolist(), slots, strict=True):
        rows = parts.tokens[begin : begin + count]
        at = torch.cat(pieces)
        reads = []
        for level in range(len(tree.shape.nodes)):
            nodes = tree.node[at[tree.level[at] == level]]
            if len(nodes):
                reads.append({"level": level, "nodes": len(nodes.unique()), "slots": len(nodes)})
        entry = {"queries": count, "first": int(rows.min()), "last": int(rows.max())}
        found.append({**entry, "items": len(pieces), "reads": reads})
    return found
