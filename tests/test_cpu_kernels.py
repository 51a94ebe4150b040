"""tree_attention on the CPU against a float64 oracle, on random plans with poisoned memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from plan_cases import DTYPES, NAN, RandomPlan, Shape, make_case, random_shape

from fork_attn.plan_format import DIAGONAL
from fork_attn.testing.planbuf import ALL_TOKENS, BlockSpec, RunSpec, build_plan


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(40))
def test_random_plans(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = random_shape(rng, dtype)
    num_tokens = rng.choice([1, 2, 5, 30, 100])
    most = rng.choice([3, 90, 300])
    plan = RandomPlan(rng, shape, num_tokens=num_tokens, max_slots=most, rotate=True).build()
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
    """One key: the output is its V, whatever the 16 bits. Two equal keys: the rounded mean."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    dim = len(values) // 8
    shape = Shape(1, 1, 1, 8, dim, dtype)
    blocks = [BlockSpec([t], [0], [[RunSpec([t], 1)]]) for t in range(8)]
    case = make_case(shape, build_plan(blocks, num_tokens=8, group=1, page_size=1))
    case.v[:8] = values[: 8 * dim].view(8, 1, 1, dim)
    assert torch.equal(case.run()[0].view(8, dim), values[: 8 * dim].view(8, dim))

    blocks = [BlockSpec([0], [0], [[RunSpec([0, 1], 2)]])]
    case = make_case(shape, build_plan(blocks, num_tokens=1, group=1, page_size=1))
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
