"""Operations on paged K and V, checked: storing, gathering, copying, moving, turning to other
positions. Tensors lie on the CPU or on one GPU.

Slots are numbered page * page_size + offset. Slots, pages and rows of tables that lie on the CPU are
checked by value; on a GPU that would wait for the device, so there they are the caller's word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fork_attn import checks, kv_checks
from fork_attn.kv_library import DTYPE_CODES

MAX_MOVES = 3072  # csrc/cuda/cache_kernels.h


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Writes rows of K and V to slots of their caches, in one launch; K rotated on the way where a
    table is given, both quantised where the caches are e4m3.

    Rotation is in fp32, one rounding per operation, and rounds once to the cache's dtype. Quantised
    caches hold x / scale, computed as x * (1 / scale) in fp32, rounded to the nearest e4m3 value, ties
    to even, saturated at 448; NaN stays NaN.

    Args:
        k: (T, num_kv_heads, head_dim), fp32, bf16 or fp16.
        v: (T, num_kv_heads, head_dim_v), likewise.
        k_cache: (num_pages, page_size, num_kv_heads, head_dim), the dtype of `k`, or float8_e4m3fn.
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v), likewise.
        slot_mapping: (T,) int64; rows with a negative slot are left out (padding). None twice.
        k_scale: (num_kv_heads,) fp32, for e4m3 caches.
        v_scale: (num_kv_heads,) fp32, for e4m3 caches.
        cos: (positions, rotary_dim / 2) fp32, contiguous: rotary embeddings of the first rotary_dim
            elements of K (RoFormer, arXiv 2104.09864); scaled variants are in the table. None: `k` is
            rotated already.
        sin: likewise.
        position_ids: (T,) int64, rows of the table.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride, slot or position is off; nothing was
            written.
        Unsupported: the caches lie on a GPU and this build has no device code.
    """
    kv_checks.check_caches(k_cache, v_cache)
    heads, device = k_cache.shape[2], k_cache.device
    rows = checks.tensor("k", k, shape=("T", heads, k_cache.shape[3]), device=device).shape[0]
    checks.tensor("v", v, shape=(rows, heads, v_cache.shape[3]), dtype=k.dtype, device=device)
    quantised = k_cache.dtype == torch.float8_e4m3fn
    if quantised and k.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"k: expected dtype float32, bfloat16 or float16, got {k.dtype}")
    if not quantised and k.dtype != k_cache.dtype:
        raise TypeError(f"k: expected the caches' dtype {k_cache.dtype}, got {k.dtype}")
    kv_checks.check_scales(k_scale, v_scale, heads, device, wanted=quantised)
    kv_checks.check_slots("slot_mapping", slot_mapping, rows, k_cache, padding=True, distinct=True)
    if cos is not None or sin is not None or position_ids is not None:
        kv_checks.check_rope("position_ids", cos, sin, position_ids, rows, k_cache)
    torch.ops.fork_attn.store_kv(
        *(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale),
        *(cos, sin, position_ids, interleaved),
    )


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """K and V of some slots as dense tensors, for export and for other libraries.

    Args:
        k_cache: (num_pages, page_size, num_kv_heads, head_dim).
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v), the same dtype.
        slots: (N,) int64; a negative slot gives a row of zeros.
        k_scale: (num_kv_heads,) fp32, where e4m3 caches become another dtype.
        v_scale: likewise.
        dtype: None keeps the caches'; e4m3 caches also give float32, bfloat16 and float16.

    Returns:
        (N, num_kv_heads, head_dim) and (N, num_kv_heads, head_dim_v), contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or slot is off.
        Unsupported: the caches lie on a GPU and this build has no device code.
    """
    kv_checks.check_caches(k_cache, v_cache)
    cached = k_cache.dtype
    if dtype is not None and dtype != cached:
        if cached != torch.float8_e4m3fn or dtype not in DTYPE_CODES:
            raise TypeError(f"dtype: expected None or {cached}, got {dtype}")
        kv_checks.check_scales(k_scale, v_scale, k_cache.shape[2], k_cache.device, wanted=True)
    else:
        kv_checks.check_scales(k_scale, v_scale, k_cache.shape[2], k_cache.device, wanted=False)
    kv_checks.check_slots("slots", slots, "N", k_cache, padding=True, distinct=False)
    result: tuple[Tensor, Tensor] = torch.ops.fork_attn.gather_kv(
        k_cache, v_cache, slots, k_scale, v_scale, dtype
    )
    return result


def shift_rope(
    k_cache: Tensor,
    v_cache: Tensor | None,
    src_slots: Tensor,
    dst_slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    table_rows: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Turns rotated K by a distance in position, from slots to other slots or in place.

    Rotations add up, so K at position p turned by row d of the table is K at position p + d. The table
    holds cosines and sines of d * frequency alone: what a scaled variant multiplies K with (YaRN's
    attention factor) is in K already. A row for a negative distance has negative sines. Arithmetic is
    that of `store_kv`. e4m3 K is turned as it is and keeps its scale; it saturates at 448.

    Args:
        k_cache: (num_pages, page_size, num_kv_heads, head_dim), any dtype of the cache.
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v): V is copied along. None: K alone.
        src_slots: (N,) int64.
        dst_slots: (N,) int64, distinct; dst_slots[i] may be src_slots[i] (in place) but no other
            source slot.
        cos: (distances, rotary_dim / 2) fp32, contiguous.
        sin: likewise.
        table_rows: (N,) int64, which row of the table turns each slot.
        interleaved: see `store_kv`.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride, slot or row is off; nothing was written.
        Unsupported: the caches lie on a GPU and this build has no device code.
    """
    kv_checks.check_caches(k_cache, v_cache)
    count = kv_checks.check_slots(
        "src_slots", src_slots, "N", k_cache, padding=False, distinct=False
    )
    kv_checks.check_slots("dst_slots", dst_slots, count, k_cache, padding=False, distinct=True)
    if src_slots.device.type == "cpu":
        elsewhere = dst_slots[src_slots != dst_slots]
        overlap = elsewhere[torch.isin(elsewhere, src_slots)]
        if overlap.numel():
            raise ValueError(
                f"dst_slots: expected none of the other source slots, got {int(overlap[0])}"
            )
    kv_checks.check_rope("table_rows", cos, sin, table_rows, count, k_cache)
    torch.ops.fork_attn.shift_rope(
        k_cache, v_cache, src_slots, dst_slots, cos, sin, table_rows, interleaved
    )


def copy_pages(caches: Sequence[Tensor], src_pages: Tensor, dst_pages: Tensor) -> None:
    """Copies whole pages within each of several caches: copy-on-write and compaction of all layers
    and branches in one launch (per 256 caches on a GPU).

    Args:
        caches: paged tensors (num_pages, page_size, num_kv_heads, dim) of one device, in each of which
            a page's elements lie together.
        src_pages: (N,) int32.
        dst_pages: (N,) int32, distinct, none of them in `src_pages`.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or page is off; nothing was copied.
        Unsupported: the caches lie on a GPU and this build has no device code.
    """
    if not caches:
        raise ValueError("caches: expected at least one, got none")
    for cache in caches:
        kv_checks.check_cache("caches", cache, device=caches[0].device)
        if not kv_checks.dense_pages(cache):
            raise ValueError(
                f"caches: expected pages whose elements lie together, got strides {cache.stride()}"
            )
    device, limit = caches[0].device, min(cache.shape[0] for cache in caches)
    shape: tuple[str | int, ...] = ("N",)
    for name, pages in (("src_pages", src_pages), ("dst_pages", dst_pages)):
        checks.tensor(name, pages, shape=shape, dtype=torch.int32, device=device)
        kv_checks.check_range(name, pages, 0, limit)
        shape = (pages.shape[0],)
    kv_checks.check_distinct("dst_pages", dst_pages)
    if device.type == "cpu" and bool(torch.isin(dst_pages, src_pages).any()):
        page = int(dst_pages[torch.isin(dst_pages, src_pages)][0])
        raise ValueError(f"dst_pages: expected none of the source pages, got {page}")
    torch.ops.fork_attn.copy_pages(list(caches), src_pages, dst_pages)


def move_slots(caches: Sequence[Tensor], src_slots: Tensor, dst_slots: Tensor) -> None:
    """Moves slots within each of several caches; all are read before any is written, so that a path of
    accepted draft tokens may move over itself.

    Args:
        caches: paged tensors (num_pages, page_size, num_kv_heads, dim) of one device and page size.
        src_slots: (N,) int64; on a GPU at most 3072.
        dst_slots: (N,) int64, distinct.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or slot is off; nothing was moved.
        Unsupported: the caches lie on a GPU and this build has no device code.
    """
    if not caches:
        raise ValueError("caches: expected at least one, got none")
    first = caches[0]
    for cache in caches:
        kv_checks.check_cache("caches", cache, device=first.device)
        if cache.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"caches: expected {first.shape[0]} pages of {first.shape[1]} in each, "
                f"got {cache.shape[0]} of {cache.shape[1]}"
            )
    count = kv_checks.check_slots("src_slots", src_slots, "N", first, padding=False, distinct=False)
    kv_checks.check_slots("dst_slots", dst_slots, count, first, padding=False, distinct=True)
    if first.device.type != "cpu" and count > MAX_MOVES:
        raise ValueError(f"src_slots: expected at most {MAX_MOVES} on a GPU, got {count}")
    torch.ops.fork_attn.move_slots(list(caches), src_slots, dst_slots)
