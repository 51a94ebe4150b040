"""flash-attn 2 and 3 over page tables that share physical pages, and FlashAttention-3 once per
level of the tree with this package's merge."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fork_attn as fa
from fork_attn.bench.inputs import Inputs
from fork_attn.bench.paging import Pool, Table, dense, leveled, padded
from fork_attn.bench.way import HALF, Absent, Way, cuda_module, no_draft, register, told


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
        self.pool, tables, self.kv = dense(self.inputs, layers)
        self.table = padded(self.pool, tables)
        lengths = [t.length for t in tables]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.inputs.device)
        self.q = self.inputs.q.unflatten(0, (len(tables), -1))

    def held_bytes(self) -> int:
        return self.pool.layer_bytes


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


class Planned(Way):
    """FlashAttention-3 whose schedule is computed once per step for all layers, as engines do."""

    has_plan = True
    dtypes = HALF
    module: Any
    pool: Pool
    calls: list[dict[str, Any]]
    """Of one layer, their arguments behind q, K and V."""

    def plan(self) -> None:
        if not self.note:
            for call in self.calls:
                call["scheduler_metadata"] = self._metadata(call)

    def _metadata(self, call: dict[str, Any]) -> Tensor:
        heads, q = self.inputs.setting.heads, self.inputs.q
        lengths, table = call["cache_seqlens"], call["page_table"]
        begins = call.get("cu_seqlens_q")
        size = self.pool.size
        # What its own heuristics see in a call: lengths up to the table's end, not the longest.
        found: Tensor = self.module.get_scheduler_metadata(
            len(lengths),
            len(q) // len(lengths) if begins is None else call["max_seqlen_q"],
            table.shape[1] * size,
            heads.q,
            heads.kv,
            heads.dim,
            lengths,
            qkv_dtype=q.dtype,
            cu_seqlens_q=begins,
            page_size=size,
            causal=call["causal"],
        )
        return found

    def try_plan(self) -> None:
        """Goes without where a build of it cannot take its own schedule, and says so."""
        try:
            self.plan()
            self.run(0)
        except Exception as error:  # which error, its versions do not agree on
            for call in self.calls:
                call.pop("scheduler_metadata", None)
            self.note = f"computes its schedule in every call: {told(error)}"
            self.run(0)

    def held_bytes(self) -> int:
        return self.pool.layer_bytes


@register
class Flash3(Planned, Paged):
    name = "flash_attn_3_paged"

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        cls.module = cuda_module("flash_attn_interface", inputs)
        cls.check(inputs)

    def build(self, layers: int) -> None:
        super().build(layers)
        table = {"cache_seqlens": self.lengths, "page_table": self.table, "causal": True}
        self.calls = [table]
        self.try_plan()

    def run(self, layer: int) -> Tensor:
        out: Tensor = self.module.flash_attn_with_kvcache(self.q, *self.kv[layer], **self.calls[0])
        return out


@register
class Flash3Merged(Planned):
    """Hydragen with FlashAttention-3: a call per level, all rows of a piece as one sequence, then
    `fork_attn.merge_states` of the levels' states, which FlashAttention-3 leaves in tensors of
    their own: they are stacked."""

    name = "flash_attn_3_levels"
    shares = True

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        cls.module = cuda_module("flash_attn_interface", inputs)
        no_draft(inputs)

    def build(self, layers: int) -> None:
        self.pool, found, self.kv = leveled(self.inputs, layers)
        self.calls = [self._call(lv.tables, lv.begins, lv.causal) for lv in found]
        try:
            self.try_plan()
        except fa.ForkAttnError as error:
            raise Absent(str(error)) from error

    def _call(self, tables: list[Table], begins: list[int], causal: bool) -> dict[str, Any]:
        device = self.inputs.device
        lengths = [t.length for t in tables]
        widths = [b - a for a, b in pairwise(begins)]
        return {
            "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
            "page_table": padded(self.pool, tables),
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
        merged, _ = fa.merge_states(torch.stack(outs), torch.stack(lses))
        return merged
