"""Chooses the body of the tree attention kernel for a plan, and launches it."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fork_attn.errors import Unsupported
from fork_attn.kernels.merge import merge_kernel
from fork_attn.kernels.tree_attention import tree_attention_kernel

MAX_HEAD_DIM = 256
# A launch that merges alone: rows and warps of a program, partial rows of a row loaded at once.
APART_ROWS, APART_WARPS, APART_AT_ONCE = 4, 4, 16
# Partial results that a program merges by itself, at most: beyond, a launch of its own is expected
# to take less time (docs/kernels/tree_attention.md).
MOST_MERGED_BYTES = 192 * 1024
FP8 = torch.float8_e4m3fn
Merge = Literal["inside", "apart", "none"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Body:
    """How one compiled kernel tiles its work."""

    rows: int  # query rows (tokens x group) of a tile
    slots: int  # KV slots of a tile
    warps: int
    stages: int  # tiles of K and V in flight


@dataclass(frozen=True)
class Workspace:
    """Memory that launches on one stream share; the kernel leaves the counters at zero."""

    partial_out: torch.Tensor  # (partial rows, num_q_heads, head_dim_v) fp32
    partial_lse: torch.Tensor  # (partial rows, num_q_heads) fp32
    counters: torch.Tensor  # (T, num_kv_heads) int32, zero before the first launch

    @classmethod
    def allocate(
        cls,
        num_partial_rows: int,
        num_tokens: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim_v: int,
        device: torch.device,
    ) -> Workspace:
        """Room for plans of so many partial rows and tokens."""
        rows = (num_partial_rows, num_q_heads)
        return cls(
            torch.empty((*rows, head_dim_v), dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.zeros((num_tokens, num_kv_heads), dtype=torch.int32, device=device),
        )


def choose_body(
    rows: int, head_dim: int, head_dim_v: int, itemsize: int, kv_itemsize: int, sm: int
) -> Body:
    """The body for row blocks of up to `rows` rows (tokens x group).

    The least of 16, 32, 64 and 128 rows that holds a block, so that K and V are read once. Where
    registers do not allow that, the block takes several passes: fp32 (no tensor cores at full
    precision) above 16 rows, heads above 128 at 128 rows. Tiles of 128 rows take 8 warps; so do
    64 rows of heads above 128 and, for its registers, on sm_100. Tiles have 64 slots, 32 for fp32
    and, for heads above 128, on sm_80, whose shared memory two stages of 64 do not fit.

    Args:
        itemsize: bytes of an element of q.
        kv_itemsize: bytes of an element of K and V.
        sm: compute capability, 80, 90, ...
    """
    widest = max(head_dim, head_dim_v)
    most = 128
    if itemsize == 4:
        most = 16
    elif widest > 128:
        most = 64
    tile = next(size for size in (16, 32, 64, 128) if size >= min(rows, most))
    warps = 8 if tile == 128 or (tile == 64 and (widest > 128 or sm >= 100)) else 4
    slots = 32 if itemsize == 4 or (widest > 128 and sm < 90) else 64
    stage = slots * (padded(head_dim) + padded(head_dim_v)) * kv_itemsize
    budget = 160 * 1024 if sm < 90 else 220 * 1024
    fixed = tile * padded(head_dim) * itemsize + tile * slots * itemsize
    stages = max(1, min(3, (budget - fixed) // stage))
    return Body(tile, slots, warps, stages)


def invariant_rows(sm: int) -> int:
    """Rows of the one body of batch-invariant launches: what a block of the planner's may hold; on
    sm_100, where that body spills in its loops, half of it, in two passes."""
    return 128 if sm < 100 else 64


def invariant_tokens(group: int, max_block_tokens: int) -> int:
    """Tokens of a block that batch-invariant launches are compiled for: what the planner puts into
    one at most, whatever this plan does.

    Raises:
        ValueError: the plan is not one of the planner's for a GPU.
    """
    most = max(1, min(64, 128 // group))
    if max_block_tokens > most:
        raise ValueError(f"max_block_tokens: expected at most {most}, got {max_block_tokens}")
    return most


def choose_merge(
    max_merge_rows: int, group: int, head_dim_v: int, batch_invariant: bool = False
) -> Merge:
    """Who merges: nobody where there are no partial rows, the last program to arrive unless that is
    too much for one, else a launch of its own.

    Args:
        max_merge_rows: partial rows that one program would merge for one KV head, at most.
        batch_invariant: merged in one place, whatever else is in the batch.
    """
    if max_merge_rows == 0:
        return "none"
    size = max_merge_rows * group * (head_dim_v + 1) * 4
    return "apart" if batch_invariant or size > MOST_MERGED_BYTES else "inside"


def padded(dim: int) -> int:
    """The tile width of a head dimension: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def tma_applies(k_cache: torch.Tensor, v_cache: torch.Tensor, body: Body, sm: int) -> bool:
    """Whether descriptors can load K and V: sm_90 on, pages of whole tiles, unpadded heads, rows of
    one pitch that begin on 16 bytes, fewer than 2**31 of them."""
    if sm < 90 or k_cache.shape[1] % body.slots != 0:
        return False
    for cache in (k_cache, v_cache):
        page, slot, head, _ = cache.stride()
        dim, size = cache.shape[3], cache.element_size()
        if dim != padded(dim) or cache.data_ptr() % 16 or slot * size % 16 or slot < dim:
            return False
        if page % slot or head % slot or num_rows(cache) >= 2**31:
            return False
    return True


def num_rows(cache: torch.Tensor) -> int:
    """Rows, one slot stride apart, from the first to the last of a paged tensor."""
    page, slot, head, _ = cache.stride()
    num_pages, page_size, num_heads, _ = cache.shape
    return 1 + ((num_pages - 1) * page + (page_size - 1) * slot + (num_heads - 1) * head) // slot


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Of a CUDA device: 80, 90, ...; under the interpreter, which runs on the CPU, 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_supported(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, head_dims: tuple[int, int]
) -> None:
    """Raises Unsupported, by name, for what the kernel cannot do.

    Args:
        dtype: of q.
        kv_dtype: of K and V.
        head_dims: of K and of V.
    """
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise Unsupported(
            f"backend 'triton' cannot attend on {device}: expected a CUDA device, or the CPU with "
            "TRITON_INTERPRET=1 set before Triton is imported"
        )
    for name, dim in zip(("head_dim", "head_dim_v"), head_dims, strict=True):
        if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            expected = f"a multiple of 8 up to {MAX_HEAD_DIM}"
            raise Unsupported(f"{name}: backend 'triton' expected {expected}, got {dim}")
    if kv_dtype == FP8 and compute_capability(device) < 89:
        raise Unsupported(
            "k_cache: backend 'triton' reads float8_e4m3fn from sm_89 on, got "
            f"sm_{compute_capability(device)}"
        )


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: Workspace,
    *,
    num_programs: int,
    max_block_tokens: int,
    page_size: int,
    group: int,
    window: int,
    softmax_scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    use_tma: bool | None = None,
    merge: Merge = "inside",
    batch_invariant: bool = False,
) -> None:
    """Attention over a plan, partial results merged in the same launch or in one behind it.

    Args:
        q: (rows, num_q_heads, head_dim); the step's rows, then those that the plan's rotations add.
        k_cache: (num_pages, page_size, num_kv_heads, head_dim), last dimension contiguous.
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v), likewise.
        plan: (words,) int64 on the device; may be longer than the plan that it holds.
        pages: (n,) int32: physical pages, which the plan's runs index.
        out: (T, num_q_heads, head_dim_v) contiguous, written. Rows past the plan's get 0.
        lse: (T, num_q_heads) fp32 contiguous, written; rows past the plan's get -inf or the sink.
        workspace: at least the plan's partial rows, and T rows of counters.
        num_programs: of the grid.
        max_block_tokens: no row block of the plan has more tokens.
        page_size, group, window: the plan's.
        softmax_scale, softcap: softcap 0 means none.
        sinks: (num_q_heads,) fp32 or None.
        k_scale, v_scale: (num_kv_heads,) fp32 factors of K and V, or None.
        use_tma: load whole tiles by descriptors; None: where that applies (`tma_applies`).
        merge: the last program to arrive merges ("inside"), or a launch of its own ("apart"; see
            `choose_merge`); "none": the plan has no partial rows.
        batch_invariant: the plan is, and a row's bits are to be: one body whatever the plan holds,
            and no multiplication fused with an addition behind the kernel's back.

    Raises:
        Unsupported: see `check_supported`.
        ValueError: `use_tma` where it does not apply, or `out` is not contiguous.
    """
    head_dim, head_dim_v = q.shape[2], v_cache.shape[3]
    if not (out.is_contiguous() and lse.is_contiguous()):
        raise ValueError("out, lse: expected contiguous tensors")
    check_supported(q.device, q.dtype, k_cache.dtype, (head_dim, head_dim_v))
    sm = compute_capability(q.device)
    if batch_invariant:
        max_block_tokens = invariant_tokens(group, max_block_tokens)
    rows = invariant_rows(sm) if batch_invariant else max_block_tokens * group
    body = choose_body(
        rows, head_dim, head_dim_v, q.element_size(), k_cache.element_size(), sm
    )
    applies = not batch_invariant and tma_applies(k_cache, v_cache, body, sm)
    if use_tma and not applies:
        raise ValueError("use_tma: descriptors cannot load these tensors (see tma_applies)")
    tma = applies if use_tma is None else use_tma
    tree_attention_kernel[(num_programs,)](
        q,
        k_cache,
        v_cache,
        _descriptor(k_cache, body) if tma else None,
        _descriptor(v_cache, body) if tma else None,
        plan,
        pages,
        out,
        lse,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.counters,
        sinks,
        k_scale,
        v_scale,
        out.shape[0],
        *q.stride()[:2],
        softmax_scale,
        softcap,
        num_warps=body.warps,
        enable_fp_fusion=not batch_invariant,
        **constants(
            body,
            num_kv_heads=k_cache.shape[2],
            k_strides=k_cache.stride()[:3],
            v_strides=v_cache.stride()[:3],
            group=group,
            page_size=page_size,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            max_block_tokens=max_block_tokens,
            window=window > 0,
            softcap=softcap > 0,
            sinks=sinks is not None,
            k_scale=k_scale is not None,
            v_scale=v_scale is not None,
            tma=tma,
            fp32=q.dtype == torch.float32,
            sm=sm,
            merge=merge,
            batch_invariant=batch_invariant,
        ),
    )
    if merge == "apart":
        num_q_heads = group * k_cache.shape[2]
        merge_kernel[(-(-out.shape[0] * num_q_heads // APART_ROWS),)](
            plan,
            out,
            lse,
            workspace.partial_out,
            workspace.partial_lse,
            sinks,
            num_warps=APART_WARPS,
            enable_fp_fusion=not batch_invariant,
            **merge_constants(num_q_heads, head_dim_v, sinks is not None, batch_invariant),
        )


def constants(
    body: Body,
    *,
    num_kv_heads: int,
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    group: int,
    page_size: int,
    head_dim: int,
    head_dim_v: int,
    max_block_tokens: int,
    window: bool,
    softcap: bool,
    sinks: bool,
    k_scale: bool,
    v_scale: bool,
    tma: bool,
    fp32: bool,
    sm: int,
    merge: Merge,
    batch_invariant: bool,
) -> dict[str, Any]:
    """The kernel's compile-time arguments; strides are those of page, slot and head."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "K_STRIDES": tuple(k_strides),
        "V_STRIDES": tuple(v_strides),
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "D": head_dim,
        "DV": head_dim_v,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(head_dim_v),
        "BLOCK_M": body.rows,
        "BLOCK_N": body.slots,
        "BLOCK_T": 32 if max_block_tokens <= 32 else 64,
        "WIDE": max_block_tokens > 32,
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "HAS_SINKS": sinks,
        "HAS_K_SCALE": k_scale,
        "HAS_V_SCALE": v_scale,
        "TMA": tma,
        "STAGES": body.stages,
        "PRECISION": "ieee" if fp32 else "tf32",
        # A function with products of warpgroups makes the caller wait for each of its own (ptxas,
        # C7510), and one that uses tensor memory cannot be called (Triton 3.6).
        "CALLS": not (batch_invariant and sm >= 90 and body.rows >= 64),
        "INVARIANT": batch_invariant,
        "MERGE": merge == "inside",
        "MERGE_ROWS": min(body.rows, 4 * body.warps),
    }


def merge_constants(
    num_q_heads: int, head_dim_v: int, sinks: bool, batch_invariant: bool
) -> dict[str, Any]:
    """The merging kernel's compile-time arguments."""
    return {
        "NUM_Q_HEADS": num_q_heads,
        "DV": head_dim_v,
        "BLOCK_DV": padded(head_dim_v),
        "ROWS": APART_ROWS,
        "AT_ONCE": APART_AT_ONCE,
        "HAS_SINKS": sinks,
        "INVARIANT": batch_invariant,
    }


def _descriptor(cache: torch.Tensor, body: Body) -> Any:
    """A paged tensor as rows of one pitch, loaded a tile at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    slot, dim = cache.stride(1), cache.shape[3]
    return TensorDescriptor(cache, [num_rows(cache), dim], [slot, 1], [body.slots, dim])
