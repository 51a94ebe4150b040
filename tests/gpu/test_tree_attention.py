"""The Triton kernel on a card: the interpreter's matrix, and what the interpreter cannot show."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from plan_cases import NAN, RandomPlan, Shape
from triton_cases import FP8, TritonCase, triton_case

from fork_attn.kernels import launch
from fork_attn.kernels.tree_attention import tree_attention_kernel
from fork_attn.plan_format import DIAGONAL, GATHER, header, sections
from fork_attn.testing.planbuf import BlockSpec, RunSpec, build_plan

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP32, None), (BF16, None), (FP16, None), (BF16, FP8), (FP16, FP8)]
IDS = ["fp32", "bf16", "fp16", "bf16-e4m3", "fp16-e4m3"]
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


def sm() -> int:
    return launch.compute_capability(torch.device("cuda", torch.cuda.current_device()))


def needs_fp8(kv_dtype: torch.dtype | None) -> None:
    if kv_dtype == FP8 and sm() < 89:
        pytest.skip(f"no e4m3 on sm_{sm()}")


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=IDS)
@pytest.mark.parametrize("seed", range(12))
def test_random_plans(seed: int, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    needs_fp8(kv_dtype)
    rng = random.Random(seed)
    dims = rng.choice(DIMS)
    shape = Shape(
        page_size=rng.choice([1, 3, 16, 64]),
        group=rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 16]),
        num_kv_heads=rng.choice([1, 2, 8]),
        head_dim=dims[0],
        head_dim_v=dims[1],
        dtype=dtype,
    )
    tokens = rng.randint(1, 100)
    plan = RandomPlan(rng, shape, num_tokens=tokens, max_slots=rng.choice([20, 700])).build()
    case = triton_case(
        shape,
        plan,
        kv_dtype=kv_dtype,
        heads_inside=rng.random() < 0.5,
        device="cuda",
        programs=rng.choice([1, 7, 132]),
        rows=tokens + rng.choice([0, 3]),
        padding=rng.choice([0, 40]),
    )
    case.softcap = rng.choice([None, 2.0])
    case.sinks = torch.randn(case.q.shape[1]) if rng.random() < 0.4 else None
    case.check()


def large_case(shape: Shape, *, tokens: int, **options: object) -> TritonCase:
    """Rows over a long context cut into many items, and runs of every kind."""
    page_size = shape.page_size
    items, page = [], 0
    for index in range(24):
        pages = list(range(page, page + 4 * 64 // page_size))
        page += len(pages)
        items.append([RunSpec(pages, 4 * 64 - 5 * (index % 3), mask=-1 if index % 4 else 0b1011)])
    own = list(range(page, page + 1 + tokens // page_size))
    page += len(own)
    items[-1].append(RunSpec(own, tokens, kind=DIAGONAL, diag=1))
    slots = [page * page_size + 2 * i for i in range(page_size // 2)]
    items[0].append(RunSpec(slots, len(slots), kind=GATHER, words=[0b101] * len(slots)))
    block = BlockSpec(list(range(tokens)), list(range(tokens)), items)
    sizes = {"num_tokens": tokens, "group": shape.group, "page_size": page_size}
    plan = build_plan([block], **sizes)
    return triton_case(shape, plan, device="cuda", programs=132, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_every_body(rows: int, page_size: int) -> None:
    shape = Shape(page_size, 4, 8, 128, 128, dtype=BF16)
    case = large_case(shape, tokens=rows // 4)
    assert launch.choose_body(rows, 128, 128, 2, 2, sm()).rows == rows
    case.check()


def _kernels() -> list[object]:
    """Compiled specialisations so far, on this device."""
    caches = tree_attention_kernel.device_caches[torch.cuda.current_device()]
    return list(caches[0].values())


@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "descriptors"])
def test_the_path_that_was_asked_for_is_the_one_that_ran(use_tma: bool) -> None:
    if use_tma and sm() < 90:
        pytest.skip("descriptors load pages from sm_90 on")
    before = len(_kernels())
    case = large_case(Shape(64, 4, 3, 64, 64, dtype=FP16), tokens=16, use_tma=use_tma)
    case.check()
    new = _kernels()[before:]
    assert len(new) == 1
    assert ("cp.async.bulk.tensor" in new[0].asm["ptx"]) == use_tma  # type: ignore[attr-defined]
    if sm() == 90:
        assert "wgmma" in new[0].asm["ptx"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_a_row_does_not_see_cannot_reach_it(value: float) -> None:
    shape = Shape(16, 2, 1, 64, 64, dtype=BF16)
    runs = [RunSpec([0, 1, 2, 3, 4], 70), RunSpec([5], 4, mask=0b001), RunSpec([6], 4, mask=0b110)]
    block = BlockSpec([0, 1, 2], [0, 0, 0], [runs])
    plan = build_plan([block], num_tokens=3, group=2, page_size=16)
    case = triton_case(shape, plan, device="cuda")
    clean, _ = case.run()
    case.v[5, 2, 0, 3] = value
    out, _ = case.run()
    torch.testing.assert_close(out[1:], clean[1:], rtol=0, atol=1e-2)
    assert not out[0].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 9, 32])
def test_a_hundred_runs_give_the_same_bits(tokens: int) -> None:
    """Whichever program arrives last, partial results are merged in the plan's order."""
    case = large_case(Shape(16, 4, 8, 128, 128, dtype=BF16), tokens=tokens)
    case.check()
    out, lse = case.run()
    for _ in range(100):
        again = case.run()
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_a_captured_launch_serves_another_plan() -> None:
    """One graph, a plan in a buffer of fixed size: counts are read on the device."""
    shape = Shape(16, 4, 2, 64, 64, dtype=FP16)
    rng = random.Random(0)
    plans = [RandomPlan(rng, shape, num_tokens=20, max_slots=300).build() for _ in range(4)]
    cases = [triton_case(shape, plan, device="cuda") for plan in plans]
    pages = max(case.k.shape[0] for case in cases)
    words = max(len(plan) for plan in plans)
    heads = cases[0].q.shape[1]
    cuda = torch.device("cuda")
    buffer = torch.zeros(words, dtype=torch.int64, device=cuda)
    page_list = torch.zeros(4096, dtype=torch.int32, device=cuda)
    q = torch.zeros(20, heads, 64, dtype=FP16, device=cuda)
    k, v = (torch.zeros(pages, 2, 16, 64, dtype=FP16, device=cuda).transpose(1, 2) for _ in "kv")
    out, lse = torch.empty_like(q), torch.empty(20, heads, device=cuda)
    rows = max(header(plan).num_partial_rows for plan in plans)
    work = launch.Workspace.allocate(rows, 20, heads, 2, 64, cuda)

    def call() -> None:
        launch.tree_attention(
            q, k, v, buffer, page_list, out, lse, work, num_programs=132, max_block_tokens=20,
            page_size=16, group=4, window=1, softmax_scale=0.125, softcap=0.0, sinks=None,
            k_scale=None, v_scale=None,
        )  # fmt: skip

    def load(case: TritonCase) -> None:
        buffer[: len(case.plan)].copy_(case.plan)
        listed = sections(case.plan).pages
        page_list[: len(listed)].copy_(listed)
        q.copy_(case.q)
        for cache, new in ((k, case.k), (v, case.v)):
            cache.fill_(NAN)
            cache[: new.shape[0]].copy_(new)

    load(cases[0])
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for case in cases:
        load(case)
        graph.replay()
        oracle, _ = case.dense(torch.float64)
        torch.testing.assert_close(out.cpu().double(), oracle, rtol=0, atol=2e-3)
