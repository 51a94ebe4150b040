"""flash-attn over dense page tables, where it is installed: no sharing, every branch reads its own
context (FlashAttention-2, arXiv 2307.08691; FlashAttention-3, arXiv 2407.08608)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fork_attn.errors import NotDense, Unsupported

if TYPE_CHECKING:
    from fork_attn import _C

FA2_PAGE_MULTIPLE = 256


def installed() -> int | None:
    """Which flash-attn is installed: 3, 2, or None."""
    if find_spec("flash_attn_interface") is not None:
        return 3
    return 2 if find_spec("flash_attn") is not None else None


def require(device: torch.device) -> None:
    """Raises Unsupported, by name, where flash-attn is not installed or `device` is no GPU."""
    if installed() is None:
        raise Unsupported("backend 'flash_attn' needs flash-attn 2 or 3, and neither is installed")
    if device.type != "cuda":
        raise Unsupported(f"backend 'flash_attn' cannot attend on {device}: expected a CUDA device")


def require_pages(page_size: int) -> None:
    """Raises Unsupported where flash-attn cannot read pages of this size."""
    if installed() == 2 and page_size % FA2_PAGE_MULTIPLE:
        raise Unsupported(
            f"page_size: flash-attn 2 reads pages of multiples of {FA2_PAGE_MULTIPLE} slots, "
            f"got {page_size}"
        )


@dataclass(frozen=True)
class Tables:
    """What flash-attn reads of a step."""

    page_table: Tensor  # (n, most pages) int32
    cu_seqlens_q: Tensor  # (n+1,) int32
    cu_seqlens_k: Tensor  # (n+1,) int32
    seqlens_k: Tensor  # (n,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    consecutive: bool  # whether positions count up by one in every context

    def to(self, device: torch.device) -> Tables:
        """On a device, without waiting for it."""

        def sent(t: Tensor) -> Tensor:
            return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)

        return replace(
            self,
            page_table=sent(self.page_table),
            cu_seqlens_q=sent(self.cu_seqlens_q),
            cu_seqlens_k=sent(self.cu_seqlens_k),
            seqlens_k=sent(self.seqlens_k),
        )


def step_tables(
    core: _C.CacheCore, handles: list[int], counts: list[int], slots: list[int], page_size: int
) -> Tables:
    """The dense tables of the open step's branches, their new tokens included, on the CPU.

    Args:
        handles: of the branches.
        counts: their new tokens.
        slots: where those go, in row order.

    Raises:
        NotDense: a context skips slots, by a join, an excision or a sealed tail.
        Unsupported: a draft tree.
    """
    if core.draft_rows():
        raise Unsupported("backend 'flash_attn' has no draft trees")
    rows, lengths, at, consecutive = [], [], 0, True
    for handle, count in zip(handles, counts, strict=True):
        length = core.length(handle)
        table = core.page_table(handle)
        for index, slot in enumerate(slots[at : at + count], length):
            if slot % page_size != index % page_size:
                raise NotDense(
                    f"branch {handle >> 32}: its new token {index} lies in slot {slot % page_size} "
                    f"of its page, expected slot {index % page_size}"
                )
            # A copied tail page takes the place of the one that it was copied from.
            table[index // page_size :] = [slot // page_size]
        at += count
        parts = core.context(handle)
        ends = [first + hi - lo for _, lo, hi, first in parts]
        firsts = [first for _, _, _, first in parts[1:]] + [core.position(handle)]
        consecutive &= ends == firsts[: len(ends)]
        rows.append(torch.tensor(table, dtype=torch.int32))
        lengths.append(length + count)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return Tables(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        _cumulated(torch.tensor(counts, dtype=torch.int32)),
        _cumulated(seqlens),
        seqlens,
        max(counts),
        max(lengths),
        consecutive,
    )


def _cumulated(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tables,
    window: int | None,
    scale: float,
    cap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a step's rows, (T, num_q_heads, head_dim) to (T, num_q_heads, head_dim_v).

    Raises:
        Unsupported: sinks, or a sliding window over positions with gaps.
    """
    if sinks is not None:
        raise Unsupported("sinks: backend 'flash_attn' has none")
    if window is not None and not tables.consecutive:
        raise Unsupported("sliding_window: backend 'flash_attn' counts tokens, and positions skip")
    windows = (-1, -1) if window is None else (window - 1, 0)
    scores = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": windows,
        "softcap": cap,
    }
    if installed() == 3:
        module: ModuleType = import_module("flash_attn_interface")
        out: Tensor = module.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens=tables.seqlens_k,
            page_table=tables.page_table,
            cu_seqlens_q=tables.cu_seqlens_q,
            max_seqlen_q=tables.max_seqlen_q,
            **scores,
        )
        return out
    module = import_module("flash_attn")
    out = module.flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        tables.cu_seqlens_q,
        tables.cu_seqlens_k,
        tables.max_seqlen_q,
        tables.max_seqlen_k,
        block_table=tables.page_table,
        **scores,
    )
    return out
