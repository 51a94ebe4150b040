"""Attaching a forked KV cache to a transformers model."""

from __future__ import annotations

import inspect
import re
import weakref
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from fork_attn.cache import ForkedKVCache
from fork_attn.errors import Unsupported
from fork_attn.hf import _link, attention
from fork_attn.hf._hooks import install_hooks
from fork_attn.hf._model_config import LayerShapes, check_supported, layer_shapes
from fork_attn.hf._rope import find_ropes

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_DEFAULT_MEMORY = 2**30


def attach(
    model: PreTrainedModel,
    *,
    num_pages: int | None = None,
    memory: int | str | None = None,
    page_size: int = 16,
    tail: Literal["seal", "copy"] = "seal",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> ForkedKVCache:
    """Gives a model a forked KV cache.

    From now on `fork_attn.hf.forward(model, ...)` and `model.generate(...,
    past_key_values=ForkCache(cache))` run over the returned cache; with any other cache, or none,
    the model works as before. No model class is patched: one attention function, one cache class
    and hooks on the model and its decoder do it. The cache lives as long as the model.

    Args:
        model: a decoder-only transformers model.
        num_pages: pages in the pool. At most one of num_pages and memory may be given.
        memory: bytes for keys and values, as a number or as text such as "4GB" or "512MiB", counted
            from the config's heads (a tensor-parallel rank holds its share of it). The default is
            half of the free memory of a CUDA device, and 1 GiB elsewhere. Pages are allocated layer
            by layer when a layer first runs.
        page_size: tokens per page.
        tail: what a write after a fork in mid-page does with the shared tail page, see
            `ForkedKVCache`.
        dtype: dtype of the stored keys and values, in which attention then runs; the model's own if
            None. float8_e4m3fn stores them in half the bytes of bf16, and attention runs in the
            model's own dtype: see `ForkedKVCache.set_scales`.
        backend: the attention backend, see `ForkedKVCache`.
        batch_invariant: attention gives a token the same bits whatever else is in the step, see
            `ForkedKVCache`. The model's other layers are its own, and most matmuls are not so.

    Returns:
        The model's cache.

    Raises:
        Unsupported: the model has recurrent layers, chunked attention, `dynamic` or `longrope`
            position scaling, attention that is not causal or cannot be replaced, an encoder, or
            lies on several devices; or `batch_invariant` with a backend that does not promise it.
        ValueError: the model is attached already, or num_pages and memory do not make sense.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    check_supported(model)
    modules = list(dict.fromkeys([model, model.get_decoder()]))
    if any(_link.is_attached(module) for module in modules):
        raise ValueError(f"model: {type(model).__name__} is attached already")
    text_config = model.config.get_text_config(decoder=True)
    shapes = layer_shapes(text_config)
    kv_dtype = model.dtype if dtype is None else dtype
    cache = ForkedKVCache._lazy(
        num_layers=shapes.num_layers,
        num_pages=_num_pages(num_pages, memory, page_size, shapes, kv_dtype, model.device),
        num_q_heads=shapes.num_q_heads,
        num_kv_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        head_dim_v=shapes.head_dim_v,
        sliding_window=shapes.sliding_window,
        page_size=page_size,
        dtype=kv_dtype,
        device=model.device,
        tail=tail,
        backend=backend,
        batch_invariant=batch_invariant,
    )
    _use_fork_attention(model)
    name = type(model).__name__
    cache._find_ropes = partial(find_ropes, weakref.ref(model), name, shapes.num_layers)
    link = _link.Link(
        cache=cache,
        model_name=type(model).__name__,
        num_layers=shapes.num_layers,
        sliding_windows=tuple(shapes.sliding_window),
        kv_dtype=kv_dtype,
        cast=kv_dtype not in (model.dtype, torch.float8_e4m3fn),
        vocab_size=text_config.vocab_size,
        keeps_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
    )
    install_hooks(modules, link)
    _link.register(model, modules, link)
    return cache


def _use_fork_attention(model: PreTrainedModel) -> None:
    """Switches the text part of the model to the registered attention function."""
    attention.register()
    config = model.config
    text_config = config.get_text_config(decoder=True)
    before = text_config._attn_implementation
    if text_config is config:
        model.set_attn_implementation(attention.ATTENTION_NAME)
    else:
        # A vision tower is not causal and keeps its own attention.
        keys = [key for key in config.sub_configs if getattr(config, key) is text_config]
        if not keys:
            raise Unsupported(
                f"model: {type(model).__name__}'s text config is none of its sub-configs "
                f"{sorted(config.sub_configs)}"
            )
        model.set_attn_implementation({keys[0]: attention.ATTENTION_NAME})
    got: Any = model.get_decoder().config._attn_implementation
    if got != attention.ATTENTION_NAME:
        raise Unsupported(
            f"model: {type(model).__name__} keeps its attention {before!r}: it cannot be replaced"
        )


def _num_pages(
    num_pages: int | None,
    memory: int | str | None,
    page_size: int,
    shapes: LayerShapes,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    if num_pages is not None and memory is not None:
        raise ValueError(
            f"num_pages, memory: expected one of them, got num_pages={num_pages}, memory={memory!r}"
        )
    if num_pages is not None:
        return num_pages
    if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
        raise ValueError(f"page_size: expected an integer of at least 1, got {page_size!r}")
    size = _default_memory(device) if memory is None else _num_bytes(memory)
    page_bytes = page_size * shapes.token_elements() * dtype.itemsize
    if size < page_bytes:
        raise ValueError(
            f"memory: expected at least one page of {page_bytes} bytes, got {size} bytes"
        )
    return size // page_bytes


def _default_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return _DEFAULT_MEMORY


def _num_bytes(memory: int | str) -> int:
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(f"memory: expected an int or a str, got {type(memory).__name__}")
    if isinstance(memory, int):
        return memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", memory, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f'memory: expected bytes such as "4GB" or "512MiB", got {memory!r}')
    return int(float(match[1]) * _UNITS[match[2].upper()])
