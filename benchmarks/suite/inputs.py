"""Tensors for one forest: queries, K and V of every token once, and the exact result."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fork_attn.bench.forest import Forest
from fork_attn.bench.shapes import Heads

EXACT_PAIRS = 100_000
"""Pairs of a row and a token that the exact result is computed for; beyond, queries are drawn."""
# Of the largest value of the exact result: products rounded to 24, 8 or 11 bits of mantissa.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Setting:
    """What a shape is measured with; `dtype` is that of K and V."""

    heads: Heads
    dtype: torch.dtype
    page_size: int
    device: torch.device

    @property
    def row_dtype(self) -> torch.dtype:
        """Of queries, new K and V, and outputs."""
        return torch.bfloat16 if self.dtype == torch.float8_e4m3fn else self.dtype


class Inputs:
    """Random tensors for a forest.

    Attributes:
        q: (T, q heads, dim).
        k, v: (N, KV heads, dim) in the queries' dtype, every token once: the nodes' in order, then
            the new ones' by row. With e4m3 K and V they have values that e4m3 has (scale 1).
        node_begin: first slot of each node; the first new token's slot last.
        shared: layouts that several ways read.
    """

    def __init__(self, forest: Forest, setting: Setting, seed: int = 0) -> None:
        self.forest, self.setting = forest, setting
        self.shared: dict[str, Any] = {}
        heads, device = setting.heads, setting.device
        begins = [0]
        for node in forest.nodes:
            begins.append(begins[-1] + node.tokens)
        self.node_begin = begins
        slots = begins[-1] + forest.num_rows
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

        self.q = normal(forest.num_rows, heads.q, heads.dim).to(setting.row_dtype)
        self.k, self.v = (
            normal(slots, heads.kv, heads.dim).to(setting.dtype).to(setting.row_dtype) for _ in "kv"
        )

    @property
    def device(self) -> torch.device:
        return self.setting.device

    @property
    def slot_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        heads = self.setting.heads
        return 2 * heads.kv * heads.dim * self.setting.dtype.itemsize

    @property
    def unique_bytes(self) -> int:
        """K and V of every visible token once, one layer."""
        return self.forest.unique_slots * self.slot_bytes

    @property
    def moved_bytes(self) -> int:
        """What any implementation must move: unique K and V, queries and outputs."""
        return self.unique_bytes + 2 * self.q.numel() * self.q.element_size()

    @property
    def flops(self) -> int:
        """Of the two products."""
        heads = self.setting.heads
        return 4 * self.forest.visible_pairs * heads.q * heads.dim

    def node_slots(self, node: int) -> Tensor:
        """(tokens,) int64."""
        begin, end = self.node_begin[node], self.node_begin[node + 1]
        return torch.arange(begin, end, device=self.device)

    def piece_slots(self, piece: int) -> Tensor:
        """(tokens,) int64, slots of a piece's nodes."""
        return torch.cat([self.node_slots(n) for n in self.forest.pieces[piece].nodes])

    def rows(self, query: int) -> slice:
        """The query's rows of q."""
        begins = self.forest.row_begin
        return slice(begins[query], begins[query + 1])

    def own_slots(self, query: int) -> Tensor:
        """(rows,) int64, slots of its new tokens."""
        rows, base = self.rows(query), self.node_begin[-1]
        return torch.arange(base + rows.start, base + rows.stop, device=self.device)

    def context_slots(self, query: int) -> Tensor:
        """(context,) int64, slots that the query sees before its own."""
        path = self.forest.paths[self.forest.queries[query].node]
        return torch.cat([self.node_slots(n) for n in path])

    def own_mask(self, query: int) -> Tensor:
        """(rows, rows) bool: which of the new tokens each row sees."""
        one = self.forest.queries[query]
        mask = torch.zeros(one.rows, one.rows, dtype=torch.bool)
        for row, seen in enumerate(one.sees):
            mask[row, list(seen)] = True
        return mask.to(self.device)

    @cached_property
    def checked_queries(self) -> list[int]:
        """Queries whose rows are compared: all, or the first, the last and some drawn by seed."""
        forest = self.forest
        count = len(forest.queries)
        if forest.visible_pairs <= EXACT_PAIRS:
            return list(range(count))
        chosen = dict.fromkeys([0, count - 1])
        order = list(range(count))
        random.Random(0).shuffle(order)
        pairs = 0
        for query in order:
            pairs += forest.queries[query].rows * forest.contexts[query]
            if len(chosen) >= 4 and pairs > EXACT_PAIRS:
                break
            chosen[query] = None
        return sorted(chosen)

    @cached_property
    def exact(self) -> dict[int, Tensor]:
        """For each checked query (rows, q heads, dim) in float64: softmax attention with an
        explicit mask over a gathered copy of what it sees."""
        return {query: self._exact(query) for query in self.checked_queries}

    def _exact(self, query: int) -> Tensor:
        heads = self.setting.heads
        slots = torch.cat([self.context_slots(query), self.own_slots(query)])
        k, v = (x[slots].double() for x in (self.k, self.v))
        q = self.q[self.rows(query)].double().unflatten(1, (heads.kv, heads.group))
        scores = torch.einsum("rhgd,nhd->hgrn", q, k) * heads.dim**-0.5
        own = self.own_mask(query)
        scores[..., -len(own) :].masked_fill_(~own, -torch.inf)
        return torch.einsum("hgrn,nhd->rhgd", scores.softmax(-1), v).flatten(1, 2)

    def error(self, out: Tensor) -> float:
        """Largest error over the largest exact value, of the checked rows; nan where the shape is
        wrong."""
        if out.shape != self.q.shape:
            return float("nan")
        errors = [
            float((out[self.rows(q)].double() - exact).abs().max() / exact.abs().max())
            for q, exact in self.exact.items()
        ]
        # max() would pass over a nan that does not stand first.
        return float("nan") if any(e != e for e in errors) else max(errors)
