"""fork-attn itself, one way per backend that this version has."""

from __future__ import annotations

import os
import random
from typing import ClassVar, Literal

import torch
from torch import Tensor

import fork_attn as fa
from fork_attn import ops, ops_flash
from fork_attn.bench.grow import grow, pages_of
from fork_attn.bench.inputs import Inputs
from fork_attn.bench.results import HALF_KV
from fork_attn.bench.way import DTYPES, HALF, Absent, Way, need, no_draft, register


class Forked(Way):
    """A ForkedKVCache grown with its verbs; pages lie scattered, as in a pool long in use."""

    backend: ClassVar[ops.Backend]
    tail: ClassVar[Literal["seal", "copy"]] = "seal"
    open: fa.Step | None = None
    dtypes = tuple(DTYPES)
    ours = True
    shares = True
    has_plan = True

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        backend, device = cls.backend, inputs.device
        if backend not in ("auto", *ops.AVAILABLE):
            raise Absent(f"backend {backend!r} is not part of this version")
        try:
            ops.resolve_backend(backend, device)
        except fa.ForkAttnError as error:
            raise Absent(str(error)) from error
        if device.type == "cpu" and backend == "triton" and "TRITON_INTERPRET" in os.environ:
            raise Absent("interpreted: its times mean nothing")

    def build(self, layers: int) -> None:
        inputs, forest = self.inputs, self.inputs.forest
        heads, size = inputs.setting.heads, inputs.setting.page_size
        pages = pages_of(forest, size, self.tail)
        need(pages * size * inputs.slot_bytes * layers, inputs, "the pool")
        try:
            self.cache = fa.ForkedKVCache(
                num_layers=layers,
                num_pages=pages,
                num_q_heads=heads.q,
                num_kv_heads=heads.kv,
                head_dim=heads.dim,
                page_size=size,
                dtype=self._kv_dtype(),
                device=inputs.device,
                backend=self.backend,
                tail=self.tail,
            )
        except fa.ForkAttnError as error:
            raise Absent(str(error)) from error
        if self.cache.dtype == DTYPES["fp8"]:
            ones = torch.ones(heads.kv, device=inputs.device)
            for layer in range(layers):
                self.cache.set_scales(layer, ones, ones)
        self._scatter(pages)
        begins = inputs.node_begin
        self.tokens = grow(
            self.cache, forest, lambda step, n: self._store(step, begins[n], begins[n + 1])
        )
        first = begins[-1]
        self.new_kv = (inputs.k[first:], inputs.v[first:])
        self._begin()

    def _kv_dtype(self) -> torch.dtype:
        return self.inputs.setting.dtype

    def _scatter(self, pages: int) -> None:
        fillers = [self.cache.new_branch() for _ in range(pages)]
        self.cache.step(dict.fromkeys(fillers, self.cache.page_size)).commit()
        random.Random(0).shuffle(fillers)
        self.cache.free(fillers)

    def _store(self, step: fa.Step, begin: int, end: int) -> None:
        """Writes slots of the inputs into all layers, whatever the device."""
        at = step.slot_mapping.to(self.inputs.device)
        page, slot = at // self.cache.page_size, at % self.cache.page_size
        for layer in range(self.cache.num_layers):
            k_cache, v_cache = self.cache.layer(layer)
            k_cache[page, slot] = self.inputs.k[begin:end].to(k_cache.dtype)
            v_cache[page, slot] = self.inputs.v[begin:end].to(v_cache.dtype)

    def _begin(self) -> fa.Step:
        self.close()
        self.open = self.cache.step(self.tokens)
        self.prepare(self.open)
        return self.open

    def prepare(self, step: fa.Step) -> None:
        """What the host computes for an open step."""
        self.ready = step.plan

    def plan(self) -> None:
        """Opens the step and plans it."""
        self._begin()

    def run(self, layer: int) -> Tensor:
        caches = self.cache.layer(layer)
        return fa.tree_attention(self.inputs.q, *caches, self.ready, backend=self.backend)[0]

    def output(self) -> Tensor:
        """Of the open step, whose slots may be others than those of the one before."""
        assert self.open is not None
        first = self.inputs.node_begin[-1]
        self._store(self.open, first, first + self.inputs.forest.num_rows)
        return super().output()

    def step(self, layers: int, held: int) -> None:
        """The whole of it: open, plan, store the new K and V and attend in every layer, close."""
        step = self._begin()
        for layer in range(layers):
            self.cache.attend(layer % held, self.inputs.q, *self.new_kv, step)
        self.close()

    def held_bytes(self) -> int:
        return self.cache.stats().kv_bytes // self.cache.num_layers

    def close(self) -> None:
        if self.open is not None and self.open.state == "open":
            self.open.rollback()
        self.open = None


def _declare(kind: ops.Backend) -> type[Way]:
    made: type[Forked] = type(
        f"Forked_{kind}", (Forked,), {"name": f"fork_attn_{kind}", "backend": kind}
    )
    return register(made)


BACKENDS: tuple[ops.Backend, ...] = ("cpu", "triton", "cuda")
for _backend in BACKENDS:
    _declare(_backend)


@register
class ForkedFlash(Forked):
    """This package's cache attended by flash-attn over dense page tables, which are its plan:
    nothing is read once for several branches."""

    name = "fork_attn_flash_attn"
    backend = "flash_attn"
    tail = "copy"  # keeps page tables dense
    dtypes = HALF  # flash-attn takes e4m3 only where the queries are e4m3 too
    shares = False

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        super().available(inputs)
        no_draft(inputs)

    def prepare(self, step: fa.Step) -> None:
        try:
            self.tables = step._flash_tables()
        except (fa.NotDense, fa.Unsupported) as error:
            raise Absent(str(error)) from error

    def run(self, layer: int) -> Tensor:
        scale = self.inputs.setting.heads.dim**-0.5
        caches = self.cache.layer(layer)
        return ops_flash.attend(self.inputs.q, *caches, self.tables, None, scale, 0.0, None)


@register
class ForkedHalf(Forked):
    """This package over K and V in bf16, beside cases of e4m3: what e4m3 wins or costs in time."""

    name = HALF_KV
    backend = "auto"
    ours = False
    beside_fp8 = True
    dtypes = ("fp8",)

    def _kv_dtype(self) -> torch.dtype:
        return self.inputs.setting.row_dtype
