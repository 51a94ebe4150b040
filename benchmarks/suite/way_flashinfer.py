"""FlashInfer over paged K and V: plain decode, multi-level cascade, BatchAttention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fork_attn.bench.inputs import Inputs
from fork_attn.bench.paging import Layers, Pool, Table, dense, leveled
from fork_attn.bench.shapes import Heads
from fork_attn.bench.way import HALF, Absent, Way, cuda_module, no_draft, register

WORKSPACE_BYTES = 256 << 20
DECODE_GROUPS = (1, 2, 3, 4, 8)
"""Query heads a KV head of the decode kernels without tensor cores."""
HOLISTIC_BYTES = 384 << 20
"""The workspace that BatchAttention allocates, whatever is asked of it."""


class FlashInfer(Way):
    has_plan = True
    dtypes = (*HALF, "fp8")
    module: Any
    pool: Pool
    kv: Layers

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        cls.module = cuda_module("flashinfer", inputs)
        no_draft(inputs)
        cls.check(inputs)

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        """Raises Absent for shapes that it does not take."""

    def workspace(self) -> Tensor:
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.inputs.device)

    def types(self) -> dict[str, torch.dtype]:
        setting = self.inputs.setting
        return {"q_data_type": setting.row_dtype, "kv_data_type": setting.dtype}

    def sizes(self) -> tuple[int, int, int, int]:
        heads = self.inputs.setting.heads
        return heads.q, heads.kv, heads.dim, self.inputs.setting.page_size

    def tables(self, tables: list[Table]) -> tuple[Tensor, Tensor, Tensor]:
        """Begins of the entries' pages, the pages, slots used of each entry's last page."""
        begins = torch.tensor([0, *(len(t.pages) for t in tables)], dtype=torch.int32).cumsum(0)
        pages = torch.cat([self.pool.physical(t.pages) for t in tables])
        size = self.pool.size
        last = torch.tensor([(t.length - 1) % size + 1 for t in tables], dtype=torch.int32)
        return begins.int(), pages, last

    def held_bytes(self) -> int:
        return self.pool.layer_bytes


class Decode(FlashInfer):
    """Batch decode: no sharing."""

    tensor_cores: ClassVar[bool]

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        if any(q.rows != 1 for q in inputs.forest.queries):
            raise Absent("decodes one token per branch")

    def build(self, layers: int) -> None:
        self.pool, found, self.kv = dense(self.inputs, layers)
        self.arguments = self.tables(found)
        self.wrapper = self.module.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace(), "NHD", use_tensor_cores=self.tensor_cores
        )

    def plan(self) -> None:
        self.wrapper.plan(*self.arguments, *self.sizes(), **self.types())

    def run(self, layer: int) -> Tensor:
        out: Tensor = self.wrapper.run(self.inputs.q, self.kv[layer])
        return out


@register
class DecodePlain(Decode):
    name = "flashinfer_decode"
    tensor_cores = False

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        super().check(inputs)
        group = inputs.setting.heads.group
        if group not in DECODE_GROUPS:
            raise Absent(f"is not built for {group} query heads a KV head")


@register
class DecodeTensorCores(Decode):
    name = "flashinfer_decode_tc"
    tensor_cores = True


class Cascade(FlashInfer):
    """Multi-level cascade: each piece once, levels merged; `forced` is its inner wrappers' backend,
    "" as shipped."""

    forced: ClassVar[str]
    shares = True

    def build(self, layers: int) -> None:
        inputs = self.inputs
        self.pool, found, self.kv = leveled(inputs, layers)
        if len(found) < 2:
            raise Absent("nothing is shared in this shape")
        if any(t.length == 0 for level in found for t in level.tables):
            raise Absent("a level has nodes without tokens")
        device = inputs.device
        rows = [torch.tensor(lv.begins, dtype=torch.int32).to(device) for lv in found]
        pages = [[x.to(device) for x in self.tables(level.tables)] for level in found]
        self.arguments = (rows, *(list(part) for part in zip(*pages, strict=True)))
        self.causal = found[-1].causal
        self.wrapper = self.module.MultiLevelCascadeAttentionWrapper(
            len(found), self.workspace(), "NHD"
        )
        if self.forced:
            for inner in self.wrapper._batch_prefill_wrappers:
                inner._backend = self.forced

    def plan(self) -> None:
        self.wrapper.plan(*self.arguments, *self.sizes(), causal=self.causal, **self.types())

    def run(self, layer: int) -> Tensor:
        out: Tensor = self.wrapper.run(self.inputs.q, self.kv[layer])
        return out


@register
class CascadeShipped(Cascade):
    name = "flashinfer_cascade"
    forced = ""


@register
class CascadeFa2(Cascade):
    name = "flashinfer_cascade_fa2"
    forced = "fa2"


@register
class Holistic(FlashInfer):
    """BatchAttention, persistent: no sharing."""

    name = "flashinfer_batch_attention"

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        processors = torch.cuda.get_device_properties(inputs.device).multi_processor_count
        states = _holistic_bytes(processors, inputs.setting.heads)
        if states > HOLISTIC_BYTES:
            raise Absent(
                f"its partial states take {states >> 20} MiB here, "
                f"its workspace has {HOLISTIC_BYTES >> 20}"
            )

    def build(self, layers: int) -> None:
        inputs = self.inputs
        self.pool, found, self.kv = dense(inputs, layers)
        begins, pages, _ = (x.to(inputs.device) for x in self.tables(found))
        rows = torch.tensor(inputs.forest.row_begin, dtype=torch.int32, device=inputs.device)
        lengths = torch.tensor([t.length for t in found], dtype=torch.int32, device=inputs.device)
        q_heads, kv_heads, dim, size = self.sizes()
        self.arguments = (rows, begins, pages, lengths, q_heads, kv_heads, dim, dim, size)
        self.wrapper = self.module.BatchAttention("NHD", str(inputs.device))

    def plan(self) -> None:
        causal = any(q.rows > 1 for q in self.inputs.forest.queries)
        self.wrapper.plan(*self.arguments, causal=causal, **self.types())

    def run(self, layer: int) -> Tensor:
        out: Tensor = self.wrapper.run(self.inputs.q, self.kv[layer])[0]
        return out


def _holistic_bytes(processors: int, heads: Heads) -> int:
    """What BatchAttention reserves for states of parts: four of a tile of 128 and one of 16 rows
    for each block, two blocks a processor (one with wide heads), a 16-bit value and an fp32 LSE."""
    blocks = processors * (1 if heads.dim >= 256 else 2)
    return 4 * blocks * (128 + 16) * heads.kv * (2 * heads.dim + 4)
