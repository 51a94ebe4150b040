"""Which cache belongs to which attached model."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fork_attn.cache import ForkedKVCache
from fork_attn.errors import Unsupported


@dataclass(frozen=True, eq=False)
class Link:
    """An attached model's cache, and what its attention calls need to know of the model.

    Attributes:
        cache: the model's cache.
        model_name: the model's class name, for messages.
        num_layers: number of attention layers.
        sliding_windows: per layer the window in tokens, or None.
        kv_dtype: the dtype of stored keys and values.
        cast: True if kv_dtype was asked for, and attention runs in it instead of the model's own.
        vocab_size: number of token ids.
        keeps_logits: True if the model's forward takes `logits_to_keep`.
    """

    cache: ForkedKVCache
    model_name: str
    num_layers: int
    sliding_windows: tuple[int | None, ...]
    kv_dtype: torch.dtype
    cast: bool
    vocab_size: int
    keeps_logits: bool


_links: weakref.WeakKeyDictionary[torch.nn.Module, Link] = weakref.WeakKeyDictionary()
# Weak on both sides: a cache that outlives its model must not keep the weights.
_models: weakref.WeakKeyDictionary[ForkedKVCache, weakref.ref[PreTrainedModel]] = (
    weakref.WeakKeyDictionary()
)


def register(model: PreTrainedModel, modules: list[torch.nn.Module], link: Link) -> None:
    """Remembers the link under every hooked module, and the way back from the cache."""
    for module in modules:
        _links[module] = link
    _models[link.cache] = weakref.ref(model)


def is_attached(module: torch.nn.Module) -> bool:
    return module in _links


def link_of(model: torch.nn.Module) -> Link:
    """The link of an attached model.

    Raises:
        Unsupported: the model is not attached.
    """
    link = _links.get(model)
    if link is None:
        raise Unsupported(
            f"model: {type(model).__name__} is not attached; call fork_attn.hf.attach(model) first"
        )
    return link


def model_of(cache: ForkedKVCache) -> PreTrainedModel:
    """The model that the cache was made for.

    Raises:
        Unsupported: the cache was not made by `attach`, or its model is gone.
    """
    reference = _models.get(cache)
    model = None if reference is None else reference()
    if model is None:
        raise Unsupported(
            "cache: expected one that fork_attn.hf.attach made for a model that is still alive"
        )
    return model
