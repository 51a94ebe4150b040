"""The oracle: float64 attention with an explicit boolean mask, and the masks that steps stand for.

Slow and plain on purpose; nothing optimised imports it. `tree_attention(backend="reference")` loads
it on call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fork_attn.plan_format import expand_queries, output_rows
from fork_attn.rope import Rope


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query row over the keys that its row of the mask names.

    Args:
        q: (T, num_q_heads, head_dim).
        k: (N, num_kv_heads, head_dim). Keys that no row sees may hold anything, NaN too.
        v: (N, num_kv_heads, head_dim_v).
        mask: (T, N) bool.
        softmax_scale: None means head_dim ** -0.5.
        softcap: scores become softcap * tanh(score / softcap), before the mask.
        sinks: (num_q_heads,) logits that join each row's softmax without a value.
        rows: (T,) int64, the output row of each query row, where several queries are one row's,
            each for other keys; None: one query a row.
        dtype: what everything is computed in; float64 for the oracle, another one for what PyTorch
            reaches in that precision.

    Returns:
        (out, lse): (T, num_q_heads, head_dim_v) and (T, num_q_heads), natural log, sinks included,
            both in `dtype`. A row that sees nothing has out 0, lse -inf (with sinks: lse = sink).
    """
    group = q.shape[1] // k.shape[1]
    seen = mask.any(0)
    mask = mask[:, seen]
    keys = k[seen].to(dtype).repeat_interleave(group, dim=1)
    values = v[seen].to(dtype).repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("thd,nhd->htn", q.to(dtype), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    num_rows = len(q) if rows is None else int(rows.max()) + 1
    if rows is not None:
        merged = scores.new_full((len(scores), num_rows, scores.shape[2]), -torch.inf)
        for row, part in zip(rows.tolist(), scores.unbind(1), strict=True):
            merged[:, row] = torch.maximum(merged[:, row], part)
        scores = merged
    extra = 0 if sinks is None else 1
    if sinks is not None:
        column = sinks.to(dtype)[:, None, None].expand(-1, num_rows, 1)
        scores = torch.cat([scores, column], dim=-1)
    if scores.shape[-1] == 0:
        shape = (num_rows, q.shape[1])
        lse = torch.full(shape, -torch.inf, dtype=dtype)
        return torch.zeros((*shape, v.shape[-1]), dtype=dtype), lse
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse))
    weights = weights[..., : weights.shape[-1] - extra]
    return torch.einsum("htn,nhd->thd", weights, values), lse[..., 0].T


def rerotate(x: torch.Tensor, shift: int, rope: Rope, dtype: torch.dtype) -> torch.Tensor:
    """Rotated vectors (..., dim) as they would be `shift` positions later, as complex numbers."""
    pairs = len(rope.inv_freq)
    if not pairs or not shift:
        return x.to(dtype)
    x = x.to(torch.float64)
    turning = x[..., rope.start : rope.end]
    split = turning.unflatten(-1, (pairs, 2) if rope.interleaved else (2, pairs))
    axis = -1 if rope.interleaved else -2
    angles = shift * torch.tensor(rope.inv_freq, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    z = torch.complex(split.select(axis, 0), split.select(axis, 1)) * turn
    new = torch.stack([z.real, z.imag], axis).flatten(-2)
    return torch.cat([x[..., : rope.start], new, x[..., rope.end :]], -1).to(dtype)


def step_mask(
    context_positions: Sequence[int],
    new_positions: Sequence[int],
    *,
    parents: Sequence[int] | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Which keys one branch's new rows see: its whole context, and of its new tokens those up to
    themselves.

    Args:
        context_positions: of the tokens that the branch saw before the step.
        new_positions: of the step's tokens of this branch.
        parents: of a draft tree; its rows see their ancestors and themselves.
        window: a row sees keys less than this many positions behind it.

    Returns:
        (rows, context + rows) bool.
    """
    rows, past = len(new_positions), len(context_positions)
    mask = torch.zeros(rows, past + rows, dtype=torch.bool)
    mask[:, :past] = True
    for i in range(rows):
        if parents is None:
            mask[i, past : past + i + 1] = True
            continue
        at = i
        while at >= 0:
            mask[i, past + at] = True
            at = parents[at]
    if window is not None:
        keys = torch.tensor([*context_positions, *new_positions], dtype=torch.int64)
        behind = keys[past:, None] - keys[None, :]
        mask &= behind < window
    return mask


def dequantised(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What (N, num_kv_heads, dim) of a cache stands for, in float64."""
    return x.double() if scale is None else x.double() * scale.double()[:, None]


def tree_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The "reference" backend: the plan expanded to a dense mask, then float64 attention.

    Args:
        q: (T, num_q_heads, head_dim), and behind it the copies of the plan's rotations.
        k_cache: (num_pages, page_size, num_kv_heads, head_dim).
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v).
        plan: (words,) int64, a plan's buffer.
        softmax_scale, softcap, sinks: see `attention`.
        k_scale, v_scale: (num_kv_heads,), what K and V are multiplied with; None means 1.
        pages: (n,) int32, the page lists that the plan's runs index; None: its own.

    Returns:
        (out, lse): (T, num_q_heads, head_dim_v) in the dtype of `q`, (T, num_q_heads) fp32.

    Raises:
        ValueError, TypeError: `plan` is none.
    """
    mask = expand_queries(plan, pages)
    out, lse = attention(
        q,
        dequantised(k_cache.flatten(0, 1)[: mask.shape[1]], k_scale),
        dequantised(v_cache.flatten(0, 1)[: mask.shape[1]], v_scale),
        mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        rows=output_rows(plan) if len(mask) else None,
    )
    return out.to(q.dtype), lse.float()
