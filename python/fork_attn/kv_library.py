"""Torch ops that move K and V, for tensors of CPUs and GPUs: definitions, kernels, fakes. Nothing is
checked here; `fork_attn.ops_cache` has the checked calls and says what each does."""

from __future__ import annotations

from collections.abc import Sequence

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
_library.define(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? cos=None, Tensor? sin=None, "
    "Tensor? table_rows=None, bool interleaved=False) -> ()"
)
_library.define(
    "gather_kv(Tensor k_cache, Tensor v_cache, Tensor slots, Tensor? k_scale=None, "
    "Tensor? v_scale=None, ScalarType? dtype=None) -> (Tensor, Tensor)"
)
_library.define(
    "shift_rope(Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor src_slots, Tensor dst_slots, "
    "Tensor cos, Tensor sin, Tensor table_rows, bool interleaved=False) -> ()"
)
_library.define("copy_pages(Tensor(a!)[] caches, Tensor src_pages, Tensor dst_pages) -> ()")
_library.define("move_slots(Tensor(a!)[] caches, Tensor src_slots, Tensor dst_slots) -> ()")


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


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rope_argument(
    cos: Tensor | None, sin: Tensor | None, table_rows: Tensor | None, interleaved: bool
) -> tuple[int, int, int, int, bool]:
    if cos is None:
        return (0, 0, 0, 0, False)
    return (cos.data_ptr(), _pointer(sin), _pointer(table_rows), 2 * cos.shape[1], interleaved)


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
) -> None:
    _C.store_kv(
        where(k_cache),
        rows_argument(k),
        rows_argument(v),
        paged_argument(k_cache),
        paged_argument(v_cache),
        slot_mapping.data_ptr(),
        (_pointer(k_scale), _pointer(v_scale)),
        _rope_argument(cos, sin, table_rows, interleaved),
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
        (_pointer(k_scale), _pointer(v_scale)),
        (k.shape[0], k.shape[1], k.shape[2], v.shape[2], k_cache.shape[1]),
        (DTYPE_CODES[k_cache.dtype], DTYPE_CODES[k.dtype]),
    )
    return k, v


def _gather_kv_fake(
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
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
) -> None:
    _, page_size, num_heads, head_dim = k_cache.shape
    _C.shift_rope(
        where(k_cache),
        paged_argument(k_cache),
        (0, 0, 0, 0) if v_cache is None else paged_argument(v_cache),
        src_slots.data_ptr(),
        dst_slots.data_ptr(),
        _rope_argument(cos, sin, table_rows, interleaved),
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


for _name, _kernel, _fake in (
    ("store_kv", _store_kv, _nothing),
    ("gather_kv", _gather_kv, _gather_kv_fake),
    ("shift_rope", _shift_rope, _nothing),
    ("copy_pages", _copy_pages, _nothing),
    ("move_slots", _move_slots, _nothing),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"fork_attn::{_name}", _fake, lib=_library)
