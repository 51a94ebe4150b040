"""Random plans and data for tests of attention kernels."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from fork_attn import _C
from fork_attn.plan_format import (
    DIAGONAL,
    GATHER,
    PER_SLOT,
    WINDOW,
    expand_queries,
    header,
    output_rows,
)
from fork_attn.reference import attention, dequantised
from fork_attn.testing.planbuf import ALL_TOKENS, BlockSpec, RunSpec, build_plan
from fork_attn.testing.tolerance import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_CODES = {dtype: code for code, dtype in enumerate([*DTYPES, torch.float8_e4m3fn])}
NAN = float("nan")


@dataclass
class Shape:
    page_size: int = 16
    group: int = 3
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: torch.dtype = torch.float32


@dataclass
class Case:
    shape: Shape
    plan: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float = 0.125
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.shape
        shape = (header(self.plan).num_tokens, self.q.shape[1])
        out = torch.full((*shape, s.head_dim_v), NAN, dtype=s.dtype)
        lse = torch.full(shape, NAN)
        _C.tree_attention_cpu(
            self.plan.data_ptr(),
            rows_arg(self.q),
            paged_arg(self.k),
            paged_arg(self.v),
            rows_arg(out),
            lse.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in (self.sinks, self.k_scale, self.v_scale)),
            DTYPE_CODES[s.dtype],
            DTYPE_CODES[self.k.dtype],
            self.q.shape[1],
            s.num_kv_heads,
            s.head_dim,
            s.head_dim_v,
            self.scale,
            self.softcap or 0.0,
        )
        return out, lse

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        mask, rows = expand_queries(self.plan), output_rows(self.plan)
        k, v = (
            dequantised(cache.flatten(0, 1)[: mask.shape[1]], scale)
            for cache, scale in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        options = {"softmax_scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        return attention(self.q, k, v, mask, rows=rows, dtype=dtype, **options)

    def check(self) -> None:
        out, lse = self.run()
        oracle, oracle_lse = self.dense(torch.float64)
        # 16-bit inputs, fp32 arithmetic, one rounding at the end: stricter than 16 bits throughout.
        reference, reference_lse = self.dense(torch.float32)
        assert_close_to_oracle(out, oracle, reference.to(self.shape.dtype))
        assert_close_to_oracle(lse, oracle_lse, reference_lse, name="lse")


def paged_arg(t: torch.Tensor) -> tuple[int, int, int, int]:
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def rows_arg(t: torch.Tensor) -> tuple[int, int, int]:
    return (t.data_ptr(), t.stride(0), t.stride(1))


def paged_tensor(num_pages: int, shape: Shape, dim: int, *, heads_inside: bool) -> torch.Tensor:
    """Random; pages outermost, then heads (as the cache keeps them) or slots."""
    if heads_inside:
        data = torch.randn(num_pages, shape.num_kv_heads, shape.page_size, dim).to(shape.dtype)
        return data.permute(0, 2, 1, 3)
    return torch.randn(num_pages, shape.page_size, shape.num_kv_heads, dim).to(shape.dtype)


def make_case(shape: Shape, plan: torch.Tensor, *, heads_inside: bool = True) -> Case:
    """Random data for a plan; slots that no row sees and pages that it does not name hold NaN."""
    h = header(plan)
    num_heads = shape.num_kv_heads * shape.group
    num_queries = h.num_tokens + h.num_rotations
    q = torch.randn(num_queries, num_heads, shape.head_dim).to(shape.dtype)
    k = paged_tensor(h.page_limit + 1, shape, shape.head_dim, heads_inside=heads_inside)
    v = paged_tensor(h.page_limit + 1, shape, shape.head_dim_v, heads_inside=heads_inside)
    hidden = torch.ones((h.page_limit + 1) * shape.page_size, dtype=torch.bool)
    hidden[: h.page_limit * shape.page_size] = ~expand_queries(plan).any(0)
    for cache in (k, v):
        cache[hidden.view(-1, shape.page_size)] = NAN
    return Case(shape, plan, q, k, v, scale=shape.head_dim**-0.5)


class RandomPlan:
    """Row blocks with runs of all kinds, each run on pages of its own; with `rotate` at times over
    rotated copies of queries, too."""

    def __init__(
        self,
        rng: random.Random,
        shape: Shape,
        *,
        num_tokens: int,
        max_slots: int,
        rotate: bool = False,
    ) -> None:
        self.rng, self.shape, self.num_tokens, self.max_slots = rng, shape, num_tokens, max_slots
        self.window = rng.choice([0, 1, 7, 40])
        self.next_page = rng.randrange(3)
        self.rotations: list[tuple[int, int]] = []
        if rotate and rng.random() < 0.4:
            count = rng.randint(1, num_tokens + 3)
            self.rotations = [
                (rng.randrange(num_tokens), rng.choice([-9, 5])) for _ in range(count)
            ]

    def build(self) -> torch.Tensor:
        blocks = [self.block() for _ in range(self.rng.randint(1, 4))]
        return build_plan(
            blocks,
            num_tokens=self.num_tokens,
            group=self.shape.group,
            page_size=self.shape.page_size,
            window=self.window,
            partials=self.rng.random() < 0.2,
            rotations=self.rotations,
        )

    def block(self) -> BlockSpec:
        outputs = [*range(self.num_tokens), *(row for row, _ in self.rotations)]
        count = self.rng.randint(1, min(64, len(outputs)))
        # One query a row: two would see the same slots of a run, and a row sees a slot once.
        chosen = {outputs[q]: q for q in self.rng.sample(range(len(outputs)), count)}
        rows, q_rows = list(chosen), list(chosen.values())
        count = len(rows)
        positions = [self.rng.randrange(60) for _ in rows]
        items = [
            [self.run(count, self.one_query_each(rows)) for _ in range(self.rng.randint(0, 4))]
            for _ in range(self.rng.randint(1, 2))
        ]
        return BlockSpec(rows, positions, items, q_rows if self.rotations else None)

    def one_query_each(self, rows: list[int]) -> int:
        """A mask of tokens: of a row that stands in the block several times, one."""
        last = {row: t for t, row in self.rng.sample(list(enumerate(rows)), len(rows))}
        return sum(1 << t for t in last.values())

    def run(self, num_tokens: int, allowed: int) -> RunSpec:
        rng, page_size = self.rng, self.shape.page_size
        first_slot = rng.randrange(page_size)
        num_slots = rng.randint(1, self.max_slots)
        num_pages = (first_slot + num_slots + page_size - 1) // page_size
        pages = list(range(self.next_page, self.next_page + num_pages))
        self.next_page += num_pages
        rng.shuffle(pages)
        kinds = [0, 0, DIAGONAL, WINDOW, PER_SLOT, DIAGONAL | WINDOW, PER_SLOT | WINDOW, GATHER]
        kind = rng.choice(kinds) if self.window else rng.choice([0, 0, DIAGONAL, PER_SLOT, GATHER])
        if kind == GATHER:  # slots of these pages, in any order
            slots = [page * page_size + at for page in pages for at in range(page_size)]
            pages, first_slot = rng.sample(slots, num_slots), 0
        words = [rng.choice([0, ALL_TOKENS, rng.getrandbits(64)]) for _ in range(num_slots)]
        return RunSpec(
            pages,
            num_slots,
            first_slot,
            first_position=rng.randrange(60),
            mask=allowed & rng.choice([0, ALL_TOKENS, ALL_TOKENS, ALL_TOKENS, rng.getrandbits(64)]),
            kind=kind,
            diag=rng.randint(-num_tokens - 2, num_slots + 2),
            words=words if kind & (PER_SLOT | GATHER) else (),
        )


def random_shape(rng: random.Random, dtype: torch.dtype) -> Shape:
    dims = [1, 7, 8, 16, 40, 64, 72, 96, 128]
    return Shape(
        page_size=rng.choice([1, 3, 16, 64]),
        group=rng.choice([1, 2, 3, 5, 7, 8, 16]),
        num_kv_heads=rng.choice([1, 2, 3]),
        head_dim=rng.choice(dims),
        head_dim_v=rng.choice(dims),
        dtype=dtype,
    )
