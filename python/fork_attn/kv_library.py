"""Torch ops that move K and V, for tensors of CPUs and GPUs: definitions, kernels, fakes. Nothing
is checked here; `fork_attn.ops_cache` has the checked calls and says what each does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fork_attn import _C

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
}

_library = torch.library.Library("fork_attn", "FRAGMENT")


def where(t: Tensor) -> tuple[int, int]:
    """Where kernels on a tensor run: (-1, 0) for the CPU, else its device and current stream."""
    if t.device.type == "cpu":
        return (-1, 0)
    return (t.device.index, torch.cuda.current_stream(t.device).cuda_stream)


def rows_argument(t: Tensor) -> tuple[int, int, int]:
    """A (rows, heads, dim) tensor as the kernels take it: pointer, strides of row and head."""
    row, head, _ = t.stride()
    return (t.data_ptr(), row, head)


def paged_argument(cache: Tensor) -> tuple[int, int, int, int]:
    """A paged tensor as the kernels take it: pointer, and strides of page, slot and head."""
    page, slot, head, _ = cache.stride()
    return (cache.data_ptr(), page, slot, head)


def pointer(t: Tensor | None) -> int:
    """Where a tensor's data lie, 0 for None."""
    return 0 if t is None else t.data_ptr()


def _rope_argument(
    cos: Tensor | None,
    sin: Tensor | None,
    table_rows: Tensor | None,
    interleaved: bool,
    start: int,
) -> tuple[int, int, int, int, int, bool]:
    if cos is None:
        return (0, 0, 0, 0, 0, False)
    rotary_dim = 2 * cos.shape[1]
    return (cos.data_ptr(), pointer(sin), pointer(table_rows), rotary_dim, start, interleaved)


def _store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    table_rows: Tensor | None = None,
    interleaved: bool = False,
    rotary_start: int = 0,
) -> None:
    _C.store_kv(
        where(k_cache),
        rows_argument(k),
        rows_argument(v),
        paged_argument(k_cache),
        paged_argument(v_cache),
        slot_mapping.data_ptr(),
        (pointer(k_scale), pointer(v_scale)),
        _rope_argument(cos, sin, table_rows, interleaved, rotary_start),
        (k.shape[0], k.shape[1], k.shape[2], v.shape[2], k_cache.shape[1]),
        (DTYPE_CODES[k_cache.dtype], DTYPE_CODES[k.dtype]),
    )


def _new_rows(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    return (
        k_cache.new_empty((slots.shape[0], *k_cache.shape[2:]), dtype=dtype),
        v_cache.new_empty((slots.shape[0], *v_cache.shape[2:]), dtype=dtype),
    )


def _gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    k, v = _new_rows(k_cache, v_cache, slots, dtype)
    _C.gather_kv(
        where(k_cache),
        paged_argument(k_cache),
        paged_argument(v_cache),
        rows_argument(k),
        rows_argument(v),
        slots.data_ptr(),
        (pointer(k_scale), pointer(v_scale)),
        (k.shape[0], k.shape[1], k.shape[2], v.shape[2], k_cache.shape[1]),
        (DTYPE_CODES[k_cache.dtype], DTYPE_CODES[k.dtype]),
    )
    return k, v


def _gather_kv_fake(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, *_: object, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    return _new_rows(k_cache, v_cache, slots, dtype)


def _shift_rope(
    k_cache: Tensor,
    v_cache: Tensor | None,
    src_slots: Tensor,
    dst_slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    table_rows: Tensor,
    interleaved: bool = False,
    rotary_start: int = 0,
) -> None:
    _, page_size, num_heads, head_dim = k_cache.shape
    _C.shift_rope(
        where(k_cache),
        paged_argument(k_cache),
        (0, 0, 0, 0) if v_cache is None else paged_argument(v_cache),
        src_slots.data_ptr(),
        dst_slots.data_ptr(),
        _rope_argument(cos, sin, table_rows, interleaved, rotary_start),
        (
            len(src_slots),
            num_heads,
            head_dim,
            0 if v_cache is None else v_cache.shape[3],
            page_size,
        ),
        DTYPE_CODES[k_cache.dtype],
    )


def _copy_pages(caches: Sequence[Tensor], src_pages: Tensor, dst_pages: Tensor) -> None:
    if not caches:
        return
    spans = [
        (t.data_ptr(), t.stride(0) * t.element_size(), t[0].numel() * t.element_size())
        for t in caches
    ]
    _C.copy_pages(
        where(caches[0]), spans, src_pages.data_ptr(), dst_pages.data_ptr(), len(src_pages)
    )


def _slot_span(cache: Tensor) -> tuple[int, int, int, int, int, int]:
    size = cache.element_size()
    page, slot, head, _ = (stride * size for stride in cache.stride())
    return (cache.data_ptr(), page, slot, head, cache.shape[2], cache.shape[3] * size)


def _move_slots(caches: Sequence[Tensor], src_slots: Tensor, dst_slots: Tensor) -> None:
    if not caches:
        return
    _C.move_slots(
        where(caches[0]),
        [_slot_span(cache) for cache in caches],
        caches[0].shape[1],
        src_slots.data_ptr(),
        dst_slots.data_ptr(),
        len(src_slots),
    )


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _define(
    name: str,
    kernel: Callable[..., object],
    written: tuple[str, ...],
    fake: Callable[..., object] = _nothing,
) -> None:
    """An op with the signature of its kernel, which writes to the arguments named."""
    _library.define(name + torch.library.infer_schema(kernel, mutates_args=written))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"fork_attn::{name}", fake, lib=_library)


_define("store_kv", _store_kv, ("k_cache", "v_cache"))
_define("gather_kv", _gather_kv, (), _gather_kv_fake)
_define("shift_rope", _shift_rope, ("k_cache", "v_cache"))
_define("copy_pages", _copy_pages, ("caches",))
_define("move_slots", _move_slots, ("caches",))
