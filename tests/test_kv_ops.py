"""store_kv, gather_kv, shift_rope, copy_pages and move_slots: bit for bit what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fork_attn import _C, DeviceError, Unsupported, ops_cache

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(BITS[t.element_size()])


def paged(num_pages: int, page_size: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random bits in the cache's layout: heads outside slots."""
    shape = (num_pages, heads, page_size, dim * dtype.itemsize)
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype).transpose(1, 2)


def table(rows: int, rotary_dim: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of row * frequency, times what a scaled variant multiplies K with."""
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * frequency
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, interleaved: bool, start: int = 0
) -> Tensor:
    """Rotary embeddings in fp32 by torch, one rounding per operation; the rest as it is."""
    half = cos.shape[1]
    c, s = cos[rows][:, None], sin[rows][:, None]
    out = x.float().clone()
    part = out[..., start : start + 2 * half]
    first = slice(0, None, 2) if interleaved else slice(0, half)
    second = slice(1, None, 2) if interleaved else slice(half, None)
    a, b = part[..., first].clone(), part[..., second].clone()
    part[..., first] = a * c - b * s
    part[..., second] = b * c + a * s
    return out


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * (1 / scale)[:, None]).clamp(-448, 448).to(FP8)


def by_slot(cache: Tensor, slots: Tensor) -> Tensor:
    return cache[slots // cache.shape[1], slots % cache.shape[1]]


def assert_bits(got: Tensor, expected: Tensor) -> None:
    """The same bits, but for the payload of NaN."""
    assert got.dtype == expected.dtype
    unlike = bits(got) != bits(expected)
    nan = got.float().isnan() & expected.float().isnan()
    assert not (unlike & ~nan.view(unlike.shape)).any()


def all_values(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_quantised_as_torch_does(dtype: torch.dtype) -> None:
    """Subnormals, saturation (Inf too) and NaN among them."""
    k = all_values(dtype).view(512, 1, 128)
    k_cache, v_cache = (paged(32, 16, 1, 128, FP8) for _ in range(2))
    scale = torch.tensor([0.37])
    slots = torch.randperm(512)
    ops_cache.store_kv(k, k, k_cache, v_cache, slots, k_scale=scale, v_scale=torch.ones(1))
    assert_bits(by_slot(k_cache, slots), quantised(k, scale))
    assert_bits(by_slot(v_cache, slots), quantised(k, torch.ones(1)))


def test_wide_fp32_values_are_quantised_as_torch_does() -> None:
    exponents = torch.randint(-160, 128, (700, 2, 144), dtype=torch.float64)
    k = ((1 + torch.rand(exponents.shape)) * 2.0**exponents).float()
    k *= torch.randint(0, 2, k.shape) * 2 - 1
    ties = torch.arange(0, 2**20, 2**16).to(torch.int32) + torch.tensor(0x3F80 << 16)
    k[0, 0, :16] = ties.to(torch.int32).view(torch.float32)
    k[1, 0, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    k[2, 0, :5] = torch.tensor([448.0, 464.0, 465.0, 2**-10, 3 * 2**-11])
    k_cache, v_cache = (paged(50, 16, 2, 144, FP8) for _ in range(2))
    slots, scale = torch.randperm(800)[:700], torch.ones(2)
    ops_cache.store_kv(k, k, k_cache, v_cache, slots, k_scale=scale, v_scale=scale)
    assert_bits(by_slot(k_cache, slots), quantised(k, scale))


def test_every_e4m3_pattern_is_read_as_torch_does() -> None:
    k_cache = torch.arange(256).to(torch.uint8).view(FP8).view(1, 4, 1, 64)
    for dtype in DTYPES:
        k, v = ops_cache.gather_kv(
            *(k_cache, k_cache, torch.arange(4)),
            k_scale=torch.tensor([0.37]),
            v_scale=torch.ones(1),
            dtype=dtype,
        )
        assert_bits(k, (k_cache[0].float() * 0.37).to(dtype))
        assert_bits(v, k_cache[0].to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("rotary_dim", "start"),
    [(128, 0), (32, 0), (64, 64), (32, 48), (6, 0), (32, 3)],
    ids=["full", "first", "last", "middle", "odd", "odd start"],
)
@pytest.mark.parametrize("cached", [None, FP8], ids=["same", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_kv_with_rope(
    dtype: torch.dtype, cached: torch.dtype | None, rotary_dim: int, start: int, interleaved: bool
) -> None:
    k = torch.randn(77, 2, 128).to(dtype)
    k.view(-1)[::1001] = torch.nan
    v = torch.randn(77, 2, 80).to(dtype)
    k_cache, v_cache = (paged(20, 16, 2, dim, cached or dtype) for dim in (128, 80))
    k_before = k_cache.clone()
    cos, sin = table(4096, rotary_dim, scale=1.21)  # as YaRN scales
    positions = torch.randint(0, 4096, (77,))
    slots = torch.randperm(320)[:77]
    slots[5] = -1
    scales = (torch.tensor([0.02, 0.5]), torch.tensor([0.1, 1.0])) if cached else (None, None)
    ops_cache.store_kv(
        *(k, v, k_cache, v_cache, slots),
        **dict(zip(("k_scale", "v_scale"), scales, strict=True)),
        cos=cos,
        sin=sin,
        position_ids=positions,
        interleaved=interleaved,
        rotary_start=start,
    )
    kept = slots >= 0
    turned = rotated(k, cos, sin, positions, interleaved, start)
    if cached:
        expected, expected_v = quantised(turned, scales[0]), quantised(v, scales[1])
    else:
        expected, expected_v = turned.to(dtype), v
    assert_bits(by_slot(k_cache, slots[kept]), expected[kept])
    assert_bits(by_slot(v_cache, slots[kept]), expected_v[kept])
    others = torch.ones(320, dtype=torch.bool)
    others[slots[kept]] = False
    untouched = others.nonzero().flatten()
    assert torch.equal(bits(by_slot(k_cache, untouched)), bits(by_slot(k_before, untouched)))


@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_store_and_gather_keep_every_bit(dtype: torch.dtype) -> None:
    if dtype == FP8:
        k_cache, v_cache = (paged(9, 4, 3, dim, FP8) for dim in (24, 7))
    else:
        k, v = (paged(20, 1, 3, dim, dtype).squeeze(1) for dim in (24, 7))
        k_cache, v_cache = (paged(9, 4, 3, dim, dtype) for dim in (24, 7))
        slots = torch.randperm(36)[:20]
        ops_cache.store_kv(k, v, k_cache, v_cache, slots)
        assert torch.equal(bits(by_slot(k_cache, slots)), bits(k))
        assert torch.equal(bits(by_slot(v_cache, slots)), bits(v))
    read = torch.tensor([3, 35, -1, 3])
    k, v = ops_cache.gather_kv(k_cache, v_cache, read)
    kept = [0, 1, 3]
    assert torch.equal(bits(k[kept]), bits(by_slot(k_cache, read[kept])))
    assert torch.equal(bits(v[kept]), bits(by_slot(v_cache, read[kept])))
    assert not bits(k[2]).any() and not bits(v[2]).any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 16, 32, 5])
@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_shift_rope(dtype: torch.dtype, start: int, interleaved: bool) -> None:
    k_cache, v_cache = (paged(30, 8, 2, dim, dtype) for dim in (64, 48))
    before, before_v = k_cache.clone(), v_cache.clone()
    cos, sin = table(50, 32)
    slots = torch.randperm(240)
    src, dst = slots[:40], slots[40:80].clone()
    dst[::3] = src[::3]  # in place
    rows = torch.randint(0, 50, (40,))
    ops_cache.shift_rope(
        *(k_cache, v_cache, src, dst, cos, sin, rows),
        interleaved=interleaved,
        rotary_start=start,
    )
    source = by_slot(before, src)
    turned = rotated(source, cos, sin, rows, interleaved, start)
    expected = quantised(turned, torch.ones(2)) if dtype == FP8 else turned.to(dtype)
    part = slice(start, start + 32)
    assert_bits(by_slot(k_cache, dst)[..., part], expected[..., part])
    for rest in (slice(0, start), slice(start + 32, None)):
        assert torch.equal(bits(by_slot(k_cache, dst)[..., rest]), bits(source[..., rest]))
    assert torch.equal(bits(by_slot(v_cache, dst)), bits(by_slot(before_v, src)))
    others = torch.ones(240, dtype=torch.bool)
    others[dst] = False
    untouched = others.nonzero().flatten()
    assert torch.equal(bits(by_slot(k_cache, untouched)), bits(by_slot(before, untouched)))


def test_a_shift_is_the_rotation_of_the_later_position() -> None:
    k = torch.randn(16, 2, 64)
    k_cache, v_cache = (torch.zeros(4, 16, 2, 64) for _ in range(2))
    cos, sin = table(200, 64)
    positions = torch.arange(16)
    ops_cache.store_kv(
        *(k, k, k_cache, v_cache, torch.arange(16)), cos=cos, sin=sin, position_ids=positions
    )
    rows = torch.full((16,), 100)
    ops_cache.shift_rope(k_cache, None, torch.arange(16), torch.arange(16), cos, sin, rows)
    expected = rotated(k, cos, sin, positions + 100, False)
    torch.testing.assert_close(k_cache[0], expected, rtol=0, atol=2e-6)
    ops_cache.shift_rope(k_cache, None, torch.arange(16), torch.arange(16), cos, -sin, rows)
    expected = rotated(k, cos, sin, positions, False)
    torch.testing.assert_close(k_cache[0], expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_copy_pages_of_all_layers(dtype: torch.dtype) -> None:
    caches = [paged(200, 16, heads, dim, dtype) for heads, dim in ((2, 64), (1, 7), (3, 80))]
    before = [cache.clone() for cache in caches]
    pages = torch.randperm(200).to(torch.int32)
    src, dst = pages[:90], pages[100:190]
    ops_cache.copy_pages(caches, src, dst)
    for cache, old in zip(caches, before, strict=True):
        expected = bits(old)
        expected[dst.long()] = expected[src.long()]
        assert torch.equal(bits(cache), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_move_slots_reads_before_it_writes(dtype: torch.dtype) -> None:
    caches = [paged(8, 3, heads, dim, dtype) for heads, dim in ((2, 5), (1, 64))]
    before = [cache.clone() for cache in caches]
    src, dst = torch.tensor([1, 2, 3, 9, 0]), torch.tensor([0, 1, 2, 3, 20])
    ops_cache.move_slots(caches, src, dst)
    for cache, old in zip(caches, before, strict=True):
        expected = bits(old)
        expected[dst // 3, dst % 3] = bits(old)[src // 3, src % 3]
        assert torch.equal(bits(cache), expected)


def _arguments() -> dict[str, dict[str, Any]]:
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    k_cache, v_cache = torch.randn(5, 4, 2, 8), torch.randn(5, 4, 2, 4)
    cos, sin = table(10, 8)
    slots = torch.tensor([3, 7, 11])
    paged_args = {"k_cache": k_cache, "v_cache": v_cache}
    rope = {"cos": cos, "sin": sin}
    pages = torch.tensor([0, 1], dtype=torch.int32)
    return {
        "store_kv": {"k": k, "v": v, **paged_args, "slot_mapping": slots, **rope}
        | {"position_ids": torch.tensor([1, 2, 9])},
        "gather_kv": {**paged_args, "slots": slots},
        "shift_rope": {**paged_args, "src_slots": slots, "dst_slots": slots + 1, **rope}
        | {"table_rows": torch.tensor([1, 2, 9])},
        "copy_pages": {"caches": [k_cache, v_cache], "src_pages": pages, "dst_pages": pages + 2},
        "move_slots": {"caches": [k_cache, v_cache], "src_slots": slots, "dst_slots": slots - 1},
    }


Spoil = Callable[[dict[str, Any]], Any]
BAD: list[tuple[str, str, Spoil, type[Exception], str]] = [
    ("store_kv", "k", lambda a: a["k"].half(), TypeError, "dtype"),
    ("store_kv", "k", lambda a: a["k"][:, :1], ValueError, "k: expected shape"),
    ("store_kv", "v", lambda a: a["v"][:2], ValueError, "v: expected shape"),
    ("store_kv", "slot_mapping", lambda a: a["slot_mapping"].int(), TypeError, "slot_mapping"),
    ("store_kv", "slot_mapping", lambda a: a["slot_mapping"] + 9, ValueError, "0 to 19, got 20"),
    ("store_kv", "slot_mapping", lambda a: a["slot_mapping"] * 0 + 3, ValueError, "3 twice"),
    ("store_kv", "position_ids", lambda a: a["position_ids"] + 1, ValueError, "0 to 9, got 10"),
    ("store_kv", "position_ids", lambda a: a["position_ids"] - 2, ValueError, "0 to 9, got -1"),
    ("store_kv", "position_ids", lambda a: None, ValueError, "all of them or none"),
    ("store_kv", "cos", lambda a: a["cos"].double(), TypeError, "cos: expected dtype"),
    ("store_kv", "sin", lambda a: a["sin"][:, :2], ValueError, "sin: expected shape"),
    ("store_kv", "cos", lambda a: torch.zeros(10, 5), ValueError, "sin: expected shape"),
    ("store_kv", "rotary_start", lambda a: 1, ValueError, "cos: expected 1 to 3 columns"),
    ("store_kv", "rotary_start", lambda a: -1, ValueError, "rotary_start: expected 0"),
    ("store_kv", "k_scale", lambda a: torch.ones(2), ValueError, "k_scale: expected None"),
    ("store_kv", "k_cache", lambda a: a["k_cache"].to(FP8), TypeError, "v_cache: expected dtype"),
    ("store_kv", "k_cache", lambda a: a["k_cache"].double(), TypeError, "k_cache: expected dtype"),
    ("gather_kv", "slots", lambda a: a["slots"] + 9, ValueError, "slots: expected"),
    ("gather_kv", "dtype", lambda a: torch.float16, TypeError, "dtype: expected None or"),
    ("gather_kv", "v_scale", lambda a: torch.ones(2), ValueError, "v_scale: expected None"),
    ("shift_rope", "src_slots", lambda a: -a["src_slots"], ValueError, "src_slots: expected 0"),
    ("shift_rope", "dst_slots", lambda a: a["dst_slots"] * 0, ValueError, "dst_slots: .* 0 twice"),
    ("shift_rope", "dst_slots", lambda a: a["src_slots"].roll(1), ValueError, "source slots, got"),
    ("shift_rope", "table_rows", lambda a: a["table_rows"] + 1, ValueError, "got 10"),
    ("copy_pages", "src_pages", lambda a: a["src_pages"].long(), TypeError, "src_pages"),
    ("copy_pages", "dst_pages", lambda a: a["src_pages"].flip(0), ValueError, "source pages, got"),
    ("copy_pages", "dst_pages", lambda a: a["dst_pages"] * 0 + 4, ValueError, "4 twice"),
    ("copy_pages", "dst_pages", lambda a: a["dst_pages"] + 2, ValueError, "0 to 4, got 5"),
    ("copy_pages", "caches", lambda a: [], ValueError, "caches: expected at least one"),
    (
        "copy_pages",
        "caches",
        lambda a: [torch.randn(5, 4, 2, 9)[..., :8]],
        ValueError,
        "elements lie together",
    ),
    ("move_slots", "dst_slots", lambda a: a["dst_slots"] * 0, ValueError, "dst_slots: .* 0 twice"),
    ("move_slots", "src_slots", lambda a: a["src_slots"] - 9, ValueError, "src_slots: expected 0"),
    ("move_slots", "caches", lambda a: [a["caches"][0], a["caches"][1][:4]], ValueError, "pages"),
]


@pytest.mark.parametrize(("name", "argument", "spoil", "error", "message"), BAD)
def test_bad_arguments_change_nothing(
    name: str, argument: str, spoil: Spoil, error: type[Exception], message: str
) -> None:
    arguments = _arguments()[name]
    arguments[argument] = spoil(arguments)
    held = [
        t
        for value in arguments.values()
        for t in (value if isinstance(value, list) else [value])
        if isinstance(t, Tensor)
    ]
    before = [t.clone() for t in held]
    with pytest.raises(error, match=message):
        getattr(ops_cache, name)(**arguments)
    assert all(
        torch.equal(bits(x), bits(y))
        for x, y in zip(held, before, strict=True)
        if x.element_size() < 8
    )


@pytest.mark.parametrize(
    "name", ["store_kv", "shift_rope", "gather_kv", "copy_pages", "move_slots"]
)
def test_good_arguments_are_taken(name: str) -> None:
    getattr(ops_cache, name)(**_arguments()[name])


def test_e4m3_caches_need_scales() -> None:
    arguments = _arguments()["store_kv"]
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].to(FP8)
    with pytest.raises(ValueError, match=r"k_scale: expected \(2,\) fp32"):
        ops_cache.store_kv(**arguments)
    scales = {"k_scale": torch.ones(2), "v_scale": torch.ones(3)}
    with pytest.raises(ValueError, match="v_scale: expected shape"):
        ops_cache.store_kv(**arguments, **scales)


@pytest.mark.parametrize(
    "name", ["store_kv", "shift_rope", "gather_kv", "copy_pages", "move_slots"]
)
def test_no_call_waits_for_a_gpu(name: str) -> None:
    """On tensors of a GPU that hold nothing, whatever depends on their values is refused."""

    def elsewhere(value: Any) -> Any:
        if isinstance(value, list):
            return [elsewhere(x) for x in value]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    with FakeTensorMode():
        arguments = {key: elsewhere(x) for key, x in _arguments()[name].items()}
        getattr(ops_cache, name)(**arguments)


def test_opcheck() -> None:
    arguments = _arguments()
    store = arguments["store_kv"]
    k, v, k_cache, v_cache, slots, cos, sin, rows = store.values()
    ops = torch.ops.fork_attn
    torch.library.opcheck(
        ops.store_kv.default, (k, v, k_cache, v_cache, slots, None, None, cos, sin, rows)
    )
    torch.library.opcheck(ops.gather_kv.default, (k_cache, v_cache, slots))
    torch.library.opcheck(
        ops.shift_rope.default, (k_cache, v_cache, slots, slots + 1, cos, sin, rows)
    )
    pages = torch.tensor([0, 1], dtype=torch.int32)
    torch.library.opcheck(ops.copy_pages.default, ([k_cache, v_cache], pages, pages + 2))
    torch.library.opcheck(ops.move_slots.default, ([k_cache, v_cache], slots, slots - 1))


def test_a_failed_launch_is_a_typed_error() -> None:
    """Without a driver every launch fails; without device code every call says so."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    cache = torch.zeros(64)
    pages = torch.tensor([0, 1], dtype=torch.int32)
    pointers = (pages.data_ptr(), pages.data_ptr() + 4, 1)
    error, message = (
        (DeviceError, "copy_pages: ")
        if _C.cuda_info()["built"]
        else (Unsupported, "no device code")
    )
    with pytest.raises(error, match=message):
        _C.copy_pages((0, 0), [(cache.data_ptr(), 16, 16)], *pointers)
    assert not cache.any()
