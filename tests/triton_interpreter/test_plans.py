"""Tree attention on plans made by hand: every feature against the float64 oracle."""

from __future__ import annotations

import random

import pytest
import torch
from plan_cases import NAN, RandomPlan, Shape
from triton_cases import FP8, TritonCase, triton_case

from fork_attn.kernels import bodies, launch
from fork_attn.plan_format import DIAGONAL, FULL, GATHER, PER_SLOT, WINDOW, header
from fork_attn.testing.planbuf import ALL_TOKENS, BlockSpec, RunSpec, build_plan
from fork_attn.testing.triton_interpreter import program_order

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP32, None), (BF16, None), (FP16, None), (BF16, FP8), (FP16, FP8)]
IDS = ["fp32", "bf16", "fp16", "bf16-e4m3", "fp16-e4m3"]


def random_case(seed: int, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> TritonCase:
    rng = random.Random(seed)
    shape = Shape(
        page_size=rng.choice([1, 3, 16, 64]),
        group=rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 16]),
        num_kv_heads=rng.choice([1, 1, 2]),
        head_dim=rng.choice([8, 16, 64]),
        head_dim_v=rng.choice([8, 24, 64]),
        dtype=dtype,
    )
    tokens, slots = rng.randint(1, 50), rng.choice([20, 150])
    plan = RandomPlan(rng, shape, num_tokens=tokens, max_slots=slots).build()
    case = triton_case(
        shape,
        plan,
        kv_dtype=kv_dtype,
        heads_inside=rng.random() < 0.5,
        programs=rng.choice([1, 2, 5]),
        rows=tokens + rng.choice([0, 2]),
        padding=rng.choice([0, 40]),
        merge=rng.choice(["inside", "apart"]),
    )
    case.softcap = rng.choice([None, None, 2.0])
    case.sinks = torch.randn(case.q.shape[1]) if rng.random() < 0.4 else None
    return case


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=IDS)
@pytest.mark.parametrize("seed", range(5))
def test_random_plans(seed: int, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    random_case(100 * DTYPES.index((dtype, kv_dtype)) + seed, dtype, kv_dtype).check()


def one_block(shape: Shape, tokens: int, runs: list[RunSpec], **options: int) -> torch.Tensor:
    block = BlockSpec(list(range(tokens)), list(range(100, 100 + tokens)), [runs])
    sizes = {"num_tokens": tokens, "group": shape.group, "page_size": shape.page_size}
    return build_plan([block], **sizes, **options)


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group(group: int) -> None:
    shape = Shape(page_size=16, group=group, num_kv_heads=1, head_dim=16, head_dim_v=16, dtype=BF16)
    tokens = min(64, 128 // group)
    runs = [RunSpec(range(5), 70, kind=FULL), RunSpec([5], 9, mask=0b10110)]
    triton_case(shape, one_block(shape, tokens, runs)).check()


@pytest.mark.parametrize(
    "dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (8, 40)], ids=str
)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    shape = Shape(3, 5, 1, *dims, dtype=dtype)
    runs = [RunSpec(range(30), 80, 1), RunSpec(range(30, 33), 7, kind=DIAGONAL, diag=2)]
    triton_case(shape, one_block(shape, 9, runs)).check()


@pytest.mark.parametrize(
    "kind", [FULL, DIAGONAL, WINDOW, PER_SLOT, DIAGONAL | WINDOW, PER_SLOT | WINDOW, GATHER]
)
@pytest.mark.parametrize("tokens", [7, 33, 64])
def test_kinds_of_runs(kind: int, tokens: int) -> None:
    """Runs of several tiles at odd offsets, words of up to 64 tokens."""
    shape = Shape(16, 2, 1, 16, 16, dtype=BF16)
    rng = random.Random(kind + tokens)
    worded = kind & (PER_SLOT | GATHER)
    words = [rng.choice([0, ALL_TOKENS, rng.getrandbits(64)]) for _ in range(205)] if worded else []
    pages = rng.sample(range(14 if kind != GATHER else 224), 14 if kind != GATHER else 205)
    first_slot = 0 if kind == GATHER else 11
    options = {"first_position": 20, "diag": 140, "words": words}
    run = RunSpec(pages, 205, first_slot, kind=kind, **options)  # type: ignore[arg-type]
    triton_case(shape, one_block(shape, tokens, [run], window=50)).check()


@pytest.mark.parametrize("window", [3, 2**31 - 1])
def test_positions_and_windows_up_to_the_largest(window: int) -> None:
    shape = Shape(16, 2, 1, 16, 16, dtype=BF16)
    runs = [RunSpec([0], 9, first_position=2**31 - 9, kind=WINDOW), RunSpec([1], 7, kind=WINDOW)]
    block = BlockSpec([0, 1], [2**31 - 2, 5], [runs])
    plan = build_plan([block], num_tokens=2, group=2, page_size=16, window=window)
    triton_case(shape, plan).check()


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["bf16", "e4m3"])
def test_descriptors_load_whole_tiles(page_size: int, kv_dtype: torch.dtype | None) -> None:
    shape = Shape(page_size, 4, 2, 64, 64, dtype=BF16)
    runs = [
        RunSpec([3, 1, 4, 0], 200, 30),
        RunSpec([2], 50, 0, mask=0b101),
        RunSpec([6, 5], page_size + 3, 0, kind=DIAGONAL, diag=page_size + 1),
    ]
    plan = one_block(shape, 6, runs)
    for use_tma in (True, False):
        triton_case(shape, plan, kv_dtype=kv_dtype, use_tma=use_tma).check()


def test_descriptors_are_refused_where_they_cannot_load() -> None:
    shape = Shape(16, 4, 1, 64, 64, dtype=BF16)
    case = triton_case(shape, one_block(shape, 2, [RunSpec([0], 5)]), use_tma=True)
    with pytest.raises(ValueError, match="descriptors cannot load"):
        case.run()


class TestMerging:
    SHAPE = Shape(16, 3, 1, 16, 16, dtype=FP32)
    BF16_SHAPE = Shape(16, 3, 2, 16, 16, dtype=BF16)

    def plan(self, rng: random.Random, *, span_items: int = 1) -> torch.Tensor:
        """30 rows, in items of several blocks."""
        blocks, page = [], 0
        for _ in range(3):
            rows = rng.sample(range(30), rng.randint(5, 25))
            items = []
            for _ in range(rng.randint(1, 3)):
                items.append([RunSpec([page, page + 1], 20, mask=rng.getrandbits(64))])
                page += 2
            blocks.append(BlockSpec(rows, [0] * len(rows), items))
        return build_plan(blocks, num_tokens=30, group=3, page_size=16, span_items=span_items)

    @pytest.mark.parametrize("programs", [1, 3, 100])
    def test_any_number_of_programs_and_any_order_give_the_same_bits(self, programs: int) -> None:
        rng = random.Random(programs)
        case = triton_case(self.BF16_SHAPE, self.plan(rng, span_items=2), programs=programs)
        case.sinks = torch.randn(6)
        case.check()
        expected = case.run()
        for order in (lambda n: range(n)[::-1], lambda n: rng.sample(range(n), n)):
            with program_order(order):
                for got, want in zip(case.run(), expected, strict=True):
                    assert torch.equal(got, want)

    def test_a_launch_that_merges_alone_gives_the_same_bits(self) -> None:
        """Also where some rows have no partial rows, and where the output has more rows."""
        case = triton_case(self.BF16_SHAPE, self.plan(random.Random(7), span_items=1), rows=33)
        case.sinks = torch.randn(6)
        expected = case.run()
        case.merge = "apart"
        case.check()
        for got, want in zip(case.run(), expected, strict=True):
            assert torch.equal(got, want)

    def test_who_merges(self) -> None:
        assert bodies.choose_merge(0, 4, 128) == "none"
        assert bodies.choose_merge(10 * 9, 4, 128) == "inside"
        assert bodies.choose_merge(10 * 16, 4, 128) == "apart"
        assert bodies.choose_merge(1, 1, 64, batch_invariant=True) == "apart"
        assert bodies.choose_merge(0, 1, 64, batch_invariant=True) == "none"

    def test_blocks_above_a_tile_merge_in_chunks(self) -> None:
        """fp32 tiles have 16 rows: heads of a token fall into two chunks."""
        rows = list(range(11))
        items = [[RunSpec([0], 9)], [RunSpec([1], 16, mask=0x5A5)], [RunSpec([2], 3)]]
        plan = build_plan([BlockSpec(rows, rows, items)], num_tokens=11, group=3, page_size=16)
        case = triton_case(self.SHAPE, plan)
        assert launch.choose_body(60, 16, 16, 4, 4, 90).rows == 16
        case.check()

    def test_empty_partial_results(self) -> None:
        items = [[RunSpec([0], 9, mask=0b01)], [RunSpec([1], 16, mask=0b01)], []]
        plan = build_plan([BlockSpec([2, 0], [0, 0], items)], num_tokens=3, group=3, page_size=16)
        case = triton_case(self.SHAPE, plan, programs=2)
        case.check()
        assert case.run()[1][1].eq(-torch.inf).all()
        case.sinks = torch.randn(3)
        case.check()


def test_rotated_queries() -> None:
    """Queries from rows behind the step's, results to the step's rows."""
    shape = Shape(16, 2, 1, 16, 16, dtype=BF16)
    blocks = [
        BlockSpec([0, 1, 2], [5, 6, 7], [[RunSpec([0], 12)]], q_rows=[3, 1, 4]),
        BlockSpec([1, 2], [6, 7], [[RunSpec([1], 16)]]),
    ]
    rotations = [(0, 5), (2, 9)]
    plan = build_plan(blocks, num_tokens=3, group=2, page_size=16, rotations=rotations)
    case = triton_case(shape, plan)
    case.q = torch.randn(5, 2, 16).to(BF16)
    out, lse = case.run()
    # Each output row is the merge of its items, each with its own query row.
    keys, values = case.k.flatten(0, 1).double()[:, 0], case.v.flatten(0, 1).double()[:, 0]
    for row, parts in enumerate([[(3, range(12))], [(1, range(12)), (1, range(16, 32))],
                                 [(4, range(12)), (2, range(16, 32))]]):  # fmt: skip
        q = case.q.double()
        s = torch.cat([q[r] @ keys[list(slots)].T * case.scale for r, slots in parts], -1)
        v = torch.cat([values[list(slots)] for _, slots in parts])
        torch.testing.assert_close(out[row].double(), s.softmax(-1) @ v, rtol=0, atol=2e-2)
        torch.testing.assert_close(lse[row].double(), s.logsumexp(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_a_row_does_not_see_cannot_reach_it(value: float, which: str) -> None:
    """One branch's overflow stays its own, in a tile that others share."""
    shape = Shape(16, 2, 1, 16, 16, dtype=BF16)
    runs = [RunSpec([0, 1, 2, 3, 4], 70), RunSpec([5], 4, mask=0b001), RunSpec([6], 4, mask=0b110)]
    case = triton_case(shape, one_block(shape, 3, runs))
    clean_out, clean_lse = case.run()
    (case.k if which == "k" else case.v)[5, 2, 0, 3] = value
    out, lse = case.run()
    torch.testing.assert_close(out[1:], clean_out[1:], rtol=0, atol=1e-2)
    torch.testing.assert_close(lse[1:], clean_lse[1:], rtol=0, atol=1e-4)
    if which == "v":
        assert not out[0].isfinite().all()


def test_a_padded_buffer_and_padded_rows() -> None:
    shape = Shape(16, 2, 2, 16, 16, dtype=FP16)
    plan = one_block(shape, 3, [RunSpec([0, 1], 20)])
    for sinks in (None, torch.randn(4)):
        case = triton_case(shape, plan, rows=9, padding=100, programs=4)
        case.sinks = sinks
        case.check()


def test_an_empty_plan() -> None:
    shape = Shape(16, 2, 1, 16, 16, dtype=FP32)
    case = triton_case(shape, build_plan([], num_tokens=2, group=2, page_size=16))
    case.check()
    assert header(case.plan).num_items == 1


def test_a_page_out_of_range_is_found() -> None:
    shape = Shape(16, 2, 1, 16, 16, dtype=FP32)
    case = triton_case(shape, one_block(shape, 2, [RunSpec([0, 1], 20)]))
    case.k, case.v = case.k[:1].clone(), case.v[:1].clone()
    with pytest.raises(Exception, match="out of bounds"):
        case.run()


def test_heads_of_queries_may_lie_far_apart() -> None:
    """As in a transposed q of many tokens: 2**31 elements from the first head to the last one."""
    shape = Shape(16, 3, 1, 16, 16, dtype=FP16)
    case = triton_case(shape, one_block(shape, 2, [RunSpec([0, 1], 20)]))
    far = 2**30 + 16
    storage = torch.empty(2 * far + 2 * 16, dtype=FP16)  # no memory but for the rows below
    case.q = storage.as_strided(case.q.shape, (16, far, 1)).copy_(case.q)
    assert case.q.stride(1) * 2 > 2**31
    case.check()


def test_descriptors_are_not_chosen_for_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with them, it spills; asked for, they work."""
    made = []
    monkeypatch.setattr(launch, "_descriptor", lambda cache, _: made.append(cache.dtype))
    for dtype, use_tma, expected in ((FP32, None, 0), (FP32, True, 2), (FP16, None, 2)):
        made.clear()
        shape = Shape(64, 2, 1, 16, 16, dtype=dtype)
        case = triton_case(shape, one_block(shape, 2, [RunSpec([0], 9)]), use_tma=use_tma)
        case.run()
        assert len(made) == expected
