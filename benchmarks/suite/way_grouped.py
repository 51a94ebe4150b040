"""Plain matmuls over gathered K and V, each piece of the tree once for all rows that see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fork_attn.bench.inputs import Inputs
from fork_attn.bench.way import Way, need, register


@dataclass(frozen=True)
class _Batch:
    """Pieces of equal size, done in one batched matmul.

    Attributes:
        rows: (n * rows,) the rows of q; a slice where they are neighbours.
        slots: (n, tokens) slots of K and V.
        mask: (n, 1, rows * group, tokens) bool, or None.
    """

    count: int
    rows: Tensor | slice
    slots: Tensor
    mask: Tensor | None


@register
class GroupedMatmul(Way):
    """Hydragen (arXiv 2402.05099) for a whole tree: pieces of equal size in one batched matmul over
    K and V that lie gathered as (pieces, KV heads, tokens, dim), merged by log-sum-exp in fp32."""

    name = "grouped_matmul"
    shares = True

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        need(inputs.unique_bytes, inputs, "gathered pieces")

    def build(self, layers: int) -> None:
        inputs = self.inputs
        need(layers * inputs.unique_bytes, inputs, f"{layers} layers of gathered pieces")
        self.batches = _batches(inputs)

        def gather(x: Tensor, batch: _Batch) -> Tensor:
            return x[batch.slots].transpose(1, 2).contiguous()

        self.kv = [
            [(gather(inputs.k, b), gather(inputs.v, b)) for b in self.batches]
            for _ in range(layers)
        ]

    def run(self, layer: int) -> Tensor:
        inputs = self.inputs
        heads = inputs.setting.heads
        out: Tensor | None = None
        lse = torch.empty(0)
        for batch, (k, v) in zip(self.batches, self.kv[layer], strict=True):
            q = inputs.q[batch.rows].view(batch.count, -1, heads.kv, heads.group, heads.dim)
            q = q.transpose(1, 2).flatten(2, 3)
            part, part_lse = _attend(q, k, v, batch.mask)

            def by_row(x: Tensor) -> Tensor:
                rows = x.unflatten(2, (-1, heads.group)).transpose(1, 2)
                return rows.reshape(-1, heads.q, x.shape[-1])

            part, part_lse = by_row(part).float(), by_row(part_lse)
            if out is None:
                out = torch.zeros_like(inputs.q, dtype=torch.float32)
                lse = out.new_full((*out.shape[:2], 1), -torch.inf)
            _merge(out, lse, part, part_lse, batch.rows)
        assert out is not None
        return out.to(inputs.q.dtype)

    def held_bytes(self) -> int:
        return self.inputs.unique_bytes


def _batches(inputs: Inputs) -> list[_Batch]:
    forest = inputs.forest
    device = inputs.device
    parts: dict[tuple[int, int, int], list[tuple[Tensor, Tensor, Tensor | None]]] = {}

    def add(kind: int, rows: Tensor, slots: Tensor, mask: Tensor | None) -> None:
        parts.setdefault((kind, len(rows), len(slots)), []).append((rows, slots, mask))

    def merges(query: int) -> bool:  # one new token that goes on in a piece of its own
        return forest.extends(query) and forest.queries[query].rows == 1

    begins = forest.row_begin
    for index, piece in enumerate(forest.pieces):
        rows = torch.arange(begins[piece.begin], begins[piece.end], device=device)
        slots = inputs.piece_slots(index)
        if piece.queries == 1 and merges(piece.begin):
            slots = torch.cat([slots, inputs.own_slots(piece.begin)])
        if len(slots):
            add(0, rows, slots, None)
    for query in range(len(forest.queries)):
        if not merges(query):
            own = inputs.own_slots(query)
            rows = torch.arange(begins[query], begins[query + 1], device=device)
            add(1, rows, own, inputs.own_mask(query))
    return [_batch(inputs, same) for same in parts.values()]


def _batch(inputs: Inputs, parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> _Batch:
    rows = torch.cat([p[0] for p in parts])
    first, last = int(rows[0]), int(rows[-1])
    neighbours = last - first + 1 == len(rows) and bool((rows.diff() == 1).all())
    masks = [p[2] for p in parts if p[2] is not None]
    mask = None
    if masks and not all(bool(m.all()) for m in masks):
        group = inputs.setting.heads.group
        mask = torch.stack(masks).repeat_interleave(group, 1)[:, None]
    return _Batch(
        len(parts),
        slice(first, last + 1) if neighbours else rows,
        torch.stack([p[1] for p in parts]),
        mask,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.transpose(-1, -2)).float().mul_(q.shape[-1] ** -0.5)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.matmul(scores.sub_(lse).exp_().to(v.dtype), v), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | slice) -> None:
    """Folds a part's result into the rows' own; both hold log-sum-exps."""
    old = lse[rows]
    weight = torch.sigmoid(part_lse - old)  # 1 where the row had nothing yet
    out[rows] = torch.lerp(out[rows], part, weight)
    lse[rows] = torch.logaddexp(old, part_lse)
