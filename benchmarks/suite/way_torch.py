"""What torch brings: SDPA over copied K and V, and variable-length flash attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fork_attn.bench.inputs import Inputs
from fork_attn.bench.paging import dense, padded, pages_in
from fork_attn.bench.way import HALF, Absent, Way, need, no_draft, register

GPU_CALLS = 512
"""Calls of a run beyond which a GPU would wait for the host, seconds long for a whole step."""
VARLEN_PAGE_MULTIPLE = 256
"""Of pages of the flash-attn 2 that torch has."""


class Copied(Way):
    """Each query's context gathered, padded to the longest: what a cache per branch holds. The two
    ways of this kind share their copies; the other one is always half of the layers away."""

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        need(_padded_slots(inputs) * inputs.slot_bytes, inputs, "a copy for each branch")

    def build(self, layers: int) -> None:
        inputs, forest = self.inputs, self.inputs.forest
        one = _padded_slots(inputs) * inputs.slot_bytes
        # As many bytes for each of the two as `layers` are without copies; that does for caches.
        self.layers = min(layers, max(2, -(-2 * layers * inputs.unique_bytes // one)))
        self.lengths = [c + q.rows for c, q in zip(forest.contexts, forest.queries, strict=True)]
        if "copies" not in inputs.shared:
            need(self.layers * one, inputs, f"{self.layers} layers of copies")
            inputs.shared["copies"] = self._copies(self.layers)
        self.kv: list[tuple[Tensor, Tensor]] = inputs.shared["copies"]

    def _copies(self, layers: int) -> list[tuple[Tensor, Tensor]]:
        """K and V of each layer, (n, KV heads, longest, dim)."""
        inputs = self.inputs
        heads = inputs.setting.heads
        shape = (len(self.lengths), heads.kv, max(self.lengths), heads.dim)
        k, v = (torch.zeros(shape, dtype=inputs.k.dtype, device=inputs.device) for _ in "kv")
        for query, length in enumerate(self.lengths):
            slots = torch.cat([inputs.context_slots(query), inputs.own_slots(query)])
            k[query, :, :length] = inputs.k[slots].transpose(0, 1)
            v[query, :, :length] = inputs.v[slots].transpose(0, 1)
        return [(k, v), *((k.clone(), v.clone()) for _ in range(layers - 1))]

    def rows_mask(self, query: int) -> Tensor | None:
        """(rows * group, context + rows) bool, or None where every row sees everything."""
        inputs = self.inputs
        own = inputs.own_mask(query)
        if bool(own.all()):
            return None
        context = inputs.forest.contexts[query]
        mask = torch.cat([own.new_ones(len(own), context), own], 1)
        return mask.repeat_interleave(inputs.setting.heads.group, 0)


def _padded_slots(inputs: Inputs) -> int:
    forest = inputs.forest
    pairs = zip(forest.contexts, forest.queries, strict=True)
    return len(forest.queries) * max(context + q.rows for context, q in pairs)


def _grouped(q: Tensor, inputs: Inputs) -> Tensor:
    """(rows, q heads, dim) as (KV heads, rows * group, dim): a KV head's query heads as the rows of
    one matrix, which is SDPA's fastest form of GQA."""
    heads = inputs.setting.heads
    return q.unflatten(1, (heads.kv, heads.group)).transpose(0, 1).flatten(1, 2)


def _ungrouped(out: Tensor, inputs: Inputs) -> Tensor:
    heads = inputs.setting.heads
    return out.unflatten(-2, (-1, heads.group)).movedim(-4, -3).flatten(-3, -2)


@register
class SdpaPerBranch(Copied):
    """One SDPA call for each branch over its copy."""

    name = "sdpa_per_branch"

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        branches = len(inputs.forest.queries)
        if inputs.device.type == "cuda" and branches > GPU_CALLS:
            raise Absent(f"{branches} calls a layer: on a GPU up to {GPU_CALLS} are measured")
        super().available(inputs)

    def build(self, layers: int) -> None:
        super().build(layers)
        self.masks = [self.rows_mask(i) for i in range(len(self.lengths))]
        self.out = torch.empty_like(self.inputs.q)

    def run(self, layer: int) -> Tensor:
        inputs = self.inputs
        k, v = self.kv[layer % self.layers]
        for query, length in enumerate(self.lengths):
            rows, one = inputs.rows(query), slice(query, query + 1)
            out = scaled_dot_product_attention(
                _grouped(inputs.q[rows], inputs)[None],
                k[one, :, :length],
                v[one, :, :length],
                attn_mask=self.masks[query],
            )
            self.out[rows] = _ungrouped(out[0], inputs)
        return self.out

    def held_bytes(self) -> int:
        return sum(self.lengths) * self.inputs.slot_bytes


@register
class SdpaBatched(Copied):
    """One SDPA call over all copies, padded to the longest where lengths differ: what a batch of
    transformers' DynamicCache does."""

    name = "sdpa_batched"

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        super().available(inputs)
        if len({q.rows for q in inputs.forest.queries}) != 1:
            raise Absent("branches add different numbers of tokens")

    def build(self, layers: int) -> None:
        super().build(layers)
        inputs = self.inputs
        self.rows = inputs.forest.queries[0].rows
        n, longest = len(self.lengths), max(self.lengths)
        self.mask: Tensor | None = None
        if self.rows == 1 and len(set(self.lengths)) == 1:
            return
        group = inputs.setting.heads.group
        mask = torch.zeros(n, 1, self.rows * group, longest, dtype=torch.bool)
        for query, length in enumerate(self.lengths):
            seen = self.rows_mask(query)
            mask[query, 0, :, :length] = True if seen is None else seen.cpu()
        self.mask = mask.to(inputs.device)

    def run(self, layer: int) -> Tensor:
        inputs = self.inputs
        heads = inputs.setting.heads
        q = inputs.q.unflatten(0, (-1, self.rows))
        q = q.unflatten(2, (heads.kv, heads.group)).transpose(1, 2).flatten(2, 3)
        k, v = self.kv[(layer + self.layers // 2) % self.layers]
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return _ungrouped(out, inputs)

    def held_bytes(self) -> int:
        return _padded_slots(self.inputs) * self.inputs.slot_bytes


@register
class Varlen(Way):
    """torch.nn.attention.varlen over page tables that share physical pages, of 256 slots: it reads
    no smaller ones."""

    name = "torch_varlen_paged"
    dtypes = HALF

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        try:
            from torch.nn.attention import varlen
        except ImportError as error:
            raise Absent(f"import torch.nn.attention.varlen: {error}") from error
        if inputs.device.type != "cuda":
            raise Absent("torch.nn.attention.varlen needs a CUDA device")
        if "block_table" not in (varlen.varlen_attn.__doc__ or ""):
            raise Absent("this torch's varlen_attn takes no block_table")
        no_draft(inputs)

    def build(self, layers: int) -> None:
        inputs, forest = self.inputs, self.inputs.forest
        size = pages_in(inputs, VARLEN_PAGE_MULTIPLE)
        self.pool, tables, self.kv = dense(inputs, layers, size)
        self.table = padded(self.pool, tables)
        lengths = torch.tensor([t.length for t in tables], dtype=torch.int32)
        self.used = lengths.to(inputs.device)
        self.cu_q = torch.tensor(forest.row_begin, dtype=torch.int32, device=inputs.device)
        self.cu_k = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(inputs.device)
        self.max_q = max(q.rows for q in forest.queries)
        self.max_k = int(lengths.max())

    def run(self, layer: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            self.inputs.q,
            *self.kv[layer],
            self.cu_q,
            self.cu_k,
            self.max_q,
            self.max_k,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self.used,
            block_table=self.table,
        )
        assert isinstance(out, Tensor)
        return out

    def held_bytes(self) -> int:
        return self.pool.layer_bytes
