"""Checks of what `ops_cache` is called with: paged tensors, slots, scales, tables.

Values are read where they lie on the CPU only: reading a GPU's would wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fork_attn import checks
from fork_attn.kv_library import DTYPE_CODES


def check_cache(name: str, cache: Tensor, device: torch.device | None = None) -> None:
    shape = ("num_pages", "page_size", "num_kv_heads", "dim")
    checks.tensor(name, cache, shape=shape, device=device)
    if cache.dtype not in DTYPE_CODES:
        wanted = "float32, bfloat16, float16 or float8_e4m3fn"
        raise TypeError(f"{name}: expected dtype {wanted}, got {cache.dtype}")
    if cache.shape[0] * cache.shape[1] >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2**31 slots, got shape {tuple(cache.shape)}")


def check_caches(k_cache: Tensor, v_cache: Tensor | None) -> None:
    check_cache("k_cache", k_cache)
    if v_cache is not None:
        shape = (*k_cache.shape[:3], "head_dim_v")
        checks.tensor("v_cache", v_cache, shape=shape, dtype=k_cache.dtype, device=k_cache.device)


def dense_pages(cache: Tensor) -> bool:
    _, page_size, num_heads, dim = cache.shape
    _, slot, head, _ = cache.stride()
    slots_inside = (slot, head) == (dim, page_size * dim)
    heads_inside = (slot, head) == (num_heads * dim, dim)
    return slots_inside or heads_inside


def check_scales(
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    num_heads: int,
    device: torch.device,
    *,
    wanted: bool,
) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not wanted:
            if scale is not None:
                raise ValueError(f"{name}: expected None, as nothing is scaled, got a tensor")
            continue
        if scale is None:
            raise ValueError(f"{name}: expected ({num_heads},) fp32 for e4m3 caches, got None")
        checks.tensor(name, scale, shape=(num_heads,), dtype=torch.float32, device=device)


def check_rope(
    rows_name: str,
    cos: Tensor | None,
    sin: Tensor | None,
    table_rows: Tensor | None,
    count: int,
    k_cache: Tensor,
    start: int,
) -> None:
    device = k_cache.device
    if cos is None or sin is None or table_rows is None:
        raise ValueError(f"cos, sin, {rows_name}: expected all of them or none")
    checks.tensor("cos", cos, shape=("positions", "rotary_dim / 2"), dtype=torch.float32)
    checks.tensor("sin", sin, shape=cos.shape, dtype=torch.float32)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.device != device:
            raise ValueError(f"{name}: expected device {device}, got {table.device}")
        if not table.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous table, got strides {table.stride()}")
    head_dim = k_cache.shape[3]
    checks.integer("rotary_start", start, low=0, high=head_dim - 2)
    most = (head_dim - start) // 2
    if not 1 <= cos.shape[1] <= most:
        raise ValueError(
            f"cos: expected 1 to {most} columns, half of head_dim {head_dim} from {start} on, "
            f"got {cos.shape[1]}"
        )
    checks.tensor(rows_name, table_rows, shape=(count,), dtype=torch.int64, device=device)
    check_range(rows_name, table_rows, 0, cos.shape[0])


def check_slots(
    name: str,
    slots: Tensor,
    count: int | str,
    cache: Tensor,
    *,
    padding: bool,
    distinct: bool,
) -> int:
    checks.tensor(name, slots, shape=(count,), dtype=torch.int64, device=cache.device)
    check_range(name, slots, None if padding else 0, cache.shape[0] * cache.shape[1])
    if distinct:
        check_distinct(name, slots, padding=padding)
    return slots.shape[0]


def check_range(name: str, values: Tensor, low: int | None, end: int) -> None:
    if values.device.type != "cpu" or values.numel() == 0:
        return
    least, most = (int(x) for x in values.aminmax())
    if most >= end or (low is not None and least < low):
        got = most if most >= end else least
        first = "negative for padding, or 0" if low is None else low
        raise ValueError(f"{name}: expected {first} to {end - 1}, got {got}")


def check_distinct(name: str, values: Tensor, *, padding: bool = False) -> None:
    """On a GPU nothing is looked at: that would wait for it. Negative values are `padding`."""
    if values.device.type != "cpu":
        return
    ordered = (values[values >= 0] if padding else values).sort().values
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if again.numel():
        raise ValueError(f"{name}: expected each at most once, got {int(again[0])} twice")
