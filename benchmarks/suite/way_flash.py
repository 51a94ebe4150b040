"""flash-attn 2 and 3 over page tables that share physical pages, and FlashAttention-3 once per
level of the tree with this package's merge."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fork_attn as fa
from fork_attn.bench.inputs import Inputs
from fork_attn.bench.paging import Pool, Table, dense, levels, padded
from fork_attn.bench.way import HALF, Absent, Way, cuda_module, no_draft, register


class Paged(Way):
    """One table per branch; nothing is read once for several."""

    dtypes = HALF
    module: Any

    @staticmethod
    def check(inputs: Inputs) -> None:
        no_draft(inputs)
        if len({q.rows for q in inputs.forest.queries}) != 1:
            raise Absent("branches add different numbers of tokens")

    def build(self, layers: int) -> None:
        pool, tables, self.kv = dense(self.inputs, layers)
        self.pages = pool.num_pages
        self.table = padded(pool, tables)
        lengths = [t.length for t in tables]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.inputs.device)
        self.q = self.inputs.q.unflatten(0, (len(tables), -1))

    def held_bytes(self) -> int:
        return self.pages * self.inputs.setting.page_size * self.inputs.slot_bytes


@register
class Flash2(Paged):
    name = "flash_attn_2_paged"

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        cls.module = cuda_module("flash_attn", inputs)
        cls.check(inputs)
        if inputs.setting.page_size % 256:
            raise Absent("its pages are multiples of 256 slots")

    def run(self, layer: int) -> Tensor:
        out: Tensor = self.module.flash_attn_with_kvcache(
            self.q,
            *self.kv[layer],
            cache_seqlens=self.lengths,
            block_table=self.table,
            causal=True,
        )
        return out


@register
class Flash3(Paged):
    name = "flash_attn_3_paged"

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        cls.module = cuda_module("flash_attn_interface", inputs)
        cls.check(inputs)

    def run(self, layer: int) -> Tensor:
        out: Tensor = self.module.flash_attn_with_kvcache(
            self.q,
            *self.kv[layer],
            cache_seqlens=self.lengths,
            page_table=self.table,
            causal=True,
        )
        return out


@register
class Flash3Merged(Way):
    """Hydragen with FlashAttention-3: a call per level, all rows of a piece as one sequence, then
    `fork_attn.merge_states`."""

    name = "flash_attn_3_levels"
    dtypes = HALF
    shares = True
    module: Any

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        cls.module = cuda_module("flash_attn_interface", inputs)
        no_draft(inputs)

    def build(self, layers: int) -> None:
        inputs = self.inputs
        pool = Pool(inputs)
        try:
            found = levels(inputs, pool)
        except ValueError as error:
            raise Absent(str(error)) from error
        self.pages = pool.num_pages
        self.kv = [pool.tensors() for _ in range(layers)]
        self.calls = [self._call(pool, lv.tables, lv.begins, lv.causal) for lv in found]
        try:
            self.run(0)
        except fa.ForkAttnError as error:
            raise Absent(str(error)) from error

    def _call(
        self, pool: Pool, tables: list[Table], begins: list[int], causal: bool
    ) -> dict[str, Any]:
        device = self.inputs.device
        lengths = [t.length for t in tables]
        widths = [b - a for a, b in pairwise(begins)]
        return {
            "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
            "page_table": padded(pool, tables),
            "cu_seqlens_q": torch.tensor(begins, dtype=torch.int32, device=device),
            "max_seqlen_q": max(widths),
            "causal": causal,
            "return_softmax_lse": True,
        }

    def run(self, layer: int) -> Tensor:
        outs, lses = [], []
        for call in self.calls:
            out, lse, *_ = self.module.flash_attn_with_kvcache(
                self.inputs.q, *self.kv[layer], **call
            )
            outs.append(out)
            lses.append(lse.transpose(0, 1))  # (heads, rows) with sequences of different lengths
        merged, _ = fa.merge_states(torch.stack(outs), torch.stack(lses).contiguous())
        return merged

    def held_bytes(self) -> int:
        return self.pages * self.inputs.setting.page_size * self.inputs.slot_bytes
