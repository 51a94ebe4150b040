"""Stand-ins for attention packages that need a GPU: the same calls, in plain torch.

They show that page tables, lengths and row ranges say what they should, no more.
"""

from __future__ import annotations

import math
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(rows, heads, dim) and (rows, heads): rows are the last of the keys where causal."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("rhd,nhd->hrn", q, k) * q.shape[-1] ** -0.5
    if causal:
        rows, keys = scores.shape[1:]
        ahead = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return torch.einsum("hrn,nhd->rhd", scores.softmax(-1), v), scores.float().logsumexp(-1).T


def _paged(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    return cache[pages.long()].flatten(0, 1)[:length]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scheduler_metadata: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Any:
    """FlashAttention-3's: q (batch, rows, heads, dim), or (rows, heads, dim) with cu_seqlens_q."""
    scale = q.shape[-1] ** -0.5
    assert math.isclose(softmax_scale or scale, scale) and (softcap, window_size) == (0, (-1, -1))
    if scheduler_metadata is not None:
        size, most = k_cache.shape[1], q.shape[1] if cu_seqlens_q is None else max_seqlen_q
        facts = [len(cache_seqlens), most, page_table.shape[1] * size, q.shape[-2]]
        facts += [k_cache.shape[2], q.shape[-1], size, int(causal)]
        assert scheduler_metadata.tolist() == [*facts, *cache_seqlens.tolist()]
    if cu_seqlens_q is None:
        bounds = [i * q.shape[1] for i in range(len(q) + 1)]
    else:
        bounds = cu_seqlens_q.tolist()
        assert max_seqlen_q == max(b - a for a, b in pairwise(bounds))
    flat = q if cu_seqlens_q is not None else q.flatten(0, 1)
    outs, lses = [], []
    for i, length in enumerate(cache_seqlens.tolist()):
        k, v = (_paged(c, page_table[i], length) for c in (k_cache, v_cache))
        out, lse = _attend(flat[bounds[i] : bounds[i + 1]], k, v, causal)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs).view(q.shape)
    return (out, torch.cat(lses).T.contiguous()) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    page_size: int | None = None,
    causal: bool = False,
) -> Tensor:
    """FlashAttention-3's; what a call checks that it was made for."""
    assert page_size is not None and headdim_v is None
    assert cu_seqlens_q is None or len(cu_seqlens_q) == batch_size + 1
    facts = [batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim]
    return torch.tensor([*facts, page_size, int(causal), *cache_seqlens.tolist()])


flash_attn_interface = ModuleType("flash_attn_interface")
flash_attn_interface.__spec__ = ModuleSpec("flash_attn_interface", None)
vars(flash_attn_interface).update(
    flash_attn_with_kvcache=flash_attn_with_kvcache, get_scheduler_metadata=get_scheduler_metadata
)


def _flash_2(q: Tensor, k_cache: Tensor, v_cache: Tensor, **kwargs: Any) -> Any:
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, page_table=kwargs.pop("block_table"), **kwargs
    )


flash_attn = SimpleNamespace(flash_attn_with_kvcache=_flash_2)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """torch.nn.attention.varlen's."""
    assert enable_gqa and window_size == (-1, 0) and max_k == int(seqused_k.max())
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    if key.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    out: Tensor = flash_attn_with_kvcache(
        query,
        key,
        value,
        cache_seqlens=seqused_k,
        page_table=block_table,
        cu_seqlens_q=cu_seq_q,
        max_seqlen_q=max_q,
        causal=True,
    )
    return out


class _Entries:
    """FlashInfer's ragged lists of pages."""

    def __init__(self, begins: Tensor, pages: Tensor, last: Tensor, size: int) -> None:
        self.begins, self.pages = begins.tolist(), pages
        self.size, self.last = size, last.tolist()

    def attend(
        self, rows: list[int], q: Tensor, kv: tuple[Tensor, Tensor], causal: bool
    ) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for i, last in enumerate(self.last):
            pages = self.pages[self.begins[i] : self.begins[i + 1]]
            length = (len(pages) - 1) * self.size + last
            k, v = (_paged(c, pages, length) for c in kv)
            out, lse = _attend(q[rows[i] : rows[i + 1]], k, v, causal)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "NHD"

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        self.entries = _Entries(indptr, indices, last_page_len, page_size)

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        return self.entries.attend(list(range(len(q) + 1)), q, kv, False)[0]


class MultiLevelCascadeAttentionWrapper:
    def __init__(self, num_levels: int, workspace: Tensor, layout: str) -> None:
        self._batch_prefill_wrappers = [SimpleNamespace(_backend="auto") for _ in range(num_levels)]

    def plan(
        self,
        qo_indptr_arr: list[Tensor],
        paged_kv_indptr_arr: list[Tensor],
        paged_kv_indices_arr: list[Tensor],
        paged_kv_last_page_len: list[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        causal: bool,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        self.rows, self.causal = [r.tolist() for r in qo_indptr_arr], causal
        lists = (paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        self.levels = [_Entries(*some, page_size) for some in zip(*lists, strict=True)]
        assert len(self.levels) == len(self._batch_prefill_wrappers)

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        states = [
            level.attend(rows, q, kv, self.causal and i == len(self.levels) - 1)
            for i, (rows, level) in enumerate(zip(self.rows, self.levels, strict=True))
        ]
        weights = torch.stack([lse for _, lse in states]).softmax(0)
        return (torch.stack([out for out, _ in states]) * weights[..., None]).sum(0)


class BatchAttention:
    def __init__(self, kv_layout: str, device: str) -> None:
        assert kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        *,
        causal: bool,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        self.rows, self.causal = qo_indptr.tolist(), causal
        last = (kv_len_arr - 1) % page_size + 1
        self.entries = _Entries(kv_indptr, kv_indices, last, page_size)

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.entries.attend(self.rows, q, kv, self.causal)


flashinfer = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper=MultiLevelCascadeAttentionWrapper,
    BatchAttention=BatchAttention,
)
