"""What a model's config says about its attention layers, and which models are refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from fork_attn.errors import Unsupported

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
_RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"})
# Their frequencies follow the longest sequence of the batch: one branch would turn the others.
_BATCH_WIDE_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class LayerShapes:
    """Per layer: heads, head sizes and window, as `ForkedKVCache` takes them."""

    num_q_heads: list[int]
    num_kv_heads: list[int]
    head_dim: list[int]
    head_dim_v: list[int]
    sliding_window: list[int | None]

    @property
    def num_layers(self) -> int:
        return len(self.num_q_heads)

    def token_elements(self) -> int:
        """K and V elements that one token takes over all layers."""
        return sum(
            heads * (dim + dim_v)
            for heads, dim, dim_v in zip(
                self.num_kv_heads, self.head_dim, self.head_dim_v, strict=True
            )
        )


def layer_shapes(config: Any) -> LayerShapes:
    """Reads the shapes of every attention layer from a text config.

    Raises:
        Unsupported: a layer is of a kind that the cache cannot hold.
    """
    num_layers: int = config.num_hidden_layers
    layers = [_layer_config(config, i) for i in range(num_layers)]
    return LayerShapes(
        num_q_heads=[layer.num_attention_heads for layer in layers],
        num_kv_heads=[_num_kv_heads(layer) for layer in layers],
        head_dim=[_head_dim(layer) for layer in layers],
        head_dim_v=[_head_dim_v(layer) for layer in layers],
        sliding_window=_sliding_windows(config, num_layers),
    )


def check_supported(model: PreTrainedModel) -> None:
    """Raises Unsupported, naming the model and the reason, for models that cannot be attached."""
    name = type(model).__name__
    text_config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise Unsupported(f"model: {name} is an encoder-decoder; expected a decoder-only model")
    _check_layer_types(name, model, text_config)
    if not model._supports_attention_backend:
        raise Unsupported(
            f"model: {name} has no attention interface (_supports_attention_backend is false), so "
            "that its attention cannot be replaced"
        )
    _check_rope(name, text_config)
    _check_causal(name, model, text_config)
    decoder = model.get_decoder()
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise Unsupported(f"model: {type(decoder).__name__}.forward takes no position_ids")
    devices = {str(d) for d in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise Unsupported(f"model: {name} is spread over {sorted(devices)}; expected one device")


def _check_layer_types(name: str, model: PreTrainedModel, config: Any) -> None:
    types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "attention_chunk_size", None) is not None:
        types.add("chunked_attention")
    recurrent = types & _RECURRENT_LAYERS
    if recurrent or model._is_stateful:
        kinds = ", ".join(sorted(recurrent)) or "a recurrent state"
        raise Unsupported(f"model: {name} has recurrent layers ({kinds}), which cannot be forked")
    if "chunked_attention" in types:
        raise Unsupported(f"model: {name} uses chunked attention (chunked_attention layers)")
    # A config may list its MLP kinds among the layer types.
    other = types - _ATTENTION_LAYERS - {"sparse", "dense"}
    if other:
        raise Unsupported(
            f"model: {name} has {', '.join(sorted(other))} layers; expected "
            f"{' and '.join(sorted(_ATTENTION_LAYERS))}"
        )


def _rope_types(parameters: Any) -> Iterator[str]:
    """The rope types in a `rope_parameters` dict, which may be nested by layer type."""
    if not isinstance(parameters, dict):
        return
    kind = parameters.get("rope_type", parameters.get("type"))
    if isinstance(kind, str):
        yield kind
    for value in parameters.values():
        yield from _rope_types(value)


def _check_rope(name: str, config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        parameters = getattr(config, "rope_scaling", None)
    refused = sorted(_BATCH_WIDE_ROPE.intersection(_rope_types(parameters)))
    if refused:
        raise Unsupported(
            f"model: {name} uses rope type {refused[0]!r}, whose frequencies depend on the longest "
            "sequence of the batch; branches of one batch would change each other"
        )


def _check_causal(name: str, model: PreTrainedModel, config: Any) -> None:
    bidirectional = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    for module in model.get_decoder().modules():
        if hasattr(module, "layer_idx") and getattr(module, "is_causal", True) is False:
            bidirectional = True
    if bidirectional:
        raise Unsupported(f"model: {name} has attention that is not causal")


def _layer_config(config: Any, layer_idx: int) -> Any:
    if getattr(config, "is_heterogeneous", False):
        return config.per_layer_config[layer_idx]
    return config


def _is_latent(config: Any) -> bool:
    """Multi-head latent attention, whose keys and values reach the cache expanded to all heads."""
    return getattr(config, "kv_lora_rank", None) is not None


def _num_kv_heads(config: Any) -> int:
    if _is_latent(config):
        return config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None)
    return config.num_attention_heads if heads is None else heads


def _head_dim(config: Any) -> int:
    if _is_latent(config):
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    dim = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if dim is None else dim


def _head_dim_v(config: Any) -> int:
    dim = getattr(config, "v_head_dim", None)
    return _head_dim(config) if dim is None else dim


def _sliding_windows(config: Any, num_layers: int) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in types[:num_layers]]
