"""Layers of a model as the cache knows them: their shapes, and where their K and V lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union

import torch

from fork_attn import checks
from fork_attn.plan import PlanShape
from fork_attn.rope import Rope

T = TypeVar("T")
PerLayer = Union[T, Sequence[T]]  # noqa: UP007 - a generic alias must exist at run time
"""One value for every layer, or a sequence with one value per layer."""


@dataclass
class Layer:
    """Shape and storage of one layer."""

    index: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    window: int | None
    rope: Rope | None = None  # None: not known
    # (num_pages, page_size, num_kv_heads, dim) views; in memory one head's page is contiguous.
    k_cache: torch.Tensor | None = None
    v_cache: torch.Tensor | None = None
    # (num_kv_heads,) fp32 of an e4m3 layer; None until set or calibrated.
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    written: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    def plan_shape(self, dtype: torch.dtype) -> PlanShape:
        """What a plan needs to know of the layer; layers with the same window and shape share."""
        return PlanShape(
            self.num_q_heads, self.num_kv_heads, self.head_dim, self.head_dim_v, dtype.itemsize
        )

    def caches(self) -> list[torch.Tensor]:
        """K and V, or nothing before the layer has memory."""
        return [cache for cache in (self.k_cache, self.v_cache) if cache is not None]


def make_layers(
    num_layers: int,
    num_q_heads: PerLayer[int],
    num_kv_heads: PerLayer[int],
    head_dim: PerLayer[int],
    head_dim_v: PerLayer[int],
    sliding_window: PerLayer[int | None],
    rope: PerLayer[Rope | None],
) -> list[Layer]:
    """The layers of a cache, checked. See `ForkedKVCache` for the arguments.

    Raises:
        ValueError, TypeError: a size is off, or a sequence has not one value per layer.
    """
    sizes = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
    }
    columns: list[list[Any]] = [
        [
            checks.integer(name, size, low=1, high=2**16)
            for size in checks.per_layer(name, value, num_layers)
        ]
        for name, value in sizes.items()
    ]
    windows: list[int | None] = [
        None if window is None else checks.integer("sliding_window", window, low=1)
        for window in checks.per_layer("sliding_window", sliding_window, num_layers)
    ]
    ropes = checks.per_layer("rope", rope, num_layers)
    layers = [
        Layer(i, q_heads, kv_heads, dim, dim_v, window, layer_rope)
        for i, (q_heads, kv_heads, dim, dim_v, window, layer_rope) in enumerate(
            zip(*columns, windows, ropes, strict=True)
        )
    ]
    for layer in layers:
        if layer.num_q_heads % layer.num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads {layer.num_kv_heads}, "
                f"got {layer.num_q_heads}"
            )
        if layer.rope is None:
            continue
        if not isinstance(layer.rope, Rope):
            raise TypeError(f"rope: expected Rope or None, got {type(layer.rope).__name__}")
        if layer.rope.end > layer.head_dim:
            raise ValueError(
                f"rope: expected at most head_dim {layer.head_dim} dimensions, got one that turns "
                f"[{layer.rope.start}, {layer.rope.end})"
            )
    return layers
