"""xformers over paged K and V: Triton split-K, and its tree attention for draft trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fork_attn.bench.inputs import Inputs
from fork_attn.bench.paging import Layers, Pool, Table, dense, padded, pages_in
from fork_attn.bench.way import HALF, Absent, Way, cuda_module, no_draft, register

PAGE_MULTIPLE = 64
"""Slots of its Triton kernels' blocks, which may not cross pages."""
MOST_CAUSAL_ROWS = 16


class Xformers(Way):
    """Physical pages, of 64 slots at least, as one long sequence; its GQA takes K and V expanded
    without a copy to (1, slots, KV heads, group, dim)."""

    dtypes = HALF

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        cuda_module("xformers.ops.fmha.triton_splitk", inputs)
        # Its wheel's C++ part may be for another CUDA than torch's and then is not loaded; all of
        # its operators then refuse GPUs, those written in Triton, which need none of it, too.
        vars(cuda_module("xformers.ops.fmha.common", inputs))["_built_with_cuda"] = True
        cls.check(inputs)

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        """Raises Absent for shapes that it does not take."""

    def fill(self, pool: Pool, kv_of_layers: Layers) -> None:
        group = self.inputs.setting.heads.group
        self.pool = pool
        self.kv = [
            tuple(x.flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1) for x in kv)
            for kv in kv_of_layers
        ]

    def bias(self, pool: Pool, tables: list[Table], rows: list[int], causal: bool) -> Any:
        from xformers.ops.fmha import attn_bias

        kind = "PagedBlockDiagonal" + ("CausalWithOffset" if causal else "") + "PaddedKeysMask"
        return getattr(attn_bias, kind).from_seqlens(
            q_seqlen=rows,
            kv_seqlen=[t.length for t in tables],
            block_tables=padded(pool, tables),
            page_size=pool.size,
            device=self.inputs.device,
        )

    def queries(self) -> Tensor:
        """(1, T, KV heads, group, dim)."""
        heads = self.inputs.setting.heads
        return self.inputs.q.unflatten(1, (heads.kv, heads.group))[None]

    def held_bytes(self) -> int:
        return self.pool.layer_bytes


@register
class SplitK(Xformers):
    name = "xformers_splitk_paged"

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        no_draft(inputs)
        rows = {q.rows for q in inputs.forest.queries}
        if len(rows) != 1:
            raise Absent("branches add different numbers of tokens")
        if max(rows) > MOST_CAUSAL_ROWS:
            raise Absent(f"takes up to {MOST_CAUSAL_ROWS} new tokens of a branch")

    def build(self, layers: int) -> None:
        size = pages_in(self.inputs, PAGE_MULTIPLE)
        pool, tables, kv_of_layers = dense(self.inputs, layers, size)
        self.fill(pool, kv_of_layers)
        rows = [q.rows for q in self.inputs.forest.queries]
        self.mask = self.bias(pool, tables, rows, causal=True)

    def run(self, layer: int) -> Tensor:
        from xformers.ops import fmha

        k, v = self.kv[layer]
        out: Tensor = fmha.memory_efficient_attention_forward(
            self.queries(), k, v, attn_bias=self.mask, op=fmha.triton_splitk.FwOp
        )
        return out[0].flatten(1, 2)


@register
class TreeAttention(Xformers):
    """The context paged, the draft dense with an explicit mask, merged."""

    name = "xformers_tree_attention"

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        drafts = {q.draft for q in inputs.forest.queries}
        if None in drafts or len(drafts) != 1:
            raise Absent("verifies one draft tree, the same for all branches")

    def build(self, layers: int) -> None:
        inputs, forest = self.inputs, self.inputs.forest
        pool = Pool(inputs, pages_in(inputs, PAGE_MULTIPLE))
        heads = inputs.setting.heads
        contexts = [inputs.context_slots(q) for q in range(len(forest.queries))]
        if any(p.parent >= 0 or p.queries != 1 for p in forest.pieces):
            raise Absent("written here for branches that share nothing")
        tables = [Table(pool.add(slots), len(slots)) for slots in contexts]
        self.fill(pool, pool.layers(layers))
        rows = forest.queries[0].rows
        self.mask = self.bias(pool, tables, [rows] * len(tables), causal=False)
        own = inputs.own_mask(0)
        draft = torch.zeros(own.shape, dtype=inputs.q.dtype, device=inputs.device)
        self.draft_mask = draft.masked_fill_(~own, -torch.inf)
        first = inputs.node_begin[-1]

        def drafted(x: Tensor) -> Tensor:
            new = x[first:].unflatten(0, (-1, rows))[:, :, :, None]
            return new.expand(-1, -1, -1, heads.group, -1)

        self.new = (drafted(inputs.k), drafted(inputs.v))
        self.q = inputs.q.unflatten(0, (-1, rows)).unflatten(2, (heads.kv, heads.group))

    def run(self, layer: int) -> Tensor:
        from xformers.ops import fmha
        from xformers.ops.tree_attention import tree_attention

        out: Tensor = tree_attention(
            self.q,
            *self.new,
            *self.kv[layer],
            self.draft_mask,
            self.mask,
            prefix_op=fmha.triton_splitk.FwOp,
        )
        return out
