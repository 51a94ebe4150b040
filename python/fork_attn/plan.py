"""Plan: the frozen description of one step's attention that every layer of the same kind reuses."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fork_attn import _C, costs
from fork_attn.rope import Rope, Turn, turn_of, with_rotations


@dataclass(frozen=True)
class PlanShape:
    """The layer that a plan's byte and FLOP figures are counted for."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    itemsize: int  # bytes of one K or V element


@dataclass(frozen=True, eq=False)
class PlanOnDevice:
    """A plan's words on a device, and the page lists there that its runs index."""

    words: torch.Tensor  # (words,) int64
    pages: torch.Tensor  # (n,) int32


@dataclass(frozen=True, eq=False)
class Plan:
    """Which query rows see which slots, as work items; made by `Step`, passed to `tree_attention`.

    All figures are exact and cover every head of one layer; they need no GPU.
    """

    buffer: torch.Tensor = field(repr=False)  # (words,) int64, the format of csrc/core/plan.h
    counts: dict[str, int]
    span_ns: tuple[float, ...] = field(repr=False)  # predicted time of each span, one KV head
    cost_ns: float  # predicted time of all row blocks before they are cut, one KV head
    shape: PlanShape
    group: int  # query heads per KV head
    page_size: int
    page_limit: int  # caches must have at least as many pages
    num_workers: int
    # (n, 2) int32, or None: copies of query rows that the plan reads behind the rows themselves,
    # each of a row, moved back by so many positions.
    rotations: torch.Tensor | None = field(repr=False, default=None)
    turns: dict[Rope, Turn] = field(repr=False, default_factory=dict)  # of rotations
    # Set where page lists stay on the device; `buffer` then has none of its own.
    on_device: PlanOnDevice | None = field(default=None, repr=False)
    launches: dict[torch.device, Any] = field(repr=False, default_factory=dict)  # of ops_triton

    def queries(self, q: torch.Tensor, rope: Rope | None) -> torch.Tensor:
        """The query tensor that the plan reads: `q`, and behind it the rotated copies, if any, of
        a layer whose RoPE is known then."""
        if self.rotations is None:
            return q
        assert rope is not None
        if rope not in self.turns:
            self.turns[rope] = turn_of(rope, -self.rotations[:, 1])
        return with_rotations(q, self.rotations, rope, self.turns[rope])

    @property
    def _slot_bytes(self) -> int:
        s = self.shape
        return s.num_kv_heads * (s.head_dim + s.head_dim_v) * s.itemsize

    @property
    def _pair_flops(self) -> int:
        s = self.shape
        return 2 * s.num_q_heads * (s.head_dim + s.head_dim_v)

    @property
    def unique_kv_bytes(self) -> int:
        """Bytes of K and V of the slots that some row sees, each slot once."""
        return self.counts["unique_slots"] * self._slot_bytes

    @property
    def tile_unique_kv_bytes(self) -> int:
        """Bytes of K and V of each slot once per row block's worth of tokens that see it."""
        return self.counts["tile_unique_slots"] * self._slot_bytes

    @property
    def read_kv_bytes(self) -> int:
        """Bytes of K and V that the items read."""
        return self.counts["read_slots"] * self._slot_bytes

    @property
    def partial_bytes(self) -> int:
        """Bytes of partial results, written once and read once: fp32 outputs and their LSE."""
        row = self.shape.num_q_heads * (self.shape.head_dim_v + 1) * 4
        return 2 * self.counts["num_partial_rows"] * row

    @property
    def flops(self) -> int:
        """FLOPs of the two products over the pairs of row and slot that attend."""
        return self.counts["visible_pairs"] * self._pair_flops

    @property
    def executed_flops(self) -> int:
        """FLOPs of the two products that the items run, masked pairs included."""
        return self.counts["executed_pairs"] * self._pair_flops

    @cached_property
    def work(self) -> tuple[float, ...]:
        """Predicted microseconds of each worker, as free workers take (span, KV head) pairs."""
        loads = [0.0] * self.num_workers
        heapq.heapify(loads)
        for ns in self.span_ns:
            for _ in range(self.shape.num_kv_heads):
                heapq.heapreplace(loads, loads[0] + ns / 1000)
        return tuple(sorted(loads, reverse=True))

    @property
    def work_max_over_mean(self) -> float:
        """Load of the busiest worker over the mean load; 1.0 is perfect balance."""
        return max(self.work) * len(self.work) / sum(self.work)

    @property
    def num_row_blocks(self) -> int:
        """Number of row blocks: query tokens that work items serve together."""
        return self.counts["num_blocks"]

    @property
    def num_items(self) -> int:
        """Number of work items: a row block and consecutive runs."""
        return self.counts["num_items"]


def build_plan(
    core: _C.CacheCore,
    window: int | None,
    shape: PlanShape,
    page_size: int,
    target: str,
    num_workers: int,
    batch_invariant: bool = False,
) -> Plan:
    """The plan of the core's open step for one kind of layer, on a target of the cost table.

    Raises:
        ValueError: an unknown target, no workers, a window below 1; or see `costs.load`.
        Unsupported: `batch_invariant` with contexts that see tokens at shifted positions.
    """
    data = plan_data(
        *(core, window, shape, target, num_workers),
        resident=False,
        batch_invariant=batch_invariant,
    )
    return make_plan(data, shape, page_size, num_workers)


def plan_data(
    core: _C.CacheCore,
    window: int | None,
    shape: PlanShape,
    target: str,
    num_workers: int,
    *,
    resident: bool,
    batch_invariant: bool = False,
) -> _C.PlanData:
    """What `build_plan` wraps; a resident plan's runs index page lists that stay on the device."""
    if window is not None and window < 1:
        raise ValueError(f"window: expected None or at least 1, got {window}")
    costs.load()
    group = shape.num_q_heads // shape.num_kv_heads
    sizes = (shape.num_kv_heads, group, shape.head_dim, shape.head_dim_v, shape.itemsize)
    return core.build_plan(window or 0, sizes, target, num_workers, batch_invariant, resident)


def make_plan(
    data: _C.PlanData,
    shape: PlanShape,
    page_size: int,
    num_workers: int,
    on_device: PlanOnDevice | None = None,
) -> Plan:
    """A Plan of what the planner made."""
    buffer = torch.frombuffer(data, dtype=torch.int64)
    begin, count = data.rotations
    words = (buffer if on_device is None else on_device.words)[begin : begin + count]
    return Plan(
        buffer,
        data.counts,
        tuple(data.span_ns),
        data.cost_ns,
        shape,
        group=shape.num_q_heads // shape.num_kv_heads,
        page_size=page_size,
        page_limit=data.page_limit,
        num_workers=num_workers,
        on_device=on_device,
        rotations=words.view(torch.int32).view(count, 2) if count else None,
    )
