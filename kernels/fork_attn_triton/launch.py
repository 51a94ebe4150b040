"""Launches the tree attention kernel over a plan."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from fork_attn.devices import current
from fork_attn.errors import Unsupported
from fork_attn.kernels.bodies import (
    APART_ROWS,
    APART_WARPS,
    Body,
    Merge,
    choose_body,
    constants,
    invariant_rows,
    invariant_tokens,
    merge_constants,
    padded,
)
from fork_attn.kernels.check_pages import BLOCK, PROGRAMS, check_pages_kernel
from fork_attn.kernels.merge import merge_kernel
from fork_attn.kernels.tree_attention import tree_attention_kernel

MAX_HEAD_DIM = 256
FP8 = torch.float8_e4m3fn
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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


@functools.cache
def shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a program may have on a CUDA device; None under the interpreter:
    what cards of its compute capability have."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the attribute
    return int(properties.shared_memory_per_block_optin)


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
        use_tma: load whole tiles by descriptors; None: where that applies (`tma_applies`), but not
            for fp32.
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
    sizes = (head_dim, head_dim_v, q.element_size(), k_cache.element_size())
    body = choose_body(rows, *sizes, sm, shared_memory(q.device))
    applies = not batch_invariant and tma_applies(k_cache, v_cache, body, sm)
    if use_tma and not applies:
        raise ValueError("use_tma: descriptors cannot load these tensors (see tma_applies)")
    # Compiled with descriptors, fp32 spills in its loops; with pointers it does not.
    tma = applies and q.dtype != torch.float32 if use_tma is None else use_tma
    values = constants(
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
        far_heads=(q.shape[1] - 1) * q.stride(1) >= 2**31,
    )
    with current(q.device):  # Triton compiles for and launches on that one, wherever tensors lie
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
            num_stages=body.stages,
            enable_fp_fusion=not batch_invariant,
            **values,
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


def check_pages(plan: torch.Tensor, pages: torch.Tensor, num_pages: int, page_size: int) -> None:
    """Looks on the device at every page that a plan names: one outside the pool, or a run outside
    the lists, fails a device-side assertion (InterpreterError under `testing.triton_interpreter`).

    Args:
        plan: (words,) int64 on the device.
        pages: (n,) int32: physical pages, which the plan's runs index.
        num_pages: of the pool, each of `page_size` slots.
    """
    with current(plan.device):
        check_pages_kernel[(PROGRAMS,)](
            plan, pages, pages.numel(), num_pages, PAGE_SIZE=page_size, BLOCK=BLOCK
        )


def _descriptor(cache: torch.Tensor, body: Body) -> Any:
    """A paged tensor as rows of one pitch, loaded a tile at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    slot, dim = cache.stride(1), cache.shape[3]
    return TensorDescriptor(cache, [num_rows(cache), dim], [slot, 1], [body.slots, dim])
