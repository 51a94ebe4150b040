"""Merging attention states over disjoint sets of keys: one program a row and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fork_attn.kernels.tiles import LOG2E, end_rows


@triton.jit
def merge_states_kernel(
    out, lse, merged, merged_lse, num_states, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """States in index order; those with lse -inf are empty, whatever `out` holds there."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = row < num_rows
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    for s in range(0, num_states):
        at = tl.zeros([BLOCK_ROWS], tl.int64) + s
        state = tl.load(lse + at * num_rows + row, mask=ok, other=-float("inf"))
        top = tl.maximum(top, state * LOG2E)
    origin = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for s in range(0, num_states):
        at = (tl.zeros([BLOCK_ROWS], tl.int64) + s) * num_rows + row
        state = tl.load(lse + at, mask=ok, other=-float("inf"))
        weight = tl.exp2(state * LOG2E - origin)
        mask = (ok & (state > -float("inf")))[:, None] & (d < D)[None, :]
        values = tl.load(out + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += weight
        acc += weight[:, None] * values.to(tl.float32)
    factor, row_lse = end_rows(top, total, top, False)
    where = merged + row.to(tl.int64)[:, None] * D + d[None, :]
    values = (acc * factor[:, None]).to(merged.dtype.element_ty)
    tl.store(where, values, mask=ok[:, None] & (d < D)[None, :])
    tl.store(merged_lse + row, row_lse, mask=ok)


def merge_states(
    out: torch.Tensor, lse: torch.Tensor, merged: torch.Tensor, merged_lse: torch.Tensor
) -> None:
    """One launch: merges states in index order.

    Args:
        out: (num_states, T, num_heads, dim), contiguous.
        lse: (num_states, T, num_heads) fp32, contiguous, natural log.
        merged: (T, num_heads, dim), contiguous, written.
        merged_lse: (T, num_heads) fp32, contiguous, written.
    """
    num_states, rows, heads, dim = out.shape
    if rows * heads == 0:
        return
    block_d = triton.next_power_of_2(dim)
    block_rows = max(1, min(16, 2048 // block_d))
    merge_states_kernel[(triton.cdiv(rows * heads, block_rows),)](
        out, lse, merged, merged_lse, num_states, rows * heads,
        D=dim, BLOCK_D=block_d, BLOCK_ROWS=block_rows, num_warps=4,
    )  # fmt: skip
