"""The CPU kernels against a float64 oracle, on random plans with poisoned memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from fork_attn import _C
from fork_attn.plan_format import DIAGONAL, PER_SLOT, WINDOW, expand_plan, header
from fork_attn.testing.dense import dense_attention
from fork_attn.testing.planbuf import ALL_TOKENS, BlockSpec, RunSpec, build_plan
from fork_attn.testing.tolerance import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
NAN = float("nan")


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.shape
        out = torch.full((*self.q.shape[:2], s.head_dim_v), NAN, dtype=s.dtype)
        lse = torch.full(self.q.shape[:2], NAN)
        _C.tree_attention_cpu(
            self.plan.data_ptr(),
            rows_arg(self.q),
            paged_arg(self.k),
            paged_arg(self.v),
            rows_arg(out),
            lse.data_ptr(),
            0 if self.sinks is None else self.sinks.data_ptr(),
            DTYPE_CODES[s.dtype],
            self.q.shape[1],
            s.num_kv_heads,
            s.head_dim,
            s.head_dim_v,
            self.scale,
            self.softcap or 0.0,
        )
        return out, lse

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        mask = expand_plan(self.plan)
        options = {"softmax_scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        return dense_attention(self.q, self.k, self.v, mask, dtype=dtype, **options)

    def check(self) -> None:
        out, lse = self.run()
        oracle, oracle_lse = self.dense(torch.float64)
        # 16-bit inputs, fp32 arithmetic, one rounding at the end: stricter than 16-bit arithmetic throughout.
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
    """Random data for a plan; slots that no row sees hold NaN, and so do pages that it does not name."""
    h = header(plan)
    num_heads = shape.num_kv_heads * shape.group
    q = torch.randn(h.num_tokens, num_heads, shape.head_dim).to(shape.dtype)
    k = paged_tensor(h.page_limit + 1, shape, shape.head_dim, heads_inside=heads_inside)
    v = paged_tensor(h.page_limit + 1, shape, shape.head_dim_v, heads_inside=heads_inside)
    hidden = torch.ones((h.page_limit + 1) * shape.page_size, dtype=torch.bool)
    hidden[: h.page_limit * shape.page_size] = ~expand_plan(plan).any(0)
    for cache in (k, v):
        cache[hidden.view(-1, shape.page_size)] = NAN
    return Case(shape, plan, q, k, v, scale=shape.head_dim**-0.5)


class RandomPlan:
    """Row blocks with runs of all kinds, each run on pages of its own."""

    def __init__(self, rng: random.Random, shape: Shape, *, num_tokens: int, max_slots: int) -> None:
        self.rng, self.shape, self.num_tokens, self.max_slots = rng, shape, num_tokens, max_slots
        self.window = rng.choice([0, 1, 7, 40])
        self.next_page = rng.randrange(3)

    def build(self) -> torch.Tensor:
        blocks = [self.block() for _ in range(self.rng.randint(1, 4))]
        return build_plan(
            blocks,
            num_tokens=self.num_tokens,
            group=self.shape.group,
            page_size=self.shape.page_size,
            window=self.window,
            partials=self.rng.random() < 0.2,
        )

    def block(self) -> BlockSpec:
        count = self.rng.randint(1, min(64, self.num_tokens))
        rows = self.rng.sample(range(self.num_tokens), count)
        positions = [self.rng.randrange(60) for _ in rows]
        items = [
            [self.run(count) for _ in range(self.rng.randint(0, 4))]
            for _ in range(self.rng.randint(1, 2))
        ]
        return BlockSpec(rows, positions, items)

    def run(self, num_tokens: int) -> RunSpec:
        rng, page_size = self.rng, self.shape.page_size
        first_slot = rng.randrange(page_size)
        num_slots = rng.randint(1, self.max_slots)
        num_pages = (first_slot + num_slots + page_size - 1) // page_size
        pages = list(range(self.next_page, self.next_page + num_pages))
        self.next_page += num_pages
        rng.shuffle(pages)
        kinds = [0, 0, 0, DIAGONAL, WINDOW, PER_SLOT, DIAGONAL | WINDOW, PER_SLOT | WINDOW]
        kind = rng.choice(kinds) if self.window else rng.choice([0, 0, DIAGONAL, PER_SLOT])
        words = [rng.choice([0, ALL_TOKENS, rng.getrandbits(64)]) for _ in range(num_slots)]
        return RunSpec(
            pages,
            num_slots,
            first_slot,
            first_position=rng.randrange(60),
            mask=rng.choice([0, ALL_TOKENS, ALL_TOKENS, ALL_TOKENS, rng.getrandbits(64)]),
            kind=kind,
            diag=rng.randint(-num_tokens - 2, num_slots + 2),
            words=words if kind & PER_SLOT else (),
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(60))
def test_random_plans(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = random_shape(rng, dtype)
    num_tokens = rng.choice([1, 2, 5, 30, 100])
    plan = RandomPlan(rng, shape, num_tokens=num_tokens, max_slots=rng.choice([3, 90, 300])).build()
    case = make_case(shape, plan, heads_inside=rng.random() < 0.5)
    case.softcap = rng.choice([None, None, 2.0, 30.0])
    if rng.random() < 0.3:
        case.sinks = torch.randn(shape.num_kv_heads * shape.group)
    case.check()


def shared_prefix(shape: Shape, *, num_tokens: int, num_slots: int) -> torch.Tensor:
    num_pages = -(-num_slots // shape.page_size)
    run = RunSpec(range(num_pages), num_slots)
    block = BlockSpec(range(num_tokens), [num_slots] * num_tokens, [[run]])
    return build_plan([block], num_tokens=num_tokens, group=shape.group, page_size=shape.page_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_long_shared_run(num_tokens: int, dtype: torch.dtype, threads: int) -> None:
    """Cut into stretches for several threads; the same bits every time."""
    torch.manual_seed(num_tokens)
    shape = Shape(dtype=dtype)
    case = make_case(shape, shared_prefix(shape, num_tokens=num_tokens, num_slots=3001))
    case.sinks = torch.randn(shape.num_kv_heads * shape.group)
    case.check()
    first, again = case.run(), case.run()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("magnitude", [1e-3, 1e2, 1e4])
@pytest.mark.parametrize("softcap", [None, 0.5, 50.0])
def test_score_magnitudes(magnitude: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    shape = Shape(group=5, head_dim=32)
    case = make_case(shape, shared_prefix(shape, num_tokens=7, num_slots=300))
    case.q *= magnitude
    case.softcap = softcap
    case.check()


@pytest.mark.parametrize("partials", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_without_keys(partials: bool, with_sinks: bool) -> None:
    """A row in no block, rows that an item hides whole, a row in an item without runs."""
    shape = Shape(page_size=4, group=2, num_kv_heads=1, head_dim=8, head_dim_v=8)
    blocks = [
        BlockSpec([4, 1], [0, 0], [[RunSpec([0, 1, 2], 10, mask=0b01)]]),
        BlockSpec([2], [0], [[]]),
        BlockSpec([3], [0], [[RunSpec([4, 3], 5, kind=DIAGONAL, diag=0)]]),
    ]
    plan = build_plan(blocks, num_tokens=5, group=2, page_size=4, partials=partials)
    case = make_case(shape, plan)
    if with_sinks:
        case.sinks = torch.randn(2)
    case.check()
    out, lse = case.run()
    assert torch.equal(out[:4], torch.zeros_like(out[:4]))
    expected = torch.full((2,), -torch.inf) if case.sinks is None else case.sinks
    assert torch.equal(lse[:4], expected.expand(4, 2))


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_overflow_stays_with_the_rows_that_see_it(poison: float, num_tokens: int) -> None:
    shape = Shape(group=2)
    runs = [RunSpec([0, 1], 30), RunSpec([2], 9, mask=0b10), RunSpec([3], 16, mask=ALL_TOKENS - 2)]
    block = BlockSpec(range(num_tokens), [0] * num_tokens, [runs])
    case = make_case(shape, build_plan([block], num_tokens=num_tokens, group=2, page_size=16))
    others = [t for t in range(num_tokens) if t != 1]
    clean, clean_lse = case.run()
    case.k[2, 4] = poison
    case.v[2, 5, :, 3] = poison
    out, lse = case.run()
    assert torch.equal(out[others], clean[others])
    assert torch.equal(lse[others], clean_lse[others])
    assert not out[1].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_exact(dtype: torch.dtype) -> None:
    """One key: the output is its V, for every finite 16-bit value. Two equal keys: the rounded mean."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    dim = len(values) // 8
    shape = Shape(1, 1, 1, 8, dim, dtype)
    one = build_plan(
        [BlockSpec([t], [0], [[RunSpec([t], 1)]]) for t in range(8)], num_tokens=8, group=1, page_size=1
    )
    case = make_case(shape, one)
    case.v[:8] = values[: 8 * dim].view(8, 1, 1, dim)
    assert torch.equal(case.run()[0].view(8, dim), values[: 8 * dim].view(8, dim))

    pair = build_plan([BlockSpec([0], [0], [[RunSpec([0, 1], 2)]])], num_tokens=1, group=1, page_size=1)
    case = make_case(shape, pair)
    case.k[1] = case.k[0]
    case.v[0, 0, 0] = values[:dim]
    case.v[1, 0, 0] = values[torch.randperm(len(values))[:dim]]
    mean = case.v[:2, 0, 0].float().sum(0) * 0.5
    assert torch.equal(case.run()[0].view(dim), mean.to(dtype))


def test_strided_rows() -> None:
    """Query and output may be views of packed projections."""
    torch.manual_seed(0)
    shape = Shape(group=2, head_dim=24, head_dim_v=40)
    case = make_case(shape, shared_prefix(shape, num_tokens=5, num_slots=77))
    packed = torch.randn(5, 7, 30)
    case.q = packed[:, 2:6, 3:27]
    case.check()


def test_bad_plans_are_refused() -> None:
    shape = Shape()
    case = make_case(shape, shared_prefix(shape, num_tokens=2, num_slots=20))
    case.shape.num_kv_heads = 3
    with pytest.raises(ValueError, match="num_q_heads"):
        case.run()
    case.plan[0] = 0
    with pytest.raises(ValueError, match="plan"):
        case.run()


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 7, 900])
def test_store_kv(num_rows: int, dtype: torch.dtype, heads_inside: bool) -> None:
    shape = Shape(page_size=3, dtype=dtype)
    cache = paged_tensor(400, shape, 10, heads_inside=heads_inside)
    src = torch.randn(num_rows, 5, 12).to(dtype)[:, 1:3, 2:]
    slots = torch.randperm(1200)[:num_rows]
    slots[::4] = -1
    expected = cache.clone()
    kept = slots >= 0
    expected[slots[kept] // 3, slots[kept] % 3] = src[kept]
    args = (rows_arg(src), paged_arg(cache), slots.data_ptr(), num_rows, 2, 10, 3)
    _C.store_kv_cpu(*args, cache.element_size())
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 90])
def test_copy_pages(count: int, dtype: torch.dtype, heads_inside: bool) -> None:
    shape = Shape(page_size=16, dtype=dtype)
    cache = paged_tensor(200, shape, 64, heads_inside=heads_inside)
    pages = torch.randperm(200).to(torch.int32)
    src, dst = pages[:count], pages[100 : 100 + count]
    expected = cache.clone()
    expected[dst.long()] = cache[src.long()]
    args = (paged_arg(cache), src.data_ptr(), dst.data_ptr(), count, 16, 2, 64)
    _C.copy_pages_cpu(*args, cache.element_size())
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_move_slots_reads_before_it_writes(dtype: torch.dtype, heads_inside: bool) -> None:
    shape = Shape(page_size=3, dtype=dtype)
    cache = paged_tensor(8, shape, 5, heads_inside=heads_inside)
    src = torch.tensor([1, 2, 3, 9, 0])
    dst = torch.tensor([0, 1, 2, 3, 20])
    expected = cache.clone()
    expected[dst // 3, dst % 3] = cache[src // 3, src % 3]
    args = (paged_arg(cache), src.data_ptr(), dst.data_ptr(), 5, 3, 2, 5)
    _C.move_slots_cpu(*args, cache.element_size())
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("num_states", [1, 2, 9])
def test_merge_states(num_states: int) -> None:
    torch.manual_seed(num_states)
    out = torch.randn(num_states, 50, 3, 40)
    lse = 20 * torch.randn(num_states, 50, 3)
    lse[torch.rand_like(lse) < 0.3] = -torch.inf
    lse[:, 0] = -torch.inf
    out[lse == -torch.inf] = 0
    merged, merged_lse = torch.full((50, 3, 40), NAN), torch.full((50, 3), NAN)
    args = (out.data_ptr(), lse.data_ptr(), num_states, 50, 3, 40, merged.data_ptr(), merged_lse.data_ptr())
    _C.merge_states_cpu(*args)

    def dense(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.logsumexp(lse.to(dtype), 0)
        weights = torch.exp(lse.to(dtype) - torch.where(total == -torch.inf, 0, total))
        return (weights[..., None] * out.to(dtype)).sum(0), total

    oracle, reference = dense(torch.float64), dense(torch.float32)
    assert_close_to_oracle(merged, oracle[0], reference[0])
    assert_close_to_oracle(merged_lse, oracle[1], reference[1], name="lse")
