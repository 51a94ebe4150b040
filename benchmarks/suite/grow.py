"""A forest grown in a ForkedKVCache with its verbs: fork, step, join."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fork_attn as fa
from fork_attn.bench.forest import Forest
from fork_attn.bench.shapes import Heads
from fork_attn.plan import Plan, build_plan

Tokens = dict[fa.Branch, "int | fa.Draft"]


def pages_of(forest: Forest, page_size: int, tail: str = "seal") -> int:
    """Pages that the grown forest and one step over it can take; with tail "copy" a node begins
    with a copy of its parent's last page."""
    nodes = sum(-(-node.tokens // page_size) for node in forest.nodes)
    rows = sum(-(-query.rows // page_size) for query in forest.queries)
    copies = len(forest.nodes) if tail == "copy" else 0
    return nodes + copies + rows + len(forest.queries) + 1


def grow(
    cache: fa.ForkedKVCache, forest: Forest, wrote: Callable[[fa.Step, int], None] | None = None
) -> Tokens:
    """Branches for the forest's queries, in order, and what each adds in the step to come. `wrote`
    is called in the open step of each node with its index, to store its K and V."""
    ends: list[fa.Branch] = []
    for index, node in enumerate(forest.nodes):
        ends.append(_behind(cache, forest, ends, node.parents))
        if node.tokens:
            with cache.step({ends[-1]: node.tokens}) as step:
                if wrote is not None:
                    wrote(step, index)
    branches = [ends[query.node].fork()[0] for query in forest.queries]
    return {
        branch: query.new if query.draft is None else fa.Draft(query.draft)
        for branch, query in zip(branches, forest.queries, strict=True)
    }


def plan_of(
    forest: Forest, heads: Heads, dtype: torch.dtype, page_size: int, target: str, workers: int
) -> Plan:
    """The plan of one step over a forest; no K and V are held."""
    cache = fa.ForkedKVCache(
        num_layers=1,
        num_pages=pages_of(forest, page_size),
        num_q_heads=heads.q,
        num_kv_heads=heads.kv,
        head_dim=heads.dim,
        page_size=page_size,
        dtype=dtype,
        device="meta",
        num_workers=workers,
    )
    with cache.step(grow(cache, forest)):
        shape = cache._layer(0).plan_shape(dtype)
        return build_plan(cache._core, None, shape, page_size, target, workers)


def _behind(
    cache: fa.ForkedKVCache, forest: Forest, ends: list[fa.Branch], parents: tuple[int, ...]
) -> fa.Branch:
    """A branch that sees what all the parents see, and nothing else."""
    if not parents:
        return cache.new_branch()
    if len(parents) == 1:
        return ends[parents[0]].fork()[0]
    paths = forest.paths
    shared = [n for n in paths[parents[0]] if all(n in paths[p] for p in parents)]
    joint = ends[shared[-1]].fork()[0] if shared else cache.new_branch()
    joint.join([ends[p].fork()[0] for p in parents])
    return joint
