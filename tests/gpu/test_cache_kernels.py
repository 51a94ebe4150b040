"""The cache's kernels on a real GPU: the same bits as on the CPU, which torch's arithmetic has
checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fork_attn as fa
from fork_attn import _C, ops_cache

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A part of each, also run under compute-sanitizer.
SMALL = pytest.mark.sanitized
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _C.cuda_info()["built"],
    reason="no CUDA device, or no device code in this build",
)


def paged(num_pages: int, page_size: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random bits, every NaN and subnormal among them, on the CPU."""
    shape = (num_pages, heads, page_size, dim * dtype.itemsize)
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype).transpose(1, 2)


def table(rows: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(rows, half) * 6.3
    return angle.cos(), angle.sin()


def on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        # `.to` keeps strides of dense tensors, transposed ones too.
        return value.to("cuda")
    if isinstance(value, list):
        return [on_gpu(x) for x in value]
    return value


def assert_same(cpu: Tensor, gpu: Tensor) -> None:
    """The same bits, but for the sign and payload of NaN."""
    assert cpu.dtype == gpu.dtype
    back = gpu.cpu()
    unlike = cpu.contiguous().view(BITS[cpu.element_size()]) != back.contiguous().view(
        BITS[cpu.element_size()]
    )
    assert not (unlike & ~(cpu.float().isnan() & back.float().isnan()).view(unlike.shape)).any()


def both(name: str, arguments: dict[str, Any], changed: list[str]) -> None:
    """Runs an op on the CPU and on the GPU and compares what it returns and what it changes."""
    device = {key: on_gpu(value) for key, value in arguments.items()}
    results = [getattr(ops_cache, name)(**arguments), getattr(ops_cache, name)(**device)]
    torch.cuda.synchronize()
    for cpu, gpu in zip(*(r or () for r in results), strict=True):
        assert_same(cpu, gpu)
    for key in changed:
        cpu, gpu = arguments[key], device[key]
        for x, y in zip(
            cpu if isinstance(cpu, list) else [cpu],
            gpu if isinstance(gpu, list) else [gpu],
            strict=True,
        ):
            assert_same(x, y)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 128, 32, 6])
@pytest.mark.parametrize("cached", [None, FP8], ids=["same", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [pytest.param(1, marks=SMALL), 3000])
def test_store_kv(
    num_rows: int,
    dtype: torch.dtype,
    cached: torch.dtype | None,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    k, v = (paged(num_rows, 1, 8, dim, dtype).squeeze(1) for dim in (128, 80))
    k_cache, v_cache = (paged(200, 16, 8, dim, cached or dtype) for dim in (128, 80))
    slots = torch.randperm(3200)[:num_rows]
    slots[num_rows // 2] = -1
    arguments = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots}
    if cached:
        arguments |= {"k_scale": torch.rand(8) + 0.01, "v_scale": torch.rand(8) + 0.01}
    if rotary_dim:
        cos, sin = table(500, rotary_dim // 2)
        arguments |= {"cos": cos, "sin": sin, "interleaved": interleaved}
        arguments |= {"position_ids": torch.randint(0, 500, (num_rows,))}
        arguments |= {"rotary_start": 0 if rotary_dim == 128 else 16}
    both("store_kv", arguments, ["k_cache", "v_cache"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_quantised_as_on_the_cpu(dtype: torch.dtype) -> None:
    k = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(512, 1, 128)
    k_cache, v_cache = (paged(32, 16, 1, 128, FP8) for _ in range(2))
    arguments = {"k": k, "v": k, "k_cache": k_cache, "v_cache": v_cache}
    arguments |= {"slot_mapping": torch.randperm(512)}
    arguments |= {"k_scale": torch.tensor([0.37]), "v_scale": torch.ones(1)}
    both("store_kv", arguments, ["k_cache", "v_cache"])


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("cached", [*DTYPES, FP8])
@pytest.mark.parametrize("dim", [128, pytest.param(7, marks=SMALL)])
def test_gather_kv(cached: torch.dtype, dtype: torch.dtype | None, dim: int) -> None:
    if dtype is not None and cached != FP8:
        pytest.skip("only e4m3 caches become another dtype")
    k_cache, v_cache = (paged(100, 16, 3, d, cached) for d in (dim, 64))
    arguments: dict[str, Any] = {"k_cache": k_cache, "v_cache": v_cache, "dtype": dtype}
    arguments["slots"] = torch.randint(-1, 1600, (700,))
    if dtype is not None:
        arguments |= {"k_scale": torch.rand(3), "v_scale": torch.rand(3)}
    both("gather_kv", arguments, [])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [128, 32, pytest.param(6, marks=SMALL)])
@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_shift_rope(dtype: torch.dtype, with_v: bool, rotary_dim: int, interleaved: bool) -> None:
    k_cache, v_cache = (paged(200, 16, 8, dim, dtype) for dim in (128, 80))
    slots = torch.randperm(3200)
    src, dst = slots[:900], slots[900:1800].clone()
    dst[::3] = src[::3]
    cos, sin = table(50, rotary_dim // 2)
    arguments = {
        "k_cache": k_cache,
        "v_cache": v_cache if with_v else None,
        "src_slots": src,
        "dst_slots": dst,
        "cos": cos,
        "sin": sin,
        "table_rows": torch.randint(0, 50, (900,)),
        "interleaved": interleaved,
    }
    both("shift_rope", arguments, ["k_cache", "v_cache"] if with_v else ["k_cache"])


@pytest.mark.parametrize("num_layers", [pytest.param(1, marks=SMALL), 32, 140])
def test_copy_pages_of_all_layers(num_layers: int) -> None:
    """Two caches a layer; 140 layers take two launches."""
    caches = [
        paged(64, 16, heads, dim, torch.bfloat16)
        for heads, dim in ((4, 64), (1, 7))
        for _ in range(num_layers)
    ]
    pages = torch.randperm(64).to(torch.int32)
    arguments = {"caches": caches, "src_pages": pages[:20], "dst_pages": pages[30:50]}
    both("copy_pages", arguments, ["caches"])


@SMALL
@pytest.mark.parametrize("count", [1, 5, 3072])
def test_move_slots_over_each_other(count: int) -> None:
    caches = [paged(200, 16, heads, dim, FP8) for heads, dim in ((2, 128), (3, 5))]
    arguments = {
        "caches": caches,
        "src_slots": torch.randperm(3200)[:count],
        "dst_slots": torch.randperm(3200)[:count],
    }
    both("move_slots", arguments, ["caches"])


@SMALL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [128, 7])
def test_merge_states(dtype: torch.dtype, dim: int) -> None:
    out = torch.randn(9, 50, 3, dim).to(dtype)
    lse = 20 * torch.randn(9, 50, 3)
    lse[torch.rand_like(lse) < 0.3] = -torch.inf
    lse[:, 0] = -torch.inf
    out[lse == -torch.inf] = torch.nan
    expected, expected_lse = fa.merge_states(out, lse)
    merged, merged_lse = fa.merge_states(out.cuda(), lse.cuda())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(merged.cpu(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(merged_lse.cpu(), expected_lse, rtol=0, atol=1e-5)


def test_kernels_run_on_the_current_stream() -> None:
    """A write on a side stream behind a long kernel is seen by what follows on that stream."""
    cache = torch.zeros(8, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(16, 2, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        ops_cache.store_kv(k, k, cache, cache.clone(), slots)
        copied = cache[0].clone()
    stream.synchronize()
    assert torch.equal(copied, k)


def test_cuda_graphs_capture_them() -> None:
    cache, other = (torch.zeros(8, 16, 2, 64, device="cuda", dtype=FP8) for _ in range(2))
    k = torch.randn(4, 2, 64, device="cuda")
    slots, scale = torch.arange(4, device="cuda"), torch.ones(2, device="cuda")
    pages = torch.tensor([0, 5], dtype=torch.int32, device="cuda")

    def work() -> None:
        ops_cache.store_kv(k, k, cache, other, slots, k_scale=scale, v_scale=scale)
        ops_cache.copy_pages([cache, other], pages[:1], pages[1:])

    work()  # kernels are loaded at their first launch
    for x in (cache, other):
        x.view(torch.uint8).zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    assert not cache.view(torch.uint8).any()
    k.copy_(torch.randn(4, 2, 64))
    graph.replay()
    assert torch.equal(cache[0, :4].float(), k.clamp(-448, 448).to(FP8).float())
    assert torch.equal(cache[5].view(torch.uint8), cache[0].view(torch.uint8))
