"""Attention with an explicit mask, in any precision: the oracle (float64) and the reference to compare with."""

from __future__ import annotations

import torch


def dense_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    mask: torch.Tensor,
    *,
    softmax_scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query row over the slots that its mask row names, computed in `dtype`.

    Args:
        q: (T, num_q_heads, head_dim).
        k_cache: (num_pages, page_size, num_kv_heads, head_dim).
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v).
        mask: (T, slots) bool; slots that no row sees may hold anything, NaN too.
        sinks: (num_q_heads,) logits that join the denominator.

    Returns:
        (out, lse): (T, num_q_heads, head_dim_v) and (T, num_q_heads), both in `dtype`; 0 and -inf for a row without keys
        (with sinks: lse = sink).
    """
    used = mask.any(0).nonzero().flatten()
    group = q.shape[1] // k_cache.shape[2]
    k = k_cache.flatten(0, 1)[used].to(dtype).repeat_interleave(group, dim=1)
    v = v_cache.flatten(0, 1)[used].to(dtype).repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,nhd->thn", q.to(dtype), k) * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, used][:, None, :], -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None].expand(q.shape[0], -1, 1)
        scores = torch.cat([scores, column], dim=-1)
    if scores.shape[-1] == 0:
        return q.new_zeros((*q.shape[:2], v.shape[-1]), dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return torch.einsum("thn,nhd->thd", weights[..., : len(used)], v), lse
