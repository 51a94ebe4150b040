"""The oracle: float64 attention with an explicit boolean mask, and the masks that steps stand for.

Slow and plain on purpose; nothing optimised imports it. `tree_attention(backend="reference")` loads
it on call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fork_attn.plan_format import expand_plan


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
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
    extra = 0 if sinks is None else 1
    if sinks is not None:
        column = sinks.to(dtype)[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, column], dim=-1)
    if scores.shape[-1] == 0:
        lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype)
        return torch.zeros((*q.shape[:2], v.shape[-1]), dtype=dtype), lse
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse))
    weights = weights[..., : weights.shape[-1] - extra]
    return torch.einsum("htn,nhd->thd", weights, values), lse[..., 0].T


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The "reference" backend: the plan expanded to a dense mask, then float64 attention.

    Args:
        q: (T, num_q_heads, head_dim).
        k_cache: (num_pages, page_size, num_kv_heads, head_dim).
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v).
        plan: (words,) int64, a plan's buffer.
        softmax_scale, softcap, sinks: see `attention`.
        k_scale, v_scale: (num_kv_heads,) factors of K and V.

    Returns:
        (out, lse): (T, num_q_heads, head_dim_v) in the dtype of `q`, (T, num_q_heads) fp32.

    Raises:
        ValueError, TypeError: `plan` is none.
    """
    mask = expand_plan(plan)
    k, v = (cache.flatten(0, 1)[: mask.shape[1]] for cache in (k_cache, v_cache))
    if k_scale is not None:
        k = k.double() * k_scale.double()[:, None]
    if v_scale is not None:
        v = v.double() * v_scale.double()[:, None]
    out, lse = attention(
        q,
        k,
        v,
        mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
    )
    return out.to(q.dtype), lse.float()
