"""A stand-in for xformers' Triton split-K over paged K and V, with what it refuses, and for its
tree attention."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BLOCK = 64


class _Bias:
    causal = False

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_seqlen: list[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device,
    ) -> _Bias:
        made = cls()
        made.rows, made.lengths = q_seqlen, kv_seqlen
        made.tables, made.page_size = block_tables.long(), page_size
        return made

    rows: list[int]
    lengths: list[int]
    tables: Tensor
    page_size: int


class _Causal(_Bias):
    causal = True


class FwOp:
    """The operator; its wheel was built for another CUDA than torch's, so that its C++ part is not
    loaded."""


def _require_supported(common: ModuleType, q: Tensor, k: Tensor, bias: _Bias, op: object) -> None:
    reasons = []
    if op is not FwOp:
        reasons.append("another operator")
    if not vars(common)["_built_with_cuda"]:
        reasons.append("xFormers wasn't build with CUDA support")
    if bias.causal and len(set(bias.rows)) > 1:
        reasons.append("Variable query len is not supported for causal masks")
    if bias.causal and max(bias.rows) > 16:
        reasons.append("Query length should not be larger than 16 for causal attention biases")
    if k.shape[1] % bias.page_size or bias.page_size % BLOCK:
        reasons.append(f"page size should be divisible by the block size, got {bias.page_size}")
    if q.shape[1] != sum(bias.rows):
        reasons.append(f"Expected total {sum(bias.rows)} queries not {q.shape[1]}")
    if reasons:
        raise ValueError("; ".join(reasons))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(rows, KV heads, group, dim) over (tokens, KV heads, group, dim), a mask that is added."""
    scores = torch.einsum("rhgd,nhgd->hgrn", q.float(), k.float()) * q.shape[-1] ** -0.5 + mask
    return torch.einsum("hgrn,nhgd->rhgd", scores.softmax(-1), v.float()).to(q.dtype)


def _context(x: Tensor, bias: _Bias, entry: int) -> Tensor:
    slots = bias.tables[entry, :, None] * bias.page_size + torch.arange(bias.page_size)
    return x[0, slots.flatten()[: bias.lengths[entry]]]


def modules() -> dict[str, ModuleType]:
    """By name, for sys.modules."""
    names = ["xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.tree_attention"]
    names += [f"xformers.ops.fmha.{name}" for name in ("common", "attn_bias", "triton_splitk")]
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        above, _, last = name.rpartition(".")
        if above:
            vars(made[above])[last] = module
    common = made["xformers.ops.fmha.common"]
    vars(common)["_built_with_cuda"] = False

    def forward(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: _Bias, op: object) -> Tensor:
        _require_supported(common, q, k, attn_bias, op)
        outs, at = [], 0
        for entry, rows in enumerate(attn_bias.rows):
            keys, values = (_context(x, attn_bias, entry) for x in (k, v))
            ahead = torch.ones(rows, len(keys)).triu(len(keys) - rows + 1).bool()
            mask = torch.zeros(rows, len(keys)).masked_fill(ahead & attn_bias.causal, -torch.inf)
            outs.append(_attend(q[0, at : at + rows], keys, values, mask))
            at += rows
        return torch.cat(outs)[None]

    def tree_attention(
        q: Tensor,
        spec_k: Tensor,
        spec_v: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        spec_attn_bias: Tensor,
        prefix_attn_bias: _Bias,
        *,
        prefix_op: object,
    ) -> Tensor:
        flat = q.view(1, -1, *q.shape[2:])
        _require_supported(common, flat, cache_k, prefix_attn_bias, prefix_op)
        outs = []
        for entry, rows in enumerate(q):
            keys = torch.cat([_context(cache_k, prefix_attn_bias, entry), spec_k[entry]])
            values = torch.cat([_context(cache_v, prefix_attn_bias, entry), spec_v[entry]])
            seen = torch.zeros(len(rows), len(keys) - len(rows))
            outs.append(_attend(rows, keys, values, torch.cat([seen, spec_attn_bias], 1)))
        return torch.stack(outs)

    parts: dict[str, dict[str, Any]] = {
        "fmha": {"memory_efficient_attention_forward": forward},
        "fmha.triton_splitk": {"FwOp": FwOp},
        "fmha.attn_bias": {
            "PagedBlockDiagonalPaddedKeysMask": _Bias,
            "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": _Causal,
        },
        "tree_attention": {"tree_attention": tree_attention},
    }
    for name, things in parts.items():
        vars(made[f"xformers.ops.{name}"]).update(things)
    return made
