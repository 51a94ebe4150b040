"""The attention function that attached models call, registered with transformers as "fork_attn"."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fork_attn.errors import Unsupported
from fork_attn.hf._pass import ForwardPass

ATTENTION_NAME = "fork_attn"

# Arguments with which a model changes its scores in ways that the cache's attention does not know.
_UNKNOWN_SCORES = ("position_bias", "head_mask", "output_attentions")


_records: dict[int, tuple[Tensor, Tensor]] | None = None  # see recording


def fork_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    fork_step: ForwardPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the forked cache, or the stock attention where the model runs without it.

    Args:
        module: the attention layer; its `layer_idx` names the layer.
        query: (batch, Hq, seq, D), rotated.
        key: (batch, Hkv, seq, D), rotated: the new tokens, or with a stock cache the whole context.
        value: (batch, Hkv, seq, Dv).
        attention_mask: used with a stock cache only.
        dropout: must be 0 over the forked cache.
        scaling: factor on the scores.
        fork_step: the running pass over the forked cache, if there is one.
        **kwargs: the model's own, of which `softcap`, `s_aux` and `sliding_window` are honoured.

    Returns:
        The output, (batch, seq, Hq, Dv), and the weights if the stock attention gives them.

    Raises:
        Unsupported: dropout, gradients, a score bias, or attention weights are asked for.
        ValueError: the layer's window is not the one that its config announced.
    """
    if fork_step is None:
        if _records is not None:
            _records[module.layer_idx] = (query, key)  # type: ignore[index]
        return _stock_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_call(module, query, dropout, kwargs)
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    planned = fork_step.link.sliding_windows[layer_idx]
    window = kwargs.get("sliding_window", planned)
    if window != planned:
        raise ValueError(
            f"sliding_window: layer {layer_idx} of {fork_step.link.model_name} asks for {window}, "
            f"its config announced {planned}"
        )
    sinks = kwargs.get("s_aux")  # of the model's dtype
    options = {
        "softmax_scale": scaling,
        "softcap": kwargs.get("softcap"),
        "sinks": None if sinks is None else sinks.float(),
    }
    return fork_step.attend(layer_idx, query, key, value, options), None


@contextmanager
def recording() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Keeps the queries and keys, (batch, heads, seq, dim), of stock attention by layer."""
    global _records
    _records = {}
    try:
        yield _records
    finally:
        _records = None


def _check_call(
    module: torch.nn.Module, query: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    if dropout:
        raise Unsupported(f"dropout: {name} asks for {dropout}, expected 0; call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise Unsupported(
            f"{name}: the forked cache gives no gradients; run the model under torch.no_grad()"
        )
    for option in _UNKNOWN_SCORES:
        if kwargs.get(option) is not None and kwargs[option] is not False:
            raise Unsupported(f"{option}: {name} asks for it, the forked cache has none")


def _stock_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model would use by itself, under a mask made for SDPA."""
    # SDPA knows neither soft caps nor sinks, and gives no weights.
    needs_eager = (
        kwargs.get("softcap") is not None
        or kwargs.get("s_aux") is not None
        or bool(kwargs.get("output_attentions"))
    )
    if not needs_eager:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    mask = _additive_mask(attention_mask, query, key)
    return _eager_attention(module)(module, query, key, value, mask, **kwargs)


def _eager_attention(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise Unsupported(f"{type(module).__name__}: its module defines no eager_attention_forward")


def _additive_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """An SDPA mask as the additive one that eager attention takes.

    SDPA's None means causal if there is more than one query, else everything.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        if num_queries == 1:
            return None
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = ones.tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zeros, torch.finfo(query.dtype).min)


def register() -> None:
    """Makes "fork_attn" known to transformers, as an attention function and as its mask."""
    AttentionInterface.register(ATTENTION_NAME, fork_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
